"""The fidelity meter: any credit rule's advantages on any rollout, held against the exact ones.

    yardstick = yardstick_of(batch, truth)
    times_RG = resample_groups(yardstick.num_groups, 400, rng)
    scores = measure(yardstick, rule(batch), times_RG)
    scores["gradient_cosine"].estimate()            # value, low, high

With `draws`, what a sampler picked, the same is measured on the drawn episodes, as often as drawn and with their loss
weights; the exact gradient stays that of the whole rollout's initial states.

Credit and selection are those of the whole rollout in every resample: rules and samplers are not asked again for
resampled groups. For rules that normalise by group that is exact; a batch-wide normaliser is held fixed.

Axes: E episodes, T turns, N played turns, G groups, X texts, B answers, D draws, L = X·B logits, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from msgrpo_lab.fidelity.gradients import cosine, episode_gradients, group_sums, map_gradients, score_matrix
from msgrpo_lab.fidelity.statistics import Score, agreement
from msgrpo_lab.fidelity.truth import LakeTruth
from msgrpo_lab.sampler.base import EpisodeSampler, diagnose
from msgrpo_lab.types import Credit, RolloutBatch, Selection

Reduction = Literal["sum", "sequence"]
"""What a gradient adds up: `sum` every turn alike, the policy gradient; `sequence` the mean over each episode's turns,
as in the loss's reduction of that name (paper section 3)."""

CORRELATION, SHARE, ANY, POSITIVE = (-1.0, 1.0), (0.0, 1.0), (-math.inf, math.inf), (0.0, math.inf)

