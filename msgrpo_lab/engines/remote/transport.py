"""Chat completions over HTTP: so many at a time, each asked again until it is answered or has failed for good.

The `openai` client carries the requests; its own retries are off, because they cover neither a malformed answer nor an
overall time limit, and would not be counted.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from msgrpo_lab.messages import one_line

PASSING_STATUSES = frozenset({408, 409, 425, 429})
"""Client errors that another try may be without; every 5xx is of this kind too."""
QUOTA = "insufficient_quota"
"""What OpenAI's 429 says when the account is out of money, which no waiting mends."""
LONGEST_EXCERPT = 200
"""Characters of a server's own words that are shown."""


class RemoteModelError(RuntimeError):
    """A remote model cannot be asked; the message names the key, the value and the remedy in one line."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One failed attempt."""

    kind: str
    """In words, without numbers that differ between attempts."""
    passing: bool
    """Whether trying again may help."""
    remedy: str
    """What the user can do, if it does not."""
    wait_s: float | None = None
    """How long the server asks to wait, seconds; None if it does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Exponential back-off with jitter: the n-th wait is uniform between half of first · 2ⁿ⁻¹ and all of it."""

    retries: int
    first_s: float
    longest_s: float

    def wait_s(self, attempt: int, fault: Fault, jitter: random.Random) -> float:
        """Seconds to wait after failed attempt number `attempt` ≥ 1: what the server asks for, or the back-off."""
        wait = min(self.longest_s, self.first_s * 2.0 ** (attempt - 1)) * jitter.uniform(0.5, 1.0)
        return wait if fault.wait_s is None else max(wait, fault.wait_s)


def as_fault(error: Exception, server: str, key_hint: str, without_key: Callable[[str], str]) -> Fault:
    """What an attempt's exception amounts to.

    Args:
        error: raised by the `openai` client, by a timeout, or by reading the answer.
        server: how the keys of the configuration name the server kind, for the remedies.
        key_hint: where the key comes from and whether there was one.
        without_key: blots the key out of a text; a server may repeat it.

    Raises:
        Exception: `error` itself, if it is no fault between here and the server.
    """
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        return Fault("no answer in time", True, "see whether the server hangs, or raise request_timeout_s")
    if isinstance(error, openai.APIConnectionError):
        cause = error.__cause__
        reason = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        return Fault(
            f"connection failed ({excerpt(without_key(reason))})", True, "start the server, or correct base_url"
        )
    if isinstance(error, MalformedAnswerError):
        kind = f"malformed answer ({excerpt(without_key(str(error)))})"
        return Fault(kind, True, "see whether base_url is an OpenAI-compatible API")
    if isinstance(error, openai.APIStatusError):
        return _status_fault(error, server, key_hint, without_key)
    raise error


def _status_fault(error: Any, server: str, key_hint: str, without_key: Callable[[str], str]) -> Fault:
    status = int(error.status_code)
    kind = f"HTTP {status} ({excerpt(without_key(_words_of(error)))})"
    if status in (401, 403):
        return Fault(kind, False, key_hint)
    if status == 404:
        return Fault(kind, False, "correct model, or base_url, which usually ends in /v1")
    if QUOTA in (error.code, error.type):
        return Fault(kind, False, "the account behind the key has no quota left")
    if status in PASSING_STATUSES or status >= 500:
        remedy = "lower concurrency" if status == 429 else "see the server's log"
        return Fault(kind, True, remedy, retry_after_s(error.response.headers, time.time()))
    return Fault(kind, False, f"see whether the server is of the kind server={server}, or correct what it names")


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for (a number, or a date seen from `now`); None without one."""
    text = headers.get("retry-after", "").strip()
    try:
        seconds = float(text)
    except ValueError:
        date = email.utils.parsedate_tz(text)
        if date is None:
            return None
        seconds = email.utils.mktime_tz(date) - now
    return max(0.0, seconds) if seconds < float("inf") else None


def _words_of(error: Any) -> str:
    """The message in an error's body, wherever the kinds of servers put it."""
    body = error.body
    if isinstance(body, Mapping):
        for key in ("message", "detail", "error"):
            if body.get(key):
                return str(body[key])
    return str(body or error.message)


