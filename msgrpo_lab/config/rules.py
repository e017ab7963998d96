"""Rules that tie several keys together, or a key to the world outside: files, devices."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from msgrpo_lab.config.paths import why_unwritable
from msgrpo_lab.config.schemas import EXAMPLES, SECTIONS, VALUES
from msgrpo_lab.config.trainer_rules import check_trainer
from msgrpo_lab.config.tree import section, whole
from msgrpo_lab.config.value_types import UNRESOLVED, annotations_of, describe, fits
from msgrpo_lab.messages import HIDDEN, Mistake, closest_first, did_you_mean, has_password, looks_secret, show

OF_TRAINING = frozenset({"resume", "ckpt_path"})
"""Values that mean this only where something is trained (`update`); an evaluation has a `resume` of its own."""
TAG_PARSER = "ActionTagParser"
"""Reads the action out of an XML tag."""
WORD_PARSER = "FirstWordParser"
"""Reads the first legal word, and tells when it stands complete."""
LARGEST_SEED = 2**63 - 1
"""torch's generators take no larger one."""
TRACKED = "run:"
"""How a `ckpt_path` begins that names a tracked run by its id."""


def check_sections(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    """Mistakes in the sections that are plain values: unknown keys, types, ranges."""
    for key, annotation in VALUES.items():
        if key in OF_TRAINING and "update" not in tree:
            continue
        if key in tree and not fits(tree[key], annotation):
            yield Mistake(key, tree[key], f"must be {describe(annotation)}", f"give for example {key}={EXAMPLES[key]}")
    for key, schema in SECTIONS.items():
        if key in tree:
            yield from _check_section(key, tree[key], schema)


def _check_section(path: str, values: Any, schema: type) -> Iterator[Mistake]:
    if values is UNRESOLVED:
        return
    if not isinstance(values, Mapping):
        yield Mistake(path, values, "must be a section of keys", f"give {path}.{next(iter(schema.__annotations__))}=…")
        return
    annotations = annotations_of(schema.__annotations__, vars(sys.modules[schema.__module__]))
    for key, value in values.items():
        annotation, name = annotations.get(key), f"{path}.{key}"
        if annotation is None:
            known = ", ".join(closest_first(key, annotations))
            yield Mistake(name, value, "no such key", f"{did_you_mean(key, annotations)}{path} takes: {known}")
        elif is_dataclass(annotation):
            yield from _check_section(name, value, annotation)  # type: ignore[arg-type]  # a class, not an instance
        elif not fits(value, annotation):
            example = show(getattr(schema, key, "…"))
            yield Mistake(name, value, f"must be {describe(annotation)}", f"give for example {name}={example}")


def check_secrets(texts: Iterable[tuple[str, str]]) -> Iterator[Mistake]:
    """Secrets that are written out in a configuration, which is kept with every run.

    Args:
        texts: dotted keys and texts as they were written, with `${…}` where something is to be put in.
    """
    for key, text in texts:
        if (looks_secret(key) and text and "${" not in text) or has_password(text):
            remedy = f"put it into an environment variable and write {key}='${{oc.env:NAME}}'"
            if key.endswith(".base_url"):  # an address that takes no password, wherever it is written
                remedy = "leave user and password out; a key is read from the variable that api_key_env names"
            yield Mistake(key, HIDDEN, "a secret would be kept with the run's configuration", remedy)


def check_across(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    """Mistakes that no single section shows: sizes that contradict each other, files that are not there, devices."""
    seed = whole(tree.get("seed"))
    if seed is not None and seed > LARGEST_SEED:
        yield Mistake("seed", seed, f"must be at most {LARGEST_SEED}", "give for example seed=0")
    yield from _check_sizes(tree)
    yield from _check_answers(tree)
    yield from _check_fidelity(tree)
    yield from _check_model(section(tree, "model"))
    yield from _check_files(tree)
    if "trainer" in tree:
        yield from check_trainer(section(tree, "trainer"))


def _check_sizes(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    rollout, update, sampler = section(tree, "rollout"), section(tree, "update"), section(tree, "sampler")
    drawn = whole(sampler.get("num_episodes"))
    groups, size = whole(rollout.get("num_groups")), whole(rollout.get("group_size"))
    collected = groups * size if groups is not None and size is not None and groups >= 1 and size >= 2 else None
    if drawn is not None and collected is not None and not sampler.get("replace", False) and drawn > collected:
        yield Mistake(
            "sampler.num_episodes",
            drawn,
            f"the rollout collects only {groups} groups of {size} = {collected} episodes",
            f"give at most {collected}, raise rollout.num_groups, or set sampler.replace=true",
        )
    minibatches = whole(update.get("minibatches"))
    if minibatches is not None and drawn is not None and minibatches > drawn >= 1:
        problem = f"there are only {drawn} episodes to split (sampler.num_episodes)"
        yield Mistake("update.minibatches", minibatches, problem, f"give at most {drawn}")


def _check_answers(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    sampling = section(section(tree, "rollout"), "sampling")
    parser = str(section(section(tree, "prompt"), "parser").get("_target_", "")).rpartition(".")[2]
    if sampling.get("constrain") is True and parser == TAG_PARSER:
        yield Mistake(
            "rollout.sampling.constrain",
            True,
            "the prompt asks for an <action> tag, which an answer constrained to one legal word never holds",
            "set sampling=free, or prompt=action_only",
        )
    prompt = section(tree, "prompt")
    if any(prompt.get("stop") or ()) and parser == WORD_PARSER and prompt.get("stop_at_action") is not False:
        yield Mistake(
            "prompt.stop",
            prompt["stop"],
            "the prompt's parser ends an answer at its first legal word by itself",
            "leave it empty, or give a parser that needs it, as prompt=think_action does",
        )


def _check_fidelity(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    meter = section(section(tree, "callbacks"), "fidelity")
    if meter.get("parameter_space") is not True or meter.get("every") is None:
        return
    if section(section(tree, "rollout"), "sampling").get("constrain") is False:
        yield Mistake(
            "callbacks.fidelity.parameter_space",
            True,
            "gradients in parameter space need answers constrained to the legal words (rollout.sampling.constrain)",
            "set it to false: credit is then measured in logit space alone",
        )


def _check_model(model: Mapping[str, Any]) -> Iterator[Mistake]:
    for key, without in (("lora_rank", "; null trains all weights"), ("lora_alpha", "")):
        value = whole(model.get(key))
        if value is not None and value < 1:
            yield Mistake(f"model.{key}", value, f"must be at least 1{without}", f"give for example model.{key}=16")
    for key, value in (("seed", model.get("seed")), ("source.init_seed", section(model, "source").get("init_seed"))):
        if (whole(value) or 0) < 0:
            yield Mistake(f"model.{key}", value, "must be at least 0", f"give for example model.{key}=0")


def _check_files(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    path = section(tree, "model").get("path")
    if isinstance(path, str) and not (Path(path).expanduser() / "config.json").is_file():
        found = Path(path).expanduser().resolve()
        problem = f"there is no config.json in {found}" if found.exists() and path else f"there is nothing at {found}"
        remedy = "give the folder of a model saved with save_pretrained, or leave the key out"
        yield Mistake("model.path", path, problem, remedy)
    for key, folder in section(tree, "paths").items():
        if isinstance(folder, str) and not folder.strip():
            yield Mistake(f"paths.{key}", folder, "must not be empty", "give a folder, or leave the key out")
        elif key == "outputs" and isinstance(folder, str) and (reason := why_unwritable(Path(folder))) is not None:
            problem = f"this folder cannot be written ({reason})"
            yield Mistake("paths.outputs", folder, problem, "give a folder you may write to")
    checkpoint = tree.get("ckpt_path")
    tracked = isinstance(checkpoint, str) and checkpoint.startswith(TRACKED)
    if isinstance(checkpoint, str) and not tracked and not Path(checkpoint).expanduser().exists():
        found = Path(checkpoint).expanduser().resolve()
        remedy = f"give the folder of a checkpoint, of an earlier run, or {TRACKED}<its MLflow id>"
        yield Mistake("ckpt_path", checkpoint, f"there is no checkpoint at {found}", remedy)
    if checkpoint is not None and tree.get("resume") is not None:
        remedy = "leave one of the two out"
        yield Mistake("resume", tree["resume"], "ckpt_path already names what to go on from", remedy)
