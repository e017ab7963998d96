"""Evaluation during training: held-out environment seeds, the same for every run, sampled and greedy."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import lightning as L
import numpy as np
import torch

from msgrpo_lab.data import RolloutDataModule
from msgrpo_lab.oracle.reference import Score, baseline_names, reference_scores
from msgrpo_lab.rollout.metrics import rollout_metrics
from msgrpo_lab.seeding import episode_generators, generator, held_out_seeds
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import RolloutBatch

log = logging.getLogger(__name__)

Z95 = 1.959963984540054
"""97.5 % quantile of the standard normal distribution: half-width of a 95 % interval in standard errors."""


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927); stays inside [0, 1] and is honest at 0 and 1."""
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean by the normal approximation; (nan, nan) for a single value."""
    if len(values) < 2:
        return float("nan"), float("nan")
    half = Z95 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half


def score_metrics(rollout: RolloutBatch, ends: tuple[float, float] | None) -> dict[str, float]:
    """Scores of evaluation episodes with 95 % intervals over the episodes, from the game's own unshaped return.

    `normalised_score` is (return − low) / (high − low), with `ends` = (low, high) the returns of the lower and the
    upper reference player: 0 is the one, 1 the other. It is left out where they are not known, or the same.
    """
    metrics = rollout_metrics(rollout)
    returns = [episode.game_ret for episode in rollout.episodes]
    success = [episode.success for episode in rollout.episodes]
    intervals = {
        "return_mean": (float(np.mean(returns)), *mean_interval(returns)),
        "success_rate": (float(np.mean(success)), *wilson_interval(sum(success), len(success))),
    }
    if ends is not None and not math.isclose(*ends):
        low, high = ends
        low_to_high = [(value - low) / (high - low) for value in intervals["return_mean"]]
        intervals["normalised_score"] = (low_to_high[0], low_to_high[1], low_to_high[2])
    named = {
        name + suffix: value
        for name, values in intervals.items()
        for suffix, value in zip(("", "_low", "_high"), values, strict=True)
    }
    return named | {name: metrics[name] for name in ("episode_length", "valid_action_rate")}


class HeldOutEvaluation(L.Callback):
    """Plays the training scenario on held-out seeds before the first update, every few epochs, and after the last.

    Metrics are named `eval/<scenario>/…` (sampled) and `eval/<scenario>/greedy_…`; the reference players' scores are
    logged once, as `reference/<scenario>/<player>/…`: exact on the same seeds for Frozen Lake, simulated on these and
    further held-out seeds for other games.

    Args:
        episodes: held-out environment seeds, one episode each.
        every: epochs between evaluations.
        temperature: of the sampled evaluation.
        reference_simulations: episodes a reference player is simulated for where there is no exact value.
        scenario: name of the scenario in the metrics.
    """

    def __init__(
        self,
        *,
        episodes: int = 400,
        every: int = 8,
        temperature: float = 1.0,
        reference_simulations: int = 2000,
        scenario: str = "game",
    ) -> None:
        for key, value in (("episodes", episodes), ("every", every), ("reference_simulations", reference_simulations)):
            if value < 1:
                raise ValueError(f"evaluation.{key}={value}: must be at least 1")
        if not temperature > 0:
            raise ValueError(f"evaluation.temperature={temperature}: must be above 0; greedy play is evaluated anyway")
        self.episodes = episodes
        self.every = every
        self.temperature = temperature
        self.reference_simulations = reference_simulations
        self.scenario = scenario
        self.references: dict[str, Score] = {}
        self.latest: dict[str, float] = {}
        """Metrics of the latest evaluation."""
        self.evaluated_at = -1
        """Optimiser updates done when it was made; -1 before the first."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Reference players and the untrained policy."""
        data = _data(trainer)
        if not self.references:
            self.references = self._reference_scores(data)
        if trainer.global_step == 0:
            for player, score in self.references.items():
                prefix = f"reference/{self.scenario}/{player}"
                _log(
                    trainer, {f"{prefix}/return_mean": score.return_mean, f"{prefix}/success_rate": score.success_rate}
                )
            self.evaluate(trainer, data)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """The policy as it is now."""
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs:
            self.evaluate(trainer, _data(trainer))

    def _reference_scores(self, data: RolloutDataModule) -> dict[str, Score]:
        seeds = held_out_seeds(max(self.episodes, self._simulated(data)))
        return reference_scores(data.collector.make_game, seeds, generator(0, "reference"))

    def _ends(self, data: RolloutDataModule) -> tuple[float, float] | None:
        """Returns of the lower and the upper reference player; None for a game without an upper one."""
        try:
            low, high = baseline_names(data.collector.example_game)
        except ValueError:
            return None
        return self.references[low].return_mean, self.references[high].return_mean

    def _simulated(self, data: RolloutDataModule) -> int:
        """Seeds needed for the reference players: more of them where they have to be simulated."""
        exact = isinstance(data.collector.example_game, FrozenLake)
        return self.episodes if exact else self.reference_simulations

    def evaluate(self, trainer: L.Trainer, data: RolloutDataModule) -> dict[str, float]:
        """Plays the held-out seeds once sampled and once greedily, and logs the scores at the current update."""
        started = time.perf_counter()
        ends = self._ends(data)
        metrics: dict[str, float] = {}
        data.engine.sync(data.policy, trainer.global_step)
        for prefix, greedy in (("", False), ("greedy_", True)):
            scores = score_metrics(self._play(data, greedy), ends)
            metrics |= {f"eval/{self.scenario}/{prefix}{name}": value for name, value in scores.items()}
        metrics["perf/evaluation_s"] = time.perf_counter() - started
        self.latest, self.evaluated_at = metrics, trainer.global_step
        _log(trainer, metrics)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        log.info(
            "update %d: held-out return %.3f, success %.3f sampled, %.3f greedy",
            trainer.global_step,
            metrics[f"eval/{self.scenario}/return_mean"],
            metrics[f"eval/{self.scenario}/success_rate"],
            metrics[f"eval/{self.scenario}/greedy_success_rate"],
        )
        return metrics

    @property
    def latest_return(self) -> float:
        """Sampled held-out return of the latest evaluation; nan before the first."""
        return self.latest.get(f"eval/{self.scenario}/return_mean", float("nan"))

    def _play(self, data: RolloutDataModule, greedy: bool) -> RolloutBatch:
        return data.collector.collect(
            seeds=held_out_seeds(self.episodes),
            group_size=1,
            members=[0] * self.episodes,
            engine=data.engine,
            sampling=replace(data.sampling, temperature=self.temperature, greedy=greedy),
            rngs=episode_generators(0, "evaluation", 0, self.episodes),
        )


def _data(trainer: L.Trainer) -> RolloutDataModule:
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, RolloutDataModule):
        raise RuntimeError("held-out evaluation needs the rollout data module: call trainer.fit(module, datamodule=…)")
    return data


def _log(trainer: L.Trainer, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(
            {name: value for name, value in metrics.items() if math.isfinite(value)}, trainer.global_step
        )
