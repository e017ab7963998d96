"""Rules that tie several keys together, or a key to the world outside: files, devices, the model's own shape."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgrpo_lab.config.components import UNRESOLVED, annotations_of, describe, fits, section, whole
from msgrpo_lab.config.paths import why_unwritable
from msgrpo_lab.config.schemas import EXAMPLES, SECTIONS, VALUES
from msgrpo_lab.messages import HIDDEN, Mistake, closest_first, did_you_mean, has_password, looks_secret, show

if TYPE_CHECKING:
    from msgrpo_lab.lap.prompt import PromptBuilder
    from msgrpo_lab.lap.sources import Outline
    from msgrpo_lab.tsmg.base import TextGame

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
    if tree.get("resume") is None and tree.get("ckpt_path") is None:  # a checkpoint holds what the adapter became
        yield from _check_adapter_folder(section(tree, "model"))
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


def _check_adapter_folder(model: Mapping[str, Any]) -> Iterator[Mistake]:
    """An adapter that training goes on from: it is whole, of this base model, and of the shape that is trained."""
    from msgrpo_lab.lap.adapter import read_adapter

    folder = model.get("adapter")
    if not isinstance(folder, str):
        return
    try:
        adapter = read_adapter(Path(folder).expanduser())
        if isinstance(model.get("source"), Mapping):
            adapter.check_base(model)
    except ValueError as error:
        yield Mistake("model.adapter", folder, str(error), "or leave the key out")
        return
    for key, value in adapter.shape.items():
        given = model.get(key, value)
        if given != ALL_LINEAR and (sorted(given) if isinstance(given, list) else given) != value:
            remedy = f"set model.{key}={show(value)}, or leave model.adapter out"
            yield Mistake("model.adapter", folder, f"has {key}={show(value)}, and model.{key} is {show(given)}", remedy)


ALL_LINEAR = "all-linear"
SEEN = 16
"""Initial states whose prompts are measured; a board's prompts differ by a few tokens."""


def check_model(tree: Mapping[str, Any]) -> tuple[Mistake, ...]:
    """Mistakes that only the model's own configuration and tokenizer show. Reads no weights and asks no network.

    Args:
        tree: resolved values of a training configuration whose model, prompt, env and sections are sound by themselves.
    """
    model = dict(tree["model"])
    if isinstance(model.get("source"), Mapping):
        model["source"] = {key: value for key, value in model["source"].items() if key != "init_seed"}
    looked_at = {
        "model": {key: value for key, value in model.items() if key != "seed"},
        **{key: tree[key] for key in ("prompt", "env", "rollout", "update")},
    }
    return _mistakes(json.dumps(looked_at, sort_keys=True, default=str))


@functools.cache
def _mistakes(looked_at: str) -> tuple[Mistake, ...]:
    """Of plain values as JSON: the jobs of a sweep are mostly alike."""
    from hydra.utils import instantiate

    from msgrpo_lab.lap.prompt import PromptBuilder
    from msgrpo_lab.lap.sources import LocalModel, ModelSourceError

    tree = json.loads(looked_at)
    model = tree["model"]
    source = instantiate(model["source"]) if model.get("path") is None else LocalModel(path=model["path"])
    if not hasattr(source, "outline"):
        return ()
    try:
        outline = source.outline()
    except (ModelSourceError, OSError):
        return ()  # it is told when the model is loaded, which may fetch it first
    mistakes = [] if model.get("lora_rank") is None else list(_check_adapter(model, outline))
    if outline.tokenizer is not None and getattr(outline.tokenizer, "chat_template", None):
        prompt = PromptBuilder(instantiate(tree["prompt"], _convert_="all"), outline.tokenizer)
        game = instantiate(tree["env"], _convert_="all")
        mistakes += _check_lengths(tree, outline, prompt, game)
        mistakes += _check_examples(prompt, game)
    mistakes += _check_top_k(tree, outline)
    return tuple(mistakes)


def _check_top_k(tree: Mapping[str, Any], outline: Outline) -> Iterator[Mistake]:
    top_k = whole(section(section(tree, "rollout"), "sampling").get("top_k"))
    size = getattr(outline.config.get_text_config(), "vocab_size", None)
    if top_k is not None and size is not None and top_k > size:
        problem = f"the model's vocabulary has only {size} tokens"
        yield Mistake("rollout.sampling.top_k", top_k, problem, "give for example 3, or null to keep all")


