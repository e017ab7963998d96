"""`python -m msgrpo_lab.evaluate` over a server: what it writes, what it says of a broken server, and the key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from remote_made import KEY, ChatServer, completion

from msgrpo_lab import evaluate


def command(tmp_path: Path, *arguments: str, server: ChatServer | None = None) -> list[str]:
    address = [] if server is None else [f"remote.base_url={server.base_url}"]
    quick = ["remote.first_wait_s=0.01", "remote.longest_wait_s=0.02", "remote.retries=2", "reference_simulations=4"]
    return [*quick, *address, *arguments, f"paths.outputs={tmp_path}/outputs", f"output={tmp_path}/scores.json"]


def run(arguments: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as users run it."""
    return subprocess.run(
        [sys.executable, "-m", "msgrpo_lab.evaluate", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(Path(evaluate.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


PLAIN = ("policy=remote:fake", "scenario=frozenlake", "episodes=6", "rollout.sampling.constrain=false")


def test_a_broken_server_is_one_line_and_leaves_no_results(tmp_path: Path) -> None:
    with ChatServer(always="500 with the key") as server:
        done = run(command(tmp_path, *PLAIN, "remote.api_key_env=PLANTED", server=server), tmp_path, PLANTED=KEY)
    lines = done.stderr.strip().splitlines()
    assert done.returncode != 0
    assert lines[-1].startswith(f"msgrpo_lab: base_url={server.base_url} model=fake: HTTP 500 (")
    assert "3 times (retries=2); see the server's log" in lines[-1]
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "scores.json").exists()
    assert not list(tmp_path.rglob("*.parquet"))
    assert_nowhere(KEY, tmp_path, done)


def test_an_evaluation_is_tracked_without_the_key(tmp_path: Path) -> None:
    with ChatServer(["429", "cut", "500 with the key"]) as server:
        done = run(
            command(tmp_path, *PLAIN, "remote.api_key_env=PLANTED", "remote.retries=5", server=server),
            tmp_path,
            PLANTED=KEY,
        )
        assert all(seen.headers["authorization"] == f"Bearer {KEY}" for seen in server.seen)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "mlflow.db").is_file()
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [(row["policy"], row["decoding"], row["episodes"]) for row in scores] == [
        ("remote:fake", "sampled", 6),
        ("remote:fake", "greedy", 6),
    ]
    assert scores[0]["valid_action_rate"] == 1.0
    assert scores[0]["token_entropy"] is None, "nobody has told"
    assert_nowhere(KEY, tmp_path, done)


def assert_nowhere(secret: str, folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert secret not in done.stdout + done.stderr
    assert not [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_what_a_server_cannot_do_is_told_before_it_is_asked(tmp_path: Path, capsys: Any) -> None:
    with ChatServer() as server:
        refused = (
            (["policy=remote:fake"], "rollout.sampling.constrain=true: only the server"),
            (["policy=remote", *PLAIN[1:]], "policy=remote: model=null"),
            ([*PLAIN, "remote.server=openai", "rollout.sampling.top_k=3"], "server=openai: it has no top-k"),
            ([*PLAIN, "remote.server=openai", "prompt.opening='Move:'"], "prompt.opening='Move:'"),
            ([*PLAIN, "remote.retries=-1"], "retries=-1: must be at least 0"),
            (["policy=base", "model=tiny", "engine=openai"], "engine=openai asks a server"),
        )
        for arguments, line in refused:
            with pytest.raises(SystemExit) as stopped:
                evaluate.main(command(tmp_path, *arguments, server=server))
            assert stopped.value.code == 2
            assert line in capsys.readouterr().err
        assert server.seen == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_engine_group_is_taken_where_it_is_of_remote_models(tmp_path: Path) -> None:
    with ChatServer() as server:
        asked = ["engine=openai", f"engine.base_url={server.base_url}", "engine.model=of-the-engine"]
        evaluate.main(command(tmp_path, "policy=remote", *PLAIN[1:], *asked, "decoding=greedy", "logger=null"))
        assert {seen.body["model"] for seen in server.seen} == {"of-the-engine"}


def test_the_72b_baseline_plays_all_its_scenarios(tmp_path: Path) -> None:
    def think(body: dict[str, Any]) -> dict[str, Any]:
        return completion("<think>so</think><plan>go</plan><action>right</action>", usage={"completion_tokens": 20})

    with ChatServer(answer=think) as server:
        preset = ["experiment=paper/baseline_72b", "episodes=3", "logger=null"]
        evaluate.main(command(tmp_path, *preset, server=server))
        bodies = [seen.body for seen in server.seen]
    assert {body["model"] for body in bodies} == {"Qwen/Qwen2.5-72B-Instruct"}
    assert {(body["temperature"], body["top_k"], body["max_tokens"]) for body in bodies} == {(0.5, 3, 200)}
    assert {(*body["stop"], body["include_stop_str_in_output"]) for body in bodies} == {("</action>", True)}
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [row["scenario"] for row in scores] == ["frozenlake", "frozenlake_slippery", "snake", "snake_poison"]
    assert {row["valid_action_rate"] for row in scores} == {1.0}