def excerpt(text: str) -> str:
    """`text` in one line of a readable length."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_EXCERPT else text[: LONGEST_EXCERPT - 1] + "…"


MOST_TOKENS = 10_000_000
"""No answer and no prompt has more; an array is made of an answer's count."""


class Answer(NamedTuple):
    """One chat completion, as far as this project reads it."""

    text: str
    finish_reason: str
    logprobs: tuple[float, ...] | None
    """Nats of each token, as the server means them; None if it does not say."""
    prompt_tokens: int | None
    completion_tokens: int | None
    """By the server's count, with the end-of-turn token or without, as it has it; None if it does not say."""


class MalformedAnswerError(Exception):
    """A server answered with success and something that is no chat completion."""


def read_answer(content_type: str, content: bytes) -> Answer:
    """The chat completion in a response's body.

    Raises:
        MalformedAnswerError: it holds none; the message says what it holds instead.
    """
    if "json" not in content_type.lower():
        raise MalformedAnswerError(f"its content type is {content_type or 'missing'!r}, not JSON")
    try:
        body = json.loads(content)
    except ValueError as error:
        raise MalformedAnswerError(f"its {len(content)} bytes are no JSON") from error
    try:
        choice = body["choices"][0]
        message, reason = choice["message"], choice["finish_reason"]
        text = message.get("content") or ""
        usage = body.get("usage") or {}
        answer = Answer(
            text=text,
            finish_reason=reason,
            logprobs=_logprobs(choice.get("logprobs")),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
        )
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        said = f" but an error: {body['error']}" if isinstance(body, dict) and body.get("error") else ""
        raise MalformedAnswerError(f"its JSON is no chat completion with a choice{said}") from error
    if not isinstance(text, str) or not isinstance(reason, str):
        raise MalformedAnswerError("its choice has no text or no finish_reason")
    if not all(count is None or _is_count(count) for count in (answer.prompt_tokens, answer.completion_tokens)):
        raise MalformedAnswerError("its usage holds something else than counts")
    return answer


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= MOST_TOKENS


def _logprobs(given: Any) -> tuple[float, ...] | None:
    entries = given.get("content") if given is not None else None
    return None if entries is None else tuple(float(entry["logprob"]) for entry in entries)


log = logging.getLogger(__name__)

NO_KEY = "none"
"""Stands where the client library insists on a key."""
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(slots=True)
class Usage:
    """What was asked for and reported since it was last cleared."""

    requests: int = 0
    """Attempts, retries among them."""
    retries: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0
    """Answers whose tokens the server did not count."""


