"""Rules that tie several keys together, or a key to the world outside: files, devices."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from msgrpo_lab.config.mistakes import Mistake, closest_first, did_you_mean, show
from msgrpo_lab.config.schemas import SECTIONS, VALUES
from msgrpo_lab.config.value_types import UNRESOLVED, annotations_of, describe, fits

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
TAG_PARSER = "ActionTagParser"
"""Reads the action out of an XML tag."""
LARGEST_SEED = 2**63 - 1
"""torch's generators take no larger one."""
CHECKPOINT_WORDS = ("last", "best", "hpc", "registry")
"""Values of `ckpt_path` that Lightning resolves itself."""


def check_sections(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    """Mistakes in the sections that are plain values: unknown keys, types, ranges."""
    for key, annotation in VALUES.items():
        if key in tree and not fits(tree[key], annotation):
            yield Mistake(key, tree[key], f"must be {describe(annotation)}", f"give for example {key}=0")
    for key, schema in SECTIONS.items():
        if key in tree:
            yield from _check_section(key, tree[key], schema)


def _check_section(path: str, section: Any, schema: type) -> Iterator[Mistake]:
    if section is UNRESOLVED:
        return
    if not isinstance(section, Mapping):
        yield Mistake(path, section, "must be a section of keys", f"give {path}.{next(iter(schema.__annotations__))}=…")
        return
    annotations = annotations_of(schema.__annotations__, vars(sys.modules[schema.__module__]))
    for key, value in section.items():
        annotation, name = annotations.get(key), f"{path}.{key}"
        if annotation is None:
            known = ", ".join(closest_first(key, annotations))
            yield Mistake(name, value, "no such key", f"{did_you_mean(key, annotations)}{path} takes: {known}")
        elif is_dataclass(annotation):
            yield from _check_section(name, value, annotation)  # type: ignore[arg-type]  # a class, not an instance
        elif not fits(value, annotation):
            example = show(getattr(schema, key, "…"))
            yield Mistake(name, value, f"must be {describe(annotation)}", f"give for example {name}={example}")


def check_across(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    """Mistakes that no single section shows: sizes that contradict each other, files that are not there, devices."""
    seed = _integer(tree.get("seed"))
    if seed is not None and seed > LARGEST_SEED:
        yield Mistake("seed", seed, f"must be at most {LARGEST_SEED}", "give for example seed=0")
    yield from _check_sizes(tree)
    yield from _check_answers(tree)
    yield from _check_model(_section(tree, "model"))
    yield from _check_files(tree)
    if "trainer" in tree:
        yield from _check_trainer(_section(tree, "trainer"))


def _check_sizes(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    rollout, update, sampler = _section(tree, "rollout"), _section(tree, "update"), _section(tree, "sampler")
    drawn = _integer(sampler.get("num_episodes"))
    groups, size = _integer(rollout.get("num_groups")), _integer(rollout.get("group_size"))
    collected = groups * size if groups is not None and size is not None and groups >= 1 and size >= 2 else None
    if drawn is not None and collected is not None and not sampler.get("replace", False) and drawn > collected:
        yield Mistake(
            "sampler.num_episodes",
            drawn,
            f"the rollout collects only {groups} groups of {size} = {collected} episodes",
            f"give at most {collected}, raise rollout.num_groups, or set sampler.replace=true",
        )
    minibatches = _integer(update.get("minibatches"))
    if minibatches is not None and drawn is not None and minibatches > drawn >= 1:
        problem = f"there are only {drawn} episodes to split (sampler.num_episodes)"
        yield Mistake("update.minibatches", minibatches, problem, f"give at most {drawn}")


def _check_answers(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    sampling = _section(_section(tree, "rollout"), "sampling")
    parser = str(_section(_section(tree, "prompt"), "parser").get("_target_", "")).rpartition(".")[2]
    if sampling.get("constrain") is True and parser == TAG_PARSER:
        yield Mistake(
            "rollout.sampling.constrain",
            True,
            "the prompt asks for an <action> tag, which an answer constrained to one legal word never holds",
            "set rollout.sampling.constrain=false with a larger rollout.sampling.max_new_tokens, or prompt=action_only",
        )


def _check_model(model: Mapping[str, Any]) -> Iterator[Mistake]:
    for key, without in (("lora_rank", "; null trains all weights"), ("lora_alpha", "")):
        value = _integer(model.get(key))
        if value is not None and value < 1:
            yield Mistake(f"model.{key}", value, f"must be at least 1{without}", f"give for example model.{key}=16")


def _check_files(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    path = _section(tree, "model").get("path")
    if isinstance(path, str) and not (Path(path).expanduser() / "config.json").is_file():
        found = Path(path).expanduser().resolve()
        problem = f"there is no config.json in {found}" if found.exists() and path else f"there is nothing at {found}"
        remedy = "give the folder of a model saved with save_pretrained, or leave the key out"
        yield Mistake("model.path", path, problem, remedy)
    outputs = _section(tree, "paths").get("outputs")
    if isinstance(outputs, str) and not outputs.strip():
        yield Mistake("paths.outputs", outputs, "must not be empty", "give a folder, or leave the key out")
    checkpoint = tree.get("ckpt_path")
    if (
        isinstance(checkpoint, str)
        and checkpoint not in CHECKPOINT_WORDS
        and not Path(checkpoint).expanduser().exists()
    ):
        found = Path(checkpoint).expanduser().resolve()
        yield Mistake(
            "ckpt_path", checkpoint, f"there is no checkpoint at {found}", "give a .ckpt file of an earlier run"
        )


def _check_trainer(trainer: Mapping[str, Any]) -> Iterator[Mistake]:
    accelerator = trainer.get("accelerator", "auto")
    if isinstance(accelerator, str) and accelerator not in ACCELERATORS:
        options = ", ".join(closest_first(accelerator, ACCELERATORS))
        yield Mistake(
            "trainer.accelerator", accelerator, "Lightning has no such accelerator", f"give one of: {options}"
        )
    if accelerator in ("gpu", "cuda") and not _gpu_is_there(accelerator):
        yield Mistake(
            "trainer.accelerator", accelerator, "this machine has none that torch can use", "give auto or cpu"
        )
    epochs = trainer.get("max_epochs", 1)
    if epochs is not UNRESOLVED and (_integer(epochs) is None or epochs < 1):
        problem = "must be a whole number at least 1 (an epoch is one rollout and its updates)"
        yield Mistake("trainer.max_epochs", epochs, problem, "give for example trainer.max_epochs=30")
    yield from _check_processes(trainer)


def _gpu_is_there(accelerator: str) -> bool:
    import torch

    return torch.cuda.is_available() or (accelerator == "gpu" and torch.backends.mps.is_available())


def _check_processes(trainer: Mapping[str, Any]) -> Iterator[Mistake]:
    """Several devices or processes: each would play and learn the very same episodes, and track a run of its own."""
    problem = "training over several devices is not built: each would play and learn the very same episodes"
    remedy = "; runs side by side are a sweep with launcher=joblib"
    strategy, nodes = trainer.get("strategy", "auto"), _integer(trainer.get("num_nodes"))
    count = _device_count(trainer)
    if isinstance(strategy, str) and strategy.startswith(("ddp", "fsdp", "deepspeed")):
        yield Mistake("trainer.strategy", strategy, problem, f"give auto{remedy}")
    elif count > 1:
        yield Mistake("trainer.devices", trainer.get("devices", "auto"), problem, f"set trainer.devices=1{remedy}")
    elif count < 1:
        yield Mistake(
            "trainer.devices", trainer.get("devices"), "there is nothing to train on", "set trainer.devices=1"
        )
    if nodes is not None and nodes > 1:
        yield Mistake("trainer.num_nodes", nodes, problem, f"leave it out{remedy}")


def _device_count(trainer: Mapping[str, Any]) -> int:
    """Devices a job would use; `auto` and -1 are all there are of an accelerator, and one CPU."""
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
    return int(devices) if isinstance(devices, int) or (isinstance(devices, str) and devices.isdigit()) else 1


def _section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = tree.get(key)
    return section if isinstance(section, Mapping) else {}


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
