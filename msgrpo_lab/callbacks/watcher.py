"""What callbacks share that look at whole rollouts, now and then, before the policy moves."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)
from __future__ import annotations

import logging
from typing import Any

import lightning as L

from msgrpo_lab.data import RolloutDataModule
from msgrpo_lab.oracle.frozen_lake import has_oracle

log = logging.getLogger(__name__)


class RolloutWatcher(L.Callback):
    """Looks at the first rollout, at every `every`-th one after it, and at the last, before their first update.

    Where the game has an oracle, the rollout's exact values are asked for; `RolloutDataModule.truth` then holds them.

    Args:
        key: name of the callback in the configuration, for messages.
        every: epochs (rollouts) between two looks; None never looks.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, *, key: str, every: int | None) -> None:
        if every is not None and every < 1:
            raise ValueError(
                f"callbacks.{key}.every={every}: must be at least 1, or null for never; give for example 10"
            )
        self.key = key
        self.every = every
        self._last_epoch: int | None = None

    def wants(self, epoch: int) -> bool:
        """Whether the rollout of this epoch is looked at."""
        return self.every is not None and (epoch % self.every == 0 or epoch == self._last_epoch)

    def look(self, trainer: L.Trainer, data: RolloutDataModule) -> None:
        """Looks at `data.rollout`, whose policy has not moved yet."""
        raise NotImplementedError

    def without_oracle(self, game: str) -> None:
        """Is told before the first rollout that its game has no oracle."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Asks for exact values."""
        if self.every is None:
            return
        data = _data(trainer)
        self._last_epoch = None if trainer.max_epochs is None else trainer.max_epochs - 1
        game = type(data.collector.example_game)
        if has_oracle(game):
            data.truth_askers.append(self.wants)
        else:
            self.without_oracle(game.__name__)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Looks, before the epoch's first update."""
        if batch_idx == 0 and self.wants(trainer.current_epoch):
            self.look(trainer, _data(trainer))


def _data(trainer: L.Trainer) -> RolloutDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, RolloutDataModule):
        raise RuntimeError("this callback needs the rollout data module: call trainer.fit(module, datamodule=…)")
    return data
