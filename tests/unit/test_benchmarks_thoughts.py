"""The benchmark of thoughts: what is asked of a server, what is counted, and its table by hand."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from lab_made import SMALL, ids, rollout, turn
from openai import OpenAI

from benchmarks import thoughts
from benchmarks.cells import FAST, BenchmarkCase, configuration
from benchmarks.handwritten import cut
from benchmarks.thoughts import OURS, PLAIN, VLLM, Timed, job_cell, measure, parser, rows, served, table, turns_of
from msgrpo_lab.training.assemble import build_lab

ANSWER = 5
"""Tokens that the server says it sampled for each prompt."""


class Completions(BaseHTTPRequestHandler):
    """A server that has one model, keeps what it is asked and answers every prompt."""

    seen: list[dict[str, Any]]

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": "base", "object": "model", "created": 0, "owned_by": "vllm"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        choices = [{"index": n, "text": "", "finish_reason": "stop"} for n in range(len(body["prompt"]))]
        usage = {"prompt_tokens": 1, "completion_tokens": ANSWER * len(choices), "total_tokens": 1}
        self.reply({"id": "1", "object": "text_completion", "created": 0, "model": "base", "choices": choices,
                    "usage": usage})  # fmt: skip

    def reply(self, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Address, and the requests that arrive there."""
    seen: list[dict[str, Any]] = []
    handler = type("Handler", (Completions,), {"seen": seen})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}", seen
        made.shutdown()
        thread.join()


def small_cell(_: Any, *overrides: str) -> BenchmarkCase:
    """Two small layers and 2 × 2 episodes of three turns."""
    return BenchmarkCase(
        name="small",
        env="frozenlake",
        model="tiny",
        policy="untrained",
        group_size=2,
        groups=2,
        naive_groups=0,
        overrides=("model=tiny", "sampling=free", "env.horizon=3", *SMALL, *overrides),
    )


def timed(arm: str, repetition: int, turn: int, tokens: int, seconds: float) -> Timed:
    return Timed(arm=arm, repetition=repetition, turn=turn, tokens=tokens, seconds=seconds)


def test_the_job_is_the_default_one_of_thoughts_in_bfloat16_and_smaller() -> None:
    config = configuration(job_cell(parser().parse_args([])), FAST)
    sampling = config.rollout.sampling
    assert (config.rollout.num_groups, config.rollout.group_size, config.model.precision) == (8, 16, "bfloat16")
    assert (sampling.temperature, sampling.top_k, sampling.constrain) == (1.0, 3, False)
    assert list(config.prompt.stop) == ["</action>"]


def test_a_turn_asks_for_the_episodes_that_are_still_alive() -> None:
    first, second = [turn(prompt=(1,)), turn(prompt=(2, 3))], [turn(prompt=(4,))]
    turns = turns_of(rollout((0, True, first), (0, False, second)))
    assert [[prompt.tolist() for prompt in prompts] for prompts in turns] == [[[1], [4]], [[2, 3]]]


def test_rates_are_compared_over_the_same_turns_and_the_warm_up_is_left_out() -> None:
    turns = [[ids(1), ids(1), ids(2)], [ids(2)]]
    found = [
        *(timed(arm, -1, place, 1, 100.0) for arm in (OURS, VLLM) for place in (0, 1)),
        *(timed(OURS, 0, 0, 30, 1.0), timed(OURS, 0, 1, 30, 1.0)),  # 60 tokens in 2 s: 30 a second
        *(timed(OURS, 1, 0, 20, 1.0), timed(OURS, 1, 1, 60, 1.0)),  # 40 a second
        *(timed(VLLM, 0, 0, 10, 1.0), timed(VLLM, 0, 1, 10, 3.0)),  # 20 tokens in 4 s: 5 a second
        *(timed(VLLM, 1, 0, 10, 1.0), timed(VLLM, 1, 1, 10, 1.0)),  # 10 a second
        *(timed(PLAIN, 0, 0, 5, 5.0), timed(PLAIN, 1, 0, 5, 10.0)),
    ]
    made = {(row["arm"], row["turns"]): row for row in rows(turns, found)}
    assert list(made) == [(OURS, 2), (VLLM, 2), (OURS, 1), (VLLM, 1), (PLAIN, 1)]
    whole, plain = made[OURS, 2], made[PLAIN, 1]
    assert (whole["prompts"], whole["distinct"], whole["tokens"], whole["seconds"]) == (4, 2, [60, 80], [2.0, 2.0])
    assert (whole["tokens_per_s"], whole["over_vllm"]["median"]) == ([30.0, 40.0], 5.0)  # pairs 30 / 5 and 40 / 10
    assert (plain["prompts"], plain["distinct"]) == (3, 2)
    assert plain["over_vllm"]["median"] == pytest.approx(0.075)  # pairs 1 / 10 and 0.5 / 10
    assert "| hf | 2 | 4 | 2 | 60, 80 | 2.0, 2.0 | 30, 40 | 5.00 [4.00, 6.00] |" in table(rows(turns, found))
    assert PLAIN not in table(rows(turns, [t for t in found if t.arm != PLAIN]))


