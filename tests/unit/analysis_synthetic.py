"""A made-up MLflow database with the curves that a real sweep has: inputs whose answers the analysis tests know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from msgrpo_lab.report.curves import join, label_methods

EVAL_EVERY = 5
UPDATES = 40
EPISODES = 200
REFERENCES = {
    "frozenlake": {
        "random": (0.007, 0.007),
        "ignores_prompt": (0.27, 0.27),
        "hole_avoiding": (0.86, 0.86),
        "compact_ceiling": (0.90, 0.90),
        "optimal": (1.0, 1.0),
    },
    "snake": {"random": (-0.31, 0.05), "ignores_prompt": (-0.22, 0.08), "search": (2.4, 0.93)},
}
"""Scenario → player → (return, success rate)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One child run to make."""

    env: str = "frozenlake"
    sampler: str = "uniform"
    seed: int = 0
    status: str = "FINISHED"
    updates: int = UPDATES
    without: tuple[str, ...] = ()
    """Metrics whose names start with one of these are not logged."""
    tags: tuple[tuple[str, str | None], ...] = ()
    """Tags to change, or with None to leave out."""
    params: tuple[tuple[str, str], ...] = ()
    """Parameters to log besides the environment's, the sampler's and the seed."""


GRID = tuple(Job(env=env, sampler=sampler) for env in ("snake", "frozenlake") for sampler in ("uniform", "abs_adv"))


def curves(job: Job) -> dict[str, dict[int, float]]:
    """Metric → step → value, deterministic in the job."""
    spawn_key = (job.seed, sum(map(ord, job.env)), sum(map(ord, job.sampler)))
    rng = np.random.default_rng(np.random.SeedSequence(7, spawn_key=spawn_key))
    lake = job.env.startswith("frozenlake")
    pace = (9.0 if job.sampler == "uniform" else 7.0) * rng.uniform(0.9, 1.1)
    low, high = (0.012, 0.85) if lake else (-0.28, 1.25)
    step_U = np.arange(1, job.updates + 1)

    def level(step: np.ndarray) -> np.ndarray:
        return low + (high - low) / (1 + np.exp(-(step - 2.2 * pace) / (0.55 * pace)))

    def logged(values: np.ndarray, steps: np.ndarray = step_U - 1) -> dict[int, float]:
        # as a run does it: what the first update logs stands at step 0
        return {int(step): float(value) for step, value in zip(steps, values, strict=True)}

    noise_U = rng.normal(0, 0.02 if lake else 0.06, job.updates)
    train_U = np.clip(level(step_U) * 0.95 + noise_U, *((0, 1) if lake else (-1, 5)))
    entropy_U = 1.35 * np.exp(-step_U / 30) + 0.05
    out = {
        "train/return_mean": logged(train_U),
        "train/success_rate": logged(np.clip(train_U, 0, 1)),
        "train/token_entropy": logged(entropy_U + rng.normal(0, 0.01, job.updates)),
        "train/action_entropy": logged(0.8 * entropy_U + rng.normal(0, 0.01, job.updates)),
        "train/zero_std_groups": logged(
            np.clip(0.75 - 0.5 * level(step_U) / high + rng.normal(0, 0.02, job.updates), 0, 1)
        ),
        "sampler/ess": logged(np.ones(job.updates) if job.sampler == "uniform" else 0.35 + 0.005 * step_U),
        "sampler/inclusion_bias": logged(rng.normal(0.0 if job.sampler == "uniform" else 0.25, 0.02, job.updates)),
        "train/trained_tokens": logged((900.0 if job.sampler == "uniform" else 1000.0) * step_U),
        "train/env_steps": logged(14_000.0 * step_U),
        "train/wall_s": logged((5.1 if lake else 8.3) * step_U + rng.uniform(0, 1)),
        "perf/rollout_s": logged(rng.uniform(2, 3, job.updates)),
    }
    if lake:  # no other environment has an oracle
        step_W = np.arange(0, job.updates, EVAL_EVERY)
        for place, score in enumerate(("gradient_cosine", "spearman", "sign_agreement")):
            fidelity_W = 0.6 - 0.1 * place - 0.005 * step_W
            out[f"credit/{score}"] = logged(fidelity_W, step_W)
            out[f"credit/{score}_low"] = logged(fidelity_W - 0.05, step_W)
            out[f"credit/{score}_high"] = logged(fidelity_W + 0.05, step_W)
            out[f"credit/drawn_{score}"] = logged(fidelity_W - 0.1, step_W)
    step_V = np.arange(0, job.updates + 1, EVAL_EVERY)
    for mode, offset in (("", 0.0), ("greedy_", 0.02)):
        score_V = level(step_V) + offset + rng.normal(0, 0.01, step_V.size)
        half_V = 1.96 * np.sqrt(np.clip(score_V * (1 - score_V), 0.004, 1) / EPISODES) + (0 if lake else 0.06)
        floor, ceiling = (0.0, 1.0) if lake else (-1.0, 5.0)
        names = ("return_mean", "success_rate") if lake else ("return_mean",)
        score_V = np.clip(score_V, floor, ceiling)
        top = 1.0 if lake else REFERENCES["snake"]["search"][0]
        for name in names:
            stem = f"eval/{job.env}/{mode}{name}"
            out[stem] = logged(score_V, step_V)
            out[f"{stem}_low"] = logged(np.maximum(score_V - half_V, floor), step_V)
            out[f"{stem}_high"] = logged(np.minimum(score_V + half_V, ceiling), step_V)
        bottom = REFERENCES[job.env]["random"][not lake and 0] if job.env in REFERENCES else 0.0
        out[f"eval/{job.env}/{mode}normalised_score"] = logged((score_V - bottom) / (top - bottom), step_V)
    for player, values in REFERENCES.get(job.env, {}).items():
        for name, value in zip(("return_mean", "success_rate"), values, strict=True):
            out[f"reference/{job.env}/{player}/{name}"] = {0: value}
    return {name: points for name, points in out.items() if not name.startswith(job.without or ("\0",))}


def points_of(jobs: Mapping[tuple[str, str, str], Mapping[str, Mapping[int, float]]]) -> pd.DataFrame:
    """Points of runs written out by hand, from {(env, sampler, seed): {metric: {step: value}}}."""
    runs = pd.DataFrame(list(jobs), columns=["env", "sampler", "seed"])
    runs["run_id"] = runs["name"] = [f"r{place}" for place in range(len(jobs))]
    runs["start"] = pd.date_range("2025-01-01", periods=len(jobs), freq="min", tz="UTC")
    runs[["credit", "model", "prompt"]] = ""
    rows = [
        (f"r{place}", metric, step, value)
        for place, values in enumerate(jobs.values())
        for metric, logged in values.items()
        for step, value in logged.items()
    ]
    return join(label_methods(runs), pd.DataFrame(rows, columns=["run_id", "metric", "step", "value"]))


class Store:
    """An MLflow database to fill; times are made up, so that order never depends on the clock."""

    def __init__(self, folder: Path, experiment: str = "msgrpo") -> None:
        self.uri = f"sqlite:///{folder / 'mlflow.db'}"
        self.client = MlflowClient(self.uri)
        self.experiment = self.client.create_experiment(experiment, artifact_location=str(folder / "artifacts"))
        self.clock = 1_700_000_000_000

    def _tick(self) -> int:
        self.clock += 60_000
        return self.clock

    def sweep(self, jobs: Iterable[Job], status: str = "FINISHED") -> str:
        """A parent run with its children; returns the parent's id."""
        tags = {"msgrpo.kind": "sweep"}
        parent = self.client.create_run(self.experiment, start_time=self._tick(), tags=tags).info.run_id
        for job in jobs:
            self.job(job, parent)
        self.client.set_terminated(parent, status, end_time=self._tick())
        return parent

    def job(self, job: Job, parent: str | None = None) -> str:
        """One job's run with all its metrics; returns its id."""
        tags: dict[str, str | None] = {
            "msgrpo.kind": "job",
            "mlflow.parentRunId": parent,
            "env": job.env,
            "sampler": job.sampler,
            "credit": "episode_return",
            "model": "tiny",
            "prompt": "action_only",
            "seed": str(job.seed),
            **dict(job.tags),
        }
        start = self._tick()
        run_id = self.client.create_run(
            self.experiment,
            start_time=start,
            run_name=f"{job.env}-{job.sampler}-{job.seed}",
            tags={key: value for key, value in tags.items() if value is not None},
        ).info.run_id
        params = {"env.name": job.env, "sampler.name": job.sampler, "seed": str(job.seed), **dict(job.params)}
        self.client.log_batch(
            run_id, params=[Param(key, value) for key, value in params.items()], tags=[RunTag("x", "y")]
        )
        self.log(run_id, curves(job), start)
        if job.status != "RUNNING":
            self.client.set_terminated(run_id, job.status, end_time=start + 50_000)
        return run_id

    def log(self, run_id: str, values: Mapping[str, Mapping[int, float]], time: int) -> None:
        """Log numbers at `time` (ms) plus a tenth of a second a step."""
        metrics = [
            Metric(name, value, time + 100 * step, step)
            for name, points in values.items()
            for step, value in points.items()
        ]
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(run_id, metrics=metrics[first : first + 1000])


