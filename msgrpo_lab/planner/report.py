"""A plan for people and for scripts: kinds of jobs, their totals, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.config.command_line import Job
from msgrpo_lab.lap.build import OutlinedModel
from msgrpo_lab.messages import Mistake
from msgrpo_lab.planner.cost import (
    GPUS,
    TURN_MS,
    Device,
    Hours,
    MemoryEstimate,
    ModelSize,
    cpu,
    estimate,
    hours,
    size_of,
    update_flops,
)
from msgrpo_lab.planner.workload import EstimatedTokenizer, Workload, answer_length, measure
from msgrpo_lab.training.assemble import component

BUILDER, OUTLINER = "msgrpo_lab.lap.build.build_policy", "msgrpo_lab.lap.build.outline_model"
FREE_OF_COST = ("seed", "credit", "callbacks", "logger", "paths", "optim", "ckpt_path")
"""Keys that change what is learnt or kept and hardly what it costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """One job on one device."""

    device: Device
    fast: Hours
    slow: Hours
    memory: MemoryEstimate
    capacity: int
    """Bytes of the device's memory."""

    @property
    def fits(self) -> bool:
        """Whether one job's peak fits the device's memory."""
        return self.memory.peak <= self.capacity


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKind:
    """Jobs that cost the same."""

    label: str
    jobs: int
    size: ModelSize
    work: Workload
    devices: tuple[DevicePlan, ...]
    """The GPUs, then this kind of CPU."""
    assumptions: tuple[str, ...]


def plan_cells(jobs: Sequence[Job], answer_tokens: int | None) -> list[JobKind]:
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


