"""One run, fitted: its callbacks put together, trained, and what was trained kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from msgrpo_lab import __version__
from msgrpo_lab.callbacks.checkpoints import AdapterKeeper, CheckpointKeeper, Resumption, best_of
from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.callbacks.progress import StopCheck
from msgrpo_lab.runs.checkpoint import Snapshot
from msgrpo_lab.runs.resume import Beginning
from msgrpo_lab.runs.stopping import Stopping
from msgrpo_lab.tracking.logger import RunLogger
from msgrpo_lab.training.assemble import Lab, component
from msgrpo_lab.training.state import load_trainable

PRECISION_TAG = "msgrpo.precision"
"""Tag of a run: the number type it computed in."""


def fit(
    config: DictConfig,
    lab: Lab,
    *,
    logger: Logger,
    folder: Path,
    begin: Beginning,
    plain: dict[str, Any],
    stopping: Stopping,
) -> float:
    """Trains, and keeps what was trained.

    Args:
        config: the run's configuration.
        lab: what it was assembled to.
        logger: of the tracked run.
        folder: of the run.
        begin: where to begin.
        plain: the configuration as plain values, for checkpoints.
        stopping: tells whether a signal has come.

    Returns:
        The last evaluation's sampled return.
    """
    choices = {str(group): choice for group, choice in HydraConfig.get().runtime.choices.items()}
    evaluation: HeldOutEvaluation = component(config.evaluation, scenario=choices["env"])
    adapter = AdapterKeeper(folder=folder, evaluation=evaluation)
    precision = str(lab.policy.compute_dtype).removeprefix("torch.")
    origin = {
        "config": plain,
        "choices": choices,
        "run_id": getattr(logger, "run_id", None),
        "versions": {"msgrpo_lab": __version__, "torch": str(torch.__version__)},
        "precision": precision,
    }
    if isinstance(logger, RunLogger):
        logger.set_tag(PRECISION_TAG, precision)
    if lab.policy.product_speed is not None:
        speed = lab.policy.product_speed._asdict()
        logger.log_metrics({f"perf/product_gflops_{name}": rate for name, rate in speed.items()}, step=0)
    keeper = CheckpointKeeper(
        folder=folder,
        origin=origin,
        adapter=adapter,
        every=config.checkpoint.every,
        keep_last=config.checkpoint.keep_last,
    )
    if begin.snapshot is not None and begin.snapshot.epoch >= config.trainer.max_epochs:
        return _wind_up(begin.snapshot, lab, evaluation, adapter, logger)
    named: list[L.Callback] = [component(node) for node in (config.callbacks or {}).values() if node is not None]
    resumed = [] if begin.snapshot is None else [Resumption(snapshot=begin.snapshot, adapter=adapter)]
    callbacks = [*resumed, StopCheck(stopping), *named, evaluation, adapter, keeper]
    trainer: L.Trainer = component(config.trainer, logger=logger, callbacks=callbacks, default_root_dir=str(folder))
    trainer.fit(lab.module, datamodule=lab.data)
    return float(evaluation.latest_return)


def going_on_from(snapshot: Snapshot | None, config: DictConfig) -> DictConfig:
    """The configuration as a checkpoint wants it: with the number type its run computed in, and without the adapter
    that its run began with, whose place its own weights take."""
    if snapshot is None:
        return config
    config = copy.deepcopy(config)
    precision = snapshot.state.get("precision")
    if precision is not None and config.model.precision == "auto":
        config.model.precision = precision
    if config.model.get("adapter") is not None:
        config.model.adapter = None
    return config


def _wind_up(
    snapshot: Snapshot, lab: Lab, evaluation: HeldOutEvaluation, adapter: AdapterKeeper, logger: Logger
) -> float:
    """The end of a run that was killed after its last epoch and before its adapter was kept."""
    load_trainable(lab.policy, snapshot.weights)
    states = snapshot.state["callbacks"]
    for callback in (evaluation, adapter):
        if callback.state_key in states:
            callback.load_state_dict(states[callback.state_key])
    adapter.best = best_of(snapshot)
    adapter.keep(lab.policy, [logger])
    return float(evaluation.latest_return)
