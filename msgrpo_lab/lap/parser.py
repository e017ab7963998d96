"""The text-to-action map Φ: from what the policy wrote to a legal action or ⊥ (paper section 1).

A parser never raises on a text, however strange: what names no legal action is ⊥ with a reason.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Protocol

from msgrpo_lab.types import ParsedAction

_EXCERPT = 40
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for the first bytes of a character whose last bytes are yet to come."""


class ActionParser(Protocol):
    """Reads the action out of a completion's text.

    A parser may also have a method `is_settled(text, legal_actions) -> bool`: whether no continuation of `text` could
    change what is read. Free decoding then ends there.
    """

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """The index of the legal action that `text` names, or ⊥."""
        ...


def _invalid(reason: str) -> ParsedAction:
    return ParsedAction(action=None, span=None, error=reason)


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT] + "…")


@functools.cache
def _legal_words(legal_actions: tuple[str, ...]) -> tuple[dict[str, int], re.Pattern[str]]:
    """The number of each legal word in lower case, and a pattern that whole words of a text must match to be one."""
    number: dict[str, int] = {}
    for index, action in enumerate(legal_actions):
        if re.fullmatch(r"\w+", action):
            number.setdefault(action.lower(), index)
    words = "|".join(re.escape(word) for word in number) or r"(?!)"
    return number, re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstWordParser:
    """The first legal word in the text, whatever stands around it; letter case is ignored."""

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """See `ActionParser.__call__`."""
        number, pattern = _legal_words(legal_actions)
        for match in pattern.finditer(text):
            # Regular expressions take a few letters for each other that `lower` does not, such as ſ for s.
            if (action := number.get(match.group().lower())) is not None:
                return ParsedAction(action=action, span=match.span(), error=None)
        return _invalid("empty text" if not text.strip() else f"no legal word in {_excerpt(text)}")

    def is_settled(self, text: str, legal_actions: tuple[str, ...]) -> bool:
        """Whether a legal word stands there complete: the first one, with something after it that cannot lengthen it.

        The end of the text could still grow, and so could the mark of a character whose bytes are incomplete.
        """
        parsed = self(text, legal_actions)
        return parsed.span is not None and text[parsed.span[1] :].rstrip(_INCOMPLETE) != ""


_ACTION_TAG = re.compile(r"<action>([^<>]*)</action>", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionTagParser:
    """What stands in the last well-formed `<action>` tag, trimmed and lower-cased [A].

    A tag is well formed if it is closed and holds no other tag.
    """

    def __call__(self, text: str, legal_actions: tuple[str, ...]) -> ParsedAction:
        """See `ActionParser.__call__`."""
        last = max(_ACTION_TAG.finditer(text), key=lambda match: match.start(), default=None)
        if last is None:
            return _invalid("empty text" if not text.strip() else "no well-formed <action> tag")
        content = last.group(1)
        word = content.strip().lower()
        words = [action.lower() for action in legal_actions]
        if word not in words:
            return _invalid(f"{_excerpt(content.strip())} in the <action> tag is no legal action")
        start = last.start(1) + len(content) - len(content.lstrip())
        return ParsedAction(action=words.index(word), span=(start, start + len(content.strip())), error=None)
