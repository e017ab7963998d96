"""A plan for people, and for scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from msgrpo_lab.planner.cells import Cell, DevicePlan
from msgrpo_lab.planner.hours import update_flops
from msgrpo_lab.planner.memory import Memory

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
"""Fields of `Memory` as people read them."""


def totals(cell: Cell) -> dict[str, tuple[float, float]]:
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


def as_json(cells: Sequence[Cell], command: str) -> dict[str, Any]:
    """The plan as plain values. Bytes and hours are whole numbers and floats; ranges are [best, worst]."""
    return {
        "command": command,
        "jobs": sum(cell.jobs for cell in cells),
        "cells": [_cell_json(cell) for cell in cells],
        "hours": {name: list(bounds) for name, bounds in all_hours(cells).items()},
    }


def all_hours(cells: Sequence[Cell]) -> dict[str, tuple[float, float]]:
    """Hours of all jobs one after the other on one device, best and worst, by device."""
    found: dict[str, tuple[float, float]] = {}
    for cell in cells:
        for plan in cell.devices:
            fast, slow = found.get(plan.device.name, (0.0, 0.0))
            found[plan.device.name] = (fast + cell.jobs * plan.fast.total_h, slow + cell.jobs * plan.slow.total_h)
    return found


def _cell_json(cell: Cell) -> dict[str, Any]:
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


def _both(cell: Cell) -> tuple[Memory, Memory]:
    """On a GPU, and on the CPU."""
    return cell.devices[0].memory, cell.devices[-1].memory


def as_text(cells: Sequence[Cell], command: str) -> str:
    """The plan as it is printed."""
    return "\n".join(_lines(cells, command))


def _lines(cells: Sequence[Cell], command: str) -> Iterator[str]:
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


def _of_devices(cell: Cell) -> Iterator[str]:
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
