"""Warnings when a policy stops learning because it has collapsed. They warn and count, and never stop a run."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)
from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A limit that a metric of every rollout should keep to."""

    metric: str
    limit: float
    breached: Callable[[float, float], bool]
    meaning: str
    remedy: str


class CollapseMonitor(L.Callback):
    """Watches the rollouts' metrics, and warns once for each cause that lasts.

    The number of causes at work is logged as `train/collapse_causes`. Thresholds are the project's own [D].

    Args:
        min_action_entropy: nats; below it nothing new is tried.
        min_valid_action_rate: share of legal answers, in [0, 1].
        max_zero_std_groups: share of groups whose episodes all have the same return, in [0, 1]; such a group has no
            advantage and teaches nothing.
        patience: rollouts in a row beyond a threshold before a warning.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        min_action_entropy: float = 0.05,
        min_valid_action_rate: float = 0.5,
        max_zero_std_groups: float = 0.9,
        patience: int = 3,
    ) -> None:
        for key, value in (
            ("min_valid_action_rate", min_valid_action_rate),
            ("max_zero_std_groups", max_zero_std_groups),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"callbacks.collapse.{key}={value}: must be in [0, 1]; it is a share")
        if min_action_entropy < 0:
            raise ValueError(f"callbacks.collapse.min_action_entropy={min_action_entropy}: must be at least 0 nats")
        if patience < 1:
            raise ValueError(f"callbacks.collapse.patience={patience}: must be at least 1; give for example 3")
        self.patience = patience
        self.thresholds = (
            Threshold(
                metric="train/action_entropy",
                limit=min_action_entropy,
                breached=operator.lt,
                meaning="the policy hardly tries anything new",
                remedy="raise loss.entropy or lower optim.lr",
            ),
            Threshold(
                metric="train/valid_action_rate",
                limit=min_valid_action_rate,
                breached=operator.lt,
                meaning="many answers name no legal action",
                remedy="set rollout.sampling.constrain=true, add prompt.examples, or lower optim.lr",
            ),
            Threshold(
                metric="train/zero_std_groups",
                limit=max_zero_std_groups,
                breached=operator.gt,
                meaning="nearly all groups score the same throughout and teach nothing",
                remedy="raise rollout.group_size or rollout.sampling.temperature, or set env.shaping",
            ),
        )
        self.streaks = {threshold.metric: 0 for threshold in self.thresholds}
        """Rollouts in a row that each metric has been beyond its limit."""
        self.warned: set[str] = set()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the rollout's metrics, which are logged with the first optimiser step of an epoch."""
        if batch_idx != 0:
            return
        causes = self.observe({key: float(value) for key, value in trainer.callback_metrics.items()}, trainer)
        pl_module.log("train/collapse_causes", float(causes), on_step=True, on_epoch=False, batch_size=1)

    def observe(self, metrics: dict[str, float], trainer: L.Trainer | None = None) -> int:
        """Take in one rollout's metrics; returns the number of thresholds they are beyond. NaN is beyond none."""
        causes = 0
        for threshold in self.thresholds:
            value = metrics.get(threshold.metric)
            beyond = value is not None and threshold.breached(value, threshold.limit)
            self.streaks[threshold.metric] = self.streaks[threshold.metric] + 1 if beyond else 0
            causes += beyond
            if self.streaks[threshold.metric] >= self.patience and threshold.metric not in self.warned:
                self.warned.add(threshold.metric)
                if trainer is None or trainer.is_global_zero:
                    log.warning(
                        "%s=%.3g for %d updates (limit %g): %s; %s",
                        threshold.metric,
                        value,
                        self.patience,
                        threshold.limit,
                        threshold.meaning,
                        threshold.remedy,
                    )
        return causes

    def state_dict(self) -> dict[str, Any]:
        """Streaks and given warnings, so that a resumed run neither repeats nor forgets one."""
        return {"streaks": dict(self.streaks), "warned": sorted(self.warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where the checkpoint left off."""
        self.streaks.update(state_dict["streaks"])
        self.warned = set(state_dict["warned"])
