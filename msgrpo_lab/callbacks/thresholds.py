"""Limits that the metrics of a run should keep to, and how long each has been beyond its own."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Cause = Literal["non_finite", "logprob_gap", "collapse", "first_rollout"]
"""What a watchdog can be told to answer, each in its own way; and what the first rollout is warned of."""

OPERATIONS: dict[str, Callable[[float, float], bool]] = {"below": operator.lt, "above": operator.gt}


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A limit that a metric of every rollout should keep to."""

    cause: Cause
    metric: str
    limit: float
    beyond: Literal["below", "above"]
    """On which side of the limit the metric must not be."""
    meaning: str
    remedy: str
    patience: int
    """Rollouts in a row beyond the limit before anything is done."""

    def breached_by(self, value: float | None) -> bool:
        """Whether `value` is beyond the limit. The limit itself, NaN and no value are not."""
        return value is not None and not math.isnan(value) and OPERATIONS[self.beyond](value, self.limit)

    def told(self, value: float) -> str:
        """One line: metric, value, what it means and what to do."""
        lasting = f"for {self.patience} rollouts " if self.patience > 1 else ""
        limit = f"(limit {self.limit:g})"
        return f"{self.metric}={value:.3g} {lasting}{limit}: {self.meaning}; {self.remedy}"


@dataclass(slots=True)
class Streaks:
    """For each threshold, the rollouts in a row that its metric has been beyond its limit."""

    thresholds: Iterable[Threshold]
    lengths: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        """Nothing has been seen."""
        self.thresholds = tuple(self.thresholds)
        self.clear()

    def take_in(self, metrics: Mapping[str, float]) -> None:
        """One rollout's metrics."""
        for threshold in self.thresholds:
            beyond = threshold.breached_by(metrics.get(threshold.metric))
            self.lengths[threshold.metric] = self.lengths[threshold.metric] + 1 if beyond else 0

    def breached(self) -> list[Threshold]:
        """Those beyond whose limit the last rollout was."""
        return [threshold for threshold in self.thresholds if self.lengths[threshold.metric]]

    def clear(self) -> None:
        """Begins anew."""
        self.lengths = {threshold.metric: 0 for threshold in self.thresholds}


def collapse_thresholds(
    *,
    min_action_entropy: float,
    min_valid_action_rate: float,
    max_zero_std_groups: float,
    max_top_action_share: float,
    patience: int,
) -> tuple[Threshold, ...]:
    """The signs that a policy has stopped learning because it has collapsed."""
    return (
        Threshold(
            cause="collapse",
            metric="train/action_entropy",
            limit=min_action_entropy,
            beyond="below",
            meaning="the policy hardly tries anything new",
            remedy="raise loss.entropy or lower optim.lr",
            patience=patience,
        ),
        Threshold(
            cause="collapse",
            metric="train/valid_action_rate",
            limit=min_valid_action_rate,
            beyond="below",
            meaning="many answers name no legal action",
            remedy="set rollout.sampling.constrain=true, add prompt.examples, or lower optim.lr",
            patience=patience,
        ),
        Threshold(
            cause="collapse",
            metric="train/zero_std_groups",
            limit=max_zero_std_groups,
            beyond="above",
            meaning="nearly all groups score the same throughout and teach nothing",
            remedy="raise rollout.group_size or rollout.sampling.temperature, or set env.shaping",
            patience=patience,
        ),
        Threshold(
            cause="collapse",
            metric="train/top_action_share",
            limit=max_top_action_share,
            beyond="above",
            meaning="one action has taken over, whatever the state",
            remedy="raise loss.entropy or lower optim.lr",
            patience=patience,
        ),
    )


def gap_threshold(limit: float) -> Threshold:
    """Engine and trainer disagree on the probability of the tokens that were sampled."""
    return Threshold(
        cause="logprob_gap",
        metric="train/logprob_gap",
        limit=limit,
        beyond="above",
        meaning="the engine sampled from another distribution than the one that is trained, so that ratios mean little",
        remedy="check that engine and trainer have the same weights, precision and rollout.sampling",
        patience=1,
    )
