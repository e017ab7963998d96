"""How well a memoryless player can do on Frozen Lake when all it reads is the compact view.

The compact view is partial: different states read the same, and a policy on texts must act alike in all of them. The
best such policy is a hard problem (memoryless policies of a POMDP are not found by greedy improvement), so what is
computed here is the success of the best one *found*: a lower bound of the view's ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from msgrpo_lab.oracle.frozen_lake import NUM_ACTIONS, hole_avoiding_policy
from msgrpo_lab.oracle.lake_values import index_texts, lake_model, policy_values
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import Lake

_STEP_SIZE = 4.0
_FLOOR = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPolicy:
    """A memoryless policy on compact texts."""

    texts: tuple[str, ...]
    prob_XA: Float[np.ndarray, "X A"]  # noqa: N815  axis letters
    """Probability of each action (Left, Down, Right, Up) on reading each text."""
    success: float
    """Mean probability of success on the maps it was optimised for."""


def compact_ceiling(lakes: Sequence[Lake], horizon: int, *, iterations: int = 60) -> TextPolicy:
    """The best memoryless text policy found on these maps: a lower bound of the compact view's ceiling.

    Tabular softmax policies improved by natural policy gradient on the *exact* mean success. With d_t(s) the state
    distribution and Q_t(s, a) the success probability, both at turn t, summed over maps, turns and states that read x,

        q(x, a) = Σ d_t(s) Q_t(s, a) / Σ d_t(s)
        π(a | x) ← π(a | x) · exp(η q(x, a) / √(max_a q(x, a) − min_a q(x, a))), renormalised,  η = 4

    (the root lets rarely successful texts move too), started from the uniform policy and from the hole-avoiding one,
    best iterate kept. Each probability is lifted to 1e-4 before an update, so that no action is lost for good.

    Args:
        lakes: maps of one size, with one kind of ice.
        horizon: turns of an episode.
        iterations: updates from each start.

    Raises:
        ValueError: no maps, or maps of different sizes.
    """
    if not lakes or len({lake.size for lake in lakes}) != 1:
        raise ValueError(f"lakes: {len(lakes)} maps; give at least one, all of one size")
    table = TextTable(lakes, horizon)
    uniform_XA = np.full((len(table.texts), NUM_ACTIONS), 1 / NUM_ACTIONS)
    hole_avoiding_XA = uniform_XA.copy()
    row_of = table.index.row_of
    for lake in lakes:
        policy_SA = hole_avoiding_policy(lake)
        for state in lake.open_S:
            hole_avoiding_XA[row_of[lake.compact_texts[state]]] = policy_SA[state]
    best_success, best_XA = -1.0, uniform_XA
    for start_XA in (uniform_XA, hole_avoiding_XA):
        prob_XA = start_XA
        for _ in range(iterations + 1):
            success, gradient_XA, visits_X = table.evaluate(prob_XA)
            if success > best_success:
                best_success, best_XA = success, prob_XA
            value_XA = gradient_XA / np.maximum(visits_X, 1e-12)[:, None]
            spread_X = np.maximum(np.ptp(value_XA, axis=1), 1e-12)
            improved_XA = np.maximum(prob_XA, _FLOOR) * np.exp(
                _STEP_SIZE * (value_XA - value_XA.max(axis=1, keepdims=True)) / np.sqrt(spread_X)[:, None]
            )
            prob_XA = improved_XA / improved_XA.sum(axis=1, keepdims=True)
    return TextPolicy(texts=table.texts, prob_XA=best_XA, success=best_success)


class TextTable:
    """Exact success of text policies, all maps side by side: M maps, S states, A actions, X distinct compact texts.

    Args:
        lakes: maps of one size, with one kind of ice.
        horizon: turns of an episode.
    """

    def __init__(self, lakes: Sequence[Lake], horizon: int) -> None:
        """Number the texts and stack the transition tables."""
        unshaped = FrozenLake(size=lakes[0].size, horizon=horizon, shaping=0.0)
        self.model = lake_model(unshaped, lakes)
        self.index = index_texts(lakes, "compact")
        self.texts = self.index.texts

    def evaluate(
        self, prob_XA: Float[np.ndarray, "X A"]
    ) -> tuple[float, Float[np.ndarray, "X A"], Float[np.ndarray, " X"]]:
        """Mean success, its gradient by text and action, and the visits by text.

        The gradient is ∂J/∂π(a | x) = Σ d_t(s) Q_t(s, a), the visits Σ d_t(s), both over turns, maps (as a mean) and
        the states that read x.
        """
        legal_only_XB = np.pad(prob_XA, ((0, 0), (0, 1)))
        values = policy_values(self.model, self.index.spread(legal_only_XB))
        action_value_MTSA = values.action_value_MTSB[..., :NUM_ACTIONS]
        weighted_MSA = np.einsum("mts,mtsa->msa", values.occupancy_MTS, action_value_MTSA)
        maps = len(weighted_MSA)
        gradient_XA = self.index.add_up(weighted_MSA) / maps
        visits_X = self.index.add_up(values.occupancy_MTS.sum(axis=1)[..., None])[:, 0] / maps
        return float(values.success_M.mean()), gradient_XA, visits_X
