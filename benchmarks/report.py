"""What was measured as a table, as JSON and as a figure."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import matplotlib as mpl
import numpy as np
import peft
import torch
import transformers
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.cells import FAST, NAIVE
from benchmarks.flops import Peak
from benchmarks.measure import Measurement
from benchmarks.run import CellResult

STYLE = Path(__file__).resolve().parents[1] / "analysis" / "paper.mplstyle"
MARKS = {NAIVE: "o", FAST: "s"}
COLOURS = {NAIVE: "#999999", FAST: "#0072b2"}


def utilisation(measurement: Measurement, peak: float) -> float:
    """Model-FLOP utilisation of the update: the operations of its distinct tokens a second, as a share of `peak`."""
    return measurement.work.flops / measurement.update_s / peak


def machine() -> dict[str, Any]:
    """Where this was measured and with what: processor, threads, versions."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), ""
        )
    return {
        "processor": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "lightning": lightning.__version__,
    }


Column = tuple[str, Callable[[Measurement, Peak], float | None], str]
COLUMNS: tuple[Column, ...] = (
    ("env-steps/s", lambda m, _: m.env_steps_per_s, "{:.2f}"),
    ("rollout", lambda m, _: m.rollout_steps_per_s, "{:.2f}"),
    ("update", lambda m, _: m.update_steps_per_s, "{:.2f}"),
    ("gen tok/s", lambda m, _: m.generated_tokens_per_s, "{:.1f}"),
    ("train tok/s", lambda m, _: m.trained_tokens_per_s, "{:.1f}"),
    ("distinct rows", lambda m, _: m.distinct_row_ratio, "{:.3f}"),
    ("peak MB", lambda m, _: m.peak_memory_mb, "{:.0f}"),
    ("rise MB", lambda m, _: m.memory_rise_mb, "{:.0f}"),
    ("MFU square", lambda m, peak: utilisation(m, peak.square), "{:.3f}"),
    ("MFU shapes", lambda m, peak: utilisation(m, peak.model_shapes), "{:.3f}"),
)
"""Name, value of a measurement, format. Rollout and update are env-steps a second of that part alone."""


def table(results: Sequence[CellResult]) -> str:
    """A line a cell and variant (medians over its repetitions), then its ratios and remarks."""
    head = ["cell", "variant", "reps", *(name for name, _, _ in COLUMNS)]
    rows = [head]
    notes = []
    for result in results:
        for variant in result.cell.variants:
            made = result.of(variant)
            rows.append([result.cell.name, variant, f"{len(made)}", *(_cell(c, made, result.peak) for c in COLUMNS)])
        notes += _notes(result)
    widths = [max(len(row[index]) for row in rows) for index in range(len(head))]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, "", *notes])


def _cell(column: Column, made: Sequence[Measurement], peak: Peak) -> str:
    _, value, form = column
    values = [v for m in made if (v := value(m, peak)) is not None]
    return form.format(float(np.median(values))) if values else "n/a"


def _notes(result: CellResult) -> list[str]:
    lines = []
    ratio = result.ratio()
    if ratio is not None:
        parts = [
            f"{name} {part}"
            for name, rate in (
                ("rollout", lambda m: m.rollout_steps_per_s),
                ("update", lambda m: m.update_steps_per_s),
            )
            if (part := result.ratio(rate)) is not None
        ]
        lines.append(
            f"{result.cell.name}: fast/naive {ratio} ({ratio.spread}, {ratio.pairs} pairs); {'; '.join(parts)}"
        )
    peak = result.peak
    lines.append(
        f"{result.cell.name}: {peak.dtype} matmul peak {peak.square / 1e9:.0f} GFLOP/s square, "
        f"{peak.model_shapes / 1e9:.0f} at the model's shapes with {peak.tokens} tokens"
    )
    return [*lines, *(f"{result.cell.name}: {remark}" for remark in result.remarks())]


def as_json(results: Sequence[CellResult], command: Sequence[str]) -> dict[str, Any]:
    """Everything that was measured, raw, with what is derived from it beside it."""
    return {
        "command": list(command),
        "machine": machine(),
        "cells": [
            {
                **asdict(result.cell),
                "repetitions_asked": result.asked,
                "repetitions_made": result.made,
                "elapsed_s": result.elapsed_s,
                "remarks": result.remarks(),
                "peak": asdict(result.peak),
                "ratio": None if (ratio := result.ratio()) is None else asdict(ratio),
                "measurements": [
                    {**asdict(m), **{name: value(m, result.peak) for name, value, _ in COLUMNS}}
                    for m in result.measurements
                ],
            }
            for result in results
        ],
    }


def draw(results: Sequence[CellResult]) -> Figure:
    """Env-steps a second of each cell, a point a variant with its ends, on a logarithmic axis; the ratio beside it."""
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(6.4, 0.5 + 0.42 * len(results) + 0.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        named: set[str] = set()
        for place, result in enumerate(results):
            for offset, variant in ((0.15, NAIVE), (-0.15, FAST)):
                rates = [m.env_steps_per_s for m in result.of(variant)]
                if rates:
                    middle = float(np.median(rates))
                    # Points: bars on a logarithmic axis would have lengths that mean nothing.
                    spread = [[middle - min(rates)], [max(rates) - middle]]
                    label = variant if variant not in named else None
                    axes.errorbar(middle, place - offset, xerr=spread, fmt=MARKS[variant], label=label,
                                  color=COLOURS[variant])  # fmt: skip
                    named.add(variant)
                    ratio = result.ratio() if variant == FAST else None
                    if ratio is not None:
                        axes.annotate(f"   × {ratio.median:.1f}", (max(rates), place - offset), va="center", fontsize=7)
        axes.set_xscale("log")
        axes.set_yticks(range(len(results)), [result.cell.name for result in results])
        axes.invert_yaxis()
        axes.set_xlabel("environment steps per second, rollout and update")
        axes.legend(loc="lower right")
        axes.margins(x=0.2, y=0.2)
    return figure


def write(results: Sequence[CellResult], command: Sequence[str], folder: Path, name: str) -> list[Path]:
    """`<name>.json` and `<name>.png` under `folder`; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    data, picture = folder / f"{name}.json", folder / f"{name}.png"
    data.write_text(json.dumps(as_json(results, command), indent=1) + "\n")
    draw(results).savefig(picture, dpi=150, metadata={"Software": None})
    return [data, picture]
