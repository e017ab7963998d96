"""An evaluation in MLflow: a parent run for the command, and a child a policy with its scores as metrics.

It is tracked once everything has been played, so a broken evaluation leaves no half-filled runs: what it has played is
in its folder, and the same command goes on from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from msgrpo_lab.callbacks.store import mlflow_module, prepare_store
from msgrpo_lab.callbacks.tracked_run import finish_run, start_run
from msgrpo_lab.callbacks.tracking import MLflowTracking, Status
from msgrpo_lab.evaluation.contender import Contender
from msgrpo_lab.evaluation.play import Evaluation, Result
from msgrpo_lab.messages import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
