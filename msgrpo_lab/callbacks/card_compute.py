"""What a sweep has cost: time, core-hours, tokens, and the share of the credit rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgrpo_lab.callbacks.markdown import MISSING, count, duration, escape, number, table
from msgrpo_lab.callbacks.sweep_record import JobRecord, SweepRecord
from msgrpo_lab.callbacks.tracked_run import RESUMED_TAG


def compute(sweep: SweepRecord) -> str:
    """The section on what the sweep has cost."""
    header = ["environment", "method", "job time", "training time", "evaluation", "core-hours", "environment steps"]
    header += ["tokens sampled", "tokens trained on", "FLOP of updates", "credit rule"]
    rows = [[escape(env), escape(method), *_spent(jobs)] for (env, method), jobs in sweep.cells().items()]
    rows.append(["all jobs", "", *_spent(sweep.jobs)])
    lines = [
        "Sums over the runs of a row; the last row has unfinished jobs too. Training time is rollouts and updates;",
        "core-hours are job time × threads of torch; the credit rule's share is of training time.",
    ]
    resumed = sum(RESUMED_TAG in job.tags for job in sweep.jobs)
    if resumed:
        lines.append(f"{resumed} job{'s' if resumed != 1 else ''} resumed: the pause before counts as job time.")
    hours = _sum(sweep.jobs, _accelerator_hours)
    if hours:
        lines.append(f"Accelerator-hours: {number(hours, 2)}.")
    return "\n\n".join(["## Compute", table(header, rows), " ".join(lines)])


def _spent(jobs: Sequence[JobRecord]) -> list[str]:
    wall = _sum(jobs, lambda job: job.last.get("train/wall_s"))
    credit, flop = (_sum(jobs, _total(f"perf/{name}")) for name in ("credit_s", "train_flops"))
    return [
        duration(_sum(jobs, lambda job: job.duration_s)),
        duration(wall),
        duration(_sum(jobs, _total("perf/evaluation_s"))),
        number(_sum(jobs, _core_hours), 2),
        count(_sum(jobs, lambda job: job.last.get("train/env_steps"))),
        count(_sum(jobs, _sampled_tokens)),
        count(_sum(jobs, lambda job: job.last.get("train/trained_tokens"))),
        MISSING if flop is None else f"{flop:.2e}",
        MISSING if not wall or credit is None else f"{100 * credit / wall:.2f} %",
    ]


def _sum(jobs: Iterable[JobRecord], of: Callable[[JobRecord], float | None]) -> float | None:
    """Over the jobs that know it; None where none does."""
    known = [value for value in map(of, jobs) if value is not None]
    return sum(known) if known else None


def _total(metric: str) -> Callable[[JobRecord], float | None]:
    return lambda job: job.total(metric)


def _sampled_tokens(job: JobRecord) -> float | None:
    """Turns × mean completion tokens of a turn, over all rollouts."""
    turns, tokens = (dict(job.history.get(f"train/{name}", ())) for name in ("turns", "completion_tokens"))
    return sum(turns[step] * tokens[step] for step in turns.keys() & tokens.keys()) if turns and tokens else None


def _core_hours(job: JobRecord) -> float | None:
    threads = job.hardware.get("torch_threads")
    return None if job.duration_s is None or threads is None else job.duration_s * float(threads) / 3600.0


def _accelerator_hours(job: JobRecord) -> float | None:
    if job.duration_s is None or not job.hardware.get("accelerators") or job.params.get("trainer.accelerator") == "cpu":
        return None
    return job.duration_s / 3600.0
