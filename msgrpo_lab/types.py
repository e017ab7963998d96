"""The nouns that every other module speaks: frozen records, no logic beyond what a field name needs.

Axes, everywhere in the project:

    E  episodes of a rollout          K  episodes drawn by the sampler
    T  turns of the longest episode   S  turn samples of a training batch
    P  prompt tokens                  C  completion tokens
    L  prompt and completion tokens, padded (P + C)

Sampled token ids and their log-probabilities are stored when they are sampled and never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """A decoding rule: how tokens are drawn from the language model's logits.

    The same rule is applied when a token is sampled and when its log-probability is recomputed for the loss, so the
    ratio π_θ/π_old is 1 as long as the parameters have not moved.
    """

    temperature: float = 1.0
    """Divides the logits; > 0. Greedy decoding is `greedy=True`, not temperature 0."""
    top_k: int | None = None
    """Keep the k most likely tokens; None keeps all."""
    top_p: float | None = None
    """Keep the smallest set of tokens whose probability reaches p, in (0, 1]; None keeps all."""
    max_new_tokens: int = 8
    """Completion tokens at most; a completion cut here has `finish_reason="length"`."""
    choices: tuple[tuple[int, ...], ...] | None = None
    """Token sequences of the legal answers. If set, decoding is constrained to them and stops at the end of one."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion as soon as they have been produced (free decoding only)."""
    greedy: bool = False
    """Take the most likely token instead of drawing one (evaluation)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the policy wrote in one turn, with the ids and log-probabilities of the very tokens that were sampled."""

    prompt_ids: Int[np.ndarray, " P"]
    token_ids: Int[np.ndarray, " C"]
    """Sampled tokens, with the end-of-turn token when one was sampled."""
    logprobs: Float[np.ndarray, " C"]
    """Nats, under the distribution sampled from: after temperature, top-k, top-p and constraint."""
    text: str
    """Decoded `token_ids` without special tokens."""
    finish_reason: FinishReason
    policy_version: int
    """Number of optimiser updates the sampling policy had behind it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedAction:
    """The text-to-action map Φ applied to one completion."""

    action: int | None
    """Index into the game's legal actions; None is ⊥, a text that names no legal action."""
    span: tuple[int, int] | None
    """Half-open character range of the action in the completion's text; None with ⊥."""
    error: str | None
    """Why there is no action; None where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One (prompt, completion) sample: the state as the agent read it, what it wrote, and what came of it."""

    observation: str
    state_key: Hashable
    """Equal for equal game states (same map, same time-independent state): groups steps by state."""
    completion: Completion
    parsed: ParsedAction
    executed_action: int
    """The action the game carried out: the parsed one, or the game's fallback with ⊥."""
    reward: float
    """What credit is assigned from: game reward + shaping − ⊥ penalty."""
    game_reward: float
    """The game's own reward: neither shaped nor penalised. Scores are reported from this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A game from its initial state to its end. A finished episode has no further turns."""

    group_id: int
    seed: int
    """Environment seed; it fixes the initial state, and is the same for the whole group."""
    turns: tuple[Turn, ...]
    terminated: bool
    truncated: bool
    success: bool
    """The game's own success criterion, stated in each game's docstring."""

    @property
    def ret(self) -> float:
        """Undiscounted return Σ_t r_t with shaping and penalties: R_i of paper section 3."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def game_ret(self) -> float:
        """Undiscounted return of the game's own rewards, unshaped and without penalties."""
        return float(sum(turn.game_reward for turn in self.turns))

    @property
    def length(self) -> int:
        """Turns, T_i."""
        return len(self.turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """All episodes of one rollout."""

    episodes: tuple[Episode, ...]
    group_index: Int[np.ndarray, " E"]
    """Same number ⇔ same group ⇔ same initial state."""
    exact_adv: Float[np.ndarray, "E T"] | None = None
    """A^π_t(s_t, a_t) of the sampling policy for each turn, 0 past an episode's end; None where no oracle was asked."""

    @property
    def num_turns(self) -> Int[np.ndarray, " E"]:
        """Turns of each episode, T_i."""
        return np.array([episode.length for episode in self.episodes], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Credit:
    """Advantages: one number a turn. Turns past an episode's end are masked and hold 0."""

    turn_adv: Float[np.ndarray, "E T"]
    turn_mask: Bool[np.ndarray, "E T"]
    episode_adv: Float[np.ndarray, " E"]
    """The episode-level advantage that samplers weight by."""
    episode_return: Float[np.ndarray, " E"] | None = None
    """R_i in the unit of the reward, with shaping and penalties; for samplers, filled by `with_outcomes`."""
    episode_success: Bool[np.ndarray, " E"] | None = None
    """Whether each episode met its game's success criterion; for samplers, filled by `with_outcomes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The episodes a sampler drew for training."""

    index: Int[np.ndarray, " K"]
    prob: Float[np.ndarray, " E"]
    """Probability of each episode in a single draw; sums to 1."""
    weight: Float[np.ndarray, " K"]
    """Loss weight of each drawn episode: 1, or the importance weight."""
    inclusion: Float[np.ndarray, " E"]
    """Expected number of times each episode is among the K drawn; sums to K."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Turn samples as right-padded rows; column l of a per-token field speaks of the token at column l."""

    input_ids: Int[torch.Tensor, "S L"]
    attention_mask: Bool[torch.Tensor, "S L"]
    completion_mask: Bool[torch.Tensor, "S L"]
    old_logprobs: Float[torch.Tensor, "S L"]
    """Sampling policy's log-probability of the token at that column; 0 off the completion."""
    ref_logprobs: Float[torch.Tensor, "S L"] | None
    advantage: Float[torch.Tensor, " S"]
    weight: Float[torch.Tensor, " S"]
    num_turns: Int[torch.Tensor, " S"]
    """T_i of the episode the sample belongs to."""
    episode: Int[torch.Tensor, " S"]
    """Index of the sample's episode among the K drawn; one drawn twice counts as two."""
    turn: Int[torch.Tensor, " S"]
    num_episodes: int
    """K of the whole optimiser step, the loss normaliser, whatever part of it these rows are."""
    num_tokens: int
    """Completion tokens of the whole optimiser step."""

    def to(self, device: torch.device | str) -> TrainBatch:
        """The same batch on `device`."""
        return self._each_tensor(lambda tensor: tensor.to(device))

    def select(self, index: Int[torch.Tensor, " M"]) -> TrainBatch:
        """The samples at `index`, with the normalisers of the whole optimiser step."""
        return self._each_tensor(lambda tensor: tensor[index])

    def normalised(self, *, num_episodes: int, num_tokens: int) -> TrainBatch:
        """The same samples as an optimiser step of its own, of so many episodes and completion tokens."""
        return replace(self, num_episodes=num_episodes, num_tokens=num_tokens)

    def _each_tensor(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TrainBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a chat prompt."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompts = Sequence[Int[np.ndarray, " P"]]
