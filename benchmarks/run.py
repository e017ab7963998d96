"""Measuring one cell: its variants by turns, in an order drawn anew each time, until the time is used up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.cells import FAST, NAIVE, BenchmarkCase, make_lab
from benchmarks.flops import Peak, measure_peak
from benchmarks.measure import Measurement, measure, resized
from benchmarks.ratios import Ratio, paired_ratio

WARM_UP_SEED = 999_983
"""No repetition is measured on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """All that was measured of a cell."""

    cell: BenchmarkCase
    measurements: tuple[Measurement, ...]
    peak: Peak
    asked: int
    """Repetitions that were asked for."""
    elapsed_s: float

    @property
    def made(self) -> int:
        """Repetitions that were made."""
        return len(self.of(FAST))

    def of(self, variant: str) -> list[Measurement]:
        """The measurements of a variant, by repetition."""
        return sorted((m for m in self.measurements if m.variant == variant), key=lambda m: m.repetition)

    def ratio(self, rate: Callable[[Measurement], float] = lambda m: m.env_steps_per_s) -> Ratio | None:
        """Fast over naive, pair by pair; None where the naive path was not measured."""
        naive = self.of(NAIVE)
        return paired_ratio([rate(m) for m in self.of(FAST)], [rate(m) for m in naive]) if naive else None

    def remarks(self) -> list[str]:
        """What a reader must know: cut repetitions, smaller naive jobs, what was left out."""
        cell, found = self.cell, []
        if self.made < self.asked:
            found.append(f"{self.made} of {self.asked} repetitions: the time for this cell was used up")
        if cell.reduced:
            found.append(f"naive was measured at {cell.naive_groups} of {cell.groups} groups (rates are per step)")
        if not cell.naive_groups:
            found.append("fast only: naive would take hours at this size")
        return found


def run_cell(
    cell: BenchmarkCase,
    *,
    repetitions: int,
    budget_s: float,
    rng: np.random.Generator,
    seed: int = 0,
    accelerator: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> CellResult:
    """Measures a cell.

    Args:
        cell: the job.
        repetitions: times each variant is measured.
        budget_s: seconds after which no further repetition begins; the first one is always made.
        rng: draws the order of the variants within a repetition.
        seed: repetition r has the seed `seed + r`, in every variant.
        accelerator: Lightning's.
        tell: is given a line after each measurement.
    """
    started = time.perf_counter()
    labs = {variant: make_lab(cell, variant, seed) for variant in cell.variants}
    for variant, lab in labs.items():
        with resized(lab, groups=1, group_size=2):
            measure(lab, variant=variant, repetition=-1, seed=WARM_UP_SEED, accelerator=accelerator)
    found: list[Measurement] = []
    for repetition in range(repetitions):
        if repetition and time.perf_counter() - started > budget_s:
            break
        for variant in rng.permutation(cell.variants).tolist():
            made = measure(
                labs[variant], variant=variant, repetition=repetition, seed=seed + repetition, accelerator=accelerator
            )
            found.append(made)
            if tell is not None:
                tell(
                    f"{cell.name} {variant} #{repetition}: {made.total_s:.2f} s, {made.env_steps_per_s:.2f} env-steps/s"
                )
    tokens = max(1, *(m.work.distinct_tokens for m in found if m.variant == FAST))
    lab = labs[FAST]
    peak = measure_peak(lab.policy, min(tokens, lab.module.token_budget))
    return CellResult(
        cell=cell,
        measurements=tuple(found),
        peak=peak,
        asked=repetitions,
        elapsed_s=time.perf_counter() - started,
    )
