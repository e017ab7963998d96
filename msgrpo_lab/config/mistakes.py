"""A mistake, told in one line: the key, its value, what is wrong, and what would be right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from msgrpo_lab.redaction import redact_mistake

LONGEST_VALUE = 80
"""Characters of a value that are shown."""


class ConfigError(Exception):
    """One or more mistakes in a configuration; the message holds one line for each, secrets hidden."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        self.mistakes = tuple(dict.fromkeys(redact_mistake(one_line(mistake)) for mistake in mistakes))
        super().__init__("\n".join(self.mistakes))


@dataclass(frozen=True, slots=True)
class Mistake:
    """What is wrong with one key. `str()` of it is the line that users read."""

    key: str
    value: Any
    problem: str
    remedy: str

    def __str__(self) -> str:
        """The line."""
        return one_line(f"{self.key}={show(self.value)}: {self.problem}; {self.remedy}")


def one_line(text: str) -> str:
    """`text` with every run of white space, line ends included, as one space."""
    return " ".join(text.split())


def show(value: Any) -> str:
    """`value` as it would be typed on the command line, cut to a readable length."""
    if value is None:
        text = "null"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, (list, tuple)):
        text = "[" + ",".join(show(item) for item in value) + "]"
    else:
        text = str(value)
    text = one_line(text)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"


def closest_first(word: str, options: Iterable[str]) -> list[str]:
    """`options`, the one most like `word` first, equally like ones in alphabetical order."""

    def distance(option: str) -> float:
        return -difflib.SequenceMatcher(a=word.lower(), b=option.lower()).ratio()

    return sorted(sorted(options), key=distance)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`did you mean 'x'? ` if an option resembles `word`, else the empty string."""
    match = difflib.get_close_matches(word, sorted(options), n=1, cutoff=0.6)
    return f"did you mean '{match[0]}'? " if match else ""