@dataclass(slots=True, kw_only=True)
class ChatTransport:
    """Asks one server.

    The key is read from the environment when it is needed, and kept nowhere: neither in this object nor in a message,
    even where the server repeats it in an error.
    """

    base_url: str
    server: str
    """The server's kind, for messages."""
    api_key_env: str | None
    concurrency: int
    request_timeout_s: float
    """Of one attempt, from the connection to the answer's last byte."""
    total_timeout_s: float
    """Of one prompt, with its retries and waits, from its first attempt."""
    backoff: Backoff
    usage: Usage = field(default_factory=Usage)
    _jitter: random.Random = field(default_factory=random.Random)
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Raises `ValueError` for an address that is none, or over which a key would travel in the clear."""
        check_address(self.base_url, self.api_key_env)
        # One line for every request of thousands says nothing that the metrics do not.
        logging.getLogger("httpx2").setLevel(logging.WARNING)

    def ask(self, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The answers, in order. The first that fails for good ends the others.

        Raises:
            RemoteModelError: the server could not be asked, or not any longer.
        """
        if not bodies:
            return []
        return asyncio.run(self._ask(bodies))

    async def _ask(self, bodies: Sequence[Mapping[str, Any]]) -> list[Answer]:
        import openai

        gate = asyncio.Semaphore(self.concurrency)
        async with openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self._key() or NO_KEY, max_retries=0, timeout=self.request_timeout_s
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._ask_one(client, body, gate)) for body in bodies]
            except BaseExceptionGroup as errors:
                failures = errors.subgroup(RemoteModelError)
                if failures is None:
                    raise
                raise _first(failures) from None
        return [task.result() for task in tasks]

    async def _ask_one(self, client: Any, body: Mapping[str, Any], gate: asyncio.Semaphore) -> Answer:
        async with gate:
            clock = asyncio.get_running_loop().time
            end = clock() + self.total_timeout_s
            attempt = 1
            while True:
                try:
                    async with asyncio.timeout(min(self.request_timeout_s, end - clock())):
                        self.usage.requests += 1
                        return self._counted(await self._attempt(client, body))
                except Exception as error:  # sorted at once; what is no fault of the server's is raised again
                    fault = as_fault(error, self.server, self._key_hint(), self._without_key)
                wait = self.backoff.wait_s(attempt, fault, self._jitter)
                if (end_of_trying := self._gives_up(fault, attempt, clock() + wait >= end)) is not None:
                    raise self._error(body, f"{fault.kind}{end_of_trying}; {fault.remedy}")
                self._tell(fault.kind, wait)
                attempt += 1
                self.usage.retries += 1
                # Waits inside the gate: a server that is asked to do less is asked less.
                await asyncio.sleep(wait)

    def _gives_up(self, fault: Fault, attempt: int, too_late: bool) -> str | None:
        """Why this fault is the last; None if the prompt is asked again."""
        if not fault.passing:
            return ""
        if attempt > self.backoff.retries:
            return f", {attempt} times (retries={self.backoff.retries})"
        if too_late:
            return f", and the next try would be past total_timeout_s={self.total_timeout_s:g}"
        return None

    async def _attempt(self, client: Any, body: Mapping[str, Any]) -> Answer:
        fields = dict(body)
        model, messages = fields.pop("model"), fields.pop("messages")
        raw = await client.chat.completions.with_raw_response.create(model=model, messages=messages, extra_body=fields)
        return read_answer(raw.http_response.headers.get("content-type", ""), raw.http_response.content)

    def _counted(self, answer: Answer) -> Answer:
        self.usage.answers += 1
        self.usage.prompt_tokens += answer.prompt_tokens or 0
        self.usage.completion_tokens += answer.completion_tokens or 0
        self.usage.uncounted += answer.completion_tokens is None
        return answer

    def _key(self) -> str | None:
        return (os.environ.get(self.api_key_env) or None) if self.api_key_env is not None else None

    def _key_hint(self) -> str:
        if self.api_key_env is None:
            return "name the environment variable that holds a key with api_key_env"
        if self._key() is None:
            return f"set the environment variable {self.api_key_env} (api_key_env), which is not set"
        return f"the key in the environment variable {self.api_key_env} (api_key_env) is not accepted"

    def _without_key(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "[key]") if key is not None else text

    def _error(self, body: Mapping[str, Any], problem: str) -> RemoteModelError:
        where = f"base_url={self.base_url} model={body['model']}"
        return RemoteModelError(one_line(f"{where}: {problem}"))

    def _tell(self, kind: str, wait: float) -> None:
        """Says that something is tried again, once for each kind of trouble; the rest is counted."""
        level = logging.DEBUG if kind in self._told else logging.WARNING
        self._told.add(kind)
        log.log(
            level, "%s: %s; trying again in %.1f s (said once, counted as remote_retries)", self.base_url, kind, wait
        )


def _first(errors: BaseExceptionGroup[RemoteModelError]) -> RemoteModelError:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def check_address(base_url: str, api_key_env: str | None) -> None:
    """Raises `ValueError` unless `base_url` is a plain http(s) address that a key may be sent to."""
    problem = f"base_url={base_url}: "
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{problem}must be an http or https address, such as http://127.0.0.1:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(
            f"base_url={parts.scheme}://{parts.hostname}/…: must hold no user, password, query or fragment, "
            "because addresses are stored with a run; name an environment variable with api_key_env"
        )
    has_key = api_key_env is not None and bool(os.environ.get(api_key_env))
    if has_key and parts.scheme == "http" and parts.hostname not in LOOPBACK:
        raise ValueError(
            f"{problem}the key in {api_key_env} would travel in the clear; use https, a tunnel to 127.0.0.1, or send "
            "no key with api_key_env=null"
        )
