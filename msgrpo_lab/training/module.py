"""The Lightning module: the policy, its loss, and one optimiser step a batch.

What differs from a textbook step: the batch is split into forward passes over *distinct* rows (`decoder/plan.py`), each
of which adds its share to the gradient of one whole-batch loss; so the step is the same for any split, to rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

from msgrpo_lab.decoder.plan import Sharing
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.lap.policy import LanguagePolicy, UpdateWork, peak_memory_mb, update_work
from msgrpo_lab.loss import LossStats, PolicyGradientLoss, sum_stats
from msgrpo_lab.training.collate import select_columns
from msgrpo_lab.training.optim import AdamW
from msgrpo_lab.types import Sampling, TrainBatch


class LAPModule(L.LightningModule):
    """A language-agent policy under a policy-gradient loss.

    Args:
        policy: the policy.
        loss: the loss of a batch.
        optim: optimiser and schedule.
        sampling: the decoding rule that episodes are sampled with; log-probabilities are under it.
        token_budget: padded tokens of one forward and backward pass at most.
        max_grad_norm: the gradient's norm is clipped to this; None does not clip.
        total_updates: optimiser steps of the whole run, for the schedule.
        sharing: what samples share in a forward pass; `none` computes each by itself and changes no result.
    """

    def __init__(
        self,
        *,
        policy: LanguagePolicy,
        loss: PolicyGradientLoss,
        optim: AdamW,
        sampling: Sampling,
        token_budget: int,
        max_grad_norm: float | None,
        total_updates: int,
        sharing: Sharing = "tree",
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.loss = loss
        self.optim = optim
        self.sampling = sampling
        self.trie = None if sampling.choices is None else choice_trie(sampling.choices)
        self.token_budget = token_budget
        self.max_grad_norm = max_grad_norm
        self.total_updates = total_updates
        self.sharing: Sharing = sharing
        self.wall_s = 0.0
        """Seconds spent in rollouts and updates so far, without evaluation."""
        self.trained_tokens = 0
        """Completion tokens trained on so far, each as often as an update saw it."""

    def counters(self) -> dict[str, Any]:
        """What has been counted so far; `load_counters` takes it back."""
        return {"wall_s": self.wall_s, "trained_tokens": self.trained_tokens}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Goes on counting where a checkpoint left off."""
        self.wall_s, self.trained_tokens = float(counters["wall_s"]), int(counters["trained_tokens"])

    def configure_optimizers(self) -> Any:
        """Optimiser over the trainable parameters, scheduler stepped once an update."""
        optimizer, scheduler = self.optim.build(self.policy.trainable_parameters(), self.total_updates)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def accumulate_gradient(self, batch: TrainBatch) -> tuple[LossStats, UpdateWork, float]:
        """Adds the gradient of the batch's loss to the parameters', one forward pass at a time.

        Returns:
            The batch's loss statistics, what the passes computed, and the mean |log π_θ − log π_old| per completion
            token (nats): how far trainer and engine disagree before the first step.
        """
        stats, work, gap = [], UpdateWork(), 0.0
        for plan in self.policy.plan(batch, self.trie, self.token_budget, self.sharing):
            # The loss reads nothing off the completions: leave those columns out.
            part = select_columns(batch, plan.columns).select(torch.from_numpy(plan.samples).to(batch.input_ids.device))
            logprobs, entropy = self.policy.token_stats(plan, self.trie, self.sampling, plan.columns)
            part_stats = self.loss(logprobs, entropy, part)
            self.manual_backward(part_stats.loss)
            stats.append(part_stats._replace(loss=part_stats.loss.detach()))
            work += update_work(self.policy, plan, self.trie, self.sampling)
            difference = (logprobs.detach() - part.old_logprobs).abs()
            gap += float(difference[part.completion_mask].sum())
        return sum_stats(stats), work, gap / max(1, batch.num_tokens)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> None:
        """One optimiser step, which is not taken where loss, gradient or a log-probability is not finite."""
        started = time.perf_counter()
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        optimizer.zero_grad()
        stats, work, gap = self.accumulate_gradient(batch)
        parameters = self.policy.trainable_parameters()
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        rate = optimizer.param_groups[0]["lr"]
        finite = all(math.isfinite(float(value)) for value in (stats.loss, grad_norm, gap))
        if not finite:
            # What has no gradient is left alone, parameter and moments. The update counts all the same: metrics and
            # schedule go by updates.
            optimizer.zero_grad()
        optimizer.step()
        scheduler.step()
        update_s = time.perf_counter() - started
        metrics = {
            "train/loss": float(stats.loss),
            "train/policy_loss": float(stats.policy_loss),
            "train/kl": float(stats.kl),
            "train/clip_frac": float(stats.clip_frac),
            "train/ratio_mean": float(stats.ratio_mean),
            "train/approx_kl": float(stats.approx_kl),
            "train/token_entropy": float(stats.entropy),
            "train/grad_norm": float(grad_norm),
            "train/lr": rate,
            "train/skipped_update": float(not finite),
            "perf/update_s": update_s,
            "perf/train_tokens_per_s": batch.num_tokens / update_s,
            "perf/computed_tokens": float(work.tokens),
            "perf/padded_tokens": float(work.padded_tokens),
            "perf/distinct_token_ratio": work.tokens / float(batch.attention_mask.sum()),
            "perf/train_flops": work.flops,
            "perf/peak_memory_mb": peak_memory_mb(self.policy.device),
        }
        self.trained_tokens += batch.num_tokens
        metrics["train/trained_tokens"] = float(self.trained_tokens)
        self.wall_s += update_s
        if batch_idx == 0:
            metrics["train/logprob_gap"] = gap
            metrics |= self._rollout_metrics(update_s)
            self.wall_s += sum(metrics.get(f"perf/{part}_s", 0.0) for part in ("rollout", "credit", "collate"))
        metrics["train/wall_s"] = self.wall_s
        self._log(metrics)

    def _log(self, metrics: dict[str, float]) -> None:
        """Gives the metrics of update `global_step` − 1 to the callbacks and the loggers.

        The loggers are told directly: Lightning's own way repeats what one update logged at every later update of the
        epoch, so that a rollout's metrics would seem to have been measured once a mini-batch.
        """
        self.log_dict(metrics, on_step=True, on_epoch=False, logger=False, batch_size=1)
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, self.trainer.global_step - 1)

    def _rollout_metrics(self, update_s: float) -> dict[str, float]:
        """The current epoch's rollout, with the environment steps per second of rollout and update together."""
        data: Any = getattr(self.trainer, "datamodule", None)
        metrics: dict[str, float] = dict(getattr(data, "metrics", {}))
        if metrics:
            seconds = metrics["perf/rollout_s"] + update_s * data.updates_per_epoch
            metrics["perf/env_steps_per_s"] = metrics["train/turns"] / seconds
        return metrics
