"""Checks of one component: a node with a `_target_` against the signature of what it names."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from msgrpo_lab.config.value_types import annotations_of, describe, fits
from msgrpo_lab.messages import Mistake, closest_first, did_you_mean, one_line, show

RESERVED = frozenset({"_target_", "_partial_", "_recursive_", "_convert_", "_args_"})
"""Keys that speak to Hydra and are no parameters."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a target can be called with."""

    names: tuple[str, ...]
    required: frozenset[str]
    positional: tuple[str, ...]
    annotations: Mapping[str, Any]
    defaults: Mapping[str, Any]
    open_ended: bool
    """It takes `**kwargs`, so that no name is unknown."""


def locate(target: str) -> Callable[..., Any]:
    """The class or function that a dotted path names.

    Raises:
        ImportError: nothing importable stands there, or it cannot be called; the message is one line.
    """
    from hydra._internal.utils import _locate  # hydra.utils.get_object prints the error as well

    try:
        found = _locate(target)
    except Exception as error:  # importing a module runs it, and it may fail in any way
        cause = error.__cause__ or error
        raise ImportError(f"{type(cause).__name__}: {one_line(str(cause))}") from error
    if not callable(found):
        raise ImportError(f"it is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


@functools.cache
def parameters_of(target: Callable[..., Any]) -> Parameters | None:
    """The parameters of a class or function; None for one without a readable signature (written in C)."""
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return None
    kinds = inspect.Parameter
    named = {
        n: p for n, p in signature.parameters.items() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    raw = {n: p.annotation for n, p in named.items() if p.annotation is not kinds.empty}
    owner = inspect.unwrap(target.__init__ if inspect.isclass(target) else target)
    return Parameters(
        names=tuple(named),
        required=frozenset(n for n, p in named.items() if p.default is kinds.empty),
        positional=tuple(n for n, p in named.items() if p.kind is kinds.POSITIONAL_OR_KEYWORD),
        annotations=annotations_of(raw, getattr(owner, "__globals__", {})),
        defaults={n: p.default for n, p in named.items() if p.default is not kinds.empty},
        open_ended=any(p.kind is kinds.VAR_KEYWORD for p in signature.parameters.values()),
    )


def check_component(path: str, node: Mapping[str, Any], supplied: Collection[str] = ()) -> list[Mistake]:
    """The mistakes in one component.

    Args:
        path: dotted key of the node, for the messages.
        node: resolved values, `_target_` among them.
        supplied: parameters that the program passes itself when it instantiates the node.

    Returns:
        One mistake for a target that cannot be imported, a key that is no parameter, a required parameter that is
        missing (not with `_partial_`), and a value that does not fit its annotation.
    """
    target_name = node["_target_"]
    if not isinstance(target_name, str):
        return [Mistake(f"{path}._target_", target_name, "a target is a dotted path", "write package.module.Name")]
    try:
        target = locate(target_name)
    except ImportError as error:
        problem = f"cannot be imported ({error})"
        return [Mistake(f"{path}._target_", target_name, problem, "name an importable class or function")]
    parameters = parameters_of(target)
    if parameters is None:
        return []
    name = target_name.rpartition(".")[2]
    given = {str(key): value for key, value in node.items() if key not in RESERVED}
    mistakes = [_unknown(path, key, given[key], name, parameters) for key in given if not _takes(parameters, key)]
    for key, value in given.items():
        if key in parameters.annotations and not fits(value, parameters.annotations[key]):
            mistakes.append(_misfit(path, key, value, parameters))
    if not node.get("_partial_", False):
        filled = set(given) | set(supplied) | set(parameters.positional[: len(node.get("_args_", ()))])
        for key in sorted(parameters.required - filled):
            remedy = f"give {path}.{key}, {_wanted(parameters, key)}"
            mistakes.append(Mistake(f"{path}.{key}", "???", f"{name} needs this key", remedy))
    return mistakes


def _wanted(parameters: Parameters, key: str) -> str:
    return describe(parameters.annotations[key]) if key in parameters.annotations else "a value"


def _takes(parameters: Parameters, key: str) -> bool:
    return parameters.open_ended or key in parameters.names


def _unknown(path: str, key: str, value: Any, name: str, parameters: Parameters) -> Mistake:
    known = ", ".join(closest_first(key, parameters.names)) or "none"
    remedy = f"{did_you_mean(key, parameters.names)}its keys are: {known}"
    return Mistake(f"{path}.{key}", value, f"{name} has no such key", remedy)


def _misfit(path: str, key: str, value: Any, parameters: Parameters) -> Mistake:
    annotation = parameters.annotations[key]
    remedy = f"give {describe(annotation)}"
    default = parameters.defaults.get(key)
    if isinstance(default, (bool, int, float, str)):
        remedy += f", for example {path}.{key}={str(default).lower() if isinstance(default, bool) else default}"
    return Mistake(f"{path}.{key}", value, f"must be {describe(annotation)}{_not_but(value, annotation)}", remedy)


def _not_but(value: Any, annotation: Any) -> str:
    """ ", not str" where the type is what is wrong with a value, and not the value itself."""
    if isinstance(value, str) and "one of " in describe(annotation):
        return ""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return f", not {show(value)}"
    return f", not {type(value).__name__}"
