"""Two policies on the same episodes: the difference with its interval, how often one does better, and a sign test.

Both play the same initial states with the same streams of chance (common random numbers), so the difference is taken
episode by episode, and what they share cancels. Intervals and p-values are over episodes, for these two very policies;
of training runs with other seeds they say nothing, and they are not corrected for the number of comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.stats import binomtest
from scipy.stats import t as student

from msgrpo_lab.evaluation.contender import DECODINGS, Decoding
from msgrpo_lab.evaluation.play import Evaluation, Result


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """What `compare_returns` finds, for one policy against another."""

    difference: float
    """Mean over episodes of the policy's return minus the other's."""
    difference_low: float
    difference_high: float
    """95 % interval, Student's t over the paired differences; nan for a single episode."""
    probability_of_improvement: float
    """Share of episodes in which the policy's return is higher, equal ones counted half."""
    probability_of_improvement_low: float
    probability_of_improvement_high: float
    wins: int
    losses: int
    ties: int
    sign_test_p: float
    """Two-sided p-value of as many wins among wins and losses if both were as likely; 1 where all are ties."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A pair, and who it is of."""

    scenario: str
    decoding: Decoding
    """Of both; a player has no other than sampled and is compared as it is."""
    policy: str
    against: str
    episodes: int
    pair: Pair


def compare_returns(ours: Float[np.ndarray, " E"], theirs: Float[np.ndarray, " E"]) -> Pair:
    """One policy's returns held against another's on the same episodes.

    Raises:
        ValueError: the numbers of episodes differ, or there are none.
    """
    if ours.shape != theirs.shape or not len(ours):
        raise ValueError(f"returns: {ours.shape} against {theirs.shape}; both must be of the same episodes")
    difference = ours - theirs
    better = (difference > 0) + 0.5 * (difference == 0)
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    low, high = _t_interval(difference)
    better_low, better_high = (float(np.clip(end, 0.0, 1.0)) for end in _t_interval(better))
    return Pair(
        difference=float(difference.mean()),
        difference_low=low,
        difference_high=high,
        probability_of_improvement=float(better.mean()),
        probability_of_improvement_low=better_low,
        probability_of_improvement_high=better_high,
        wins=wins,
        losses=losses,
        ties=len(difference) - wins - losses,
        sign_test_p=float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
    )


def _t_interval(values: Float[np.ndarray, " E"]) -> tuple[float, float]:
    """95 % interval of the mean of independent values; (nan, nan) for a single one."""
    count = len(values)
    if count < 2:
        return float("nan"), float("nan")
    half = float(student.ppf(0.975, count - 1)) * float(values.std(ddof=1)) / math.sqrt(count)
    return float(values.mean()) - half, float(values.mean()) + half


EVERY_PAIR, FIRST = "all", "first"
INTERVALS = ("success_rate", "return_mean", "normalised_score")
"""Scores that have an interval: `<name>_low` and `<name>_high`."""
POINTS = ("episode_length", "valid_action_rate", "token_entropy", "action_entropy")
"""Scores that have none."""


def score_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """One object a policy, scenario and decoding; what is not defined is None."""
    return [_row(result, evaluation) for result in evaluation.results]


def _row(result: Result, evaluation: Evaluation) -> dict[str, Any]:
    ends = evaluation.ends[result.scenario]
    scores = {f"{name}{end}": result.scores.get(f"{name}{end}") for name in INTERVALS for end in ("", "_low", "_high")}
    reference = evaluation.references[result.scenario].get(result.contender.label)
    exact = result.contender.kind == "player" and reference is not None and reference.exact
    return {
        "policy": result.contender.label,
        "scenario": result.scenario,
        "decoding": result.decoding,
        "episodes": len(result.played),
        **{name: defined(value) for name, value in scores.items()},
        **{name: defined(result.scores[name]) for name in POINTS},
        "exact_success_rate": reference.success_rate if exact and reference is not None else None,
        "return_at_0": None if ends is None else ends[0],
        "return_at_1": None if ends is None else ends[1],
        "kind": result.contender.kind,
        **asdict(result.contender.origin),
    }


def defined(value: float | None) -> float | None:
    """None for nan: JSON has no nan."""
    return None if value is None or math.isnan(value) else value


def comparisons(evaluation: Evaluation, against: str | None) -> list[Comparison]:
    """The pairs that `against` asks for, on every scenario and under both decodings.

    Args:
        evaluation: the results.
        against: `first` (every policy against the first), `all` (every pair), a policy's name, or None.
    """
    if against is None or not evaluation.results:
        return []
    found = []
    for scenario in evaluation.references:
        for decoding in DECODINGS:
            side = {one.contender.label: one for one in evaluation.results if _stands(one, scenario, decoding)}
            for ours, theirs in _pairs(list(side), evaluation, against):
                pair = (side[ours], side[theirs])
                if all(one.decoding != decoding for one in pair):
                    continue  # two players are compared once, not once a decoding of others
                found.append(
                    Comparison(
                        scenario=scenario,
                        decoding=decoding,
                        policy=ours,
                        against=theirs,
                        episodes=len(pair[0].played),
                        pair=compare_returns(*(one.played.outcomes.returns for one in pair)),
                    )
                )
    return found


def _stands(result: Result, scenario: str, decoding: Decoding) -> bool:
    """Whether a result is its policy's under this decoding; a player's is, under any."""
    return result.scenario == scenario and (result.decoding == decoding or result.contender.kind == "player")


def _pairs(labels: Sequence[str], evaluation: Evaluation, against: str) -> Iterator[tuple[str, str]]:
    if against == EVERY_PAIR:
        yield from ((ours, theirs) for at, theirs in enumerate(labels) for ours in labels[at + 1 :])
        return
    other = evaluation.results[0].contender.label if against == FIRST else against
    if other in labels:
        yield from ((label, other) for label in labels if label != other)


def pair_row(comparison: Comparison) -> dict[str, Any]:
    """A comparison as one flat object; what is not defined is None."""
    pair: Mapping[str, Any] = asdict(comparison.pair)
    return {
        "scenario": comparison.scenario,
        "decoding": comparison.decoding,
        "policy": comparison.policy,
        "against": comparison.against,
        "episodes": comparison.episodes,
        **{name: defined(value) if isinstance(value, float) else value for name, value in pair.items()},
    }
