"""Markdown from values that may hold anything: what stands in a configuration must not become markup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

MISSING = "–"
_MARKUP = re.compile(r"([\\`*_\[\]<>|#~&!])")


def escape(text: object) -> str:
    """One line that reads as the text itself: markup escaped, line ends and other controls as spaces."""
    line = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split())
    return _MARKUP.sub(r"\\\1", line)


def code_block(text: str) -> str:
    """Text as it is, behind a fence longer than any in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits and a true minus sign; a dash where it is not known."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """A whole number in groups of three digits; a dash where it is not known."""
    return MISSING if value is None else f"{round(value):,}".replace(",", " ")


def duration(seconds: float | None) -> str:
    """Seconds as `41 s`, `12 min 05 s` or `2 h 03 min`; a dash where unknown."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