def _plan(jobs: Sequence[Job], answer_tokens: int | None) -> JobKind:
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
    return JobKind(
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


def _on(device: Device, size: ModelSize, work: Workload, memory: MemoryEstimate) -> DevicePlan:
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


MIB = 2**20
PARTS: Mapping[str, str] = {
    "process": "Python and libraries",
    "weights": "weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimiser moments",
    "activations": "activations",
    "logits": "logits",
    "kv_cache": "KV cache",
    "episodes": "episodes and batch",
    "allocator": "held by the allocator",
}
"""Fields of `MemoryEstimate` as people read them."""


def totals(cell: JobKind) -> dict[str, tuple[float, float]]:
    """What one rollout with its update, and one whole job, amount to, by name; evaluations with both their passes."""
    work, play, held_out = cell.work, cell.work.rollout, cell.work.evaluation
    rollouts, evaluations = work.rollouts, work.evaluations
    computed = sum(part.tokens for part in work.passes)
    flops = sum(update_flops(cell.size, work, part) for part in work.passes)
    return {
        "rollouts": (1, rollouts),
        "updates": (work.updates / rollouts, work.updates),
        "episodes": (play.episodes, rollouts * play.episodes),
        "turns": (play.turns, rollouts * play.turns),
        "prompt tokens": (play.prompt_tokens, rollouts * play.prompt_tokens),
        "of these read": (play.read_tokens, rollouts * play.read_tokens),
        "generated tokens": (play.answer_tokens, rollouts * play.answer_tokens),
        "trained samples": (work.samples, rollouts * work.samples),
        "trained tokens": (work.trained_tokens, rollouts * work.trained_tokens),
        "computed by updates": (computed, rollouts * computed),
        "update PFLOP": (flops / 1e15, rollouts * flops / 1e15),
        "evaluation episodes": (0, 2 * evaluations * held_out.episodes),
        "evaluation turns": (0, 2 * evaluations * held_out.turns),
        "evaluation generated tokens": (0, 2 * evaluations * held_out.answer_tokens),
    }


def as_json(cells: Sequence[JobKind], command: str) -> dict[str, Any]:
    """The plan as plain values. Bytes and hours are whole numbers and floats; ranges are [best, worst]."""
    return {
        "command": command,
        "jobs": sum(cell.jobs for cell in cells),
        "cells": [_cell_json(cell) for cell in cells],
        "hours": {name: list(bounds) for name, bounds in all_hours(cells).items()},
    }


def all_hours(cells: Sequence[JobKind]) -> dict[str, tuple[float, float]]:
    """Hours of all jobs one after the other on one device, best and worst, by device."""
    found: dict[str, tuple[float, float]] = {}
    for cell in cells:
        for plan in cell.devices:
            fast, slow = found.get(plan.device.name, (0.0, 0.0))
            found[plan.device.name] = (fast + cell.jobs * plan.fast.total_h, slow + cell.jobs * plan.slow.total_h)
    return found


def _cell_json(cell: JobKind) -> dict[str, Any]:
    return {
        "label": cell.label,
        "jobs": cell.jobs,
        "model": asdict(cell.size),
        "work": {
            name.replace(" ", "_"): {"rollout": once, "job": job, "all": cell.jobs * job}
            for name, (once, job) in totals(cell).items()
        },
        "memory": {
            place: {**asdict(memory), "peak": memory.peak}
            for place, memory in zip(("gpu", "cpu"), _both(cell), strict=True)
        },
        "devices": {
            plan.device.name: {
                "hours": [plan.fast.total_h, plan.slow.total_h],
                "rollout_s": [plan.fast.rollout_s, plan.slow.rollout_s],
                "update_s": [plan.fast.update_s, plan.slow.update_s],
                "evaluation_s": [plan.fast.evaluation_s, plan.slow.evaluation_s],
                "fits": plan.fits,
                "capacity": plan.capacity,
                "measured": plan.device.measured,
                "utilisation": list(plan.device.utilisation),
                "source": plan.device.source,
            }
            for plan in cell.devices
        },
        "assumptions": list(cell.assumptions),
    }


def _both(cell: JobKind) -> tuple[MemoryEstimate, MemoryEstimate]:
    """On a GPU, and on the CPU."""
    return cell.devices[0].memory, cell.devices[-1].memory


def as_text(cells: Sequence[JobKind], command: str) -> str:
    """The plan as it is printed."""
    return "\n".join(_lines(cells, command))


def _lines(cells: Sequence[JobKind], command: str) -> Iterator[str]:
    count = sum(cell.jobs for cell in cells)
    yield f"Plan of `{command}`: {count} job{'s' * (count != 1)}. Nothing was run and nothing downloaded."
    for cell in cells:
        size = cell.size
        trained = f"{size.trained / 1e6:.1f} M trained" + (" (adapter)" if size.has_adapter else "")
        yield ""
        jobs = f"{cell.jobs} job{'s' * (cell.jobs != 1)}"
        yield f"{cell.label}: {jobs}; {size.parameters / 1e6:,.1f} M parameters, {trained}"
        yield ""
        yield f"  {'work':<28}{'a rollout':>14}{'a job':>16}{'all':>18}"
        for name, (once, job) in totals(cell).items():
            shown = "" if once == 0 else _number(once)
            yield f"  {name:<28}{shown:>14}{_number(job):>16}{_number(cell.jobs * job):>18}"
        yield ""
        on_gpu, on_cpu = _both(cell)
        yield f"  {'peak memory of a job, MiB':<28}{'GPU':>14}{'CPU':>16}"
        for field, name in (*PARTS.items(), ("peak", "peak")):
            yield f"  {name:<28}{getattr(on_gpu, field) / MIB:>14,.0f}{getattr(on_cpu, field) / MIB:>16,.0f}"
        yield ""
        yield f"  {'hours':<28}{'a job':>14}{'all, one by one':>18}   one rollout + update, s; does it fit?"
        for plan in cell.devices:
            yield _device_line(plan, cell.jobs)
    if len(cells) > 1:
        yield ""
        yield f"  {'hours of all ' + str(count) + ' jobs':<28}{'one by one':>14}"
        for name, (fast, slow) in all_hours(cells).items():
            yield f"  {name:<28}{_range(fast, slow):>14}"
    yield ""
    yield "Assumptions"
    for text in dict.fromkeys(text for cell in cells for text in (*_of_devices(cell), *cell.assumptions)):
        yield f"  - {text}"


def _of_devices(cell: JobKind) -> Iterator[str]:
    for plan in cell.devices:
        device = plan.device
        low, high = device.utilisation
        names = [p.device.name for p in cell.devices if p.device.source == device.source]
        yield (
            f"{', '.join(names)}: {low:.1%} to {high:.1%} of the peak in matrix products, "
            f"{'measured' if device.measured else 'ASSUMED'} ({device.source}); assumed: "
            f"{device.bandwidth_share[0]:.0%} to {device.bandwidth_share[1]:.0%} of the bandwidth for weights, "
            f"{device.layer_call_ms[0]} to {device.layer_call_ms[1]} ms a layer and call at least."
        )


def _device_line(plan: DevicePlan, jobs: int) -> str:
    fast, slow = plan.fast, plan.slow
    each, together = _range(fast.total_h, slow.total_h), _range(jobs * fast.total_h, jobs * slow.total_h)
    seconds = f"{_range(fast.rollout_s, slow.rollout_s)} + {_range(fast.update_s, slow.update_s)}"
    room = f"{'fits' if plan.fits else 'DOES NOT FIT'} {plan.capacity / 1e9:.0f} GB"
    return f"  {plan.device.name:<28}{each:>14}{together:>18}   {seconds}; {room}"


def _range(low: float, high: float) -> str:
    return f"{_short(low)}-{_short(high)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or float(value).is_integer() else f"{value:.3g}"
