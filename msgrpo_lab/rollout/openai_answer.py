"""What a chat completion says, read out of a response that may hold anything."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

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
