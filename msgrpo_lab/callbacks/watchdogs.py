"""Watchdogs: a run that goes wrong is warned of, stopped, or rolled back to its last good checkpoint."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)

from __future__ import annotations

import logging
import math
import operator
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import lightning as L
import torch

from msgrpo_lab.callbacks.checkpoints import CheckpointKeeper
from msgrpo_lab.runs.folder import CheckpointError
from msgrpo_lab.tracking.logger import RunLogger
from msgrpo_lab.tracking.run import STOPPED_TAG
from msgrpo_lab.training.module import LAPModule

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

    def describe(self, value: float) -> str:
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


log = logging.getLogger(__name__)

Answer = Literal["warn", "stop", "roll_back"]
"""What to do."""
ANSWERS: tuple[Answer, ...] = ("warn", "roll_back", "stop")
"""The same, the more careful ones last."""
EXIT_CODE = 3


class WatchdogStop(SystemExit):
    """A watchdog has ended the run, with exit code 3; `reason` is one line, which has been printed."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_CODE)
        self.reason = reason


class Watchdogs(L.Callback):
    """Watches every rollout and update, and acts between epochs, before evaluation and checkpoint.

    Causes, each with its answer (null does not watch):

    - `non_finite`: a loss, gradient or log-probability, or a parameter, that is not finite. The module has not taken
      such an update; a parameter that is not finite ends the run whatever the answer, unless it can roll back.
    - `logprob_gap`: `train/logprob_gap`, the mean |log π_θ − log π_old| per token before the epoch's first update,
      which is 0 but for rounding where the engine samples from the policy that is trained.
    - `collapse`: `patience` rollouts in a row beyond one of the limits. They are the project's own [D].

    `warn` says so once a streak. `stop` ends the run as FAILED with tag `msgrpo.stopped_by`; checkpoints and adapter
    are kept. `roll_back` takes the parameters and the optimiser of the newest checkpoint whose policy was still well,
    and goes on with all later learning rates `lr_factor` times as large; after `max_roll_backs` times it stops. If
    several causes are due, a stop goes before a roll-back, and that before a warning.

    Logged with an epoch's first update: `train/collapse_causes` (limits of `collapse` the rollout is beyond). Counted
    since the run began, with every update: `train/watchdog_skipped_updates`, `train/watchdog_roll_backs`.

    Args:
        non_finite: answer.
        logprob_gap: answer.
        collapse: answer.
        max_logprob_gap: nats.
        min_action_entropy: nats; below it nothing new is tried.
        min_valid_action_rate: share of legal answers, in [0, 1].
        max_zero_std_groups: share of groups whose episodes all have the same return, in [0, 1]; such a group has no
            advantage and teaches nothing.
        max_top_action_share: share of the most frequent action among all that were played, in [0, 1].
        patience: rollouts in a row beyond a limit of `collapse` before it is answered.
        max_roll_backs: in a run; one more stops it.
        lr_factor: in (0, 1].

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        *,
        non_finite: Answer | None = "stop",
        logprob_gap: Answer | None = "warn",
        collapse: Answer | None = "warn",
        max_logprob_gap: float = 0.1,
        min_action_entropy: float = 0.05,
        min_valid_action_rate: float = 0.5,
        max_zero_std_groups: float = 0.9,
        max_top_action_share: float = 0.98,
        patience: int = 3,
        max_roll_backs: int = 3,
        lr_factor: float = 0.5,
    ) -> None:
        _check_shares(
            min_valid_action_rate=min_valid_action_rate,
            max_zero_std_groups=max_zero_std_groups,
            max_top_action_share=max_top_action_share,
        )
        _check_least(0, " nats", min_action_entropy=min_action_entropy, max_logprob_gap=max_logprob_gap)
        _check_least(0, "", max_roll_backs=max_roll_backs)
        _check_least(1, "; give for example 3", patience=patience)
        if not 0 < lr_factor <= 1:
            raise ValueError(f"callbacks.watchdogs.lr_factor={lr_factor}: must lie in (0, 1]; give for example 0.5")
        self.answers: dict[Cause, Answer | None] = {
            "non_finite": non_finite,
            "logprob_gap": logprob_gap,
            "collapse": collapse,
        }
        self.max_roll_backs = max_roll_backs
        self.lr_factor = lr_factor
        thresholds = (
            gap_threshold(max_logprob_gap),
            *collapse_thresholds(
                min_action_entropy=min_action_entropy,
                min_valid_action_rate=min_valid_action_rate,
                max_zero_std_groups=max_zero_std_groups,
                max_top_action_share=max_top_action_share,
                patience=patience,
            ),
        )
        self.streaks = Streaks([threshold for threshold in thresholds if self.answers[threshold.cause] is not None])
        self.skipped_updates = 0
        """Updates that were not taken, because a number in them was not finite."""
        self.roll_backs = 0
        self.well_at = 0
        """Updates done by the newest policy whose epoch gave no cause for a roll-back; 0 is the untrained one's."""
        self._due: list[tuple[Answer, str]] = []
        self._epoch_began_at = 0
        self._skipped_in_epoch = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuses to watch a run that it could not roll back."""
        for cause, answer in self.answers.items():
            if answer == "roll_back" and _keeper(trainer) is None:
                raise ValueError(f"callbacks.watchdogs.{cause}=roll_back: this run keeps no checkpoints; give stop")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The policy that played this epoch's rollout is the one after `global_step` updates."""
        self._epoch_began_at, self._skipped_in_epoch, self._due = trainer.global_step, 0, []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the update, and at the rollout's metrics, which come with the epoch's first."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        logged = {}
        self._skipped_in_epoch += metrics.get("train/skipped_update", 0.0) > 0
        if batch_idx == 0:
            self.observe(metrics)
            causes = [threshold for threshold in self.streaks.breached() if threshold.cause == "collapse"]
            logged["train/collapse_causes"] = float(len(causes))
        logged["train/watchdog_skipped_updates"] = float(self.skipped_updates + self._skipped_in_epoch)
        logged["train/watchdog_roll_backs"] = float(self.roll_backs)
        pl_module.log_dict(logged, on_step=True, on_epoch=False, logger=False, batch_size=1)
        for logger in trainer.loggers:
            logger.log_metrics(logged, trainer.global_step - 1)

    def observe(self, metrics: Mapping[str, float]) -> None:
        """Takes in one rollout's metrics; what has lasted long enough is answered when the epoch ends."""
        self.streaks.take_in(metrics)
        for threshold in self.streaks.breached():
            answer, length = self.answers[threshold.cause], self.streaks.lengths[threshold.metric]
            assert answer is not None
            if length == threshold.patience or (length > threshold.patience and answer != "warn"):
                self._find(answer, threshold.cause, threshold.describe(metrics[threshold.metric]))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Answers the worst of what has been found: nothing is half done now."""
        assert isinstance(pl_module, LAPModule)
        self._look_for_non_finite(pl_module)
        self.skipped_updates += self._skipped_in_epoch
        ill = [self.answers[threshold.cause] for threshold in self.streaks.breached()]
        if "roll_back" not in [*ill, *(answer for answer, _ in self._due)]:
            self.well_at = self._epoch_began_at
        if (keeper := _keeper(trainer)) is not None and "roll_back" in self.answers.values():
            keeper.needed = self.well_at
        if not self._due:
            return
        answer, reason = max(self._due, key=lambda found: ANSWERS.index(found[0]))
        if answer == "stop":
            _stop(trainer, reason)
        for _, line in self._due:
            if trainer.is_global_zero:
                log.warning("%s", line)
        if answer == "roll_back" and self.roll_backs < self.max_roll_backs:
            self._roll_back(trainer, pl_module, reason)
        elif answer == "roll_back":
            _stop(trainer, f"{reason} (after {self.roll_backs} roll-backs)")

    def _look_for_non_finite(self, module: LAPModule) -> None:
        answer = self.answers["non_finite"]
        if answer is None:
            return
        remedy = "lower optim.lr or update.max_grad_norm"
        if self._skipped_in_epoch:
            met = f"{self._skipped_in_epoch} update(s) not taken: loss, gradient or a log-probability is not finite"
            self._find(answer, "non_finite", f"{met}; {remedy}")
        if not all(bool(torch.isfinite(parameter).all()) for parameter in module.policy.trainable_parameters()):
            self._find("stop" if answer == "warn" else answer, "non_finite", f"a parameter is not finite; {remedy}")

    def _find(self, answer: Answer, cause: Cause, line: str) -> None:
        self._due.append((answer, f"callbacks.watchdogs.{cause}={answer}: {line}"))

    def _roll_back(self, trainer: L.Trainer, module: LAPModule, reason: str) -> None:
        keeper = _keeper(trainer)
        assert keeper is not None
        try:
            update = keeper.roll_back(trainer, module, self.lr_factor, until=self.well_at)
        except CheckpointError as error:
            _stop(trainer, f"{reason} ({error})")
        self.roll_backs += 1
        self.streaks.clear()
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        log.warning(
            "rolled back to update %d at update %d (%d of at most %d times); the learning rate is now %.3g",
            update,
            trainer.global_step,
            self.roll_backs,
            self.max_roll_backs,
            rate,
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, so that it neither repeats, forgets nor decides otherwise."""
        return {
            "streaks": dict(self.streaks.lengths),
            "skipped_updates": self.skipped_updates,
            "roll_backs": self.roll_backs,
            "well_at": self.well_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up where the checkpoint left off."""
        self.streaks.lengths.update(state_dict["streaks"])
        self.skipped_updates = int(state_dict["skipped_updates"])
        self.roll_backs = int(state_dict["roll_backs"])
        self.well_at = int(state_dict["well_at"])


def _stop(trainer: L.Trainer, reason: str) -> NoReturn:
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.set_tag(STOPPED_TAG, reason)
    if trainer.is_global_zero:
        print(f"msgrpo_lab: {reason}", file=sys.stderr)
    raise WatchdogStop(reason)


def _keeper(trainer: L.Trainer) -> CheckpointKeeper | None:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, CheckpointKeeper)), None)


def _check_shares(**shares: float) -> None:
    for key, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"callbacks.watchdogs.{key}={value}: must be in [0, 1]; it is a share")


def _check_least(least: int, unit: str, **values: float) -> None:
    for key, value in values.items():
        if not value >= least:
            raise ValueError(f"callbacks.watchdogs.{key}={value}: must be at least {least}{unit}")
