"""What a server does wrong: tried again where that may help, within bounds, and told in one line where it does not."""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from remote_made import FAULTS, KEY, TEMPLATE, ChatServer

from msgrpo_lab.engines.remote.engine import OpenAIEngine
from msgrpo_lab.engines.remote.transport import Backoff, Fault, RemoteModelError, retry_after_s
from msgrpo_lab.types import Completion, Sampling

PASSING = (
    *("408", "409", "425", "429", "500", "500 html", "502", "503", "hang up", "cut", "cut chunks"),
    *("not json", "html", "empty", "no choices", "a list", "an error", "no finish reason", "text is no text"),
    *("negative usage", "endless usage"),
)
FINAL = ("400", "401", "403", "404", "422", "429 no quota")


def ask(engine: OpenAIEngine, count: int = 1, greedy: bool = False) -> list[Completion]:
    prompt = engine.prompt(TEMPLATE)
    prompts = [prompt.render("rules", f"state {number}", ("Left", "Up")) for number in range(count)]
    return engine.generate(prompts, Sampling(greedy=greedy), [np.random.default_rng(n) for n in range(count)])


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_asked_again(fault: str) -> None:
    with ChatServer([fault]) as server:
        engine = server.engine()
        (answer,) = ask(engine)
        assert answer.text in ("Left", "Down", "Right", "Up")
        assert len(server.seen) == 2
        assert server.seen[0].body == server.seen[1].body, "the same question, seed included"
        assert (engine.metrics()["remote_requests"], engine.metrics()["remote_retries"]) == (2, 1)


@pytest.mark.parametrize("fault", ["hang", "trickle"])
def test_a_server_that_does_not_finish_is_asked_again(fault: str) -> None:
    with ChatServer([fault]) as server:
        started = time.monotonic()
        assert ask(server.engine(request_timeout_s=0.3))
        assert len(server.seen) == 2
        assert 0.3 <= time.monotonic() - started < 3


@pytest.mark.parametrize("fault", ["500", "429", "cut", "not json", "hang up"])
def test_retries_are_bounded(fault: str) -> None:
    with ChatServer(always=fault) as server:
        with pytest.raises(RemoteModelError) as caught:
            ask(server.engine(retries=3))
        assert len(server.seen) == 4
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"base_url={server.base_url} model=fake: ")
    assert "4 times (retries=3)" in line


@pytest.mark.parametrize(
    ("fault", "what", "remedy"),
    [
        ("400", "HTTP 400 (unknown field min_p)", "server=vllm"),
        ("401", "HTTP 401 (who are you)", "api_key_env"),
        ("403", "HTTP 403", "api_key_env"),
        ("404", "HTTP 404 (no such model)", "correct model"),
        ("422", "HTTP 422 (Unexpected fields)", "server=vllm"),
        ("429 no quota", "HTTP 429 (pay)", "no quota"),
    ],
)
def test_a_final_fault_is_told_at_once(fault: str, what: str, remedy: str) -> None:
    with ChatServer(always=fault) as server:
        with pytest.raises(RemoteModelError) as caught:
            ask(server.engine())
        assert len(server.seen) == 1
    assert what in str(caught.value)
    assert remedy in str(caught.value)


def test_every_fault_of_the_server_is_covered() -> None:
    rest = {"429 retry-after 0.4", "429 retry-after 3600", "hang", "trickle"}
    echoes = {name for name in FAULTS if "with the key" in name}
    assert {*PASSING, *FINAL, *rest, *echoes} == set(FAULTS)


def test_retry_after_is_waited_for() -> None:
    with ChatServer(["429 retry-after 0.4"]) as server:
        ask(server.engine())
        assert server.seen[1].at - server.seen[0].at >= 0.4


def test_without_retry_after_the_wait_is_the_back_off() -> None:
    with ChatServer(["429"]) as server:
        ask(server.engine())
        assert server.seen[1].at - server.seen[0].at < 0.4


def test_a_wait_past_the_total_time_is_not_begun() -> None:
    with ChatServer(["429 retry-after 3600"]) as server:
        started = time.monotonic()
        with pytest.raises(RemoteModelError, match=r"HTTP 429 .*total_timeout_s=60"):
            ask(server.engine(total_timeout_s=60.0))
        assert time.monotonic() - started < 5


def test_the_total_time_bounds_a_hanging_server() -> None:
    with ChatServer(always="hang") as server:
        started = time.monotonic()
        with pytest.raises(RemoteModelError, match=r"no answer in time.*total_timeout_s=0\.7"):
            ask(server.engine(request_timeout_s=0.3, total_timeout_s=0.7, retries=100))
        assert 0.6 <= time.monotonic() - started < 3
        assert len(server.seen) == 3


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


def test_a_refused_connection_is_told_with_its_address() -> None:
    port = free_port()
    engine = OpenAIEngine(base_url=f"http://127.0.0.1:{port}/v1", model="fake", retries=1, first_wait_s=0.01)
    with pytest.raises(RemoteModelError, match=rf"127\.0\.0\.1:{port}/v1 .*connection failed.*start the server"):
        ask(engine)


