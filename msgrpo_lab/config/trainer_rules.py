"""Rules for the section `trainer`: devices that are there, and arguments of Lightning's that the lab does otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgrpo_lab.config.tree import whole
from msgrpo_lab.config.value_types import UNRESOLVED
from msgrpo_lab.messages import Mistake, closest_first

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
_STEPS_BY_HAND = "the module takes its optimiser steps itself"
FIXED: Mapping[str, tuple[tuple[Any, ...], str, str]] = {
    "accumulate_grad_batches": ((1,), _STEPS_BY_HAND, "set update.minibatches or update.token_budget"),
    "gradient_clip_val": ((None,), _STEPS_BY_HAND, "set update.max_grad_norm"),
    "gradient_clip_algorithm": ((None,), _STEPS_BY_HAND, "set update.max_grad_norm"),
    "precision": ((None, 32, "32", "32-true"), "the model's own precision is used", "set model.precision"),
    "max_steps": ((None, -1), "a run is as long as trainer.max_epochs", "set trainer.max_epochs"),
    "min_steps": ((None,), "a run is as long as trainer.max_epochs", "leave it out"),
    "min_epochs": ((None,), "a run is as long as trainer.max_epochs", "leave it out"),
    "fast_dev_run": ((None, False, 0), "would leave the rollouts' updates out", "use debug=fast or debug=one_update"),
    "overfit_batches": ((None, 0, 0.0), "there is no data set to repeat", "leave it out"),
    "limit_train_batches": ((None, 1.0), "would leave a rollout's updates out", "set update.minibatches"),
    "reload_dataloaders_every_n_epochs": ((0,), "a rollout is collected every epoch anyway", "leave it out"),
    "barebones": ((False,), "would leave metrics and callbacks out", "leave it out"),
    "enable_checkpointing": ((None, False), "Lightning's checkpoints hold pickled objects", "set it to false"),
    "profiler": ((None,), "a trace is made in another way", "use debug=profiler"),
    "plugins": ((None,), "none is known to leave the results as they are", "leave it out"),
    "detect_anomaly": ((None, True, False), "must be true or false", "set trainer.detect_anomaly=false"),
    "deterministic": ((None, True, "warn"), "a seed must give the same bits again", "set trainer.deterministic=true"),
    "max_time": ((None,), "a run is as long as trainer.max_epochs", "set trainer.max_epochs"),
}
"""Arguments of `lightning.Trainer` that have one right value here (or few): those, why, and what to do instead."""
GIVEN: Mapping[str, str] = {"logger": "; choose logger=…", "callbacks": "; add +callbacks.<name>._target_=…"}
"""Arguments that the job passes to the trainer, and what to set instead."""


def check_trainer(trainer: Mapping[str, Any]) -> Iterator[Mistake]:
    """Mistakes in the section `trainer`: what this machine has not, and what the lab does in its own way."""
    accelerator = trainer.get("accelerator", "auto")
    if accelerator not in (*ACCELERATORS, UNRESOLVED):
        options = ", ".join(closest_first(str(accelerator), ACCELERATORS))
        yield Mistake(
            "trainer.accelerator", accelerator, "Lightning has no such accelerator", f"give one of: {options}"
        )
    if accelerator in ("gpu", "cuda") and not _gpu_is_there(accelerator):
        yield Mistake(
            "trainer.accelerator", accelerator, "this machine has none that torch can use", "give auto or cpu"
        )
    epochs = trainer.get("max_epochs", 1)
    if epochs is not UNRESOLVED and (whole(epochs) is None or epochs < 1):
        problem = "must be a whole number at least 1 (an epoch is one rollout and its updates)"
        yield Mistake("trainer.max_epochs", epochs, problem, "give for example trainer.max_epochs=30")
    yield from _check_processes(trainer)
    yield from _check_fixed(trainer)


def _gpu_is_there(accelerator: str) -> bool:
    import torch

    return torch.cuda.is_available() or (accelerator == "gpu" and torch.backends.mps.is_available())


def _check_processes(trainer: Mapping[str, Any]) -> Iterator[Mistake]:
    """Several devices or processes: each would play and learn the very same episodes, and track a run of its own."""
    problem = "training over several devices is not built: each would play and learn the very same episodes"
    remedy = "; runs side by side are a sweep with launcher=joblib"
    strategy, nodes = trainer.get("strategy", "auto"), whole(trainer.get("num_nodes"))
    count = _device_count(trainer)
    if isinstance(strategy, str) and strategy.startswith(("ddp", "fsdp", "deepspeed")):
        yield Mistake("trainer.strategy", strategy, problem, f"give auto{remedy}")
    elif strategy not in ("auto", "single_device", UNRESOLVED):
        yield Mistake("trainer.strategy", strategy, "one job runs on one device", "give auto")
    elif count > 1:
        yield Mistake("trainer.devices", trainer.get("devices", "auto"), problem, f"set trainer.devices=1{remedy}")
    elif count < 1:
        problem = "there is nothing to train on"
        yield Mistake("trainer.devices", trainer.get("devices"), problem, "set trainer.devices=1")
    if nodes is not None and nodes > 1:
        yield Mistake("trainer.num_nodes", nodes, problem, f"leave it out{remedy}")


def _device_count(trainer: Mapping[str, Any]) -> int:
    """Devices a job would use; `auto` and -1 are all there are of an accelerator, and one CPU. 0 for no such number."""
    devices = trainer.get("devices", "auto")
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    if devices in ("auto", "-1", -1):
        if trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
            return 1
        import torch

        return max(1, torch.cuda.device_count())
    return int(devices) if whole(devices) is not None or (isinstance(devices, str) and devices.isdecimal()) else 0


def _check_fixed(trainer: Mapping[str, Any]) -> Iterator[Mistake]:
    for key, (allowed, problem, remedy) in FIXED.items():
        value = trainer.get(key, UNRESOLVED)
        if value is not UNRESOLVED and not any(type(value) is type(one) and value == one for one in allowed):
            yield Mistake(f"trainer.{key}", value, problem, remedy)
    for key in GIVEN:
        if key in trainer:
            yield Mistake(f"trainer.{key}", trainer[key], "the job gives this itself", f"leave it out{GIVEN[key]}")
    every = whole(trainer.get("log_every_n_steps", 1))
    if every is not None and every < 1:
        problem = "must be at least 1, or nothing would be logged"
        yield Mistake("trainer.log_every_n_steps", every, problem, "give for example trainer.log_every_n_steps=1")
