"""One MLflow run: opened under its parent, with the configuration and where it comes from, and closed."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.config.components import resolve
from msgrpo_lab.config.paths import code_checkout
from msgrpo_lab.messages import redact_text
from msgrpo_lab.tracking.database import mlflow_module, reason_of, store_errors
from msgrpo_lab.tracking.outbox import End, Entry, Tag

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
    config = resolve(cfg)
    params = [(key, _cut(value)) for key, value in flatten(config)]
    for first in range(0, len(params), PARAMS_A_CALL):
        mlflow.log_params(dict(params[first : first + PARAMS_A_CALL]))
    mlflow.log_text(OmegaConf.to_yaml(OmegaConf.create(config)), "config/resolved.yaml")
    if HydraConfig.initialized():
        overrides = [redact_text(text) for text in HydraConfig.get().overrides.task]
        mlflow.log_text(OmegaConf.to_yaml(OmegaConf.create(overrides)), "config/overrides.yaml")
    # Of the code that runs, wherever outputs go.
    git = git_state(code_checkout())
    mlflow.log_dict({"commit": git.commit, "branch": git.branch, "dirty": git.dirty}, "provenance/git.json")
    if git.diff:
        mlflow.log_text(git.diff, "provenance/uncommitted.diff")
    mlflow.log_dict(package_versions(), "provenance/packages.json")
    mlflow.log_dict(hardware(), "provenance/hardware.json")
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


GIT_TIMEOUT_S = 20
LONGEST_DIFF = 1_000_000
"""Characters of an uncommitted diff that are kept."""
_SECRET_FILES = (".env", ".env.*", "*.env", "*.pem", "*.key", "*secret*", "*credential*", ".netrc", ".npmrc", ".pypirc")


@dataclass(frozen=True, slots=True, kw_only=True)
class GitState:
    """The code that ran."""

    commit: str | None
    """Full hash; None outside a git checkout."""
    branch: str | None
    dirty: bool
    """Tracked files differ from the commit, or untracked ones lie beside them."""
    diff: str
    """Uncommitted changes of tracked files, secret-looking files left out and values hidden."""


def git_state(root: Path | None) -> GitState:
    """The state of the checkout whose top is `root`; all None and empty where there is none, or no git."""
    commit = None if root is None or not _is_top(root) else _git(root, "rev-parse", "HEAD")
    if root is None or commit is None:
        return GitState(commit=None, branch=None, dirty=False, diff="")
    status = _git(root, "status", "--porcelain") or ""
    left_out = [f":(exclude,glob)**/{pattern}" for pattern in _SECRET_FILES]
    diff = redact_text(_git(root, "diff", "HEAD", "--no-color", "--no-ext-diff", "--", ".", *left_out) or "")
    if len(diff) > LONGEST_DIFF:
        diff = f"{diff[:LONGEST_DIFF]}\n[cut: {len(diff)} characters in all]\n"
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD")
    return GitState(commit=commit.strip(), branch=branch and branch.strip(), dirty=bool(status.strip()), diff=diff)


def _is_top(root: Path) -> bool:
    """Whether `root` is a checkout itself, and does not only lie in somebody else's."""
    top = _git(root, "rev-parse", "--show-toplevel")
    return top is not None and Path(top.rstrip("\n")).resolve() == root.resolve()


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Version of every installed distribution by name, sorted."""
    found = {dist.metadata["Name"]: dist.version for dist in metadata.distributions() if dist.metadata["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def hardware() -> dict[str, Any]:
    """The machine: system, processor, cores usable by this process, memory in GB (10⁹ bytes), accelerators, threads."""
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
