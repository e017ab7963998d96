"""The sweep as Markdown: a row a (environment, method), the reference players, and the comparison over environments."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.style import PLAYER_LABELS, method_label, scenario_title
from msgrpo_lab.intervals import Interval, iqm, probability_of_improvement, stratified_bootstrap
from msgrpo_lab.report.curves import (
    BOOTSTRAP_SEED,
    MODES,
    NONE,
    OVER_EPISODES,
    OVER_RUNS,
    last_values,
    score_metric,
    summary,
)

MISSING = "–"
SCORES = ("return_mean", "success_rate")
FOOTNOTES = {
    OVER_RUNS: "95 % bootstrap intervals over seeds",
    OVER_EPISODES: "95 % intervals over evaluation episodes: with one seed there is no interval over seeds",
    NONE: "no interval: one seed, and none over episodes was logged",
}


def number(value: float, digits: int = 3) -> str:
    """A number with fixed digits and a true minus sign; a dash where it is not known."""
    return f"{value:.{digits}f}".replace("-", "−") if math.isfinite(value) else MISSING


def with_interval(value: float, interval: Interval, digits: int = 3) -> str:
    """`0.840 [0.790, 0.880]`, or the number alone where there is no interval."""
    if not (math.isfinite(interval.low) and math.isfinite(interval.high)):
        return number(value, digits)
    return f"{number(value, digits)} [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def duration(seconds: float) -> str:
    """Seconds as `41 s`, `12 min 05 s` or `2 h 03 min`; a dash where unknown."""
    if not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _change(row: Mapping[Hashable, float]) -> str:
    start = with_interval(row["start"], Interval(row["start_low"], row["start_high"]))
    return f"{start} → {with_interval(row['end'], Interval(row['end_low'], row['end_high']))}"


def _cell_rows(cell: pd.DataFrame) -> list[list[str]]:
    rows = []
    for method, modes in cell.groupby("method", sort=False):
        by_mode = {str(row["mode"]): row for row in modes.to_dict("records")}
        first = next(iter(by_mode.values()))
        steps = first["env_steps"]
        rows.append(
            [
                method_label(str(method)),
                str(first["seeds"]),
                str(first["last_step"]),
                *(_change(by_mode[mode]) if mode in by_mode else MISSING for mode in MODES),
                *(number(by_mode[mode]["normalised"]) if mode in by_mode else MISSING for mode in MODES),
                f"{round(steps):,}".replace(",", " ") if math.isfinite(steps) else MISSING,
                duration(first["wall_s"]),
            ]
        )
    return rows


def reference_values(points: pd.DataFrame, env: str, scenario: str) -> pd.DataFrame:
    """Reference players × (return_mean, success_rate) of a scenario, worst first; nan where not logged."""
    prefix = f"reference/{scenario}/"
    mine = points[(points["env"] == env) & points["metric"].str.startswith(prefix)]
    names = mine["metric"].str.removeprefix(prefix).str.split("/", n=1, expand=True).reindex(columns=[0, 1])
    table = mine.assign(player=names[0], score=names[1]).pivot_table(index="player", columns="score", values="value")
    return table.reindex(columns=list(SCORES)).sort_values([score_metric(scenario), *SCORES], kind="stable")


def _scenario_section(points: pd.DataFrame, env: str, scenario: str, cell: pd.DataFrame) -> list[str]:
    score = "success rate" if score_metric(scenario) == "success_rate" else "return"
    header = [
        "sampler",
        "seeds",
        "updates",
        f"{score}, sampled: start → end",
        f"{score}, greedy: start → end",
        "normalised, sampled",
        "normalised, greedy",
        "env steps",
        "training time",
    ]
    notes = [FOOTNOTES[kind] for kind in FOOTNOTES if kind in set(cell["interval"])]
    lines = [f"## {scenario_title(env, scenario)} (`{scenario}`)", markdown_table(header, _cell_rows(cell))]
    lines.append(f"Held-out episodes. In brackets: {'; '.join(notes)}.")
    players = reference_values(points, env, scenario)
    if not players.empty:
        rows = [
            [PLAYER_LABELS.get(str(player), str(player)), *(number(float(value)) for value in row)]
            for player, row in zip(players.index, players.to_numpy(), strict=True)
        ]
        lines.append(markdown_table(["reference player", "return", "success rate"], rows))
    return lines


def _across_section(points: pd.DataFrame, table: pd.DataFrame) -> list[str]:
    """IQM of the normalised sampled score over environments, and P(improvement) over the first method."""
    own = table[(table["mode"] == "sampled") & (table["env"] == table["scenario"])]
    envs = list(own["env"].unique())
    scores: dict[str, list[np.ndarray]] = {}
    for method in own["method"].unique():
        values = [last_values(points, env, method, f"eval/{env}/normalised_score")["value"] for env in envs]
        if all(len(value) and value.notna().all() for value in values):
            scores[method] = [value.to_numpy(dtype=np.float64) for value in values]
    if len(envs) < 2 or not scores:
        return []
    base = next(iter(scores))
    rows = []
    for method, scores_MR in scores.items():
        interval = stratified_bootstrap(scores_MR, iqm, np.random.default_rng(BOOTSTRAP_SEED))
        better = number(probability_of_improvement(scores_MR, scores[base]), 2) if method != base else MISSING
        runs = ", ".join(str(scores_R.size) for scores_R in scores_MR)
        rows.append([method_label(method), runs, with_interval(iqm(scores_MR), interval), better])
    single = any(scores_R.size < 2 for scores_MR in scores.values() for scores_R in scores_MR)
    note = "IQM and probability of improvement after Agarwal et al. 2021; in brackets: stratified bootstrap over seeds"
    note += "; with a single seed no interval exists." if single else "."
    header = ["sampler", "seeds an environment", "IQM of the normalised score", f"P(better than {method_label(base)})"]
    return [f"## Over {len(envs)} environments (sampled, last update)", markdown_table(header, rows), note]


def render(points: pd.DataFrame, source: str, left_out: Sequence[str]) -> str:
    """The whole document: every cell of `summary`, its reference rows, and what was left out."""
    table = summary(points)
    jobs = points["run_id"].nunique()
    blocks = ["# Comparison", f"{jobs} finished job{'s' if jobs != 1 else ''}; {source}."]
    if table.empty:
        blocks.append("No job logged a held-out score.")
    else:
        for (env, scenario), cell in table.groupby(["env", "scenario"], sort=False):
            blocks += _scenario_section(points, str(env), str(scenario), cell)
        blocks += _across_section(points, table)
    if left_out:
        blocks += ["## Remarks", "\n".join(f"- {line}" for line in left_out)]
    return "\n\n".join(blocks) + "\n"


def write_table(points: pd.DataFrame, source: str, left_out: Sequence[str], out: Path) -> list[Path]:
    """Write `table.md` and the same numbers, unrounded, as `table.csv`; returns both paths."""
    paths = [out / "table.md", out / "table.csv"]
    paths[0].write_text(render(points, source, left_out), encoding="utf-8")
    summary(points).to_csv(paths[1], index=False)
    return paths