@dataclass(frozen=True, kw_only=True)
class Filled:
    """The store that the analysis tests share, and the ids in it."""

    uri: str
    empty_sweep: str
    """A finished sweep whose only job failed."""
    seeds: str
    """Frozen Lake, both samplers, three seeds each, and a failed and a running job."""
    grid: str
    """The newest finished sweep: both environments, both samplers, one seed."""
    running: str
    """A newer sweep, still running, with one finished job."""
    single: str
    """A job of its own, whose `train/loss` was logged twice at step 3 (first 9, then 4) and is -inf at step 4."""


SHORT = 6
"""Updates of the jobs whose curves do not matter."""


@cache
def filled(folder: Path) -> Filled:
    """Make the shared store under `folder`, once a test session."""
    home = folder / "analysis-store"
    home.mkdir()
    store = Store(home)
    empty_sweep = store.sweep([Job(status="FAILED", updates=SHORT)])
    finished = [
        Job(sampler=sampler, seed=seed, updates=SHORT) for sampler in ("uniform", "abs_adv") for seed in range(3)
    ]
    unfinished = [Job(seed=3, status="FAILED", updates=SHORT), Job(seed=4, status="RUNNING", updates=SHORT)]
    seeds = store.sweep([*finished, *unfinished])
    grid = store.sweep(GRID)
    running = store.sweep([Job(updates=SHORT)], status="RUNNING")
    single = store.job(Job(updates=SHORT, seed=11))
    for when, value in ((1, 9.0), (2, 4.0)):
        store.log(single, {"train/loss": {3: value}}, store.clock + when)
    store.log(single, {"train/loss": {4: -np.inf}, "system/cpu": {1: 0.5}}, store.clock)
    Store(home, "bare")
    only_running = Store(home, "only-running")
    only_running.sweep([Job(updates=SHORT)], status="RUNNING")
    return Filled(uri=store.uri, empty_sweep=empty_sweep, seeds=seeds, grid=grid, running=running, single=single)
