"""The fidelity meter while a run trains: how faithful its credit rule is to the exact advantages, as `credit/…`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import lightning as L

from msgrpo_lab.callbacks.watcher import RolloutWatcher
from msgrpo_lab.credit.base import CreditAssigner
from msgrpo_lab.data import RolloutDataModule
from msgrpo_lab.fidelity.choices import configured
from msgrpo_lab.fidelity.estimate import resample_groups
from msgrpo_lab.fidelity.meter import draw_repeatedly, measure, yardstick_of
from msgrpo_lab.fidelity.parameters import ParameterSpace
from msgrpo_lab.seeding import generator

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
            self.rules: dict[str, CreditAssigner] = {name: configured("credit", name) for name in rules}
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
