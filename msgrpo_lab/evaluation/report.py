"""Results for people and for scripts: Markdown, JSON, and all episodes in one Parquet file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from msgrpo_lab.evaluation.play import Evaluation
from msgrpo_lab.evaluation.rows import INTERVALS, POINTS
from msgrpo_lab.evaluation.store import as_columns
from msgrpo_lab.files import written_whole
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED

EPISODES, TABLE, SCORES, PAIRS = "episodes.parquet", "table.md", "scores.json", "pairs.json"
HEADINGS: Mapping[str, str] = {
    "success_rate": "success",
    "return_mean": "return",
    "normalised_score": "normalised",
    "episode_length": "turns",
    "valid_action_rate": "legal answers",
    "token_entropy": "token entropy",
    "action_entropy": "action entropy",
}
NOTES = """\
Intervals (95 %) are over episodes, for these very policies: success by Wilson, return by the normal approximation,
differences by Student's t over the pairs. They say nothing of training runs with other seeds. Normalised: 0 is the
lower reference player's return, 1 the upper one's. Entropies in nats, estimated from the sampled answers."""
PAIR_NOTES = """\
Difference: mean return of the policy minus the other's on the same episodes. P(better): share of episodes with a higher
return, equal ones counted half. Sign test: two-sided p-value over the episodes that are not equal, not corrected for
the number of comparisons."""


def write_files(
    evaluation: Evaluation, scores: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], command: str
) -> list[Path]:
    """Writes everything into the evaluation's folder; returns the files.

    Raises:
        OSError: a file cannot be written.
    """
    folder = evaluation.folder
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / EPISODES) as stream:
        pq.write_table(_all_episodes(evaluation), stream, compression="zstd")
    write_json(folder / SCORES, scores)
    write_json(folder / PAIRS, pairs)
    with written_whole(folder / TABLE) as stream:
        stream.write(as_markdown(evaluation, scores, pairs, command).encode())
    return [folder / name for name in (EPISODES, SCORES, PAIRS, TABLE)]


def write_json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a list of objects, whole or not at all.

    Raises:
        OSError: it cannot be written; what stood there still does.
    """
    text = json.dumps(list(rows), indent=1, ensure_ascii=False, allow_nan=False)
    with written_whole(path) as stream:
        stream.write(f"{text}\n".encode())


def _all_episodes(evaluation: Evaluation) -> pa.Table:
    """A row an episode, with the names of its policy, scenario and decoding."""
    parts = []
    for result in evaluation.results:
        count = len(result.played)
        names = {"policy": result.contender.label, "scenario": result.scenario, "decoding": result.decoding}
        origin = {"kind": result.contender.kind, **asdict(result.contender.origin)}
        columns = {name: [value] * count for name, value in {**names, **origin}.items()}
        parts.append(pa.table({**columns, "episode": list(range(count)), **as_columns(result.played)}))
    return pa.concat_tables(parts, promote_options="default")


def as_markdown(
    evaluation: Evaluation, scores: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]], command: str
) -> str:
    """The tables, a scenario each, and how they came about."""
    episodes = scores[0]["episodes"] if scores else 0
    last = FIRST_HELD_OUT_SEED + episodes - 1
    lines = [
        "# Evaluation",
        "",
        f"    {command}",
        "",
        f"{episodes} held-out episodes a cell, seeds {FIRST_HELD_OUT_SEED} to {last}, the same for every policy.",
        NOTES,
    ]
    for scenario in evaluation.references:
        lines += [
            "",
            f"## {_cell(scenario)}",
            "",
            *_score_table(scenario, scores),
            "",
            _reference_line(evaluation, scenario),
        ]
    if pairs:
        lines += ["", "## Comparisons", "", PAIR_NOTES, "", *_pair_table(pairs)]
    return "\n".join(lines) + "\n"


def _score_table(scenario: str, scores: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = (*INTERVALS, *POINTS)
    yield "| policy | decoding | " + " | ".join(HEADINGS[name] for name in names) + " |"
    yield "|---|---|" + "---|" * len(names)
    for row in scores:
        if row["scenario"] == scenario:
            values = [_with_interval(row, name) for name in INTERVALS] + [_number(row[name]) for name in POINTS]
            yield f"| {_cell(_name(row))} | {row['decoding']} | " + " | ".join(values) + " |"


def _name(row: Mapping[str, Any]) -> str:
    """A policy's label and, of a trained one, what it was trained on."""
    told = [f"{key} {row[key]}" for key in ("trained_on", "sampler", "seed") if row[key]]
    return f"{row['policy']} ({', '.join(told)})" if told else str(row["policy"])


def _reference_line(evaluation: Evaluation, scenario: str) -> str:
    players = [
        f"{name} {score.return_mean:.3f}" + ("" if score.exact else f" ± {score.standard_error:.3f}")
        for name, score in evaluation.references[scenario].items()
    ]
    exact = all(score.exact for score in evaluation.references[scenario].values())
    how = "exact on these seeds" if exact else "simulated, ± one standard error"
    return f"Reference players' return ({how}): {', '.join(players)}."


def _pair_table(pairs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "| scenario | decoding | policy | against | difference | P(better) | wins / ties / losses | sign test p |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in pairs:
        cells = [
            _cell(row["scenario"]),
            row["decoding"],
            _cell(row["policy"]),
            _cell(row["against"]),
            _with_interval(row, "difference"),
            _with_interval(row, "probability_of_improvement"),
            f"{row['wins']} / {row['ties']} / {row['losses']}",
            f"{row['sign_test_p']:.2g}",
        ]
        yield "| " + " | ".join(cells) + " |"


def _with_interval(row: Mapping[str, Any], name: str) -> str:
    if row[f"{name}_low"] is None:
        return _number(row[name])
    return f"{_number(row[name])} [{_number(row[f'{name}_low'])}, {_number(row[f'{name}_high'])}]"


def _number(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def _cell(text: str) -> str:
    """Text that cannot end a table's cell or begin anything else."""
    return " ".join(
        str(text).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;").split()
    )