def test_a_completion_is_cut_behind_its_end_token_or_its_stop_text() -> None:
    texts = {1: "<", 2: "end", 3: ">", 7: ""}

    def decode(tokens: list[int]) -> str:
        return "".join(texts[token] for token in tokens)

    assert cut([2, 1, 2, 3, 7, 7], {7}, ["<end>"], decode) == [2, 1, 2, 3]
    assert cut([2, 7, 1, 2, 3], {7}, ["<end>"], decode) == [2, 7]
    assert cut([1, 2, 3, 2], {7}, [], decode) == [1, 2, 3, 2]


def test_all_arms_answer_the_same_prompts(
    server: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(thoughts, "job_cell", small_cell)
    address, seen = server
    assert thoughts.main(["--server", address, "--repetitions", "1", "--out", str(tmp_path)]) == 0
    made = json.loads((tmp_path / "thoughts.json").read_text())["rows"]
    count = made[0]["turns"]
    assert [(row["arm"], row["turns"]) for row in made] == [
        *((OURS, count), (VLLM, count)),
        *((OURS, 1), (VLLM, 1), (PLAIN, 1)),
    ]
    warm_up, measured = seen[:count], seen[count:]
    assert [body["prompt"] for body in warm_up] == [body["prompt"] for body in measured]
    assert sum(len(body["prompt"]) for body in measured) == made[1]["prompts"]
    assert made[1]["tokens"] == [ANSWER * made[1]["prompts"]]
    assert 4 <= made[4]["tokens"][0] <= 4 * 8  # four answers of at most eight tokens


def test_every_request_has_the_whole_decoding_rule_and_each_measurement_a_memory_of_its_own(
    server: tuple[str, list[dict[str, Any]]],
) -> None:
    address, seen = server
    rule = ("rollout.sampling.temperature=0.7", "rollout.sampling.top_k=2", "rollout.sampling.max_new_tokens=6")
    tags = ("prompt.parser._target_=msgrpo_lab.lap.prompt.ActionTagParser", "prompt.examples=[]", "prompt.stop=[x]")
    lab = build_lab(configuration(small_cell(None, *rule, *tags), FAST))
    begin = served(OpenAI(base_url=f"{address}/v1", api_key="none"), "base", lab)
    for seed, turns in enumerate(([[ids(1, 2), ids(3)], [ids(4)]], [[ids(1, 2)]])):
        measure(VLLM, begin, turns, seed=seed, repetition=seed)
    asked = {"model": "base", "temperature": 0.7, "top_k": 2, "top_p": 1.0, "max_tokens": 6, "stop": ["x"]}
    assert all(asked.items() <= body.items() for body in seen)
    assert [body["prompt"] for body in seen] == [[[1, 2], [3]], [[4]], [[1, 2]]]
    first, second, third = (body["cache_salt"] for body in seen)
    assert first == second != third


def test_without_a_server_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(thoughts, "job_cell", small_cell)
    assert thoughts.main(["--server", "http://127.0.0.1:9"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmark: --server http://127.0.0.1:9: no answer (Connection error.)")