def test_a_server_that_is_still_starting_is_waited_for() -> None:
    port = free_port()
    servers: list[ChatServer] = []

    def start() -> None:
        servers.append(ChatServer(port=port).__enter__())

    timer = threading.Timer(0.4, start)
    timer.start()
    engine = OpenAIEngine(
        base_url=f"http://127.0.0.1:{port}/v1", model="fake", retries=50, first_wait_s=0.1, longest_wait_s=0.1
    )
    try:
        assert ask(engine)
        assert engine.metrics()["remote_retries"] >= 1
    finally:
        timer.join()
        for server in servers:
            server.__exit__(None, None, None)


def test_one_prompt_that_fails_ends_the_others() -> None:
    with ChatServer(["400"], always="hang") as server:
        started = time.monotonic()
        with pytest.raises(RemoteModelError, match="HTTP 400"):
            ask(server.engine(concurrency=4, request_timeout_s=30.0), count=8)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_than_the_limit_are_under_way(limit: int) -> None:
    with ChatServer(["429", "500", "not json"], delay_s=0.02) as server:
        answers = ask(server.engine(concurrency=limit, retries=5), count=24)
        assert len(answers) == 24
        assert server.most_at_once == limit


def test_back_off_doubles_up_to_its_bound_with_jitter() -> None:
    backoff = Backoff(retries=6, first_s=1.0, longest_s=5.0)
    fault = Fault("x", True, "y")
    jitter = random.Random(0)
    for attempt, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (50, 5.0)):
        waits = [backoff.wait_s(attempt, fault, jitter) for _ in range(200)]
        assert longest / 2 <= min(waits) < 0.55 * longest
        assert 0.95 * longest < max(waits) <= longest
    assert backoff.wait_s(1, Fault("x", True, "y", wait_s=9.0), jitter) == 9.0, "a server may ask for more"
    assert backoff.wait_s(3, Fault("x", True, "y", wait_s=0.0), jitter) >= 2.0, "but not for less"


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:02:00 GMT"}, 20.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:10 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(header, now=100.0) == seconds


# The key --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MSGRPO_TEST_KEY", KEY)
    return "MSGRPO_TEST_KEY"


def test_the_key_is_sent_and_nothing_else_knows_it(planted: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with ChatServer(["500 with the key", "429", "hang up"]) as server:
        engine = server.engine(api_key_env=planted, retries=5)
        answers = ask(engine, count=3)
        assert {seen.headers["authorization"] for seen in server.seen} == {f"Bearer {KEY}"}
    assert KEY not in caplog.text
    assert "wrong credentials" in caplog.text, "what was scrubbed was there"
    assert KEY not in repr([answers, vars(engine), engine._transport, engine.metrics()])


@pytest.mark.parametrize("fault", ["401 with the key", "401 with the key, cut", "500 with the key"])
def test_a_server_that_repeats_the_key_does_not_bring_it_into_an_error(planted: str, fault: str) -> None:
    with ChatServer(always=fault) as server, pytest.raises(RemoteModelError) as caught:
        ask(server.engine(api_key_env=planted))
    whole = "".join(traceback.format_exception(caught.value))
    assert "wrong credentials: Bearer" in str(caught.value)
    assert not any(KEY[:length] in whole for length in range(8, len(KEY) + 1)), "not even its beginning"


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with ChatServer() as server:
        ask(server.engine(api_key_env=None))
        assert KEY not in str(server.seen)


def test_an_unset_key_is_named_where_one_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MSGRPO_NO_SUCH_KEY", raising=False)
    unset = "set the environment variable MSGRPO_NO_SUCH_KEY"
    with ChatServer(always="401") as server, pytest.raises(RemoteModelError, match=unset):
        ask(server.engine(api_key_env="MSGRPO_NO_SUCH_KEY"))


def test_a_key_does_not_travel_in_the_clear(planted: str) -> None:
    with pytest.raises(ValueError, match=r"base_url=http://models\.example/v1: the key .* in the clear"):
        OpenAIEngine(base_url="http://models.example/v1", model="m", api_key_env=planted)
    OpenAIEngine(base_url="https://models.example/v1", model="m", api_key_env=planted)
    OpenAIEngine(base_url="http://models.example/v1", model="m", api_key_env=None)


@pytest.mark.parametrize(
    "address", ["http://user:hunter2@h/v1", "https://h/v1?api_key=hunter2", "https://h/v1#hunter2"]
)
def test_an_address_may_hold_no_secret_and_is_not_repeated(address: str) -> None:
    with pytest.raises(ValueError, match=r"base_url=https?://h/…: must hold no user") as caught:
        OpenAIEngine(base_url=address, model="m")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("address", ["", "127.0.0.1:8000", "ftp://h/v1", "http://"])
def test_an_address_must_be_one(address: str) -> None:
    with pytest.raises(ValueError, match=r"base_url=.*must be an http or https address"):
        OpenAIEngine(base_url=address, model="m")


def test_nothing_is_written_by_asking(planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ChatServer(always="500") as server, pytest.raises(RemoteModelError):
        ask(server.engine(api_key_env=planted))
    assert list(tmp_path.iterdir()) == []
