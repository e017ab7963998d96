"""An entropy bonus on actions, as credit: for policies whose one action is many texts.

The entropy of a thinking policy's *tokens* is mostly the wording of its thoughts. A bonus on it is spent there, while
the choice of action goes on hardening. The entropy of its *actions* in a state s,

    H(π(·|s)) = −Σ_a π(a|s) log π(a|s),        π(a|s) = Σ_{y: Φ(y) = a} p_θ(y | s)        (paper section 2),

has the gradient E_{y ~ p_θ(·|s)} [∇ log p_θ(y|s) · (−log π(Φ(y)|s) − H)]: the one of an advantage −log π(a|s) − H for
every token of the answer. π(a|s) is taken from the rollout's own answers to one and the same prompt. [D]
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
from jaxtyping import Float

from msgrpo_lab.types import RolloutBatch


def action_surprise(batch: RolloutBatch) -> Float[np.ndarray, "E T"]:
    """−log π̂(a_t|s_t) − Ĥ(s_t) of every turn, nats; 0 past an episode's end.

    π̂ is the share of the action among the legal answers to the same prompt in the rollout, in all groups; so the mean
    over the turns of a prompt is 0, and a prompt that was met once, or always answered alike, has 0. Illegal answers
    have 0 and do not count: rare ones are nothing to encourage.
    """
    turns = [(e, t, turn) for e, episode in enumerate(batch.episodes) for t, turn in enumerate(episode.turns)]
    legal = [(e, t, turn) for e, t, turn in turns if turn.parsed.action is not None]
    surprise_ET = np.zeros((len(batch.episodes), int(batch.num_turns.max())))
    if not legal:
        return surprise_ET
    number_of: dict[Hashable, int] = {}
    prompt = np.array(
        [number_of.setdefault(turn.completion.prompt_ids.tobytes(), len(number_of)) for *_, turn in legal]
    )
    action = np.array([turn.parsed.action for *_, turn in legal], dtype=np.int64)
    count_PA = np.zeros((len(number_of), int(action.max()) + 1))
    np.add.at(count_PA, (prompt, action), 1)
    share_PA = count_PA / count_PA.sum(axis=1, keepdims=True)
    nats_PA = -np.log(share_PA, where=share_PA > 0, out=np.zeros_like(share_PA))
    entropy_P = (share_PA * nats_PA).sum(axis=1)
    episode, place = (np.array(part) for part in zip(*((e, t) for e, t, _ in legal), strict=True))
    surprise_ET[episode, place] = nats_PA[prompt, action] - entropy_P[prompt]
    return surprise_ET
