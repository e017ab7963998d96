"""The experiment card of a sweep: `card.md`, an artifact of its parent run, made when the sweep ends.

It reads MLflow alone, so it can be made again at any time:

    python -m msgrpo_lab.report.card <sweep id, or latest>
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from msgrpo_lab.config.paths import project_root
from msgrpo_lab.messages import one_line
from msgrpo_lab.report.markdown import MISSING, code_block, count, duration, escape, number, table
from msgrpo_lab.report.sweep import JobRecord, SweepRecord, read_sweep
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED
from msgrpo_lab.tracking.database import check_reachable, database_path, mlflow_module
from msgrpo_lab.tracking.run import RESUMED_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient

PACKAGES = ("torch", "transformers", "peft", "lightning", "gymnasium", "hydra-core", "mlflow", "numpy", "msgrpo-lab")
"""Whose versions a result depends on; all others are in each job's `provenance/packages.json`."""
ONE_SEED = "Cells with one seed have no interval over runs: with a single run its spread is unknown."


class Spread(NamedTuple):
    """A mean over runs and its 95 % interval, nan where there is none."""

    mean: float
    low: float
    high: float


def over_runs(values: Sequence[float]) -> Spread:
    """Mean and Student's 95 % interval of independent runs; a single run has no interval."""
    from scipy.stats import t

    mean = float(np.mean(values))
    if len(values) < 2:
        return Spread(mean, math.nan, math.nan)
    half = float(t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half)


def render(sweep: SweepRecord) -> str:
    """The card."""
    sections = [_head, _results, _references, _lengths, compute, _protocol, _unfinished, _origin]
    return "\n\n".join(["# Experiment card", *(section(sweep) for section in sections)]) + "\n"


def _head(sweep: SweepRecord) -> str:
    done, total = len(sweep.finished), len(sweep.jobs)
    seeds = sorted({job.seed for job in sweep.jobs}, key=lambda seed: seed.zfill(9))
    end = MISSING if sweep.end_ms is None else f"{_utc(sweep.end_ms)}, {_elapsed(sweep)} after it began"
    rows = [
        ["sweep", f"{escape(sweep.name)}, run {escape(sweep.run_id)}"],
        ["status", f"{escape(sweep.status)}: {done} of {total} job{'s' if total != 1 else ''} finished"],
        ["began", _utc(sweep.start_ms)],
        ["ended", end],
        ["seeds", _listed(seeds)],
        ["swept keys", _listed(sweep.tags.get("msgrpo.swept", "").split(","))],
    ]
    command = sweep.tags.get("msgrpo.command", "")
    return "\n\n".join([table(["", ""], rows), *([code_block(f"python -m {command}")] if command else [])])


def _results(sweep: SweepRecord) -> str:
    rows = []
    for (env, method), jobs in sweep.cells().items():
        for scenario in _scenarios(jobs):
            score = "success_rate" if scenario.startswith("frozenlake") else "return_mean"
            name = score.replace("_", " ").removesuffix(" mean")
            names = [env if scenario == env else f"{env} → {scenario}", method]
            stem = f"eval/{scenario}/"
            rows.append(
                [
                    *map(escape, names),
                    str(len(jobs)),
                    _updates(jobs, f"{stem}{score}"),
                    name,
                    _change(jobs, f"{stem}{score}"),
                    _change(jobs, f"{stem}greedy_{score}"),
                    _spread(_ends(jobs, f"{stem}normalised_score")[1]),
                ]
            )
    if not rows:
        return "## Results\n\nNo finished job logged a held-out score."
    header = ["environment", "method", "runs", "updates", "score", "sampled: start → end", "greedy: start → end"]
    header.append("normalised, sampled, end")
    note = "Means over runs on held-out episodes; in brackets: Student's 95 % interval over runs (seeds)."
    single = any(len(jobs) < 2 for jobs in sweep.cells().values())
    return "\n\n".join(["## Results", table(header, rows), f"{note} {ONE_SEED}" if single else note])


def _references(sweep: SweepRecord) -> str:
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for job in sweep.finished:
        for key, value in job.last.items():
            match = re.fullmatch(r"reference/([^/]+)/([^/]+)/(return_mean|success_rate)", key)
            if match:
                found.setdefault((match[1], match[2]), {}).setdefault(match[3], []).append(value)
    if not found:
        return "## Reference players\n\nNone was logged: scores are raw."
    means = {place: {score: float(np.mean(values)) for score, values in by.items()} for place, by in found.items()}
    places = sorted(means, key=lambda place: (place[0], means[place].get("return_mean", 0.0), place[1]))
    rows = [
        [*map(escape, place), *(number(means[place].get(score)) for score in ("return_mean", "success_rate"))]
        for place in places
    ]
    note = "A normalised score is 0 for `random` and 1 for `optimal`, or for `search` where the optimum is not known."
    return "\n\n".join(["## Reference players", table(["scenario", "player", "return", "success rate"], rows), note])


