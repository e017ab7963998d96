"""Exact policy gradients in action-logit space, and the gradients that advantages induce on sampled turns.

The policy is a tabular softmax over answers, one row of logits a state or a text. A language model's own gradient is
that of these logits pulled back through the model: ∇_θ J = Σ_{x,b} g(x, b) ∇_θ log π_θ(b|x) with g from here, since
each row of g sums to 0.

Axes: M maps, T turns, S states, X texts, B answers (the last one ⊥), E episodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.oracle.lake_values import PolicyValues
from msgrpo_lab.tsmg.base import ObservationStyle
from msgrpo_lab.tsmg.lake import Lake


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextIndex:
    """Which text each state of some maps reads as; states that read the same share a row."""

    texts: tuple[str, ...]
    """X distinct texts of the states in which a turn can be taken, in alphabetical order."""
    text_MS: Int[np.ndarray, "M S"]  # noqa: N815  axis letters
    """Number of each state's text; X in holes and at the goal."""

    @property
    def row_of(self) -> dict[str, int]:
        """Number of each text."""
        return {text: row for row, text in enumerate(self.texts)}

    def spread(self, table_XB: Float[np.ndarray, "X B"]) -> Float[np.ndarray, "M S B"]:
        """The row of each state's text; uniform in holes and at the goal."""
        last_B = np.full((1, table_XB.shape[1]), 1 / table_XB.shape[1])
        spread_MSB: Float[np.ndarray, "M S B"] = np.concatenate([table_XB, last_B])[self.text_MS]
        return spread_MSB

    def add_up(self, values_MSB: Float[np.ndarray, "M S B"]) -> Float[np.ndarray, "X B"]:
        """Sums over the states that read the same; holes and the goal are left out."""
        rows, columns = len(self.texts) + 1, values_MSB.shape[-1]
        index = (self.text_MS[..., None] * columns + np.arange(columns)).ravel()
        total = np.bincount(index, weights=values_MSB.ravel(), minlength=rows * columns)
        return total.reshape(rows, columns)[:-1]


def index_texts(lakes: Sequence[Lake], observation: ObservationStyle) -> TextIndex:
    """Numbers what can be read on some maps of one size."""
    texts_M = [lake.texts(observation) for lake in lakes]
    distinct = sorted({texts[state] for lake, texts in zip(lakes, texts_M, strict=True) for state in lake.open_S})
    row_of = {text: row for row, text in enumerate(distinct)}
    text_MS = np.full((len(lakes), len(lakes[0].letters)), len(distinct), dtype=np.int64)
    for number, (lake, texts) in enumerate(zip(lakes, texts_M, strict=True)):
        text_MS[number, lake.open_S] = [row_of[texts[state]] for state in lake.open_S]
    return TextIndex(texts=tuple(distinct), text_MS=text_MS)


def state_gradient(values: PolicyValues) -> Float[np.ndarray, "M S B"]:
    """∂J_m/∂logit(s, b) = Σ_t d_t(s) π(b|s) A_t(s, b): each map's gradient, if every state had logits of its own.

    The policy-gradient theorem (Sutton et al. 2000) for a finite horizon, undiscounted. With a policy that changes with
    the turn it is the gradient of a shift of the logits of all turns together. Rows sum to 0.
    """
    gradient_MSB: Float[np.ndarray, "M S B"] = np.einsum(
        "mts,mtsb,mtsb->msb", values.occupancy_MTS, values.prob_MTSB, values.advantage_MTSB
    )
    return gradient_MSB


def exact_gradient(
    values: PolicyValues, index: TextIndex, weight_M: Float[np.ndarray, " M"] | None = None
) -> Float[np.ndarray, "X B"]:
    """∂J/∂logit(x, b) of a policy on texts, J = Σ_m w_m J_m: `state_gradient` summed over states that read the same.

    Args:
        values: of the policy, the same in all states that read the same.
        index: which text each state reads as.
        weight_M: weight of each map; 1/M each by default.
    """
    maps = len(values.value_MTS)
    weights = np.full(maps, 1 / maps) if weight_M is None else weight_M
    assert weights.shape == (maps,)
    return index.add_up(weights[:, None, None] * state_gradient(values))


def induced_gradient(
    adv_ET: Float[np.ndarray, "E T"],
    mask_ET: Bool[np.ndarray, "E T"],
    row_ET: Int[np.ndarray, "E T"],
    answer_ET: Int[np.ndarray, "E T"],
    prob_XB: Float[np.ndarray, "X B"],
) -> Float[np.ndarray, "X B"]:
    """The gradient that advantages induce: 1/E Σ_i Σ_t adv_{i,t} ∇ log π(b_{i,t}|x_{i,t}), with respect to the logits.

    ∂ log π(b|x)/∂logit(x, c) = 1[b = c] − π(c|x). With unbiased advantages, such as the return from turn t on, its
    expectation is `exact_gradient`, the maps weighted as they were drawn. A normaliser of another kind (1/T_i, a loss
    weight) is multiplied into `adv_ET` first.

    Args:
        adv_ET: advantage of each turn.
        mask_ET: the turns that were taken; what stands elsewhere has no effect.
        row_ET: number of the text (or state) that was read.
        answer_ET: the answer that was given, B − 1 for ⊥.
        prob_XB: the sampling policy.
    """
    assert adv_ET.shape == mask_ET.shape == row_ET.shape == answer_ET.shape
    rows, columns = prob_XB.shape
    adv, row, answer = adv_ET[mask_ET], row_ET[mask_ET], answer_ET[mask_ET]
    of_answer = np.bincount(row * columns + answer, weights=adv, minlength=rows * columns).reshape(rows, columns)
    of_row = np.bincount(row, weights=adv, minlength=rows)
    gradient_XB: Float[np.ndarray, "X B"] = (of_answer - of_row[:, None] * prob_XB) / len(adv_ET)
    return gradient_XB
