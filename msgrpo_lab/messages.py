"""A mistake in one line: the key, its value, what is wrong, what would be right; with secrets hidden."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Characters of an environment variable's value below which it is too common a text to be hidden wherever it stands."""

_SECRET = r"(?:api[_-]?key|secret|passw(?:or)?d|credential|private[_-]?key|(?:access|auth|hf|hub|bearer)[_-]?token)"
_SECRET_KEY = re.compile(rf"^(?!.*_env$).*(?:{_SECRET}|^token$)", re.IGNORECASE)
"""`api_key_env` names the variable that a key is in, and is no secret itself."""
_SECRET_VARIABLE = re.compile(
    rf"{_SECRET}|token$|passphrase|webhook|connection_?string|_(?:pass|pwd|pat)$", re.IGNORECASE
)
_KEY_VARIABLE = re.compile(r"_key$", re.IGNORECASE)
"""May hold a secret, as in `OPENAI_KEY`, or a word, as in `SORT_KEY=update`."""
_ASSIGNMENT = re.compile(rf"((?:[\w.-]*{_SECRET}[\w.-]*|\btoken)[\"']?\s*[:=]\s*)(\S.*)", re.IGNORECASE)
_PASSWORD = re.compile(r"(://[^:/\[\s]*):(?:(?!\d{1,5}[/?#])\S+|[^/?#\s]+)@")
"""Up to the last `@`, since people leave `@` and `/` in passwords as they are; `host:5000/a@b` is a port and a path."""
_PARAMETER = re.compile(rf"([?&](?:[\w.-]*{_SECRET}[\w.-]*|[\w.-]*token|pass|pwd|passphrase)=)[^&#\s]+", re.IGNORECASE)


def looks_secret(key: str) -> bool:
    """Whether the last part of a dotted key names a secret, as in `engine.api_key`."""
    return _SECRET_KEY.search(key.rpartition(".")[2]) is not None


def has_password(text: str) -> bool:
    """Whether an address with a password in it, before its host or as a parameter, stands in a text."""
    return _PASSWORD.search(text) is not None or _PARAMETER.search(text) is not None


def mask(uri: str) -> str:
    """An address, or a text with some in it, without the passwords that may stand in them."""
    return _PARAMETER.sub(rf"\g<1>{HIDDEN}", _PASSWORD.sub(rf"\g<1>:{HIDDEN}@", uri))


def redact(value: Any, key: str = "") -> Any:
    """A configuration tree with the values of secret-looking keys, and passwords in addresses, replaced by `***`."""
    if isinstance(value, Mapping):
        return {name: redact(child, str(name)) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(child, key) for child in value]
    if value is not None and _SECRET_KEY.search(key):
        return HIDDEN
    return mask(value) if isinstance(value, str) and "://" in value else value


def redact_text(text: str) -> str:
    """`text` with what is assigned to a secret-looking name, passwords and secrets of the environment replaced."""
    return without_known(mask(_ASSIGNMENT.sub(rf"\g<1>{HIDDEN}", text)))


def redact_mistake(line: str) -> str:
    """A line `key=value: …` about a mistake, with the value of a secret-looking key and other secrets replaced."""
    key, equals, rest = line.partition("=")
    if equals and looks_secret(key):
        line = f"{key}={HIDDEN}{rest[at:] if (at := rest.find(': ')) >= 0 else ''}"
    return without_known(mask(line))


def without_known(text: str) -> str:
    """`text` without the values of environment variables that are named like secrets."""
    # The longest first: one may be the beginning of another.
    for value in sorted(_environment_secrets(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return text


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) < SHORTEST_SECRET or (value.startswith("/") and os.access(value, os.F_OK)):
            continue  # too common a text, or the name of a file
        if _SECRET_VARIABLE.search(name) or (_KEY_VARIABLE.search(name) and not value.isalpha()):
            yield value


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