def _check_examples(prompt: PromptBuilder, game: TextGame) -> Iterator[Mistake]:
    """Worked examples teach the form of an answer: one that the prompt's own parser cannot read teaches a wrong one."""
    for number, (_, answer) in enumerate(prompt.template.examples):
        parsed = prompt.parse(answer, game.legal_actions)
        if parsed.action is None:
            problem = f"the prompt's parser reads no action in it ({parsed.error})"
            remedy = f"write an answer as the model is to write it, with one of: {', '.join(game.legal_actions)}"
            yield Mistake(f"prompt.examples[{number}]", answer, problem, remedy)


def _check_adapter(model: Mapping[str, Any], outline: Outline) -> Iterator[Mistake]:
    rank, width = model["lora_rank"], getattr(outline.config, "hidden_size", None)
    if width is not None and rank > width:
        problem = f"the model's matrices are only {width} wide, so that the adapter would be larger than they are"
        yield Mistake("model.lora_rank", rank, problem, "give for example model.lora_rank=16")
    targets = model.get("lora_targets", ALL_LINEAR)
    if targets == ALL_LINEAR:
        return
    names = linear_layers(outline)
    kinds = sorted({name.rpartition(".")[2] for name in names})
    remedy = f"give {ALL_LINEAR}, or a list of: {', '.join(kinds)}"
    if isinstance(targets, str):
        if not _matches(targets, names):
            problem = "a text is a pattern for the whole name of a layer, and none is called so"
            hint = f"[{targets}] for layers of that name, or " if targets in kinds else ""
            yield Mistake("model.lora_targets", targets, problem, f"give {hint}{remedy.removeprefix('give ')}")
        return
    if not targets:
        yield Mistake("model.lora_targets", targets, "no layer is named", remedy)
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            closest = (
                f"{did_you_mean(target, kinds)}give {ALL_LINEAR}, or of: {', '.join(closest_first(target, kinds))}"
            )
            yield Mistake("model.lora_targets", targets, f"the model has no layer {target!r} to adapt", closest)


def linear_layers(outline: Outline) -> list[str]:
    """Names of the layers that can be adapted: the linear ones but the output projection, whose rows are read as they
    are."""
    import torch
    from transformers import AutoModelForCausalLM

    make: Any = AutoModelForCausalLM  # its methods carry no types
    with torch.device("meta"):
        model = make.from_config(outline.config)
    head = model.get_output_embeddings()
    return [n for n, part in model.named_modules() if isinstance(part, torch.nn.Linear) and part is not head]


def _matches(pattern: str, names: Sequence[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False


def _check_lengths(
    tree: Mapping[str, Any], outline: Outline, prompt: PromptBuilder, game: TextGame
) -> Iterator[Mistake]:
    """A row must fit into a forward pass and into the model, and a legal word into a completion."""
    sampling = section(section(tree, "rollout"), "sampling")
    tokens = whole(sampling.get("max_new_tokens"))
    budget = whole(section(tree, "update").get("token_budget"))
    if tokens is None or budget is None:
        return
    observations = [game.reset(seed=seed)[0] for seed in range(SEEN)]
    longest = max(len(prompt.render(game.rules, text, game.legal_actions)) for text in observations)
    answer = tokens
    if sampling.get("constrain") is True:
        words = dict(zip(game.legal_actions, map(len, prompt.choices(game.legal_actions)), strict=True))
        word = max(words, key=lambda name: words[name])
        answer = words[word]
        if tokens < answer:
            problem = f"the legal word {word} has {answer} tokens"
            remedy = f"give at least {answer}"
            yield Mistake("rollout.sampling.max_new_tokens", tokens, problem, remedy)
    row = longest + answer
    if budget < row:
        problem = f"the longest row has {row} tokens ({longest} of the prompt, {answer} of the answer)"
        yield Mistake("update.token_budget", budget, problem, f"give at least {row}; 4096 is usual")
    context = getattr(outline.config, "max_position_embeddings", None)
    if context is not None and row > context:
        problem = f"with a prompt of {longest} tokens that is more than the {context} that the model can read"
        yield Mistake("rollout.sampling.max_new_tokens", tokens, problem, f"give at most {max(1, context - longest)}")
