"""The command from its line to its files: lists, the same numbers twice, after a kill, and as training has them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from lab_made import SMALL, SMALL_RUN, composed, fit, move, small_lab
from mlflow import MlflowClient
from omegaconf import OmegaConf

from msgrpo_lab import evaluate as command
from msgrpo_lab.callbacks.evaluation import HeldOutEvaluation
from msgrpo_lab.runs.checkpoint import Snapshot, write_checkpoint
from msgrpo_lab.training.assemble import Lab
from msgrpo_lab.training.state import trainable

ROOT = Path(__file__).parents[2]
FEW = ("episodes=24", "reference_simulations=4", "device=cpu")
SCORES = ("success_rate", "return_mean", "normalised_score")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run the command in, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate"])
    return tmp_path


def evaluate(*arguments: str, outputs: Path | str = "outputs", logger: str = "null") -> list[dict[str, Any]]:
    """Runs the command in this process and reads what it has written for scripts."""
    command.main([*FEW, *arguments, f"paths.outputs={outputs}", f"logger={logger}", "output=scores.json"])
    rows: list[dict[str, Any]] = json.loads(Path("scores.json").read_text())
    return rows


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The lines that a wrong command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command.main([*FEW, "paths.outputs=outputs", "logger=null", *arguments])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lab, dict[str, float]]:
    """A folder with all weights of a small policy, and what training's own evaluation said of it."""
    folder = tmp_path_factory.mktemp("trained") / "last"
    lab = small_lab("env=frozenlake_slippery")
    move(lab.policy, scale=0.02)
    own = HeldOutEvaluation(episodes=24, every=100, scenario="frozenlake_slippery", reference_simulations=4)
    fit(lab, epochs=1, callbacks=[own])
    lab.policy.save(folder)
    return folder, lab, own.latest


# What it says -------------------------------------------------------------------------------------------------------


def test_lists_are_lists_and_every_cell_is_an_object(here: Path) -> None:
    rows = evaluate("policy=optimal,random", "scenario=frozenlake_slippery,frozenlake")
    assert [(row["policy"], row["scenario"], row["decoding"]) for row in rows] == [
        (policy, scenario, "sampled")
        for policy in ("optimal", "random")
        for scenario in ("frozenlake_slippery", "frozenlake")
    ]
    for row in rows:
        assert row["episodes"] == 24
        for name in SCORES:
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert row["token_entropy"] is None
        assert row["action_entropy"] is None
    best = rows[1]
    assert (best["success_rate"], best["normalised_score"], best["exact_success_rate"]) == (1.0, 1.0, 1.0)
    (pair,) = [one for one in json.loads(Path("scores.pairs.json").read_text()) if one["scenario"] == "frozenlake"]
    assert (pair["policy"], pair["against"], pair["episodes"]) == ("random", "optimal", 24)
    assert pair["difference"] == pytest.approx(rows[3]["return_mean"] - rows[1]["return_mean"])
    assert {path.name for path in here.iterdir()} == {"outputs", "scores.json", "scores.pairs.json"}


