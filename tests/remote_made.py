"""A chat server on loopback that fails as it is told to, and counts what it is asked."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

from msgrpo_lab.engines.remote.engine import OpenAIEngine
from msgrpo_lab.lap.prompt import FirstWordParser, PromptTemplate

KEY = "sk-planted-0123456789-never-to-be-seen"
WORDS = ("Left", "Down", "Right", "Up")
TEMPLATE = PromptTemplate(user="{observation}", system="{rules} Reply: {actions}.", parser=FirstWordParser())


class Seen(NamedTuple):
    """One request as it arrived."""

    body: dict[str, Any]
    headers: dict[str, str]
    at: float
    """Seconds on a monotonic clock."""


def completion(
    text: str | None,
    *,
    finish_reason: str | None = "stop",
    usage: Any = None,
    logprobs: Sequence[float] | None = None,
) -> dict[str, Any]:
    """The body of a chat completion, as servers write it."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
    }
    if logprobs is not None:
        choice["logprobs"] = {"content": [{"token": "?", "logprob": value} for value in logprobs]}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice]}
    return body | ({} if usage is None else {"usage": usage})


def drawn_word(body: dict[str, Any]) -> dict[str, Any]:
    """A legal word: the first if greedy, else one that the request's seed decides; three tokens."""
    allowed = body.get("structured_outputs", {}).get("choice", WORDS)
    word = allowed[0] if body["temperature"] == 0 else random.Random(body["seed"]).choice(allowed)
    return completion(word, usage={"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13})


class ChatServer:
    """Serves chat completions on 127.0.0.1, each request in a thread of its own.

    Args:
        faults: what befalls the first requests, one each; names in `FAULTS`.
        always: what befalls every request after them; None: nothing.
        answer: makes the body of a response from a request's.
        delay_s: how long an answer takes.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        faults: Sequence[str] = (),
        *,
        always: str | None = None,
        answer: Callable[[dict[str, Any]], dict[str, Any]] = drawn_word,
        delay_s: float = 0.0,
        port: int = 0,
    ) -> None:
        self.answer, self.delay_s, self.always = answer, delay_s, always
        self.faults = list(faults)
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self._under_way = 0
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.chat = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def engine(self, **changes: Any) -> OpenAIEngine:
        """An engine that asks this server and waits next to nothing between attempts."""
        keys = {"first_wait_s": 0.01, "longest_wait_s": 0.02, "request_timeout_s": 5.0, "model": "fake", "retries": 2}
        return OpenAIEngine(**(keys | {"base_url": self.base_url, "api_key_env": None} | changes))

    def enter(self) -> None:
        with self.lock:
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)

    def leave(self) -> None:
        with self.lock:
            self._under_way -= 1

    def next_fault(self) -> str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def __enter__(self) -> ChatServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    chat: ChatServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_POST(self) -> None:
        chat = self.server.chat
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        seen = Seen(body, {name.lower(): value for name, value in self.headers.items()}, time.monotonic())
        chat.enter()
        try:
            with chat.lock:
                chat.seen.append(seen)
            fault = chat.next_fault()
            if self.path != "/v1/chat/completions":
                self.reply(404, b'{"error": {"message": "no such path"}}')
            elif fault is not None:
                FAULTS[fault](self)
            else:
                time.sleep(chat.delay_s)
                content = json.dumps(chat.answer(body)).encode()
        finally:
            chat.leave()
        if fault is None:
            self.reply(200, content)

    def reply(self, status: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def refuse(self, status: int, message: str = "as told", **headers: str) -> None:
        self.reply(status, json.dumps({"error": {"message": message, "code": None}}).encode(), **headers)

    def hang(self) -> None:
        self.server.chat.closed.wait(30)
        self.close_connection = True

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def cut(self) -> None:
        """Half of a body whose length was announced."""
        content = json.dumps(completion("Left")).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True

    def cut_chunks(self) -> None:
        """A chunked stream that breaks off within a chunk."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"10\r\n{'id': 'half of")
        self.close_connection = True

    def trickle(self) -> None:
        """A byte now and then, so that no single read ever times out."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.chat.closed.wait(0.02):
            self.wfile.write(b" ")
            self.wfile.flush()

    def echo_key(self, status: int, padding: int) -> None:
        self.refuse(status, "x" * padding + " wrong credentials: " + self.headers["Authorization"])

    def whole(self, body: Any) -> None:
        self.reply(200, json.dumps(body).encode())


FAULTS: dict[str, Callable[[_Handler], None]] = {
    "408": lambda self: self.refuse(408),
    "409": lambda self: self.refuse(409),
    "425": lambda self: self.refuse(425),
    "429": lambda self: self.refuse(429),
    "429 retry-after 0.4": lambda self: self.refuse(429, Retry_After="0.4"),
    "429 retry-after 3600": lambda self: self.refuse(429, Retry_After="3600"),
    "429 no quota": lambda self: self.reply(429, b'{"error": {"message": "pay", "code": "insufficient_quota"}}'),
    "500": lambda self: self.refuse(500),
    "500 html": lambda self: self.reply(500, b"<html>oh no</html>", "text/html"),
    "502": lambda self: self.refuse(502),
    "503": lambda self: self.refuse(503),
    "hang": _Handler.hang,
    "hang up": _Handler.hang_up,
    "cut": _Handler.cut,
    "cut chunks": _Handler.cut_chunks,
    "trickle": _Handler.trickle,
    "not json": lambda self: self.reply(200, b'{"choices": [{"message"'),
    "html": lambda self: self.reply(200, b"<html>sign in</html>", "text/html"),
    "empty": lambda self: self.reply(200, b""),
    "no choices": lambda self: self.whole({"choices": []}),
    "a list": lambda self: self.whole([]),
    "an error": lambda self: self.whole({"error": {"message": "out of memory"}}),
    "no finish reason": lambda self: self.whole(completion("Le", finish_reason=None)),
    "text is no text": lambda self: self.whole(completion(5)),  # type: ignore[arg-type]
    "negative usage": lambda self: self.whole(completion("Left", usage={"completion_tokens": -4})),
    "endless usage": lambda self: self.whole(completion("Left", usage={"completion_tokens": 10**15})),
    "400": lambda self: self.refuse(400, "unknown field min_p"),
    "401": lambda self: self.refuse(401, "who are you"),
    "403": lambda self: self.refuse(403),
    "404": lambda self: self.refuse(404, "no such model"),
    "422": lambda self: self.reply(422, b'{"detail": "Unexpected fields"}'),
    "401 with the key": lambda self: self.echo_key(401, 0),
    "401 with the key, cut": lambda self: self.echo_key(401, 160),
    "500 with the key": lambda self: self.echo_key(500, 0),
}