def _lengths(sweep: SweepRecord) -> str:
    rows = []
    for (env, method), jobs in sweep.cells().items():
        metrics = ["train/episode_length"]
        metrics += [f"eval/{env}/{mode}episode_length" for mode in ("", "greedy_")]
        rows.append([escape(env), escape(method), *(_plain_change(jobs, metric) for metric in metrics)])
    header = ["environment", "method", "training: first → last", "held-out, sampled", "held-out, greedy"]
    return "\n\n".join(["## Episode lengths [turns]", table(header, rows)])


def _protocol(sweep: SweepRecord) -> str:
    def values(key: str) -> str:
        return _listed(dict.fromkeys(job.params[key] for job in sweep.jobs if key in job.params))

    if not any("evaluation.episodes" in job.params for job in sweep.jobs):
        return "## Evaluation protocol\n\nNo job was evaluated on held-out episodes."
    lines = [
        f"- Episodes: {values('evaluation.episodes')} held-out environment seeds, from {FIRST_HELD_OUT_SEED} on, one "
        "episode each; the same for every run, never used in training.",
        f"- When: before the first update, every {values('evaluation.every')} epochs, after the last update.",
        f"- Decoding: sampled at temperature {values('evaluation.temperature')}, and greedy; legal words only: "
        f"{values('rollout.sampling.constrain')}. Training samples at {values('rollout.sampling.temperature')}.",
        f"- Groups: {values('rollout.num_groups')} of {values('rollout.group_size')} episodes an epoch, of which "
        f"{values('sampler.num_episodes')} are trained on; {values('trainer.max_epochs')} epochs.",
        "- Scores are the game's own return, without shaping and penalties.",
    ]
    return "\n\n".join(["## Evaluation protocol", "\n".join(lines)])


def _unfinished(sweep: SweepRecord) -> str:
    left = [job for job in sweep.jobs if job.status != "FINISHED"]
    if not left:
        return "## Unfinished jobs\n\nNone."
    rows = [[escape(job.name), escape(job.run_id), escape(job.status), duration(job.duration_s)] for job in left]
    note = "They are in no mean above."
    return "\n\n".join(["## Unfinished jobs", table(["job", "run", "status", "time"], rows), note])


def _origin(sweep: SweepRecord) -> str:
    known = [job for job in sweep.jobs if job.hardware]
    machines: dict[str, int] = {}
    for job in known:
        machines[_machine(job)] = machines.get(_machine(job), 0) + 1
    commits = dict.fromkeys(job.tags.get("msgrpo.commit", "unknown") for job in sweep.jobs)
    dirty = sum(job.dirty for job in sweep.jobs)
    state = f"{_listed(commits)}; " + (f"{dirty} jobs with uncommitted changes" if dirty else "no uncommitted changes")
    lines = [f"- Commit: {state}."]
    lines += [f"- Machine of {jobs} job{'s' if jobs != 1 else ''}: {text}." for text, jobs in machines.items()]
    versions = [
        f"{name} {_listed(dict.fromkeys(job.packages[name] for job in known if name in job.packages))}"
        for name in PACKAGES
        if any(name in job.packages for job in known)
    ]
    lines.append(f"- Versions: {', '.join(versions) or 'unknown'}.")
    return "\n\n".join(["## Code, machine, versions", "\n".join(lines)])


def _machine(job: JobRecord) -> str:
    facts = job.hardware
    accelerators = _listed(facts.get("accelerators") or []) if facts.get("accelerators") else "no accelerator"
    return (
        f"{escape(facts.get('processor'))}, {escape(facts.get('cores'))} cores, {escape(facts.get('memory_gb'))} GB, "
        f"{accelerators}, torch threads: {escape(facts.get('torch_threads'))}, Python {escape(facts.get('python'))}, "
        f"{escape(facts.get('system'))}"
    )


def _scenarios(jobs: Sequence[JobRecord]) -> list[str]:
    found = (re.fullmatch(r"eval/([^/]+)/(?:return_mean|success_rate)", key) for job in jobs for key in job.history)
    return list(dict.fromkeys(match[1] for match in found if match))


