"""Callbacks that look at rollouts: the fidelity meter (`credit/…`) and the keeper of rollout files."""

# ruff: noqa: ARG002  (Lightning fixes the signatures)

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig

from msgrpo_lab.config.choices import build_option
from msgrpo_lab.credit.base import CreditAssigner
from msgrpo_lab.fidelity.gradients import ParameterSpace
from msgrpo_lab.fidelity.meter import draw_repeatedly, measure, yardstick_of
from msgrpo_lab.fidelity.rollout_file import GameSettings, SavedRollout, save_rollout
from msgrpo_lab.fidelity.statistics import resample_groups
from msgrpo_lab.oracle.frozen_lake import has_oracle
from msgrpo_lab.seeding import generator
from msgrpo_lab.tracking.logger import RunLogger
from msgrpo_lab.tracking.run import TAGGED_GROUPS
from msgrpo_lab.training.data import RolloutDataModule


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


log = logging.getLogger(__name__)


class FidelityMeter(RolloutWatcher):
    """Logs `credit/<score>` for the run's own credit rule, with `_low` and `_high`, the 95 % interval over groups.

    `credit/drawn_<score>` is the same for the episodes that the run's sampler has drawn, and `credit/<rule>/<score>`
    what another rule would have given the same rollout. Scores: `fidelity.meter.CREDIT_SCORES` and `DRAWN_SCORES`. What
    is not defined, such as a correlation with credit that is 0 everywhere, is not logged.

    It draws nothing from the run's streams and changes no update. Off by default, because the policy has to be asked
    on every text of every map: as much as a few rollouts' prompts where texts are many (paper's view, large models).

    Args:
        every: epochs (rollouts) between two measurements; None never measures.
        rules: other credit rules, files of `conf/credit` by name.
        resamples: of the groups, for the intervals.
        parameter_space: log `credit/parameter_cosine` too, the cosine of the two gradients in the space of the trained
            parameters: two more passes over all texts, forward and backward. Constrained decoding only.

    Raises:
        ValueError: a number is out of range, or there is no such rule.
    """

    def __init__(
        self,
        *,
        every: int | None = None,
        rules: Sequence[str] = (),
        resamples: int = 200,
        parameter_space: bool = False,
    ) -> None:
        super().__init__(key="fidelity", every=every)
        if resamples < 2:
            raise ValueError(f"callbacks.fidelity.resamples={resamples}: must be at least 2; give for example 200")
        try:
            self.rules: dict[str, CreditAssigner] = {name: build_option("credit", name) for name in rules}
        except ValueError as error:
            raise ValueError(f"callbacks.fidelity.rules=[{','.join(rules)}]: {error}") from error
        self.resamples = resamples
        self.parameter_space = parameter_space

    def without_oracle(self, game: str) -> None:
        """Says once that nothing is measured."""
        log.warning(
            "callbacks.fidelity.every=%s: %s has no oracle, so credit is not measured; set it to null, or train on "
            "env=frozenlake",
            self.every,
            game,
        )

    def look(self, trainer: L.Trainer, data: RolloutDataModule) -> None:
        """Measures, and adds to the metrics of the epoch, which are logged with its first update."""
        if data.rollout is None or data.truth is None:
            return
        epoch_metrics = self.measured(data, trainer.current_epoch)
        data.metrics |= {name: value for name, value in epoch_metrics.items() if math.isfinite(value)}

    def measured(self, data: RolloutDataModule, epoch: int) -> dict[str, float]:
        """Every score of the current rollout."""
        batch, truth = data.rollout, data.truth
        assert batch is not None
        assert truth is not None
        yardstick = yardstick_of(batch, truth)
        times_RG = resample_groups(yardstick.num_groups, self.resamples, generator(0, "reference", epoch))
        credit = data.assign(batch)
        # The generator that the run's own draw was made with gives the same draw again.
        drawn = draw_repeatedly(
            data.sampler, credit, batch, data.sampler.num_episodes, [generator(data.seed, "sampler", epoch)]
        )
        metrics: dict[str, float] = {}
        for name, score in measure(yardstick, credit, times_RG).items():
            value, low, high = score.estimate()
            metrics |= {f"credit/{name}": value, f"credit/{name}_low": low, f"credit/{name}_high": high}
        for name, score in measure(yardstick, credit, times_RG[:0], draws=drawn).items():
            metrics[f"credit/drawn_{name}"] = float(score.point_D[0])
        for rule_name, rule in self.rules.items():
            for name, score in measure(yardstick, rule(batch), times_RG[:0]).items():
                metrics[f"credit/{rule_name}/{name}"] = float(score.point_D[0])
        if self.parameter_space:
            space = ParameterSpace(
                policy=data.policy,
                prompt=data.collector.prompt,
                game=data.collector.example_game,
                sampling=data.sampling,
                token_budget=data.token_budget,
                sharing=data.sharing,
            )
            metrics["credit/parameter_cosine"] = space.cosine(truth, batch, credit)
        return metrics


class RolloutKeeper(RolloutWatcher):
    """Writes `<folder>/update_<updates done>.parquet`, refills included, and hands it to MLflow as an artifact.

    Args:
        every: epochs (rollouts) between two files; None writes none.
        folder: in the run's folder.
        keep_in_mlflow: whether the files become artifacts as well.

    Raises:
        ValueError: `every` is below 1, or `folder` is empty or outside the run's.
    """

    def __init__(self, *, every: int | None = None, folder: str = "rollouts", keep_in_mlflow: bool = True) -> None:
        super().__init__(key="rollouts", every=every)
        if not folder.strip():
            raise ValueError("callbacks.rollouts.folder=: must not be empty; give a name such as rollouts")
        if Path(folder).is_absolute() or folder.startswith("~") or ".." in Path(folder).parts:
            problem = "must lie in the run's folder, or the jobs of a sweep would overwrite each other's files"
            raise ValueError(f"callbacks.rollouts.folder={folder}: {problem}; give a name such as rollouts")
        self.folder = folder
        self.keep_in_mlflow = keep_in_mlflow

    def without_oracle(self, game: str) -> None:
        """Says once that the files will not do for a comparison."""
        log.warning("callbacks.rollouts.every=%s: %s has no oracle; its rollouts cannot be compared", self.every, game)

    def look(self, trainer: L.Trainer, data: RolloutDataModule) -> None:
        """Writes the rollout."""
        if data.rollout is None:
            return
        path = Path(trainer.default_root_dir) / self.folder / f"update_{trainer.global_step:06d}.parquet"
        choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
        saved = SavedRollout(
            batch=data.rollout,
            scenario=GameSettings.of(data.collector.make_game),
            sampling=data.sampling,
            table=None if data.truth is None else data.truth.table,
            origin={
                **{group: str(choices[group]) for group in TAGGED_GROUPS if choices.get(group) is not None},
                "seed": data.seed,
                "epoch": trainer.current_epoch,
                "update": trainer.global_step,
            },
        )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_rollout(path, saved)
        except OSError as error:
            log.warning("%s could not be written (%s); training goes on without it", path, error.strerror or error)
            return
        if not self.keep_in_mlflow:
            return
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_artifact(path, "rollouts")
