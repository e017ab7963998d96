"""Times rollout and update of the lab's fast path beside its naive path: `python benchmarks/throughput.py --quick`.

What is measured and how the numbers are defined: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

if __package__ in (None, ""):  # run by path: Python put benchmarks/ itself on the path, not the folder that holds it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.cells import ENVS, GROUP_SIZES, MODELS, POLICIES, BenchmarkCase, default_job, unit_cell
from benchmarks.run import CellResult, run_cell
from msgrpo_lab.config import ConfigError
from msgrpo_lab.training.heap import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
QUICK_BUDGET_S = 200.0
"""Seconds of one of the two cells of `--quick`, after which no further repetition begins."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="SmolLM2 on both games in under 10 minutes on 2 cores")
    made.add_argument("--env", nargs="+", choices=ENVS, default=list(ENVS))
    made.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    made.add_argument("--policy", nargs="+", choices=POLICIES, default=["untrained", "legal"])
    made.add_argument("--groups", type=_count, default=8, help="groups of the fast path")
    made.add_argument(
        "--naive-groups",
        type=_count_or_none,
        help="groups of the naive path; by default what 64 episodes hold; 0 for none",
    )
    made.add_argument("--group-size", type=_count, nargs="+", default=list(GROUP_SIZES))
    made.add_argument("--horizon", type=_count, default=8)
    made.add_argument("--max-new-tokens", type=_count, default=8)
    made.add_argument("--repetitions", type=_count, default=5)
    made.add_argument("--budget-s", type=float, default=900.0, help="seconds a cell after which no repetition begins")
    made.add_argument(
        "--no-default-job",
        action="store_true",
        help="leave out the default job, of words and of thoughts, which is fast only",
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--accelerator", default="auto")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--name", help="of the files that are written; throughput, or quick")
    return made


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be at least 1")
    return value


def _count_or_none(text: str) -> int:
    return 0 if text == "0" else _count(text)


def cells_of(arguments: argparse.Namespace) -> list[BenchmarkCase]:
    """The cells that a command line asks for."""
    if arguments.quick:
        return [unit_cell(env, "smollm2_135m", "untrained", naive_groups=2) for env in arguments.env]
    cells = [
        unit_cell(
            env,
            model,
            policy,
            groups=arguments.groups,
            group_size=size,
            naive_groups=None if arguments.naive_groups is None else min(arguments.naive_groups, arguments.groups),
            horizon=arguments.horizon,
            max_new_tokens=arguments.max_new_tokens,
        )
        for model in arguments.model
        for env in arguments.env
        for policy in arguments.policy
        for size in arguments.group_size
    ]
    if not arguments.no_default_job and "smollm2_135m" in arguments.model and "frozenlake" in arguments.env:
        cells += [default_job(), default_job("think_action")]
    return cells


def last_line(results: Sequence[CellResult]) -> str:
    """`frozenlake fast/naive X; snake fast/naive Y`: the end-to-end ratios of the cells that have one."""
    found = [(result.cell.env, ratio.median) for result in results if (ratio := result.ratio()) is not None]
    return "; ".join(f"{env} fast/naive {median:.2f}" for env, median in found)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and writes JSON and figure. Returns the exit code."""
    arguments = parser().parse_args(argv)
    _quieten()
    keep_freed_memory()  # as training does; whatever is measured beside the lab has it too
    rng = np.random.default_rng(np.random.SeedSequence(arguments.seed))
    repetitions = min(arguments.repetitions, 2) if arguments.quick else arguments.repetitions
    budget_s = min(arguments.budget_s, QUICK_BUDGET_S) if arguments.quick else arguments.budget_s
    started = time.perf_counter()
    results = []
    try:
        for cell in cells_of(arguments):
            results.append(
                run_cell(
                    cell,
                    repetitions=repetitions,
                    budget_s=budget_s,
                    rng=rng,
                    seed=arguments.seed,
                    accelerator=arguments.accelerator,
                    tell=lambda line: print(f"[{time.perf_counter() - started:6.0f} s] {line}", file=sys.stderr),
                )
            )
    except ConfigError as error:
        for line in error.mistakes:
            print(f"benchmark: {line}", file=sys.stderr)
        return 2
    name = arguments.name or ("quick" if arguments.quick else "throughput")
    command = ["benchmarks/throughput.py", *(sys.argv[1:] if argv is None else argv)]
    paths = report.write(results, command, arguments.out, name)
    print(report.table(results))
    print("Written:", *paths)
    if arguments.quick:
        print(last_line(results))
    return 0


def _quieten() -> None:
    """Leaves out what Lightning says of every fit."""
    for logger in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")


if __name__ == "__main__":
    raise SystemExit(main())