def _ends(jobs: Sequence[JobRecord], metric: str) -> tuple[list[float], list[float]]:
    """The first and the last value of every job that logged the metric."""
    logged = [job.history[metric] for job in jobs if job.history.get(metric)]
    return [points[0][1] for points in logged], [points[-1][1] for points in logged]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return MISSING
    spread = over_runs(values)
    if not math.isfinite(spread.low):
        return number(spread.mean)
    return f"{number(spread.mean)} \\[{number(spread.low)}, {number(spread.high)}\\]"


def _change(jobs: Sequence[JobRecord], metric: str) -> str:
    starts, ends = _ends(jobs, metric)
    return f"{_spread(starts)} → {_spread(ends)}" if ends else MISSING


def _plain_change(jobs: Sequence[JobRecord], metric: str) -> str:
    starts, ends = _ends(jobs, metric)
    return f"{number(float(np.mean(starts)), 2)} → {number(float(np.mean(ends)), 2)}" if ends else MISSING


def _updates(jobs: Sequence[JobRecord], metric: str) -> str:
    last = sorted({job.history[metric][-1][0] for job in jobs if job.history.get(metric)})
    return _listed(last)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(escape(value) for value in values if str(value)) or MISSING


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000.0, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _elapsed(sweep: SweepRecord) -> str:
    return duration(None if sweep.end_ms is None else (sweep.end_ms - sweep.start_ms) / 1000.0)


log = logging.getLogger(__name__)

CARD = "card.md"
LATEST = "latest"


def keep_card(tracking_uri: str, sweep: str) -> None:
    """Write the card of a sweep that has ended to its parent run; a card that cannot be made is a warning."""
    mlflow = mlflow_module()
    try:
        client = mlflow.MlflowClient(tracking_uri)
        client.log_text(sweep, render(read_sweep(client, sweep)), CARD)
    # RuntimeError: a program that is ending starts no threads, which remote artifact stores work with
    except (mlflow.exceptions.MlflowException, OSError, ValueError, RuntimeError) as error:
        log.warning(
            "sweep %s has no card (%s): make it with python -m msgrpo_lab.report.card %s",
            sweep,
            one_line(str(error)),
            sweep,
        )


def _newest(client: MlflowClient, experiment: str) -> str:
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"experiment={experiment}: no such experiment; give the --experiment that was swept in")
    sweeps = client.search_runs(
        [found.experiment_id], "tags.`msgrpo.kind` = 'sweep'", max_results=1, order_by=["attributes.start_time DESC"]
    )
    if not sweeps:
        raise ValueError(f"sweep={LATEST}: experiment '{experiment}' has no sweep; make one with `make sweep`")
    return str(sweeps[0].info.run_id)


def _client(tracking_uri: str) -> MlflowClient:
    check_reachable(tracking_uri)
    path = database_path(tracking_uri)
    if path is not None and not path.is_file():
        raise ValueError(f"tracking-uri={tracking_uri}: no database is there; give the one the sweep was logged to")
    client: MlflowClient = mlflow_module().MlflowClient(tracking_uri)
    return client


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="msgrpo_lab.report.card", description="Make a sweep's experiment card.")
    parser.add_argument("sweep", nargs="?", default=LATEST, help="parent run id (default: the newest sweep)")
    parser.add_argument(
        "--tracking-uri",
        default=f"sqlite:///{project_root() / 'outputs' / 'mlflow.db'}",
        help="MLflow address (%(default)s)",
    )
    parser.add_argument("--experiment", default="msgrpo", help="where to look for the newest sweep (%(default)s)")
    parser.add_argument(
        "--output", type=Path, help=f"write the card to this file, instead of to the parent run as {CARD}"
    )
    arguments = parser.parse_args(argv)
    mlflow = mlflow_module()
    try:
        client = _client(arguments.tracking_uri)
        sweep = _newest(client, arguments.experiment) if arguments.sweep == LATEST else arguments.sweep
        text = render(read_sweep(client, sweep))
        if arguments.output is None:
            client.log_text(sweep, text, CARD)
            print(f"{CARD} of sweep {sweep} in {arguments.tracking_uri}")
        else:
            arguments.output.write_text(text, encoding="utf-8")
            print(arguments.output)
    except (mlflow.exceptions.MlflowException, OSError, ValueError) as error:
        print(f"msgrpo_lab: {one_line(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())


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
