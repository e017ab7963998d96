"""One MLflow run: opened under its parent, with the configuration and where it comes from, and closed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.callbacks import provenance
from msgrpo_lab.callbacks.entries import End, Entry, Tag
from msgrpo_lab.callbacks.store import mlflow_module, reason_of, store_errors
from msgrpo_lab.config.components import resolved
from msgrpo_lab.config.paths import code_checkout
from msgrpo_lab.messages import redact_text

log = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]
TAGGED_GROUPS = ("env", "sampler", "credit", "model", "prompt")
LONGEST_PARAM = 250
"""Characters of a parameter's value that MLflow keeps everywhere; the whole configuration is an artifact."""
PARAMS_A_CALL = 100
COMMIT_TAG = "msgrpo.commit"
RESUMED_TAG = "msgrpo.resumed"
STOPPED_TAG = "msgrpo.stopped_by"
FOLDER_TAG = "msgrpo.folder"
"""Holds the run's folder: it is there from the moment the run is."""


def start_run(
    cfg: DictConfig,
    *,
    parent_run_id: str | None,
    run_name: str | None,
    tags: Mapping[str, str],
    log_system_metrics: bool = True,
) -> str:
    """Open a run in the current MLflow experiment, and log the configuration and where the run comes from.

    Parameters are the flattened configuration, each value cut at 250 characters; artifacts are `config/resolved.yaml`,
    `config/overrides.yaml` and `provenance/`. If logging fails the run is closed as FAILED; if a signal
    ends it, as KILLED.

    Returns:
        The run's id.
    """
    mlflow = mlflow_module()
    run = mlflow.start_run(
        parent_run_id=parent_run_id, run_name=run_name, tags=dict(tags), log_system_metrics=log_system_metrics
    )
    _log_origin_or_fail(cfg)
    return str(run.info.run_id)


def continue_run(cfg: DictConfig, run_id: str, *, log_system_metrics: bool = True) -> None:
    """Open a run of an earlier process again; it is RUNNING, and `msgrpo.resumed` counts how often this was done.

    The configuration stands in it already, unless that process died before it had written it. What stopped it then is
    no longer true of it.

    Raises:
        ValueError: there is no such run, or it is deleted.
    """
    mlflow = mlflow_module()
    try:
        run = mlflow.start_run(run_id=run_id, log_system_metrics=log_system_metrics)
    except mlflow.exceptions.MlflowException as error:
        remedy = "restore it, or start afresh with resume=null"
        raise ValueError(f"run {run_id}: MLflow cannot continue it ({reason_of(error)}); {remedy}") from error
    if COMMIT_TAG not in run.data.tags:
        _log_origin_or_fail(cfg)
    if STOPPED_TAG in run.data.tags:
        mlflow.delete_tag(STOPPED_TAG)
    mlflow.set_tag(RESUMED_TAG, str(int(run.data.tags.get(RESUMED_TAG, "0")) + 1))


def tells_end(entry: Entry) -> bool:
    """Whether an entry says how a run ended, which is no longer true of a run that is continued."""
    return isinstance(entry, End) or (isinstance(entry, Tag) and entry.key == STOPPED_TAG)


def finish_run(status: Status) -> None:
    """Close the active run, after what is still on its way has been written.

    A store that does not answer is no error here: the run's own logger keeps its end and says so.
    """
    if "mlflow" not in sys.modules:
        return  # a program that is interrupted before it has opened a run does not wait for the import
    mlflow = mlflow_module()
    if mlflow.active_run() is None:
        return
    try:
        mlflow.flush_trace_async_logging()
        mlflow.end_run(status)
    except store_errors() as error:
        log.debug("the run could not be closed: %s", reason_of(error))


def _log_origin_or_fail(cfg: DictConfig) -> None:
    try:
        _log_origin(cfg)
    except BaseException as error:
        finish_run("FAILED" if isinstance(error, Exception) else "KILLED")  # a signal is no exception
        raise


def _log_origin(cfg: DictConfig) -> None:
    mlflow = mlflow_module()
    config = resolved(cfg)
    params = [(key, _cut(value)) for key, value in flatten(config)]
    for first in range(0, len(params), PARAMS_A_CALL):
        mlflow.log_params(dict(params[first : first + PARAMS_A_CALL]))
    mlflow.log_text(OmegaConf.to_yaml(OmegaConf.create(config)), "config/resolved.yaml")
    if HydraConfig.initialized():
        overrides = [redact_text(text) for text in HydraConfig.get().overrides.task]
        mlflow.log_text(OmegaConf.to_yaml(OmegaConf.create(overrides)), "config/overrides.yaml")
    # Of the code that runs, wherever outputs go.
    git = provenance.git_state(code_checkout())
    mlflow.log_dict({"commit": git.commit, "branch": git.branch, "dirty": git.dirty}, "provenance/git.json")
    if git.diff:
        mlflow.log_text(git.diff, "provenance/uncommitted.diff")
    mlflow.log_dict(provenance.package_versions(), "provenance/packages.json")
    mlflow.log_dict(provenance.hardware(), "provenance/hardware.json")
    # Last: it says that all of this is there.
    mlflow.set_tag(COMMIT_TAG, git.commit or "none")


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings by dotted key; a list is one leaf, an empty mapping none."""
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from flatten(value, f"{path}.{key}" if path else str(key))


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST_PARAM else f"{text[: LONGEST_PARAM - 1]}…"


def tags_of(cfg: DictConfig) -> dict[str, str]:
    """The tags by which runs are grouped, the choice of each group and the seed; and the run's folder."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    tags = {group: str(choices[group]) for group in TAGGED_GROUPS if choices.get(group) is not None}
    if HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        tags[FOLDER_TAG] = str(HydraConfig.get().runtime.output_dir)
    return {"msgrpo.kind": "job", **tags, "seed": str(cfg.get("seed", "none"))}


def run_name_of(tags: Mapping[str, str]) -> str:
    """A run's name from its tags: `frozenlake-uniform-episode_return-seed0`."""
    parts = [tags[group] for group in ("env", "sampler", "credit") if group in tags]
    return "-".join([*parts, f"seed{tags['seed']}"])
