"""Results for people and for scripts: Markdown, JSON, MLflow, and all episodes in one Parquet file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import DictConfig

from msgrpo_lab.evaluation.contender import Contender
from msgrpo_lab.evaluation.pairs import INTERVALS, POINTS
from msgrpo_lab.evaluation.play import Evaluation, Result
from msgrpo_lab.evaluation.results import as_columns
from msgrpo_lab.files import written_whole
from msgrpo_lab.messages import redact_text
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED
from msgrpo_lab.tracking.database import mlflow_module, prepare_store
from msgrpo_lab.tracking.run import finish_run, start_run
from msgrpo_lab.tracking.tracking import MLflowTracking, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient

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


PARENT_KIND, KIND = "evaluations", "evaluation"
LONGEST_TAG = 5000
METRICS_A_CALL = 1000
"""MLflow takes no more in one batch."""


def track(
    evaluation: Evaluation, tracking: MLflowTracking, config: DictConfig, command: str, files: Sequence[Path]
) -> str:
    """Logs everything, with `files` as the parent's artifacts; returns the parent run's id.

    Raises:
        ValueError: the store cannot be used.
    """
    mlflow = mlflow_module()
    experiment_id = prepare_store(tracking.tracking_uri, tracking.experiment)
    mlflow.set_tracking_uri(tracking.tracking_uri)
    mlflow.set_experiment(experiment_id=experiment_id)
    told = redact_text(command)[:LONGEST_TAG]
    parent = start_run(
        config,
        parent_run_id=None,
        run_name=tracking.run_name or "evaluation",
        tags={"msgrpo.kind": PARENT_KIND, "msgrpo.command": told, "msgrpo.digest": evaluation.digest},
        log_system_metrics=False,
    )
    status: Status = "FAILED"
    try:
        for file in files:
            mlflow.log_artifact(str(file), "evaluation")
        client = mlflow.MlflowClient(tracking.tracking_uri)
        for contender in dict.fromkeys(one.contender.label for one in evaluation.results):
            results = [one for one in evaluation.results if one.contender.label == contender]
            _child(client, experiment_id, parent, results, evaluation)
        status = "FINISHED"
    finally:
        finish_run(status)
    return parent


def _child(
    client: MlflowClient, experiment_id: str, parent: str, results: Sequence[Result], evaluation: Evaluation
) -> None:
    from mlflow.entities import Metric

    contender = results[0].contender
    run = client.create_run(experiment_id, tags=tags_of(contender, parent), run_name=contender.label)
    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, 0) for name, value in metrics_of(results, evaluation).items()]
    for first in range(0, len(metrics), METRICS_A_CALL):
        client.log_batch(run.info.run_id, metrics=metrics[first : first + METRICS_A_CALL])
    client.set_terminated(run.info.run_id, "FINISHED")


def tags_of(contender: Contender, parent: str) -> dict[str, str]:
    """By which the run of a policy's scores is found; "" where there is nothing to say."""
    return {
        "msgrpo.kind": KIND,
        "mlflow.parentRunId": parent,
        "policy": contender.label,
        "policy.kind": contender.kind,
        **asdict(contender.origin),
    }


def metrics_of(results: Sequence[Result], evaluation: Evaluation) -> dict[str, float]:
    """A policy's scores under the names that training gives them, and the reference players' of its scenarios."""
    metrics: dict[str, float] = {}
    for result in results:
        prefix = "greedy_" if result.decoding == "greedy" else ""
        metrics |= {f"eval/{result.scenario}/{prefix}{name}": value for name, value in result.scores.items()}
    for scenario in dict.fromkeys(result.scenario for result in results):
        metrics |= dict(_of_references(scenario, evaluation.references[scenario]))
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _of_references(scenario: str, players: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for player, score in players.items():
        yield f"reference/{scenario}/{player}/return_mean", score.return_mean
        yield f"reference/{scenario}/{player}/success_rate", score.success_rate
