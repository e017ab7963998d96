"""Any text at all through the parsers: no exception, the promises kept, and time in proportion to the length."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.fuzz_parsers import LEGAL, PARSERS, PIECES, fuzz, main
from msgrpo_lab.lap.prompt import ActionParser, ActionTagParser, FirstWordParser

FIRST, TAG = FirstWordParser(), ActionTagParser()
TEXTS = 50_000
ANYTHING = (
    st.text(alphabet=st.characters(), max_size=60)
    | st.lists(st.sampled_from(PIECES), max_size=20).map("".join)
    | st.binary(max_size=80).map(lambda raw: raw.decode("utf-8", errors="surrogateescape"))
)


def test_fifty_thousand_texts_go_through_at_more_than_fifty_thousand_a_second() -> None:
    tally = fuzz(TEXTS, seed=1)
    assert tally.texts == TEXTS
    for name in PARSERS:
        assert tally.rate(name) > 50_000, f"{name}: seconds of processor time, so that a busy machine does not count"
        assert tally.actions[name] > TEXTS // 50, "some texts are legal answers, or the check of them is idle"


def test_the_command_counts_and_tells_a_slow_parser(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--texts", "500", "--at-least", "1"]) == 0
    assert "first word: 500 texts, no exception" in capsys.readouterr().out
    assert main(["--texts", "500", "--at-least", "1e12"]) == 1


def plain_first_word(text: str) -> int | None:
    """The definition: the first whole word that is a legal one in lower case."""
    words = [word.lower() for word in LEGAL]
    return next((words.index(word) for word in map(str.lower, re.findall(r"\w+", text)) if word in words), None)


@given(text=ANYTHING)
@example(text="left\u0301 \u017f Up")
@example(text="Le\ufb05 \u212a up")
def test_the_first_word_is_the_one_of_the_definition(text: str) -> None:
    assert FIRST(text, LEGAL).action == plain_first_word(text)


def test_letters_that_only_regular_expressions_take_for_each_other_are_told_apart() -> None:
    assert FIRST("re\u017ft", ("Rest",)).action is None, "the long s is an s to a pattern, and not in lower case"
    assert FIRST("\u212aeep", ("Keep",)).action == 0, "the Kelvin sign is a k in lower case"
    assert FIRST("turn left", ("turn left", "stay")).action is None, "two words are never read as one"


@given(text=ANYTHING)
def test_what_was_read_is_read_again_by_itself(text: str) -> None:
    for parser, around in ((FIRST, "{}"), (TAG, "<action>{}</action>")):
        parsed = parser(text, LEGAL)
        if parsed.span is not None:
            again = parser(around.format(text[slice(*parsed.span)]), LEGAL)
            assert again.action == parsed.action


@given(text=ANYTHING, rest=ANYTHING)
@example(text="Left \ufffd", rest="x")
@example(text="Left ", rest="Up")
def test_a_settled_text_keeps_its_action_whatever_follows(text: str, rest: str) -> None:
    if FIRST.is_settled(text, LEGAL):
        assert FIRST(text + rest, LEGAL) == FIRST(text, LEGAL)
        assert FIRST(text, LEGAL).action is not None


@pytest.mark.parametrize("parser", [FIRST, TAG])
@pytest.mark.parametrize(
    "unit",
    ["<action>", "<action>Left</action>", "</action>", "<action>a", "<", " ", "\x00", "a ", "a", "Up_", "\u0130"],
)
def test_time_is_in_proportion_to_the_length(parser: ActionParser, unit: str) -> None:
    """A million characters: what goes over a text again and again would take hours."""
    text = "<action>" + unit * (1_000_000 // len(unit))
    start = time.process_time()
    parsed = parser(text, LEGAL)
    assert time.process_time() - start < 3.0
    assert parsed.error is None or len(parsed.error) < 300, "an error quotes the beginning only"
