"""Trained policies: folders of weights, checkpoints and tracked runs, and how they get into a policy."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msgrpo_lab.config.components import components
from msgrpo_lab.evaluation.contender import Origin, PolicySpec
from msgrpo_lab.files import check_manifest
from msgrpo_lab.lap.adapter import CONFIG as ADAPTER_CONFIG
from msgrpo_lab.lap.adapter import SavedAdapter, load_adapter, read_adapter
from msgrpo_lab.messages import mask
from msgrpo_lab.tracking.database import check_reachable, database_path, mlflow_module

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from msgrpo_lab.lap.policy import LanguagePolicy

SECTIONS = frozenset({"env", "model", "prompt", "rollout", "evaluation"})
PACKAGE = "msgrpo_lab."


def check_training_config(tree: Any, where: str) -> dict[str, Any]:
    """`tree` as the configuration of a training run.

    What is found in a store or a folder may be another's. The components it names will be called, so they may be
    nothing but the lab's own.

    Args:
        tree: plain values.
        where: what holds them, for the message.

    Raises:
        ValueError: it is none, or names code outside of this package; one line.
    """
    if not isinstance(tree, Mapping) or not tree.keys() >= SECTIONS:
        raise ValueError(f"{where} is no configuration of a training run")
    config = {str(key): value for key, value in tree.items()}
    for group in ("model", "prompt"):
        for key, node in components(config[group], group):
            if not str(node["_target_"]).startswith(PACKAGE):
                problem = f"{where} names {key}._target_={node['_target_']}, which is not of {PACKAGE[:-1]}"
                raise ValueError(f"{problem}; evaluate its adapter folder, with model=… and prompt=… of your own")
    return config


def spec_of(config: Mapping[str, Any], *, engine: Mapping[str, Any], temperature: float | None) -> PolicySpec:
    """How the policy of a training run reads and answers.

    Args:
        config: as `check_training_config` returns it.
        engine: what runs it now.
        temperature: of sampled decoding; None: that of the run's own evaluation.
    """
    return PolicySpec(
        model=config["model"],
        prompt=config["prompt"],
        engine=engine,
        sampling=config["rollout"]["sampling"],
        temperature=float(config["evaluation"]["temperature"]) if temperature is None else temperature,
    )


MODEL_CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A folder of trained weights."""

    folder: Path
    digest: str
    """SHA-256 of its configuration and weights."""
    adapter: SavedAdapter | None = None
    """None where all weights were trained."""

    def model_node(self, node: Mapping[str, Any]) -> dict[str, Any]:
        """A `model` node with room for these weights: its base with such an adapter, or the folder itself."""
        if self.adapter is None:
            return {**node, "path": str(self.folder), "lora_rank": None, "adapter": None}
        return {**node, **self.adapter.shape, "seed": 0, "adapter": None}  # what the adapter begins as is overwritten

    def put_into(self, policy: LanguagePolicy) -> None:
        """Gives the policy the adapter; where all weights were trained, it was read from them.

        Raises:
            ValueError: the file cannot be read, or is of another model; one line without the key.
        """
        if self.adapter is not None:
            load_adapter(policy, self.folder)