def test_table_and_episodes_say_what_the_objects_say(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = evaluate("policy=search,random", "scenario=snake", "folder=kept")
    table = (here / "kept" / "table.md").read_text()
    assert capsys.readouterr().out == table
    for row in rows:
        shown = f"{row['return_mean']:.3f} [{row['return_mean_low']:.3f}, {row['return_mean_high']:.3f}]"
        assert f"| {row['policy']} | sampled |" in table
        assert shown in table
    episodes = pq.read_table(here / "kept" / "episodes.parquet").to_pandas()
    for row in rows:
        own = episodes[(episodes.policy == row["policy"]) & (episodes.scenario == "snake")]
        assert len(own) == 24
        assert own["return"].mean() == row["return_mean"]
        assert own["seed"].tolist() == list(range(10_000_000, 10_000_024)), "the same initial states for every policy"


def test_the_same_evaluation_twice_gives_the_same_numbers(
    here: Path, trained: tuple[Path, Lab, dict[str, float]]
) -> None:
    """Played twice, not read twice; and reading it a third time gives them too."""
    request = (f"policy={trained[0]},random", "scenario=frozenlake_slippery")
    first = evaluate(*request)
    assert evaluate(*request, outputs="elsewhere") == first
    assert evaluate(*request) == first
    assert evaluate(*request, "resume=null") == first


def test_it_agrees_with_the_evaluation_of_training(here: Path, trained: tuple[Path, Lab, dict[str, float]]) -> None:
    """Same episodes, same draws, same numbers, from weights that went through a file."""
    folder, _, own = trained
    rows = evaluate(f"policy={folder}", "scenario=frozenlake_slippery", "model=tiny")
    assert [row["decoding"] for row in rows] == ["sampled", "greedy"]
    for row in rows:
        prefix = "eval/frozenlake_slippery/" + ("greedy_" if row["decoding"] == "greedy" else "")
        for name in (*SCORES, "episode_length", "valid_action_rate"):
            assert row[name] == own[prefix + name], (row["decoding"], name)
    sampled, greedy = rows
    assert 0 < sampled["token_entropy"] <= math.log(4) + 0.2
    assert sampled["action_entropy"] == pytest.approx(sampled["token_entropy"]), "a legal word is one token of tiny"
    assert greedy["token_entropy"] is None


def test_an_adapter_is_put_into_its_base_and_the_base_stays_as_it_was(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ("model=tiny", *SMALL, "model.lora_rank=4")
    lab = small_lab("model.lora_rank=4")
    lab.policy.save(here / "untrained")
    move(lab.policy, scale=0.5)
    lab.policy.save(here / "moved")
    rows = evaluate("policy=moved,base,untrained", *model, "decoding=sampled", "scenario=frozenlake")
    keep = ("success_rate", "return_mean", "episode_length", "token_entropy")
    moved, base, untrained = ([row[name] for name in keep] for row in rows)
    assert untrained == base != moved
    assert [row["kind"] for row in rows] == ["adapter", "base", "adapter"]
    (line,) = refused(capsys, "policy=moved", "model=tiny", "scenario=frozenlake")
    assert line.startswith("msgrpo_lab: policy=moved: ")
    assert "is an adapter of another model" in line


def test_a_view_is_the_policys_own_unless_it_is_given(here: Path, trained: tuple[Path, Lab, dict[str, float]]) -> None:
    plain = evaluate("policy=random", "scenario=frozenlake", "env.observation=paper")
    assert plain == evaluate("policy=random", "scenario=frozenlake"), "players look at the game, not at its text"
    (seen,) = evaluate(f"policy={trained[0]}", "scenario=frozenlake", "env.observation=paper", "decoding=sampled")
    (other,) = evaluate(f"policy={trained[0]}", "scenario=frozenlake", "decoding=sampled")
    assert seen["token_entropy"] != other["token_entropy"]


def test_a_checkpoint_plays_as_its_run_did(
    here: Path, trained: tuple[Path, Lab, dict[str, float]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the configuration that it keeps, whatever model the command line names."""
    folder, lab, _ = trained
    config = OmegaConf.to_container(composed(*SMALL_RUN, "env=frozenlake_slippery", "seed=7"), resolve=True)
    state = {"update": 1, "epoch": 1, "config": config, "choices": {"env": "frozenlake_slippery", "model": "tiny"}}
    kept = write_checkpoint(here, Snapshot(weights=trainable(lab.policy), optimizer={}, state=state))
    rows = evaluate(f"policy={kept}", "scenario=frozenlake_slippery")
    rows += evaluate(f"policy={folder}", "scenario=frozenlake_slippery", "model=tiny")
    told = ("policy", "kind", "trained_on", "model", "seed")
    own, same = ([{k: v for k, v in row.items() if k not in told} for row in rows[at : at + 2]] for at in (0, 2))
    assert own == same
    assert [rows[0][name] for name in told[1:]] == ["checkpoint", "frozenlake_slippery", "tiny", "7"]
    path = kept / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (line,) = refused(capsys, f"policy={kept}", "scenario=frozenlake_slippery")
    assert line.startswith(f"msgrpo_lab: policy={kept}: ")
    assert "weights.safetensors" in line


# Runs and sweeps ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(
    tmp_path_factory: pytest.TempPathFactory, trained: tuple[Path, Lab, dict[str, float]]
) -> tuple[Path, str, list[str]]:
    """A store with a sweep of two finished jobs and one that failed; its folder, the parent's id, the jobs'."""
    here = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{here}/runs.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("msgrpo", artifact_location=(here / "artifacts").as_uri())
    parent = client.create_run(experiment, tags={"msgrpo.kind": "sweep"}).info.run_id
    config = OmegaConf.to_container(composed(*SMALL, "model=tiny", "env=frozenlake_slippery", "seed=3"), resolve=True)
    ids = []
    for seed, status in (("3", "FINISHED"), ("4", "FINISHED"), ("5", "FAILED")):
        tags = {"msgrpo.kind": "job", "mlflow.parentRunId": parent, "env": "frozenlake_slippery", "seed": seed}
        run = client.create_run(experiment, tags={**tags, "sampler": "abs_adv", "model": "tiny"}).info.run_id
        client.log_text(run, yaml.safe_dump(config), "config/resolved.yaml")
        client.log_artifacts(run, str(trained[0]), "adapter/last")
        client.set_terminated(run, status)
        ids.append(run)
    client.set_terminated(parent, "FINISHED")
    return here, parent, ids


def test_a_sweep_is_its_finished_runs_each_as_it_was_trained(
    here: Path, sweep: tuple[Path, str, list[str]], trained: tuple[Path, Lab, dict[str, float]], capsys: Any
) -> None:
    """The command line's own model is another; a run brings the one that it was trained with."""
    store, parent, (one, other, _) = sweep
    request = ("scenario=frozenlake_slippery", f"source.tracking_uri=sqlite:///{store}/runs.db")
    rows = evaluate(
        "policy=sweep:latest,random", *request, f"logger.tracking_uri=sqlite:///{here}/found.db", logger="mlflow"
    )
    assert "1 of its runs have not finished" in capsys.readouterr().err
    assert [row["policy"] for row in rows] == [f"run:{one}"] * 2 + [f"run:{other}"] * 2 + ["random"]
    told = {"kind": "run", "trained_on": "frozenlake_slippery", "sampler": "abs_adv", "seed": "3", "source_run": one}
    assert told.items() <= rows[0].items()
    for row in rows[:4]:
        prefix = "eval/frozenlake_slippery/" + ("greedy_" if row["decoding"] == "greedy" else "")
        assert row["return_mean"] == trained[2][f"{prefix}return_mean"]
    assert evaluate(f"policy=sweep:{parent},random", *request) == rows
    _check_tracked(MlflowClient(f"sqlite:///{here}/found.db"), rows)


def _check_tracked(client: MlflowClient, rows: list[dict[str, Any]]) -> None:
    """A parent and a child a policy, with the objects' numbers as metrics."""
    experiment = client.get_experiment_by_name("msgrpo")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags["msgrpo.kind"] == "evaluations"]
    assert "policy=sweep:latest,random" in parent.data.tags["msgrpo.command"]
    children = {run.data.tags["policy"]: run for run in runs if run.data.tags["msgrpo.kind"] == "evaluation"}
    assert set(children) == {row["policy"] for row in rows}
    for run in (parent, *children.values()):
        assert run.info.status == "FINISHED"
    for row in rows:
        run = children[row["policy"]]
        assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert run.data.tags["policy.kind"] == row["kind"]
        for tag in ("trained_on", "model", "sampler", "credit", "seed", "source_run"):
            assert run.data.tags[tag] == row[tag]
        prefix = f"eval/{row['scenario']}/" + ("greedy_" if row["decoding"] == "greedy" else "")
        for name in (
            *SCORES,
            *(f"{name}_low" for name in SCORES),
            "episode_length",
            "valid_action_rate",
            "token_entropy",
        ):
            assert run.data.metrics.get(prefix + name) == row[name], name
        assert run.data.metrics["reference/frozenlake_slippery/optimal/return_mean"] == row["return_at_1"]
    files = {one.path for one in client.list_artifacts(parent.info.run_id, "evaluation")}
    assert {"evaluation/table.md", "evaluation/episodes.parquet", "evaluation/scores.json"} <= files


def test_a_run_names_no_code_but_the_labs_own(
    here: Path, sweep: tuple[Path, str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    store, _, (*_, run) = sweep
    client = MlflowClient(f"sqlite:///{store}/runs.db")
    (path,) = (store / "artifacts" / run).rglob("resolved.yaml")
    config = yaml.safe_load(path.read_text())
    config["prompt"]["parser"]["_target_"] = "os.system"
    client.log_text(run, yaml.safe_dump(config), "config/resolved.yaml")
    (line,) = refused(capsys, f"policy=run:{run}", f"source.tracking_uri=sqlite:///{store}/runs.db")
    assert "prompt.parser._target_=os.system, which is not of msgrpo_lab" in line


def test_a_run_that_is_not_there_is_told(
    here: Path, sweep: tuple[Path, str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    store, parent, (one, *_) = sweep
    source = f"source.tracking_uri=sqlite:///{store}/runs.db"
    assert refused(capsys, "policy=run:nosuch", source)[0].startswith("msgrpo_lab: policy=run:nosuch: no such run in")
    assert "has no artifact adapter/best" in refused(capsys, f"policy=run:{one}/best", source)[0]
    assert "neither last nor best" in refused(capsys, f"policy=run:{one}/first", source)[0]
    assert "has no finished training run" in refused(capsys, f"policy=sweep:{one}", source)[0]
    assert "has no artifact config/resolved.yaml" in refused(capsys, f"policy=run:{parent}", source)[0]
    (line,) = refused(capsys, "policy=run:abc", f"source.tracking_uri=sqlite:///{here}/none.db")
    assert f"there is no tracking database at {here}/none.db" in line
    assert not (here / "none.db").exists(), "looking makes no database"


# Mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["policy=randon"], "policy=randon: no such policy; did you mean 'random'? give random, "),
        (["policy=optimal", "scenario=snake"], "policy=optimal: does not play snake; give another scenario=…, "),
        (["policy=random", "scenario=frozenlak"], "scenario=frozenlak: no such option; did you mean 'frozenlake'? "),
        (
            ["policy=random", "episodes=0"],
            "episodes=0: must be a whole number at least 1; give for example episodes=400",
        ),
        (["policy=random", "temperature=0"], "temperature=0: must be a number at least 0.0001 or null; "),
        (["policy=random", "output=/nosuch/x.json"], "output=/nosuch/x.json: there is no folder /nosuch; make it, "),
        (["policy=random", "decoding=greedily"], "decoding=greedily: no such decoding; give some of: sampled, greedy"),
        (
            ["policy=random", "against=base"],
            "against=base: no such policy is evaluated; give first, all, null or one of",
        ),
        (["policy=random", "env.horizon=0"], "env.horizon=0: must be at least 1"),
        (["policy=random", "env=snake"], "env=snake: no such key; name scenarios by scenario=snake"),
        (["policy=base:nosuch"], "policy=base:nosuch: no such model; there are: "),
        (["policy="], "policy=[]: no policy is named; give players or base, "),
        (["policy=."], "policy=.: this folder holds no trained weights; give a folder that training has written"),
        (["-m", "policy=random"], "command line: policies and scenarios are lists here; leave out -m"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_played(
    arguments: list[str], line: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, keys = arguments[:-1] if arguments[0] == "-m" else [], arguments
    if options:
        with pytest.raises(SystemExit):
            command.main(["-m", *FEW, "paths.outputs=outputs", "policy=random"])
        lines = capsys.readouterr().err.splitlines()
    else:
        lines = refused(capsys, *keys)
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"msgrpo_lab: {line}")
    assert not (here / "outputs" / "evaluations").exists()


def test_a_damaged_cell_is_refused_by_its_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate("policy=random", "scenario=frozenlake", "folder=kept")
    (cell,) = (here / "kept" / "cells").glob("random--*.parquet")
    cell.write_bytes(cell.read_bytes()[:-20])
    (line,) = refused(capsys, "policy=random", "scenario=frozenlake", "folder=kept")
    assert f"{cell} cannot be used (" in line
    assert "delete the file to play it again" in line


# Killed and started again -------------------------------------------------------------------------------------------


def test_killed_half_way_and_started_again_it_gives_the_same_numbers(
    tmp_path: Path, trained: tuple[Path, Lab, dict[str, float]]
) -> None:
    """A real SIGKILL while cells are played, and the same command once more."""
    request = [
        f"policy=random,{trained[0]},optimal",
        "scenario=frozenlake,frozenlake_slippery,frozenlake_big",
        "episodes=60",
        "reference_simulations=4",
        "logger=null",
        "device=cpu",
    ]

    def start(outputs: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "msgrpo_lab.evaluate",
                *request,
                f"paths.outputs={outputs}",
                f"output={outputs}.json",
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def cells(outputs: str) -> list[Path]:
        return sorted((tmp_path / outputs).rglob("cells/*.parquet"))

    undisturbed = start("whole")
    _, said = undisturbed.communicate(timeout=200)
    assert undisturbed.returncode == 0, said
    every = len(cells("whole"))
    killed = start("killed")
    deadline = time.monotonic() + 200
    while len(cells("killed")) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    kept = {path: path.read_bytes() for path in cells("killed")}
    assert 3 <= len(kept) < every, "it was killed half-way"
    assert not (tmp_path / "killed.json").exists()
    again = start("killed")
    _, said = again.communicate(timeout=200)
    assert again.returncode == 0, said
    assert re.search(rf"^{len(kept)} of {every} results are in .* not played again$", said, flags=re.MULTILINE)
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    for one, other in zip(cells("killed"), cells("whole"), strict=True):
        assert one.read_bytes() == other.read_bytes()
