"""From the jobs of a command line to plans: jobs that differ by nothing that costs are planned once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.assemble import component
from msgrpo_lab.config.command_line import Job
from msgrpo_lab.lap.build import OutlinedModel
from msgrpo_lab.messages import Mistake
from msgrpo_lab.planner.devices import GPUS, Device, cpu
from msgrpo_lab.planner.hours import TURN_MS, Hours, hours
from msgrpo_lab.planner.memory import Memory, estimate
from msgrpo_lab.planner.model_size import ModelSize, size_of
from msgrpo_lab.planner.tokens import EstimatedTokenizer
from msgrpo_lab.planner.workload import Workload, answer_length, measure

BUILDER, OUTLINER = "msgrpo_lab.lap.build.build_policy", "msgrpo_lab.lap.build.outline_model"
FREE_OF_COST = ("seed", "credit", "callbacks", "logger", "paths", "optim", "ckpt_path")
"""Keys that change what is learnt or kept and hardly what it costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """One job on one device."""

    device: Device
    fast: Hours
    slow: Hours
    memory: Memory
    capacity: int
    """Bytes of the device's memory."""

    @property
    def fits(self) -> bool:
        """Whether one job's peak fits the device's memory."""
        return self.memory.peak <= self.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """Jobs that cost the same."""

    label: str
    jobs: int
    size: ModelSize
    work: Workload
    devices: tuple[DevicePlan, ...]
    """The GPUs, then this kind of CPU."""
    assumptions: tuple[str, ...]


def plan_cells(jobs: Sequence[Job], answer_tokens: int | None) -> list[Cell]:
    """Plans of all jobs, in the order in which their kinds appear.

    Args:
        jobs: checked jobs of the main job's configuration.
        answer_tokens: tokens of an answer under free decoding; None takes half of what is allowed.

    Raises:
        ValueError: a model or a prompt cannot be planned; one line.
    """
    kinds: dict[str, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(_cost_key(job.config), []).append(job)
    return [_plan(alike, answer_tokens) for alike in kinds.values()]


def _cost_key(config: DictConfig) -> str:
    tree: Any = OmegaConf.to_container(config, resolve=False)  # seeds inside components stay `${seed}`
    for key in FREE_OF_COST:
        tree.pop(key, None)
    tree["sampler"] = tree["sampler"].get("num_episodes")
    return json.dumps(tree, sort_keys=True, default=str)


def _plan(jobs: Sequence[Job], answer_tokens: int | None) -> Cell:
    config, choices = jobs[0]
    here = outline(config)
    # A GPU has bfloat16 whatever this machine has.
    there = outline(config, precision="bfloat16") if config.model.precision == "auto" else here
    sizes = {"cpu": size_of(here), "gpu": size_of(there)}
    tokenizer = here.tokenizer or EstimatedTokenizer()
    work = measure(config, tokenizer, sizes["cpu"].vocabulary, answer_tokens)
    tracked = str(config.logger.get("_target_", "")).endswith("MLflowTracking")
    budgets = {
        "token_budget": int(config.engine.get("token_budget", 0)),
        "memory_tokens": int(config.engine.get("memory_tokens", 0)),
    }
    on_cpu = estimate(sizes["cpu"], work, place="cpu", tracked=tracked, **budgets)
    on_gpu = estimate(sizes["gpu"], work, place="gpu", tracked=tracked, **budgets)
    devices = [
        *(_on(device, sizes["gpu"], work, on_gpu) for device in GPUS),
        _on(cpu(sizes["cpu"].item, sizes["cpu"].hidden), sizes["cpu"], work, on_cpu),
    ]
    return Cell(
        label=f"{choices['model']} on {choices['env']}",
        jobs=len(jobs),
        size=sizes["gpu"],
        work=work,
        devices=tuple(devices),
        assumptions=tuple(_assumptions(config, work, sizes["gpu"], here.tokenizer is None, answer_tokens)),
    )


def outline(config: DictConfig, **changes: Any) -> OutlinedModel:
    """The policy's model of a composed configuration on the meta device.

    Raises:
        ValueError: it is built in a way that has no outline, or its source cannot say what it is.
    """
    if config.model.get("_target_") != BUILDER:
        problem = "only models that this builds can be planned"
        raise ValueError(str(Mistake("model._target_", config.model.get("_target_"), problem, f"give {BUILDER}")))
    overrides: dict[Any, Any] = {"_target_": OUTLINER, **changes}
    node = OmegaConf.merge(config.model, overrides)
    node._set_parent(config)  # interpolations such as ${seed} are the whole configuration's
    try:
        found: OutlinedModel = component(node)  # type: ignore[arg-type]  # merging mappings gives a mapping
    except InstantiationException as error:
        cause = error.__cause__ or error
        raise ValueError(str(cause)) from error
    return found


def _on(device: Device, size: ModelSize, work: Workload, memory: Memory) -> DevicePlan:
    capacity = psutil.virtual_memory().total if device.memory_gb is None else int(device.memory_gb * 1e9)
    return DevicePlan(
        device=device,
        fast=hours(size, work, device, fast=True),
        slow=hours(size, work, device, fast=False),
        memory=memory,
        capacity=capacity,
    )


def _assumptions(
    config: DictConfig, work: Workload, size: ModelSize, estimated: bool, answer_tokens: int | None
) -> list[str]:
    found = [
        "Episodes are as long as a random player's; a policy that learns to survive plays longer, one that learns to "
        f"arrive shorter. At most: {work.rollout.episodes * work.horizon:,} turns a rollout.",
        "Drawn episodes are as long as the others, whatever the sampler; refills of samplers that ask for them are "
        "not counted.",
    ]
    if estimated:
        found.append(
            "The tokenizer is not on this machine: tokens are counted as words, digits and punctuation marks, which "
            "is within 10 % of a byte-pair tokenizer's on these prompts (docs/planning.md)."
        )
    if not work.constrained:
        length = answer_length(config, answer_tokens)
        why = "half of what is allowed, a guess" if answer_tokens is None else "as given by answer_tokens"
        found.append(
            f"An answer has {length} tokens ({why}; at most {work.longest_answer}), "
            "each as likely as any other that may be drawn."
        )
    if not size.block_decoder:
        found.append(
            "The lab's own decoder does not compute this model: activations and time are those of one that it does."
        )
    if "memory_tokens" not in config.engine or config["update"].sharing != "tree":
        found.append(
            "Rollouts are counted as engine=hf plays them; an engine that shares nothing reads every prompt again."
        )
    found += [
        "Every job has a process of its own. Jobs of launcher=basic follow each other in one process, whose heap goes "
        "on growing: by some 10 % a job where it was measured.",
        f"The host needs {TURN_MS} ms a turn for game, prompt and parser. Start-up, tracking and the reference players "
        "are not counted.",
    ]
    return found
