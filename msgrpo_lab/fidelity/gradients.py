"""Policy gradients in action-logit space, one row an episode or a group, and how they point in resampled batches.

The gradient that advantages induce is that of `oracle.gradients.induced_gradient`, kept apart by episode, so that any
batch drawn from the same episodes is a sum of rows.

Axes: E episodes, G groups, N played turns, X texts, B answers, D = X·B logits, R resamples.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy import sparse

from msgrpo_lab.oracle.gradients import TextIndex, state_gradient
from msgrpo_lab.oracle.lake_values import PolicyValues


def score_matrix(
    text_N: Int[np.ndarray, " N"], answer_N: Int[np.ndarray, " N"], prob_XB: Float[np.ndarray, "X B"]
) -> sparse.csr_array:
    """∂ log π(b_n|x_n)/∂logit, `[N, D]`: 1[b = b_n] − π(b|x_n) in row x_n of the logits."""
    texts, answers = prob_XB.shape
    score_NB = -prob_XB[text_N]
    score_NB[np.arange(len(text_N)), answer_N] += 1.0
    column_NB = text_N[:, None] * answers + np.arange(answers)
    ends = np.arange(len(text_N) + 1) * answers
    return sparse.csr_array((score_NB.ravel(), column_NB.ravel(), ends), shape=(len(text_N), texts * answers))


def episode_gradients(
    adv_N: Float[np.ndarray, " N"], num_turns_E: Int[np.ndarray, " E"], score_ND: sparse.csr_array
) -> sparse.csr_array:
    """Σ_t adv_{i,t} ∇ log π(b_{i,t}|x_{i,t}) of each episode, `[E, D]`; turns in order of episode and time."""
    ends = np.concatenate([[0], np.cumsum(num_turns_E)])
    adv_EN = sparse.csr_array((adv_N, np.arange(len(adv_N)), ends), shape=(len(num_turns_E), len(adv_N)))
    return sparse.csr_array(adv_EN @ score_ND)


def group_sums(
    gradient_ED: sparse.csr_array, group_E: Int[np.ndarray, " E"], weight_E: Float[np.ndarray, " E"], groups: int
) -> sparse.csr_array:
    """Σ_{i in g} weight_i gradient_i, `[G, D]`."""
    shape = (groups, len(group_E))
    return sparse.csr_array(sparse.csr_array((weight_E, (group_E, np.arange(len(group_E)))), shape=shape) @ gradient_ED)


def map_gradients(values: PolicyValues, texts: TextIndex) -> sparse.csr_array:
    """∂J_m/∂logit of each map by itself, `[M, D]`: `exact_gradient` is their weighted sum."""
    gradient_MSB = state_gradient(values)
    maps, _, answers = gradient_MSB.shape
    taken_MS = texts.text_MS < len(texts.texts)
    map_Q, _ = np.nonzero(taken_MS)
    column_QB = texts.text_MS[taken_MS][:, None] * answers + np.arange(answers)
    entries = (gradient_MSB[taken_MS].ravel(), (np.repeat(map_Q, answers), column_QB.ravel()))
    return sparse.csr_array(entries, shape=(maps, len(texts.texts) * answers))


def cosine(first_RD: Float[np.ndarray, "R D"], second_RD: Float[np.ndarray, "R D"]) -> Float[np.ndarray, " R"]:
    """Cosine of the angle between two gradients, row by row; nan where one of them is 0."""
    inner_R = np.einsum("rd,rd->r", first_RD, second_RD)
    norm_R = np.sqrt(np.einsum("rd,rd->r", first_RD, first_RD) * np.einsum("rd,rd->r", second_RD, second_RD))
    return np.where(norm_R > 0, np.clip(inner_R / np.where(norm_R > 0, norm_R, 1.0), -1.0, 1.0), np.nan)