CREDIT_SCORES: Mapping[str, tuple[float, float]] = {
    "spearman": CORRELATION,
    "pearson": CORRELATION,
    "sign_agreement": CORRELATION,
    "wrong_sign": SHARE,
    "bias": ANY,
    "gradient_cosine": CORRELATION,
    "sampled_cosine": CORRELATION,
    "gradient_variance": POSITIVE,
}
"""What is measured of credit, and what it cannot leave. The first five: `statistics.Agreement`.

- `gradient_cosine`: cosine between the induced gradient and the exact one, ∇J of the rollout's initial states. What
  chance has sampled is in it, so even exact advantages stay below 1.
- `sampled_cosine`: cosine with the gradient that exact advantages induce on the very same turns: credit alone; exact
  advantages have 1.
- `gradient_variance`: variance of the induced gradient over batches of so many groups, E|ĝ − E ĝ|² / |E ĝ|², with the
  sample's moments: the closed form of drawing groups with replacement without end, times G/(G − 1).
"""
DRAWN_SCORES: Mapping[str, tuple[float, float]] = {
    "pool_cosine": CORRELATION,
    "norm_ratio": POSITIVE,
    "ess": SHARE,
    "mean_advantage": ANY,
    "inclusion_bias": ANY,
}
"""What is measured of a sampler beside these: the cosine between the drawn episodes' gradient and the whole pool's
under the same credit, the ratio of their norms (each a mean over episodes), and `sampler.base.diagnose`."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Yardstick:
    """What is true of a rollout: exact advantages, and exact gradients by group."""

    taken_ET: Bool[np.ndarray, "E T"]  # noqa: N815  axis letters
    exact_ET: Float[np.ndarray, "E T"]  # noqa: N815
    """A^π of every played turn; 0 elsewhere."""
    group_E: Int[np.ndarray, " E"]  # noqa: N815
    """Group of each episode, 0 to G − 1."""
    size_G: Int[np.ndarray, " G"]  # noqa: N815
    """Episodes of each group."""
    score_NL: sparse.csr_array  # noqa: N815
    """∂ log π/∂logit of every played turn."""
    exact_GL: sparse.csr_array  # noqa: N815
    """Σ of ∇J_m over the episodes of each group, m the map that an episode is played on."""

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.size_G)

    @property
    def num_turns_E(self) -> Int[np.ndarray, " E"]:  # noqa: N802
        """T_i."""
        num_turns_E: Int[np.ndarray, " E"] = self.taken_ET.sum(axis=1)
        return num_turns_E


def yardstick_of(batch: RolloutBatch, truth: LakeTruth) -> Yardstick:
    """What is true of a rollout.

    Raises:
        ValueError: the truth is of another rollout (`LakeTruth.turns`).
    """
    turns = truth.turns(batch)
    _, group_E = np.unique(batch.group_index, return_inverse=True)
    size_G = np.bincount(group_E)
    gradient_ML = map_gradients(truth.values, truth.texts)
    map_E = np.array([truth.map_of_seed[episode.seed] for episode in batch.episodes])
    played_GM = sparse.csr_array((np.ones(len(map_E)), (group_E, map_E)), shape=(len(size_G), gradient_ML.shape[0]))
    return Yardstick(
        taken_ET=turns.taken,
        exact_ET=truth.advantages(batch) if batch.exact_adv is None else batch.exact_adv,
        group_E=group_E,
        size_G=size_G,
        score_NL=score_matrix(turns.text[turns.taken], turns.answer[turns.taken], truth.table.prob_XB),
        exact_GL=sparse.csr_array(played_GM @ gradient_ML),
    )


def measure(
    yardstick: Yardstick,
    credit: Credit,
    times_RG: Float[np.ndarray, "R G"],
    *,
    draws: Sequence[Selection] | None = None,
    reduction: Reduction = "sum",
) -> dict[str, Score]:
    """All scores of one rule's credit: those of `CREDIT_SCORES`, with `draws` those of `DRAWN_SCORES` too.

    Args:
        yardstick: of the same rollout.
        credit: what the rule gave it.
        times_RG: resamples of its groups (`resample_groups`), at least 2 a draw, or none at all for the bare numbers;
            each draw is given an equal share of them.
        draws: what a sampler picked, once or several times; None measures all episodes.
        reduction: what the gradients add up.

    Raises:
        ValueError: the credit is of another rollout, or not finite; too few resamples for the draws.
    """
    _check(yardstick, credit)
    picks = [None] if draws is None else list(draws)
    share = len(times_RG) // len(picks)
    if len(times_RG) and share < 2:
        wanted = 2 * len(picks)
        raise ValueError(f"times_RG: {len(times_RG)} resamples for {len(picks)} draws; give at least {wanted}, or none")
    pool = _Gradients(yardstick, credit, reduction)
    rows = [
        _one_draw(yardstick, credit, pool, times_RG[number * share : (number + 1) * share], picked)
        for number, picked in enumerate(picks)
    ]
    bounds = {**CREDIT_SCORES, **DRAWN_SCORES}
    return {
        name: Score(
            point_D=np.array([row[name][0] for row in rows]),
            resampled_DR=np.stack([row[name][1:] for row in rows]),
            bounds=bounds[name],
        )
        for name in rows[0]
    }


def draw_repeatedly(
    sampler: EpisodeSampler,
    credit: Credit,
    batch: RolloutBatch,
    num_episodes: int,
    rngs: Sequence[np.random.Generator],
) -> list[Selection]:
    """What a sampler picks, once for each generator; `credit` with outcomes (`sampler.base.with_outcomes`)."""
    return [sampler(credit, batch.group_index, num_episodes, rng) for rng in rngs]


class _Gradients:
    """Gradients of each episode under a rule's credit and under the exact one."""

    def __init__(self, yardstick: Yardstick, credit: Credit, reduction: Reduction) -> None:
        length_E = yardstick.num_turns_E
        share_E = np.ones(len(length_E)) if reduction == "sum" else 1.0 / length_E
        self.induced_EL, self.exact_EL = (
            episode_gradients((adv_ET * share_E[:, None])[yardstick.taken_ET], length_E, yardstick.score_NL)
            for adv_ET in (credit.turn_adv, yardstick.exact_ET)
        )


