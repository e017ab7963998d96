"""Says after the first rollout why a run will not learn, before hours have gone into it."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)
from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L

from msgrpo_lab.callbacks.watchdogs import Threshold

log = logging.getLogger(__name__)


class FirstRolloutAdvice(L.Callback):
    """One warning for each sign in the first rollout that there is nothing to learn from, with the key to set.

    The limits are the project's own [D], set between first rollouts of runs that learnt and of runs that did not
    (docs/results/free-text.md). Only the untrained policy's rollout is looked at; what goes wrong later is the
    watchdogs' matter.

    Args:
        min_action_entropy: nats; below it, most turns get one and the same answer, and other actions are hardly tried.
        min_valid_action_rate: share of answers that name a legal action.
        max_zero_std_groups: share of groups whose episodes all have the same return and so have no advantage.
        max_cut_answers: share of answers that were cut at `rollout.sampling.max_new_tokens`.
    """

    def __init__(
        self,
        *,
        min_action_entropy: float = 0.5,
        min_valid_action_rate: float = 0.6,
        max_zero_std_groups: float = 0.5,
        max_cut_answers: float = 0.2,
    ) -> None:
        shares = {
            "min_valid_action_rate": min_valid_action_rate,
            "max_zero_std_groups": max_zero_std_groups,
            "max_cut_answers": max_cut_answers,
        }
        for key, value in shares.items():
            if not 0 <= value <= 1:
                raise ValueError(f"callbacks.advice.{key}={value}: must be in [0, 1]; it is a share")
        if not min_action_entropy >= 0:
            raise ValueError(f"callbacks.advice.min_action_entropy={min_action_entropy}: must be at least 0 nats")
        self.thresholds = (
            _threshold(
                "train/action_entropy",
                min_action_entropy,
                "below",
                "most turns get one and the same answer, so that other actions are hardly tried",
                "sample warmer (rollout.sampling.temperature=1.5) among few tokens (rollout.sampling.top_k=3)",
            ),
            _threshold(
                "train/valid_action_rate",
                min_valid_action_rate,
                "below",
                "few answers name a legal action",
                "give worked examples (prompt.examples), open the answer (prompt.opening), or set sampling=constrained",
            ),
            _threshold(
                "train/zero_std_groups",
                max_zero_std_groups,
                "above",
                "most groups have episodes of one and the same return, which teach nothing",
                "raise rollout.group_size, or set env.shaping=0.1",
            ),
            _threshold(
                "train/cut_answers",
                max_cut_answers,
                "above",
                "many answers were cut before their end",
                "raise rollout.sampling.max_new_tokens, or set prompt.stop",
            ),
        )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the first rollout's metrics, which come with the first update."""
        if trainer.current_epoch == 0 and batch_idx == 0 and trainer.is_global_zero:
            for line in self.advise({key: float(value) for key, value in trainer.callback_metrics.items()}):
                log.warning("first rollout: %s", line)

    def advise(self, metrics: Mapping[str, float]) -> list[str]:
        """One line for each limit that a first rollout's metrics are beyond."""
        return [
            threshold.describe(metrics[threshold.metric])
            for threshold in self.thresholds
            if threshold.breached_by(metrics.get(threshold.metric))
        ]


def _threshold(metric: str, limit: float, beyond: Any, meaning: str, remedy: str) -> Threshold:
    return Threshold(
        cause="first_rollout",
        metric=metric,
        limit=limit,
        beyond=beyond,
        meaning=meaning,
        remedy=remedy,
        patience=1,
    )
