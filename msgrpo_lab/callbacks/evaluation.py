"""Evaluation during training: held-out environment seeds, the same for every run, sampled and greedy."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import Any, get_args

import lightning as L
import torch

from msgrpo_lab.oracle.players import Score
from msgrpo_lab.rollout.held_out import Outcomes, held_out_references, play_held_out, reference_ends
from msgrpo_lab.rollout.map_split import Maps, prompt_digests
from msgrpo_lab.training.data import RolloutDataModule

log = logging.getLogger(__name__)


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
        maps: `unseen` also plays as many held-out seeds of maps that training never meets, as
            `eval/<scenario>/unseen_…` and `…/unseen_greedy_…`; and says how many of the distinct prompts of an
            evaluation training has read, as `…prompts_met` (a share). The data module must split maps as well.
    """

    def __init__(
        self,
        *,
        episodes: int = 400,
        every: int = 8,
        temperature: float = 1.0,
        reference_simulations: int = 2000,
        scenario: str = "game",
        maps: Maps = "all",
    ) -> None:
        if maps not in get_args(Maps):
            raise ValueError(f"evaluation.maps={maps!r}: is unknown; use one of {', '.join(get_args(Maps))}")
        self.maps: Maps = maps
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
            self.references = held_out_references(data.collector.make_game, self.episodes, self.reference_simulations)
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

    def evaluate(self, trainer: L.Trainer, data: RolloutDataModule) -> dict[str, float]:
        """Plays the held-out seeds once sampled and once greedily, and logs the scores at the current update."""
        started = time.perf_counter()
        ends = reference_ends(data.collector.example_game, self.references)
        metrics: dict[str, float] = {}
        data.engine.sync(data.policy, trainer.global_step)
        split = data.map_split if self.maps == "unseen" else None
        places = {"": None} if split is None else {"": None, "unseen_": split.unseen_seeds(self.episodes)}
        for where, seeds in places.items():
            for prefix, greedy in ((where, False), (f"{where}greedy_", True)):
                sampling = replace(data.sampling, temperature=self.temperature, greedy=greedy)
                played = play_held_out(data.collector, data.engine, sampling, self.episodes, seeds)
                scores = Outcomes.of(played).scores(ends if seeds is None else None)
                if split is not None:
                    read = prompt_digests(played)
                    scores["prompts_met"] = len(read & data.prompts_met) / len(read)
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

    def state_dict(self) -> dict[str, Any]:
        """The latest evaluation."""
        return {"latest": dict(self.latest), "evaluated_at": self.evaluated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers what a checkpoint's run had evaluated."""
        self.latest, self.evaluated_at = dict(state_dict["latest"]), int(state_dict["evaluated_at"])

    @property
    def latest_return(self) -> float:
        """Sampled held-out return of the latest evaluation; nan before the first."""
        return self.latest.get(f"eval/{self.scenario}/return_mean", float("nan"))


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