def _one_draw(
    yardstick: Yardstick,
    credit: Credit,
    gradients: _Gradients,
    times_RG: Float[np.ndarray, "R G"],
    picked: Selection | None,
) -> dict[str, Float[np.ndarray, " 1+R"]]:
    """Every statistic on the batch itself and then on its resamples; what no resample changes stands alone."""
    groups, group_E = yardstick.num_groups, yardstick.group_E
    times_RG = np.concatenate([np.ones((1, groups)), times_RG])
    one_E = np.ones(len(group_E))
    weight_E = one_E if picked is None else np.bincount(picked.index, picked.weight, len(group_E))
    weight_N = np.repeat(weight_E, yardstick.num_turns_E)
    taken = yardstick.taken_ET
    group_N = np.repeat(group_E, yardstick.num_turns_E)
    agreed = agreement(credit.turn_adv[taken], yardstick.exact_ET[taken], weight_N, group_N, times_RG)
    induced_GL = group_sums(gradients.induced_EL, group_E, weight_E, groups)
    induced_RL = times_RG @ induced_GL
    statistics = {
        **agreed._asdict(),
        "gradient_cosine": cosine(induced_RL, times_RG @ yardstick.exact_GL),
        "sampled_cosine": cosine(induced_RL, times_RG @ group_sums(gradients.exact_EL, group_E, weight_E, groups)),
        "gradient_variance": relative_variance(induced_GL, induced_RL, times_RG),
    }
    if picked is None:
        return statistics
    pool_RL = times_RG @ group_sums(gradients.induced_EL, group_E, one_E, groups)
    drawn_G = np.bincount(group_E, np.bincount(picked.index, minlength=len(group_E)), groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn_R, pool_R = times_RG @ drawn_G, times_RG @ yardstick.size_G
        ratio_R = np.linalg.norm(induced_RL, axis=1) / drawn_R / (np.linalg.norm(pool_RL, axis=1) / pool_R)
    told = diagnose(credit, picked)
    return {
        **statistics,
        "pool_cosine": cosine(induced_RL, pool_RL),
        "norm_ratio": ratio_R,
        **{name: np.array([told[f"sampler/{name}"]]) for name in ("ess", "mean_advantage", "inclusion_bias")},
    }


def relative_variance(
    gradient_GL: sparse.csr_array, sum_RL: Float[np.ndarray, "R L"], times_RG: Float[np.ndarray, "R G"]
) -> Float[np.ndarray, " R"]:
    """Variance of the mean of G groups' gradients over its square, (E|g|² − |E g|²) / ((G − 1) |E g|²), each resample's
    moments; nan with one group or where the mean is 0."""
    groups = times_RG.shape[1]
    square_R = times_RG @ np.asarray(gradient_GL.multiply(gradient_GL).sum(axis=1)).ravel() / groups
    of_mean_R = np.einsum("rl,rl->r", sum_RL, sum_RL) / groups**2
    defined_R = (of_mean_R > 0) & (groups > 1)
    spread_R = np.maximum(square_R - of_mean_R, 0.0)
    return np.where(defined_R, spread_R / np.where(defined_R, of_mean_R * (groups - 1), 1.0), np.nan)


def _check(yardstick: Yardstick, credit: Credit) -> None:
    if credit.turn_adv.shape != yardstick.taken_ET.shape or not np.array_equal(credit.turn_mask, yardstick.taken_ET):
        raise ValueError(
            f"Credit.turn_adv has shape {credit.turn_adv.shape}, the rollout's turns {yardstick.taken_ET.shape}, or it "
            "masks other turns: give the credit of the rollout that the yardstick is of"
        )
    if not np.isfinite(credit.turn_adv).all():
        raise ValueError("Credit.turn_adv is not finite everywhere: check the rule and the rollout's rewards")
