"""Range checks for a game's arguments: each mistake is one line with the key, the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LARGEST = 1e6
"""Rewards and penalties are at most this: far beyond any use, and small enough that no sum of them overflows."""


def whole_number(key: str, value: Any, *, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high].

    Raises:
        ValueError: it is no whole number, or lies outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"env.{key}={value!r}: must be a whole number, {_range(low, high)}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"env.{key}={value!r}: must be {_range(low, high)}")
    return value


def real_number(
    key: str, value: Any, *, low: float | None = None, high: float | None = None, remedy: str = ""
) -> float:
    """`value` as a float in [low, high]; None leaves a side open, up to `LARGEST`.

    Raises:
        ValueError: it is no finite number, or lies outside the range. `remedy` is appended to the message.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"env.{key}={value!r}: must be a finite number, {_range(low, high)}{remedy}")
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"env.{key}={value!r}: must be {_range(low, high)}{remedy}")
    if abs(value) > LARGEST:
        raise ValueError(f"env.{key}={value!r}: must be at most {LARGEST:g} in size{remedy}")
    return float(value)


def one_of(key: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of `choices`.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"env.{key}={value!r}: must be one of {', '.join(choices)}")
    return value


def truth(key: str, value: Any) -> bool:
    """`value` if it is a bool.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, bool):
        raise ValueError(f"env.{key}={value!r}: must be true or false")
    return value


def _range(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return "of any size"
    if high is None:
        return f"at least {low}"
    if low is None:
        return f"at most {high}"
    return f"at least {low} and at most {high}"
