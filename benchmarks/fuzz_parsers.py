"""Any text at all through the parsers: `python benchmarks/fuzz_parsers.py --texts 1000000`.

Texts are made of random bytes, of random code points (lone surrogates, marks, right-to-left letters and NULs among
them), of pieces that answers are made of, and of what hypothesis comes up with, spliced into each other; a few are very
long. Every text goes through both parsers. What comes back is checked; what is timed is the parsing alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from msgrpo_lab.lap.prompt import ActionParser, ActionTagParser, FirstWordParser
from msgrpo_lab.types import ParsedAction

LEGAL = ("Left", "Down", "Right", "Up")
PARSERS: dict[str, ActionParser] = {"first word": FirstWordParser(), "action tag": ActionTagParser()}
PIECES = (
    *("<action>", "</action>", "<ACTION>", "</Action >", "<think>", "</think>", "<plan>", "<", ">", "/", "&lt;"),
    *("Left", "down", "RIGHT", "uP", "Leftish", "Up_Down", "ſ", "K", "İ", "ı", "ß", "𝔘𝔭", "L\u0301eft", "\u202eUp"),
    *("<action>Left</action>", "<action>\n up </action>", "<Action>DOWN</aCTION>", "<action>north</action>"),
    *(" ", "\n", "\t", "\r\n", "\x00", "\x1b[2J", "\ufffd", "\ufeff", "\u2028", "\ud800", "\udfff", "\u200b"),
)
BYTES, POINTS, PARTS, SPLICED = range(4)
"""Kinds of texts."""
SHORT = 48
"""Characters (bytes, pieces) of a text at most, but for the long ones."""
LONG = 200_000
LONG_EVERY = 20_000
"""One text in so many is long."""
INVENTED = 400
"""Texts that hypothesis makes."""


@dataclass(slots=True)
class Tally:
    """What was found."""

    texts: int = 0
    actions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARSERS, 0))
    """Legal actions read, by parser."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARSERS, 0.0))

    def rate(self, parser: str) -> float:
        """Texts a second."""
        return self.texts / self.seconds[parser]


def invented(count: int, seed: int) -> list[str]:
    """Texts by hypothesis, which tries what breaks programs: empty, repeated, and odd characters."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    found: list[str] = []
    anything = st.text(max_size=SHORT) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join)

    @seeded(seed)
    @settings(max_examples=count, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(anything)
    def collect(text: str) -> None:
        found.append(text)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collect()
    return found


def texts(count: int, rng: np.random.Generator, seeds: Sequence[str]) -> Iterator[str]:
    """So many texts; `seeds` are spliced into some of them."""
    kinds, sizes = rng.integers(4, size=count), rng.integers(SHORT + 1, size=count)
    for number, (kind, size) in enumerate(zip(kinds.tolist(), sizes.tolist(), strict=True)):
        length = LONG if number % LONG_EVERY == LONG_EVERY - 1 else size
        if kind == BYTES:
            yield rng.bytes(length).decode("utf-8", errors=("replace", "surrogateescape", "ignore")[size % 3])
        elif kind == POINTS:
            yield "".join(map(chr, rng.integers((0x80, 0x3000, 0x110000)[size % 3], size=length).tolist()))
        else:
            pool = PIECES if kind == PARTS else seeds
            wanted = length if length == LONG else size // 6
            yield "".join([pool[index] for index in rng.integers(len(pool), size=wanted).tolist()])


def check(text: str, parsed: ParsedAction) -> None:
    """What holds for any text.

    Raises:
        AssertionError: a span outside the text or on another word, an action that is none, an error of several lines.
    """
    if parsed.action is None:
        assert parsed.span is None, text
        assert parsed.error, text
        assert len(parsed.error.splitlines()) == 1, text
        return
    assert parsed.error is None, text
    assert parsed.span is not None, text
    start, stop = parsed.span
    assert 0 <= start < stop <= len(text), text
    assert text[start:stop].lower() == LEGAL[parsed.action].lower(), text


def fuzz(count: int, seed: int = 0, chunk: int = 10_000) -> Tally:
    """Sends texts through both parsers.

    Raises:
        AssertionError: what came back breaks `check`.
    """
    rng, tally, seeds = np.random.default_rng(seed), Tally(), invented(INVENTED, seed)
    for first in range(0, count, chunk):
        made = list(texts(min(chunk, count - first), rng, seeds))
        for name, parser in PARSERS.items():
            start = time.process_time()
            found = [parser(text, LEGAL) for text in made]
            tally.seconds[name] += time.process_time() - start
            for text, parsed in zip(made, found, strict=True):
                check(text, parsed)
            tally.actions[name] += sum(parsed.action is not None for parsed in found)
        tally.texts += len(made)
    return tally


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints how many texts went through, and how fast; 1 if a parser is slower than asked."""
    asked = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    asked.add_argument("--texts", type=int, default=1_000_000)
    asked.add_argument("--seed", type=int, default=0)
    asked.add_argument("--at-least", type=float, default=50_000, help="texts a second, of each parser")
    given = asked.parse_args(arguments)
    tally = fuzz(given.texts, given.seed)
    for name in PARSERS:
        legal = tally.actions[name] / tally.texts
        print(f"{name}: {tally.texts:,} texts, no exception, {legal:.1%} legal, {tally.rate(name):,.0f} a second")
    return int(any(tally.rate(name) < given.at_least for name in PARSERS))


if __name__ == "__main__":
    sys.exit(main())
