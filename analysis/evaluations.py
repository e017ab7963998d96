"""Evaluation runs → one tidy table of scores, and the trained-on × evaluated-on matrix.

`python -m msgrpo_lab.evaluate` logs a parent run (tag `msgrpo.kind=evaluations`) with a child a policy
(`msgrpo.kind=evaluation`), whose metrics at step 0 are `eval/<scenario>/[greedy_]<score>` with `_low` and `_high`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from msgrpo_lab.intervals import Interval, mean_of_means, stratified_bootstrap
from msgrpo_lab.report.curves import BOOTSTRAP_SEED, ENV_ORDER, MODES, OVER_EPISODES, OVER_RUNS, SAMPLER_ORDER, rank
from msgrpo_lab.report.sweep import KIND, LATEST, PARENT, Runs, TrackingError

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger("analysis.evaluations")

MATCHING = "matching"
NO_EVALUATIONS = "none"
SCORES = ("normalised_score", "return_mean", "success_rate")
TAGS = ("policy", "policy.kind", "trained_on", "model", "sampler", "credit", "seed", "source_run")
FIXED_KINDS = ("player", "base", "remote")
"""Policies that no run of this project trained."""
UPPER_ENDS = ("search", "optimal")
PLAYER_ORDER = ("random", "ignores_prompt", "hole_avoiding", "compact_ceiling", *UPPER_ENDS, "upper")
COLUMNS = ("run_id", "evaluations", "start", *TAGS, "scenario", "mode", "score", "value", "low", "high")


def _scores(run: Run) -> list[dict[str, Any]]:
    """One row a (scenario, mode, score) that the run has logged."""
    named = {"run_id": run.info.run_id, "evaluations": run.data.tags.get(PARENT, "")}
    named["start"] = pd.Timestamp(run.info.start_time, unit="ms", tz="UTC")
    named |= {tag: run.data.tags.get(tag, "") for tag in TAGS}
    metrics, rows = run.data.metrics, []
    for key, value in metrics.items():
        found = re.fullmatch(rf"eval/([^/]+)/(greedy_)?({'|'.join(SCORES)})", key)
        if found:
            ends = {end: metrics.get(f"{key}_{end}", math.nan) for end in ("low", "high")}
            mode = "greedy" if found[2] else "sampled"
            rows.append({**named, "scenario": found[1], "mode": mode, "score": found[3], "value": value, **ends})
    return rows


def load_evaluations(
    tracking_uri: str, experiment: str, run_ids: Collection[str], evaluations: str = MATCHING
) -> pd.DataFrame:
    """Scores of evaluated policies, one row a (policy, scenario, mode, score).

    A policy that was evaluated on a scenario several times counts once, with its newest scores.

    Args:
        tracking_uri: MLflow tracking address.
        experiment: experiment name.
        run_ids: training runs that are drawn.
        evaluations: "matching" (policies trained by `run_ids`, and what else was evaluated beside them), "latest" (the
            newest finished command), parent run ids with commas between, or "none".

    Returns:
        Columns run_id, evaluations (parent id), start, policy, policy.kind, trained_on, model, sampler, credit, seed,
        source_run, scenario, mode (sampled or greedy), score, value, low, high (95 % interval over episodes, or nan).

    Raises:
        TrackingError: no such evaluation.
    """
    empty = pd.DataFrame(columns=list(COLUMNS))
    if evaluations == NO_EVALUATIONS:
        return empty
    store = Runs(tracking_uri, experiment)
    children = store.search(f"tags.`{KIND}` = 'evaluation'")
    finished = [run for run in children if run.info.status == "FINISHED"]
    if len(finished) < len(children):
        log.warning("left out: %d evaluations that did not finish", len(children) - len(finished))
    if evaluations == MATCHING:
        sources = set(run_ids)
        parents = {run.data.tags.get(PARENT) for run in finished if run.data.tags.get("source_run") in sources}
        chosen = [
            run
            for run in finished
            if run.data.tags.get("source_run") in sources
            or (run.data.tags.get(PARENT) in parents and run.data.tags.get("policy.kind") in FIXED_KINDS)
        ]
    else:
        wanted = set(_parents(store, evaluations))
        chosen = [run for run in finished if run.data.tags.get(PARENT) in wanted]
        if not chosen:
            raise TrackingError(f"evaluations '{evaluations}': no policy in it was evaluated to the end; run it again")
    table = pd.DataFrame([row for run in chosen for row in _scores(run)], columns=list(COLUMNS))
    keys = ["policy", "policy.kind", "source_run", "scenario", "mode", "score"]
    return table.sort_values("start", kind="stable").drop_duplicates(keys, keep="last").reset_index(drop=True)


def _parents(store: Runs, evaluations: str) -> list[str]:
    """The parent ids that "latest" or a list of ids names."""
    found = store.search(f"tags.`{KIND}` = 'evaluations'")
    known = [run.info.run_id for run in found]
    if evaluations == LATEST:
        done = [run.info.run_id for run in found if run.info.status == "FINISHED"]
        if not done:
            remedy = "make one with python -m msgrpo_lab.evaluate"
            raise TrackingError(f"experiment '{store.experiment}' has no finished evaluation; {remedy}")
        return done[-1:]
    ids = [part.strip() for part in evaluations.split(",") if part.strip()]
    for run_id in ids:
        if run_id not in known:
            newest = ", ".join(known[-3:]) or "none"
            raise TrackingError(
                f"evaluations '{run_id}' is not in experiment '{store.experiment}'; newest: {newest}; "
                f"or give '{MATCHING}', '{LATEST}' or '{NO_EVALUATIONS}'"
            )
    if not ids:
        raise TrackingError(f"evaluations '{evaluations}' names no run: give an id, '{MATCHING}' or '{LATEST}'")
    return ids


def transfer(evaluations: pd.DataFrame, mode: str = "sampled") -> pd.DataFrame:
    """Normalised scores of what was trained on one scenario and played on another, means over training runs.

    Returns:
        One row a (policy, scenario): columns kind (player, base, remote or trained), trained_on ("" where nothing was),
        method (sampler, and model or credit rule where these differ; else the policy), scenario, runs, value, low, high
        and interval (over runs by bootstrap; with one run the logged one over episodes). Reference players come first,
        `optimal` and `search` as one, "upper", where no scenario has both; then untrained and served models; then what
        was trained, in the order of the environments.
    """
    mine = evaluations[(evaluations["mode"] == mode) & (evaluations["score"] == "normalised_score")]
    if mine.empty:
        return pd.DataFrame()
    trained = mine["trained_on"] != ""
    shown = [tag for tag in ("model", "credit") if mine.loc[trained, tag].nunique() > 1]
    method = mine["sampler"].astype(str)
    for tag in shown:
        method = method + ", " + mine[tag].astype(str)
    method = method.where(trained & (mine["sampler"] != ""), mine["policy"])
    upper = mine["policy.kind"].eq("player") & mine["policy"].isin(UPPER_ENDS)
    if not mine[upper].duplicated("scenario").any():  # each scenario's own upper end of the scale: one row
        method = method.where(~upper, "upper")
    kind = mine["policy.kind"].where(~trained, "trained")
    rows = []
    for (what, trained_on, name, scenario), cell in mine.assign(method=method, kind=kind).groupby(
        ["kind", "trained_on", "method", "scenario"], sort=False
    ):
        scores_R = cell["value"].to_numpy(dtype=np.float64)
        interval, over = Interval(float(cell["low"].iloc[0]), float(cell["high"].iloc[0])), OVER_EPISODES
        if scores_R.size > 1:
            rng = np.random.default_rng(BOOTSTRAP_SEED)
            interval, over = stratified_bootstrap([scores_R], mean_of_means, rng), OVER_RUNS
        rows.append(
            {
                "kind": what,
                "trained_on": trained_on,
                "method": name,
                "scenario": scenario,
                "runs": scores_R.size,
                "value": float(scores_R.mean()),
                "low": interval.low,
                "high": interval.high,
                "interval": over,
                "mode": mode,
            }
        )
    kinds = ("player", "base", "remote", "trained")
    rows.sort(
        key=lambda row: (
            rank(row["kind"], kinds),
            rank(row["trained_on"], ENV_ORDER),
            rank(row["method"], PLAYER_ORDER if row["kind"] == "player" else SAMPLER_ORDER),
            rank(row["scenario"], ENV_ORDER),
        )
    )
    return pd.DataFrame(rows)


def as_references(evaluations: pd.DataFrame, points: pd.DataFrame, trained: Collection[str]) -> pd.DataFrame:
    """Evaluated models that were not trained here, as reference players of every environment drawn.

    Args:
        evaluations: from `load_evaluations`.
        points: from `msgrpo_lab.report.curves.join`.
        trained: names of the models that were trained; their untrained selves are the first points of their curves.

    Returns:
        Points to add: metrics `reference/<scenario>/<policy>/<score>`, one run an environment.
    """
    models = evaluations[
        evaluations["policy.kind"].isin(["base", "remote"])
        & ~evaluations["model"].isin(list(trained))
        & (evaluations["mode"] == next(iter(MODES)))
    ]
    rows = []
    for env, run_id, method, seed in points.drop_duplicates("env")[["env", "run_id", "method", "seed"]].itertuples(
        index=False, name=None
    ):
        for row in models.to_dict("records"):
            name = str(row["policy"]).rpartition("/")[2]
            metric = f"reference/{row['scenario']}/{name}/{row['score']}"
            rows.append((run_id, env, method, seed, metric, 0, row["value"]))
    columns = ["run_id", "env", "method", "seed", "metric", "step", "value"]
    return pd.DataFrame(rows, columns=columns).astype({"step": "int64", "value": "float64"})
