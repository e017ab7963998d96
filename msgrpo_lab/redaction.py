"""Secrets are hidden in what is printed, logged or kept: by the name they stand under, or because they are known."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

HIDDEN = "***"
SHORTEST_SECRET = 6
"""Characters of an environment variable's value below which it is too common a text to be hidden wherever it stands."""

_SECRET = r"(?:api[_-]?key|secret|passw(?:or)?d|credential|private[_-]?key|(?:access|auth|hf|hub|bearer)[_-]?token)"
_SECRET_KEY = re.compile(rf"^(?!.*_env$).*(?:{_SECRET}|^token$)", re.IGNORECASE)
"""`api_key_env` names the variable that a key is in, and is no secret itself."""
_SECRET_VARIABLE = re.compile(rf"{_SECRET}|token$", re.IGNORECASE)
_ASSIGNMENT = re.compile(rf"((?:[\w.-]*{_SECRET}[\w.-]*|\btoken)[\"']?\s*[:=]\s*)(\S.*)", re.IGNORECASE)
_PASSWORD = re.compile(r"(://[^:/@\s]*):[^/@\s]+@")


def looks_secret(key: str) -> bool:
    """Whether the last part of a dotted key names a secret, as in `engine.api_key`."""
    return _SECRET_KEY.search(key.rpartition(".")[2]) is not None


def has_password(text: str) -> bool:
    """Whether an address with a password in it stands in a text."""
    return _PASSWORD.search(text) is not None


def mask(uri: str) -> str:
    """`uri` without the password that may stand in it."""
    try:
        password = urlsplit(uri).password
    except ValueError:  # no address at all
        password = None
    return uri.replace(f":{password}@", f":{HIDDEN}@") if password else uri


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
    """`text` with what is assigned to a secret-looking name, and the secrets of the environment, replaced by `***`."""
    return without_known(_ASSIGNMENT.sub(rf"\g<1>{HIDDEN}", text))


def redact_mistake(line: str) -> str:
    """A line `key=value: …` about a mistake, with the value of a secret-looking key and other secrets replaced."""
    key, equals, rest = line.partition("=")
    if equals and looks_secret(key):
        line = f"{key}={HIDDEN}{rest[at:] if (at := rest.find(': ')) >= 0 else ''}"
    return without_known(_PASSWORD.sub(rf"\g<1>:{HIDDEN}@", line))


def without_known(text: str) -> str:
    """`text` without the values of environment variables that are named like secrets."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    return text


def _environment_secrets() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_SECRET and _SECRET_VARIABLE.search(name):
            yield value
