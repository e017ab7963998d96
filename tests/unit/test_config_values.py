"""Which YAML values fit which annotations, and how an annotation is put into words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest

from msgrpo_lab.config.components import UNRESOLVED, Range, annotations_of, describe, fits

AT_LEAST_ONE = Annotated[int, Range(1)]
SHARE = Annotated[float, Range(0, 1, above=True)]
NODE = {"_target_": "somewhere.Thing"}


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3, int),
        (-3, int),
        (3, float),
        (3.5, float),
        (True, bool),
        ("a", str),
        ("a/b", Path),
        (Path("a"), Path),
        (None, None),
        (None, int | None),
        (None, Optional[str]),  # noqa: UP045 - the old spelling must work too
        (3, int | str),
        ("x", int | str),
        ("a", Literal["a", "b"]),
        (None, Literal["a"] | None),
        ([1, 2], tuple[int, ...]),
        ([], tuple[int, ...]),
        ([1, "a"], tuple[int, str]),
        ([0.9, 0.95], tuple[float, float]),
        ([1], list[int]),
        (["a"], Sequence[str]),
        ([["a", "b"]], Sequence[Sequence[str]]),
        (["a"], Iterable[str]),
        ([1, "a"], list),
        ({"a": 1}, dict[str, int]),
        ({"a": 1}, Mapping[str, float]),
        ({"a": object()}, dict),
        (object(), Any),
        (1, Callable[[], int]),
        (1, AT_LEAST_ONE),
        (None, AT_LEAST_ONE | None),
        (1.0, SHARE),
        (1, SHARE),
        (NODE, int),
        (NODE, Path | None),
        ([NODE], tuple[int, ...]),
        (UNRESOLVED, int),
        ({"a": UNRESOLVED}, dict[str, int]),
    ],
)
def test_value_fits(value: Any, annotation: Any) -> None:
    assert fits(value, annotation)


@pytest.mark.parametrize(
    ("value", "annotation"),
    [
        (3.0, int),
        ("3", int),
        (True, int),
        (False, float),
        (None, int),
        (1, bool),
        ("true", bool),
        (3, str),
        (None, str),
        (3, Path),
        (0, None),
        ("x", int | None),
        (True, int | str),
        ("c", Literal["a", "b"]),
        (True, Literal[1, 2]),
        ("ab", tuple[str, ...]),
        ([1, "a"], tuple[int, ...]),
        ([1], tuple[int, int]),
        ([1, 2, 3], tuple[int, int]),
        ("a", Sequence[str]),
        ({"a": 1}, list[str]),
        ([1], Sequence[str]),
        ([["a", 1]], Sequence[Sequence[str]]),
        ([1], dict[str, int]),
        ({"a": "b"}, dict[str, int]),
        ({1: 1}, Mapping[str, int]),
        (0, AT_LEAST_ONE),
        (1.5, AT_LEAST_ONE),
        (0.0, SHARE),
        (1.01, SHARE),
        (float("nan"), SHARE),
        (0, AT_LEAST_ONE | None),
    ],
)
def test_value_does_not_fit(value: Any, annotation: Any) -> None:
    assert not fits(value, annotation)


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "a whole number"),
        (bool, "true or false"),
        (int | None, "a whole number or null"),
        (Literal["a", "b"], "one of a, b"),
        (AT_LEAST_ONE, "a whole number at least 1"),
        (SHARE, "a number in (0, 1]"),
        (Annotated[float, Range(0, above=True)] | None, "a number greater than 0 or null"),
        (tuple[int, ...], "a list, each item a whole number"),
        (tuple[float, str], "a list of a number and text"),
        (dict[str, int], "a mapping"),
        (Path, "a path"),
    ],
)
def test_annotation_in_words(annotation: Any, words: str) -> None:
    assert describe(annotation) == words


@pytest.mark.parametrize(
    ("number", "inside"), [(0.0, False), (1e-9, True), (1.0, True), (1.0001, False), (float("inf"), False)]
)
def test_range_open_below_and_closed_above(number: float, inside: bool) -> None:
    assert (number in Range(0, 1, above=True)) is inside


def test_an_annotation_that_cannot_be_resolved_keeps_no_other_from_being_checked() -> None:
    resolved = annotations_of({"a": "int", "b": "OnlyForTypeCheckers", "c": "Path | None"}, {"Path": Path})
    assert resolved == {"a": int, "c": Path | None}
