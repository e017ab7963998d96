"""What can go wrong between here and a model server: which of it passes by itself, and how long to wait for that."""

from __future__ import annotations

import email.utils
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from msgrpo_lab.rollout.openai_answer import MalformedAnswerError

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
