"""What an episode sampler is, and draws by probability.

A sampler is a frozen dataclass that decides the single-draw probabilities p_i; `select` then draws, works out how often
each episode is to be expected among the drawn, and weights them. Samplers that prefer some classes of episodes draw by
`strata.select_tiers` or `strata.select_strata` instead. All draw exactly K episodes, so that an ablation compares like
with like.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.types import Credit, RolloutBatch, Selection


class EpisodeSampler(Protocol):
    """Picks the training episodes of a rollout."""

    @property
    def num_episodes(self) -> int:
        """K, the number of episodes to draw from a rollout."""

    def __call__(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator
    ) -> Selection:
        """Draws `num_episodes` of the E episodes of `credit`; all randomness comes from `rng`."""


def check_num_episodes(num_episodes: int) -> None:
    """Refuses a number of episodes no sampler can draw.

    Raises:
        ValueError: `num_episodes` is below 1.
    """
    if num_episodes < 1:
        raise ValueError(f"sampler.num_episodes={num_episodes}: must be at least 1; set how many episodes to train on")


def check_pool(
    credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, *, replace: bool
) -> Float[np.ndarray, " E"]:
    """Checks a request against the pool and returns the episode advantages `[E]`.

    Raises:
        ValueError: shapes differ, an advantage is not finite, or more episodes are wanted than there are.
    """
    adv_E = credit.episode_adv
    if adv_E.ndim != 1 or adv_E.size == 0 or group_index.shape != adv_E.shape:
        raise ValueError(
            f"Credit.episode_adv {adv_E.shape} and group_index {group_index.shape} must both be [E] with E ≥ 1"
        )
    if not np.isfinite(adv_E).all():
        bad = int(np.flatnonzero(~np.isfinite(adv_E))[0])
        raise ValueError(f"Credit.episode_adv[{bad}]={adv_E[bad]} must be finite: check the rewards of that episode")
    check_num_episodes(num_episodes)
    if num_episodes > adv_E.size and not replace:
        raise ValueError(
            f"sampler.num_episodes={num_episodes} exceeds the rollout's {adv_E.size} episodes: lower it, raise "
            "rollout.num_groups, or set sampler.replace=true"
        )
    return adv_E


def draw(
    prob_E: Float[np.ndarray, " E"], num_episodes: int, rng: np.random.Generator, *, replace: bool
) -> Int[np.ndarray, " K"]:
    """Draws K episodes, with or without replacement, in exchangeable order (any cut of it is a fair mini-batch).

    Without replacement this is successive sampling: draw by `prob_E`, take the drawn one out, rescale, repeat. It is
    done at once by giving each episode an exponential clock of rate p_i and taking the K that ring first (Efraimidis
    and Spirakis 2006; with log p_i plus Gumbel noise as the key). Episodes of probability 0 come after all others, in
    uniformly random order, so that K episodes are drawn even where fewer have a positive probability.
    """
    if replace:
        return rng.choice(prob_E.size, size=num_episodes, replace=True, p=prob_E)
    zero_E = prob_E == 0.0
    key_E = rng.gumbel(size=prob_E.size)
    key_E[~zero_E] += np.log(prob_E[~zero_E])
    return rng.permutation(np.lexsort((-key_E, zero_E))[:num_episodes])


def inclusion_of(prob_E: Float[np.ndarray, " E"], num_episodes: int, *, replace: bool) -> Float[np.ndarray, " E"]:
    """Expected number of times each episode is among the K drawn; sums to K.

    Exact cases: K p_i with replacement, and for K = 1; K/E for a uniform p; where at most K episodes have a positive
    probability, 1 for those and an equal share of the remaining draws for the others. Otherwise the inclusion
    probability of successive sampling has no closed form, and Rosén's (1972) approximation is given:

        π_i ≈ 1 − exp(−t p_i),   t such that Σ_i π_i = K,

    which stops all clocks at one fixed time instead of the random time of the K-th ring. Its error falls as 1/E: with
    p ∝ |normal|, the largest error of any episode, against enumeration or quadrature, was 0.10 for 4 ≤ E ≤ 6 (median
    pool 0.02), 0.006 for E = 32 and 64, 0.0013 for E = 128.
    """
    if replace or num_episodes == 1:
        return num_episodes * prob_E
    positive_E = prob_E > 0.0
    num_positive = int(positive_E.sum())
    if num_positive <= num_episodes:
        rest = (num_episodes - num_positive) / max(prob_E.size - num_positive, 1)
        return np.where(positive_E, 1.0, rest)
    prob_M = prob_E[positive_E]
    if prob_M.min() == prob_M.max():
        return np.where(positive_E, num_episodes / num_positive, 0.0)
    inclusion_E = np.zeros_like(prob_E)
    inclusion_E[positive_E] = _clock_inclusion(prob_M, num_episodes)
    return inclusion_E


def _clock_inclusion(prob_M: Float[np.ndarray, " M"], num_episodes: int) -> Float[np.ndarray, " M"]:
    """1 − exp(−t p) with t solved by bisection on log t, for K < M positive probabilities."""
    log_prob_M = np.log(prob_M)
    # 1 − e^−x ≤ x puts the root above t = K; p ≥ min p puts it below −log(1 − K/M) / min p.
    low = np.log(num_episodes)
    high = np.log(-np.log1p(-num_episodes / prob_M.size)) - log_prob_M.min()
    inclusion_M = np.zeros_like(prob_M)
    for _ in range(64):
        middle = 0.5 * (low + high)
        # Beyond e^6 ≈ 403 a clock has rung for certain; the cap keeps tiny probabilities from overflowing the others.
        inclusion_M[:] = -np.expm1(-np.exp(np.minimum(middle + log_prob_M, 6.0)))
        low, high = (middle, high) if inclusion_M.sum() < num_episodes else (low, middle)
    return inclusion_M


def select(
    prob_E: Float[np.ndarray, " E"],
    num_episodes: int,
    rng: np.random.Generator,
    *,
    replace: bool,
    importance_weights: bool,
) -> Selection:
    """Draws K episodes by the single-draw probabilities `prob_E` and weights them.

    See `weigh` for the weights. Episodes that can never be drawn are left out of the mean that these estimate; under
    `AbsAdvantage` with floor 0 such episodes have advantage 0 and no policy gradient, but a KL and an entropy term.
    """
    index_K = draw(prob_E, num_episodes, rng, replace=replace)
    inclusion_E = inclusion_of(prob_E, num_episodes, replace=replace)
    return weigh(index_K, prob_E, inclusion_E, importance_weights=importance_weights)


def weigh(
    index_K: Int[np.ndarray, " K"],
    prob_E: Float[np.ndarray, " E"],
    inclusion_E: Float[np.ndarray, " E"],
    *,
    importance_weights: bool,
) -> Selection:
    """A draw with its loss weights: 1 each, or weight_i = (K/E) / inclusion_i.

    With the latter, (1/K) Σ_drawn weight_i f_i estimates the pool's mean (1/E) Σ_i f_i (Horvitz and Thompson 1952):
    without bias where the inclusion is exact and no episode's is 0, otherwise up to the error of `inclusion_of`.
    """
    weight_K = np.ones(index_K.size)
    if importance_weights:
        weight_K = index_K.size / prob_E.size / inclusion_E[index_K]
    return Selection(index=index_K, prob=prob_E, weight=weight_K, inclusion=inclusion_E)


def diagnose(credit: Credit, selection: Selection) -> dict[str, float]:
    """What a draw did to the pool it came from.

    - `sampler/ess`: effective sample size of the inclusion probabilities as a share of the pool,
      (Σ_i π_i)² / (E Σ_i π_i²) in [1/E, 1] (Kish 1965); 1 means that all episodes are equally likely to be trained on.
    - `sampler/inclusion_bias`: mean advantage of the drawn episodes − mean advantage of the pool.
    - `sampler/mean_advantage`: mean of weight · advantage over the drawn episodes, the mean that the loss sees; it is
      the drawn episodes' mean advantage unless importance weights are on.
    - `sampler/inclusion_min`, `sampler/inclusion_max`: the extremes of π_i, the expected number of times drawn.
    - `sampler/drawn_zero_advantage_share`: share of the drawn episodes with advantage exactly 0, which no policy
      gradient comes from.

    Raises:
        ValueError: `credit` and `selection` speak of different numbers of episodes.
    """
    adv_E, pi_E = credit.episode_adv, selection.inclusion
    if adv_E.shape != pi_E.shape:
        raise ValueError(f"Credit.episode_adv {adv_E.shape} and Selection.inclusion {pi_E.shape} must both be [E]")
    drawn_K = adv_E[selection.index]
    return {
        "sampler/ess": float(pi_E.sum() ** 2 / (pi_E.size * np.square(pi_E).sum())),
        "sampler/inclusion_bias": float(drawn_K.mean() - adv_E.mean()),
        "sampler/mean_advantage": float((selection.weight * drawn_K).mean()),
        "sampler/inclusion_min": float(pi_E.min()),
        "sampler/inclusion_max": float(pi_E.max()),
        "sampler/drawn_zero_advantage_share": float((drawn_K == 0.0).mean()),
    }


DECIMALS = 9
"""Returns and spreads that agree to so many decimals, in the unit of the reward, are equal [D]: 0.1 + 0.2 is 0.3. It is
the resolution of the metric `train/zero_std_groups`."""


def with_outcomes(batch: RolloutBatch, credit: Credit) -> Credit:
    """The same credit with `episode_return` and `episode_success` of the episodes it was assigned to.

    Raises:
        ValueError: `credit` is of another number of episodes.
    """
    if credit.episode_adv.shape != (len(batch.episodes),):
        raise ValueError(
            f"Credit.episode_adv has shape {credit.episode_adv.shape} and the rollout {len(batch.episodes)} episodes: "
            "give the credit of this rollout"
        )
    return replace(
        credit,
        episode_return=np.array([episode.ret for episode in batch.episodes]),
        episode_success=np.array([episode.success for episode in batch.episodes]),
    )


def returns_of(credit: Credit) -> Float[np.ndarray, " E"]:
    """Episode returns, to `DECIMALS` decimals, so that equal returns are equal.

    Raises:
        ValueError: the credit does not hold them, or one is not finite.
    """
    return_E = credit.episode_return
    if return_E is None:
        raise ValueError("Credit.episode_return=None: this sampler compares returns; pass the credit by with_outcomes")
    if not np.isfinite(return_E).all():
        bad = int(np.flatnonzero(~np.isfinite(return_E))[0])
        raise ValueError(f"Credit.episode_return[{bad}]={return_E[bad]} must be finite: check that episode's rewards")
    return np.round(return_E, DECIMALS)


def success_of(credit: Credit) -> Bool[np.ndarray, " E"]:
    """Whether each episode succeeded.

    Raises:
        ValueError: the credit does not hold it.
    """
    if credit.episode_success is None:
        raise ValueError("Credit.episode_success=None: this sampler needs outcomes; pass the credit by with_outcomes")
    return credit.episode_success


def group_spread(return_E: Float[np.ndarray, " E"], group_index: Int[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
    """Population std of the returns of each episode's group, to `DECIMALS` decimals; 0 in a group of equal returns."""
    _, group_E = np.unique(group_index, return_inverse=True)
    size_G = np.bincount(group_E)
    order_E = np.lexsort((return_E, group_E))  # summed in one order whatever the episodes' order
    sorted_E, group_sorted_E = return_E[order_E], group_E[order_E]
    centred_E = sorted_E - (np.bincount(group_sorted_E, sorted_E) / size_G)[group_sorted_E]
    std_G = np.sqrt(np.bincount(group_sorted_E, centred_E**2) / size_G)
    spread_E: Float[np.ndarray, " E"] = np.round(std_G, DECIMALS)[group_E]
    return spread_E