def read_weights(folder: Path) -> Weights | None:
    """What a folder holds; None if it is no folder of trained weights.

    Raises:
        ValueError: it is one, and incomplete or damaged; one line without the key.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        return Weights(folder=folder, digest=folder_digest(folder), adapter=read_adapter(folder))
    if (folder / MODEL_CONFIG).is_file():
        check_manifest(folder)
        if not any(folder.glob("*.safetensors")):
            raise ValueError(f"{folder} has no *.safetensors; give a whole folder written by save_pretrained")
        return Weights(folder=folder, digest=folder_digest(folder))
    return None


def folder_digest(folder: Path) -> str:
    """SHA-256 of a folder's configuration, tokenizer and weights."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.jinja"), *folder.glob("*.safetensors")]):
        with path.open("rb") as stream:
            digest.update(path.name.encode() + b"\0" + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that has been found sound."""

    folder: Path
    digest: str
    config: Mapping[str, Any]
    """The run's configuration."""
    choices: Mapping[str, str]
    """The option chosen of each group."""

    @property
    def origin(self) -> Origin:
        """The run that it is of."""
        return Origin(
            trained_on=str(self.choices.get("env", "")),
            seed=str(self.config.get("seed", "")),
            **{key: str(self.choices.get(key, "")) for key in ("model", "sampler", "credit")},
        )

    def model_node(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        """The run's own."""
        return {**node, "adapter": None}  # what training went on from may be gone, and is overwritten

    def put_into(self, policy: LanguagePolicy) -> None:
        """Gives the policy the weights. Raises `ValueError` if they are of another model; one line."""
        from msgrpo_lab.training.state import load_policy_weights

        load_policy_weights(self.folder, policy)


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """What a folder holds; None if it is no checkpoint.

    Raises:
        ValueError: it is one, and damaged, or of a configuration that cannot be used; one line.
    """
    if not (folder / STATE).is_file():
        return None
    from msgrpo_lab.runs.checkpoint import read_state

    state = read_state(folder)
    config = check_training_config(state.get("config"), str(folder / STATE))
    return Checkpoint(
        folder=folder, digest=folder_digest(folder), config=config, choices=dict(state.get("choices") or {})
    )


Which = Literal["last", "best"]
CONFIG = "config/resolved.yaml"
PARENT = "tags.`mlflow.parentRunId`"
LATEST = "latest"


class RunSource:
    """The tracking store that training runs are looked up in; opened when the first is asked for, and never made.

    Args:
        tracking_uri: its address.
        experiment: where the newest sweep is looked for.
    """

    def __init__(self, tracking_uri: str, experiment: str) -> None:
        self.tracking_uri = tracking_uri
        self.experiment = experiment
        self._opened: MlflowClient | None = None

    @property
    def _client(self) -> MlflowClient:
        if self._opened is None:
            check_reachable(self.tracking_uri)
            path = database_path(self.tracking_uri)
            if path is not None and not _has_runs(path):
                raise ValueError(f"there is no tracking database at {path}; give source.tracking_uri=sqlite:///…")
            self._opened = mlflow_module().MlflowClient(self.tracking_uri)
        return self._opened

    def run(self, run_id: str) -> Run:
        """The run of this id.

        Raises:
            ValueError: there is none, or the store cannot be read; one line without the key.
        """
        client = self._client
        try:
            return client.get_run(run_id)
        except mlflow_module().exceptions.MlflowException as error:
            raise ValueError(f"no such run in {mask(self.tracking_uri)}; give source.tracking_uri=…") from error

    def sweep(self, name: str) -> tuple[list[Run], int]:
        """The finished runs of a sweep, by parent id or `latest` (the newest finished one), oldest first, and how many
        others it has.

        Raises:
            ValueError: there is no such sweep, or no run of it has finished; one line without the key.
        """
        client = self._client
        parent = self._newest_sweep() if name == LATEST else self.run(name)
        found = _search(client, parent.info.experiment_id, f"{PARENT} = '{parent.info.run_id}'")
        jobs = [run for run in found if run.data.tags.get("msgrpo.kind") == "job"]
        finished = [run for run in jobs if run.info.status == "FINISHED"]
        if not finished:
            raise ValueError(f"{parent.info.run_id} has no finished training run; give the id of a sweep's parent run")
        return finished, len(jobs) - len(finished)

    def _newest_sweep(self) -> Run:
        experiment = self._client.get_experiment_by_name(self.experiment)
        found = (
            []
            if experiment is None
            else _search(self._client, experiment.experiment_id, "tags.`msgrpo.kind` = 'sweep'")
        )
        finished = [run for run in found if run.info.status == "FINISHED"]
        if not finished:
            problem = f"experiment {self.experiment} has no finished sweep in {mask(self.tracking_uri)}"
            raise ValueError(f"{problem}; give sweep:<id of its parent run>, or source.experiment=…")
        return finished[-1]

    def adapter(self, run: Run, which: Which) -> Path:
        """The folder of a run's trained weights.

        Raises:
            ValueError: the run has kept none; one line without the key.
        """
        return self._artifact(run, f"adapter/{which}", "it ended before its policy was kept")

    def config(self, run: Run) -> dict[str, Any]:
        """The configuration that a run was trained under, as plain values.

        Raises:
            ValueError: there is none, it is damaged, or it names code outside of this package; one line.
        """
        path = self._artifact(run, CONFIG, "it is no training run of this lab")
        try:
            tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except (OmegaConfBaseException, YAMLError, OSError) as error:
            raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); train the run again") from error
        return check_training_config(tree, str(path))

    def _artifact(self, run: Run, path: str, why: str) -> Path:
        try:
            found = Path(self._client.download_artifacts(run.info.run_id, path))
        except (mlflow_module().exceptions.MlflowException, OSError) as error:
            raise ValueError(f"run {run.info.run_id} ({run.info.status}) has no artifact {path}: {why}") from error
        if not found.exists():
            raise ValueError(f"run {run.info.run_id} ({run.info.status}) has no artifact {path}: {why}")
        return found


def origin_of(run: Run) -> Origin:
    """What a run's tags say of it."""
    tags: Mapping[str, str] = run.data.tags
    return Origin(
        trained_on=tags.get("env", ""),
        model=tags.get("model", ""),
        sampler=tags.get("sampler", ""),
        credit=tags.get("credit", ""),
        seed=tags.get("seed", ""),
        source_run=str(run.info.run_id),
    )


def _search(client: MlflowClient, experiment_id: str, filter_string: str) -> list[Run]:
    """All runs that match, oldest first."""
    runs: list[Run] = []
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment_id], filter_string, max_results=1000, order_by=["attributes.start_time ASC"], page_token=token
        )
        runs += page
        token = page.token
        if not token:
            return runs


def _has_runs(path: Path) -> bool:
    """Whether an sqlite file is there and holds MLflow's tables; opening it by MLflow would make them."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            tables = connection.execute("select count(*) from sqlite_master where type = 'table' and name = 'runs'")
            return bool(tables.fetchone()[0])
    except sqlite3.DatabaseError:
        return False
