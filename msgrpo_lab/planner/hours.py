"""How long a job takes on a device: a roofline with an overhead a call, as a range."""

from __future__ import annotations

from dataclasses import dataclass

from msgrpo_lab.planner.devices import Device
from msgrpo_lab.planner.model_size import ModelSize
from msgrpo_lab.planner.workload import Pass, Play, Workload

TURN_MS = 0.015
"""Of the host a turn: game, prompt, parser. Measured: `tiny` plays 5,300 turns in 0.12 s, its model included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Of one job on one device."""

    rollout_s: float
    """Seconds of a rollout."""
    update_s: float
    """Seconds of a rollout's updates, π_ref included."""
    evaluation_s: float
    """Seconds of an evaluation, both of its passes over the seeds."""
    total_h: float
    """Hours of the whole job."""


def hours(size: ModelSize, work: Workload, device: Device, *, fast: bool) -> Hours:
    """Time at the favourable (`fast`) or the unfavourable end of what is assumed of the device."""
    rollout_s = _play_seconds(size, work, work.rollout, device, fast)
    update_s = sum(_pass_seconds(size, work, part, device, fast) for part in work.passes)
    evaluation_s = 2 * _play_seconds(size, work, work.evaluation, device, fast)
    seconds = work.rollouts * (rollout_s + update_s) + work.evaluations * evaluation_s
    return Hours(rollout_s=rollout_s, update_s=update_s, evaluation_s=evaluation_s, total_h=seconds / 3600)


def update_flops(size: ModelSize, work: Workload, part: Pass) -> float:
    """Model operations of one pass, as `lap.work.update_work` counts them."""
    head = 4 if size.has_adapter else 6
    columns, finding = (work.columns, 0) if work.candidates is None else (work.candidates, 2 * work.columns)
    projection = (head * columns + finding) * size.hidden * part.nodes
    attention = 12 * size.layers * size.query_width * part.attended
    return float(size.update_flops_per_token * part.tokens + projection + attention)


def forward_flops(size: ModelSize, work: Workload, play: Play) -> float:
    """Model operations of playing: prompts read, what is written behind them, and a distribution for each token."""
    keys = (play.prompt_tokens / max(1, play.turns) + work.longest_answer) * (play.read_tokens + play.branch_tokens)
    attention = 4 * size.layers * size.query_width * keys
    drawn = play.branch_tokens + play.turn_texts * play.steps if work.constrained else play.branch_tokens
    projection = 2 * size.hidden * work.columns * drawn
    return float(size.forward_flops_per_token * (play.read_tokens + play.branch_tokens) + projection + attention)


def _pass_seconds(size: ModelSize, work: Workload, part: Pass, device: Device, fast: bool) -> float:
    flops = update_flops(size, work, part)
    if size.recompute:
        flops += size.forward_flops_per_token * part.tokens
    calls = 3.0
    if work.reference:
        flops += size.forward_flops_per_token * part.tokens
        calls += 1.0
    best = 1 if fast else 0
    return max(
        flops / (device.peak_tflops * 1e12 * device.utilisation[best]),
        calls * size.layers * device.layer_call_ms[1 - best] / 1e3,
    )


def _play_seconds(size: ModelSize, work: Workload, play: Play, device: Device, fast: bool) -> float:
    best = 1 if fast else 0
    computing = forward_flops(size, work, play) / (device.peak_tflops * 1e12 * device.utilisation[best])
    reading = size.weight_bytes / (device.bandwidth_gbs * 1e9 * device.bandwidth_share[best])
    calling = size.layers * device.layer_call_ms[1 - best] / 1e3
    return max(computing, play.steps * max(reading, calling)) + play.turns * TURN_MS / 1e3
