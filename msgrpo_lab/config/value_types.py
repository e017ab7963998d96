"""Does a configuration value fit a Python annotation? The subset of annotations that configuration files need."""

from __future__ import annotations

import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from msgrpo_lab.messages import show


class _Unresolved:
    """Stands for a value that only a running job knows, such as `${hydra:runtime.output_dir}`."""

    def __repr__(self) -> str:
        return "UNRESOLVED"


UNRESOLVED: Final = _Unresolved()

_SEQUENCES = (list, set, frozenset, Sequence, MutableSequence, Iterable, Collection)
_MAPPINGS = (dict, Mapping, MutableMapping)
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that are allowed, as metadata of an `Annotated` annotation."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    """`low` itself is not allowed."""

    def __contains__(self, value: float) -> bool:
        """Whether a number is allowed."""
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or value <= self.high

    def __str__(self) -> str:
        """The range in words."""
        low, high = (f"{end:g}" if isinstance(end, float) else str(end) for end in (self.low, self.high))
        if self.high is not None:
            return f"in {'(' if self.above else '['}{low}, {high}]"
        return f"greater than {low}" if self.above else f"at least {low}"


def is_component(value: Any) -> bool:
    """Whether `value` is a node that Hydra instantiates."""
    return isinstance(value, Mapping) and "_target_" in value


def fits(value: Any, annotation: Any) -> bool:  # noqa: PLR0911 - a return for each kind of annotation
    """Whether `value`, as read from YAML, may be given where `annotation` stands. What is not understood fits.

    An int is a float, a bool is no int, NaN and the infinities are no numbers, a list is a tuple, text is a path. A
    node with a `_target_` fits everywhere, because only instantiating it tells what it becomes.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if isinstance(value, _Unresolved) or annotation in (Any, object) or is_component(value):
        return True
    if origin is Annotated:
        return fits(value, args[0]) and all(_in_range(value, mark) for mark in args[1:])
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in args)
    if annotation is None or annotation is types.NoneType:
        return value is None
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if annotation in _NAMES:
        return _fits_scalar(value, annotation)
    return _fits_container(value, origin or annotation, args)


def _in_range(value: Any, mark: Any) -> bool:
    return not isinstance(mark, Range) or value is None or value in mark


def _fits_scalar(value: Any, annotation: type) -> bool:
    if annotation is Path:
        return isinstance(value, (str, os.PathLike))
    if annotation in (int, float):
        if isinstance(value, float):
            return annotation is float and math.isfinite(value)
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, annotation)


def _fits_container(value: Any, origin: Any, args: tuple[Any, ...]) -> bool:  # noqa: PLR0911 - the same
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if not args or args[-1] is Ellipsis:
            return all(fits(item, args[0]) for item in value) if args else True
        return len(value) == len(args) and all(fits(item, arg) for item, arg in zip(value, args, strict=True))
    if origin in _SEQUENCES:
        return isinstance(value, (list, tuple)) and all(fits(item, args[0]) for item in value if args)
    if origin in _MAPPINGS:
        if not isinstance(value, Mapping):
            return False
        return all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items()) if len(args) == 2 else True
    return True


def describe(annotation: Any) -> str:  # noqa: PLR0911 - a return for each kind of annotation
    """What fits `annotation`, in words: "a whole number at least 1, or null"."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is types.NoneType:
        return "null"
    if origin is Annotated:
        return " ".join([describe(args[0]), *(str(mark) for mark in args[1:] if isinstance(mark, Range))])
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in args)
    if origin is Literal:
        return "one of " + ", ".join(show(option) for option in args)
    if annotation in _NAMES:
        return _NAMES[annotation]
    if (origin or annotation) in _MAPPINGS:
        return "a mapping"
    if (origin or annotation) in (tuple, *_SEQUENCES):
        if origin is tuple and args and args[-1] is not Ellipsis:
            return "a list of " + " and ".join(describe(arg) for arg in args)
        return f"a list, each item {describe(args[0])}" if args else "a list"
    return getattr(annotation, "__name__", str(annotation))


def annotations_of(raw: Mapping[str, Any], namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The annotations `raw`, resolved one by one in `namespace`; unresolvable ones are left out.

    A name imported only for type checkers cannot be resolved, and its parameter is then not checked: this must not
    keep the others from being checked.
    """
    resolved: dict[str, Any] = {}
    for name, annotation in raw.items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            hints = typing.get_type_hints(holder, globalns=dict(namespace), include_extras=True)
        except (NameError, TypeError, SyntaxError, AttributeError):
            continue
        resolved[name] = hints[name]
    return resolved