@runtime_checkable
class Refilling(Protocol):
    """A sampler that may want more episodes than one rollout gives."""

    def episodes_wanted(
        self, credit: Credit, group_index: Int[np.ndarray, " E"], num_episodes: int, refills: int
    ) -> int:
        """How many episodes to collect in addition, after `refills` refills; 0 ends it, and must come in the end.

        Args:
            credit: of all episodes so far, with outcomes.
            group_index: of all episodes so far.
            num_episodes: K, how many are to be drawn.
            refills: how often there has been a refill in this epoch.
        """


def merge_rollouts(first: RolloutBatch, second: RolloutBatch) -> RolloutBatch:
    """The episodes of both, in order; the groups of `second` get numbers behind those of `first`.

    `exact_adv` is kept where both have it, padded to the longer.
    """
    offset = int(first.group_index.max()) + 1 - int(second.group_index.min())
    moved = tuple(replace(episode, group_id=episode.group_id + offset) for episode in second.episodes)
    exact_ET = None
    if first.exact_adv is not None and second.exact_adv is not None:
        turns = max(first.exact_adv.shape[1], second.exact_adv.shape[1])
        exact_ET = np.concatenate([_padded(first.exact_adv, turns), _padded(second.exact_adv, turns)])
    return RolloutBatch(
        episodes=first.episodes + moved,
        group_index=np.concatenate([first.group_index, second.group_index + offset]),
        exact_adv=exact_ET,
    )


def _padded(value_ET: Float[np.ndarray, "E T"], turns: int) -> Float[np.ndarray, "E U"]:
    return np.pad(value_ET, ((0, 0), (0, turns - value_ET.shape[1])))
