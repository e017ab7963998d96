"""Which runs belong together: a cell is one (environment, method), and its runs differ in the seed alone.

A method is the sampler, plus whatever else differs between the jobs (credit rule, model, prompt, any logged parameter),
so that two settings are never averaged as if they were two seeds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import pandas as pd

log = logging.getLogger("analysis.cells")

SAMPLER_ORDER = ("uniform", "abs_adv")
ENV_ORDER = (
    "frozenlake",
    "frozenlake_slippery",
    "frozenlake_big",
    "snake",
    "snake_20",
    "snake_poison",
    "snake_poison_banana",
)
IDENTITY = re.compile(
    r"^param\.(paths|logger|callbacks|checkpoint)\.|(^|[._])(seed|run_id|run_name|dir|ckpt_path|resume|job_num|job_id)$"
)
"""Parameters that tell two runs of one setting apart, and are no setting themselves."""


def score_metric(scenario: str) -> str:
    """The score a scenario is judged by: success on Frozen Lake, whose only reward is success; else the return."""
    return "success_rate" if scenario.startswith("frozenlake") else "return_mean"


def rank(name: str, order: Sequence[str]) -> tuple[int, str]:
    """Sort key: the known names in their order, then the others by name."""
    return (order.index(name) if name in order else len(order), name)


def label_methods(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a column `method`, ordered by environment, method and seed, one run a (env, method, seed).

    A seed that occurs twice in a cell is one run, not two: the newer is kept, and a warning names the other.
    """
    runs = runs.reset_index(drop=True)
    shown = [tag for tag in ("credit", "model", "prompt") if runs[tag].nunique() > 1]
    cells = runs.groupby(["env", "sampler", "credit", "model", "prompt"], sort=False)
    params = [column for column in runs.columns if column.startswith("param.") and not IDENTITY.search(column)]
    shown += [column for column in params if (cells[column].nunique() > 1).any()]
    method = runs["sampler"].astype(str)
    for column in shown:
        name = column.removeprefix("param.")
        value = runs[column].astype(str)
        method = method + ", " + (f"{name}=" + value if column.startswith("param.") else value)
    runs = runs.assign(method=method)
    keyed = runs.assign(seed_key=runs["seed"].where(runs["seed"] != "", runs["run_id"])).sort_values(
        "start", kind="stable"
    )
    twice = keyed.duplicated(["env", "method", "seed_key"], keep="last")
    for row in keyed[twice].itertuples():
        log.warning(
            "left out: job %s (%s, %s) has seed %s, as a newer job does", row.name, row.env, row.method, row.seed
        )
    keyed = keyed[~twice].drop(columns="seed_key")
    order = sorted(
        keyed.index,
        key=lambda i: (
            rank(str(keyed.at[i, "env"]), ENV_ORDER),
            rank(str(keyed.at[i, "sampler"]), SAMPLER_ORDER),
            str(keyed.at[i, "method"]),
            str(keyed.at[i, "seed"]).zfill(9),
        ),
    )
    return keyed.loc[order].reset_index(drop=True)


def join(runs: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Every number with its run's env, method and seed: columns run_id, env, method, seed, metric, step, value."""
    return runs[["run_id", "env", "method", "seed"]].merge(
        metrics[["run_id", "metric", "step", "value"]], on="run_id", how="inner", sort=False
    )


def panels(points: pd.DataFrame) -> list[tuple[str, str]]:
    """The (env, scenario) pairs with held-out scores, the environment's own scenario before the others."""
    found: list[tuple[str, str]] = []
    for env in points["env"].unique():
        names = points.loc[points["env"] == env, "metric"].str.extract(r"^eval/([^/]+)/")[0].dropna().unique()
        found += [(env, scenario) for scenario in sorted(names, key=lambda s: (s != env, *rank(s, ENV_ORDER)))]
    return found
