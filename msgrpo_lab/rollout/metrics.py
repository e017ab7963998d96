"""What a rollout says of itself, as named numbers."""

from __future__ import annotations

import numpy as np

from msgrpo_lab.types import RolloutBatch


def rollout_metrics(batch: RolloutBatch) -> dict[str, float]:
    """Means over episodes (returns, success, length) or over turns (validity), without a prefix.

    `return_mean` and `return_std` are of the game's own return, unshaped and without penalties; `shaped_return_mean` is
    of what credit is assigned from. `zero_std_groups` is the share of groups whose episodes all have the same return
    (to 1e-9), which teach nothing under group-relative credit. `cut_answers` is
    the share of answers that ended at `max_new_tokens`.
    """
    game_return = np.array([episode.game_ret for episode in batch.episodes])
    shaped_return = np.array([episode.ret for episode in batch.episodes])
    turns = [turn for episode in batch.episodes for turn in episode.turns]
    spread = [np.ptp(shaped_return[batch.group_index == group]) for group in np.unique(batch.group_index)]
    return {
        "return_mean": float(game_return.mean()),
        "return_std": float(game_return.std()),
        "shaped_return_mean": float(shaped_return.mean()),
        "success_rate": float(np.mean([episode.success for episode in batch.episodes])),
        "valid_action_rate": float(np.mean([turn.parsed.action is not None for turn in turns])),
        "episode_length": float(batch.num_turns.mean()),
        "completion_tokens": float(np.mean([len(turn.completion.token_ids) for turn in turns])),
        "cut_answers": float(np.mean([turn.completion.finish_reason == "length" for turn in turns])),
        "zero_std_groups": float(np.mean(np.array(spread) < 1e-9)),
        "distinct_prompts": float(len({turn.completion.prompt_ids.tobytes() for turn in turns})),
    }


def top_action_share(batch: RolloutBatch) -> float:
    """Share of the most frequent action among all that were played, fallbacks too; in [1 / actions, 1]."""
    played = [turn.executed_action for episode in batch.episodes for turn in episode.turns]
    return float(np.bincount(played).max() / len(played))


def action_entropy(batch: RolloutBatch, constrained: bool) -> float:
    """Entropy (nats) of the policy over *actions*, averaged over the turns of a rollout.

    With constrained decoding an action is exactly one completion, so −log π(a|s) is an unbiased estimate at every turn.
    With free decoding many texts give one action: the entropy of the actions observed at equal prompts is taken, with
    the Miller–Madow correction for small counts; prompts met once say nothing and are left out (nan if there are none).
    """
    turns = [turn for episode in batch.episodes for turn in episode.turns]
    if constrained:
        return float(np.mean([-turn.completion.logprobs.sum() for turn in turns]))
    actions_of: dict[bytes, list[int]] = {}
    for turn in turns:
        action = -1 if turn.parsed.action is None else turn.parsed.action
        actions_of.setdefault(turn.completion.prompt_ids.tobytes(), []).append(action)
    total, visits = 0.0, 0
    for actions in actions_of.values():
        if len(actions) > 1:
            count = np.unique(actions, return_counts=True)[1]
            share = count / count.sum()
            total += len(actions) * float(-(share * np.log(share)).sum() + (len(count) - 1) / (2 * count.sum()))
            visits += len(actions)
    return total / visits if visits else float("nan")
