"""Updates that go wrong, made for real: an infinite loss, a NaN in a gradient, a log-probability of −∞."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from msgrpo_lab.loss import LossStats

Poison = Callable[[Any, Any], None]
"""Is given the module and the batch before an update, which it spoils."""


class At(L.Callback):
    """Spoils one update, and remembers parameters and first moments before and after it."""

    def __init__(self, update: int, poison: Poison) -> None:
        self.update, self.poison = update, poison
        self.before: list[torch.Tensor] = []
        self.after: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.update:
            self.before = everything(trainer, pl_module)
            self.poison(pl_module, batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.update + 1 and not self.after:
            self.after = everything(trainer, pl_module)


def everything(trainer: Any, module: Any) -> list[torch.Tensor]:
    """Copies of the trainable parameters and of their moments."""
    states = trainer.optimizers[0].state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq", "step")]
    return [value.detach().clone() for value in [*module.policy.trainable_parameters(), *moments]]


def infinite_loss(module: Any, batch: Any) -> None:
    """The loss is infinite, and its gradient finite."""
    plain, step = module.loss, module.training_step

    def spoilt(*arguments: Any) -> LossStats:
        stats: LossStats = plain(*arguments)
        return stats._replace(loss=stats.loss + math.inf)

    def training_step(*arguments: Any) -> None:
        module.loss = spoilt
        try:
            step(*arguments)
        finally:
            module.loss = plain
            del module.training_step

    module.training_step = training_step


def nan_gradient(module: Any, batch: Any) -> None:
    """The loss is finite, and one number of its gradient is not."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        spoilt = gradient.clone()
        spoilt.view(-1)[0] = math.nan
        return spoilt

    handle = module.policy.trainable_parameters()[0].register_hook(spoil)


def infinite_logprob(module: Any, batch: Any) -> None:
    """The engine gave a token log-probability −∞, and its advantage is above 0: the clipped loss stays finite."""
    row, column = (int(index[0]) for index in batch.completion_mask.nonzero(as_tuple=True))
    batch.old_logprobs[row, column] = -math.inf
    batch.advantage[:] = 0.5


def nan_parameter(module: Any, batch: Any) -> None:
    """A parameter that this update does not read is spoilt."""
    with torch.no_grad():
        module.policy.trainable_parameters()[0].view(-1)[0] = math.nan
