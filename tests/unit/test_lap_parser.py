"""The text-to-action map: hand-made answers of both formats, and any text at all."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from msgrpo_lab.lap.prompt import ActionParser, ActionTagParser, FirstWordParser

WORDS = ("Left", "Down", "Right", "Up")
FIRST, TAG = FirstWordParser(), ActionTagParser()


@pytest.mark.parametrize(
    ("text", "action", "span"),
    [
        ("Left", 0, (0, 4)),
        ("left", 0, (0, 4)),
        ("DOWN", 1, (0, 4)),
        ("  Right\n", 2, (2, 7)),
        ("Up.", 3, (0, 2)),
        ("*Up*", 3, (1, 3)),
        ("I go Down then Up", 1, (5, 9)),
        ("Upwards! Left", 0, (9, 13)),  # only whole words
        ("Left-Right", 0, (0, 4)),
        ("\n\n\tuP", 3, (3, 5)),
        ("→ Right", 2, (2, 7)),
        ("Ответ: Down", 1, (7, 11)),
        ("Up" * 3 + " Down", 1, (7, 11)),
        ("1 Left", 0, (2, 6)),
        ("<action>Up</action>", 3, (8, 10)),
    ],
)
def test_first_legal_word(text: str, action: int, span: tuple[int, int]) -> None:
    parsed = FIRST(text, WORDS)
    assert (parsed.action, parsed.span, parsed.error) == (action, span, None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty text"),
        (" \n\t", "empty text"),
        ("go north", "no legal word in 'go north'"),
        ("Leftish", "no legal word in 'Leftish'"),
        ("Up_Down", "no legal word in 'Up_Down'"),
        ("L e f t", "no legal word in 'L e f t'"),
        ("x" * 41, f"no legal word in '{'x' * 40}…'"),
        ("x" * 40, f"no legal word in '{'x' * 40}'"),
        ("Ｌｅｆｔ", "no legal word in 'Ｌｅｆｔ'"),
        ("a\nb", r"no legal word in 'a\nb'"),
    ],
)
def test_no_legal_word_is_bottom_with_a_reason(text: str, error: str) -> None:
    parsed = FIRST(text, WORDS)
    assert (parsed.action, parsed.span, parsed.error) == (None, None, error)


@pytest.mark.parametrize(
    ("text", "action", "span"),
    [
        ("<action>Left</action>", 0, (8, 12)),
        ("<action> down </action>", 1, (9, 13)),
        ("<action>\nRIGHT\n</action>", 2, (9, 14)),
        ("<ACTION>Up</Action>", 3, (8, 10)),
        ("<think>Left?</think><action>Up</action>", 3, (28, 30)),
        ("<action>Left</action><action>Up</action>", 3, (29, 31)),  # the last one
        ("<action>Left</action> <action>Up", 0, (8, 12)),  # the last well-formed one
        ("<action><action>Down</action>", 1, (16, 20)),  # the outer one is never closed
        ("<action>Down</action></action>", 1, (8, 12)),
        ("<action>Up</action>\n<think>or Left</think>", 3, (8, 10)),
        ("é→<action>Up</action>", 3, (10, 12)),
        ("<action>x</think><action>Left</action>", 0, (25, 29)),
    ],
)
def test_last_well_formed_tag(text: str, action: int, span: tuple[int, int]) -> None:
    parsed = TAG(text, WORDS)
    assert (parsed.action, parsed.span, parsed.error) == (action, span, None)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "empty text"),
        ("\n ", "empty text"),
        ("Left", "no well-formed <action> tag"),
        ("<action>Left", "no well-formed <action> tag"),
        ("Left</action>", "no well-formed <action> tag"),
        ("<action><b>Left</b></action>", "no well-formed <action> tag"),
        ("< action >Left</ action >", "no well-formed <action> tag"),
        ("<plan>Left</plan>", "no well-formed <action> tag"),
        ("<action></action>", "'' in the <action> tag is no legal action"),
        ("<action>   </action>", "'' in the <action> tag is no legal action"),
        ("<action>north</action>", "'north' in the <action> tag is no legal action"),
        ("<action>Left Up</action>", "'Left Up' in the <action> tag is no legal action"),
        ("<action>Left.</action>", "'Left.' in the <action> tag is no legal action"),
        ("<action>Left</action><action>north</action>", "'north' in the <action> tag is no legal action"),
    ],
)
def test_no_action_in_a_tag_is_bottom_with_a_reason(text: str, error: str) -> None:
    parsed = TAG(text, WORDS)
    assert (parsed.action, parsed.span, parsed.error) == (None, None, error)


PIECES = st.sampled_from(
    ["<action>", "</action>", "<think>", "Left", "up", " ", "\n", "<", ">", "İ", "ß", "\x00", "𝔘𝔭"]
)


@pytest.mark.parametrize("parser", [FIRST, TAG])
@given(text=st.text() | st.lists(PIECES, max_size=12).map("".join))
@example(text="<action>İ</action>")
@example(text="<action>" * 50)
def test_any_text_is_an_action_at_its_span_or_bottom_with_one_line(parser: ActionParser, text: str) -> None:
    parsed = parser(text, WORDS)
    if parsed.action is None:
        assert parsed.span is None
        assert parsed.error
        assert len(parsed.error.splitlines()) == 1
    else:
        assert parsed.error is None
        assert parsed.span is not None
        start, stop = parsed.span
        assert text[start:stop].lower() == WORDS[parsed.action].lower()


@given(before=st.text(alphabet="xyz ,.\n"), word=st.sampled_from(WORDS), after=st.text(alphabet="xyz ,.\n"))
def test_a_legal_word_between_others_is_found(before: str, word: str, after: str) -> None:
    text = f"{before} {word} {after}"
    parsed = FIRST(text, WORDS)
    assert parsed.action == WORDS.index(word)
    assert parsed.span == (len(before) + 1, len(before) + 1 + len(word))


@pytest.mark.parametrize("parser", [FIRST, TAG])
def test_the_legal_words_decide(parser: ActionParser) -> None:
    assert parser("<action>stay</action>", ("Stay", "Go")).action == 0
    assert parser("<action>stay</action>", WORDS).action is None
