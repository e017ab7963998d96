"""Checks of values and components: a value against its type and range, a `_target_` against the signature it names."""

from __future__ import annotations

import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from msgrpo_lab.messages import Mistake, closest_first, did_you_mean, one_line, redact, show


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


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """`cfg` as plain values without Hydra's own node, interpolations resolved and secrets hidden."""
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in redact(tree).items() if key != "hydra"}


def plain(config: Container, mistakes: list[Mistake], path: str = "") -> Any:
    """`config` as dicts and lists of resolved values.

    A missing value (`???`) or a broken interpolation becomes a mistake and `UNRESOLVED`; so does, without a mistake, an
    interpolation that only Hydra's running job can resolve.
    """
    if isinstance(config, ListConfig):
        return [_value(config, i, f"{path}.{i}" if path else str(i), mistakes) for i in range(len(config))]
    assert isinstance(config, DictConfig)
    names = {str(key): key for key in config.keys()}  # noqa: SIM118 - iterating the node itself has no key type
    return {name: _value(config, key, f"{path}.{name}" if path else name, mistakes) for name, key in names.items()}


def _value(config: Container, key: Any, path: str, mistakes: list[Mistake]) -> Any:
    try:
        value = config[key]
    except MissingMandatoryValue:
        mistakes.append(Mistake(path, "???", "a value is missing", f"give one, with {path}=… on the command line"))
        return UNRESOLVED
    except InterpolationResolutionError as error:
        if "HydraConfig was not set" in str(error):
            return UNRESOLVED
        return _broken(config, key, path, error, mistakes)
    except OmegaConfBaseException as error:
        return _broken(config, key, path, error, mistakes)
    return plain(value, mistakes, path) if isinstance(value, Container) and not value._is_none() else value


def _broken(config: Container, key: Any, path: str, error: Exception, mistakes: list[Mistake]) -> Any:
    parent = OmegaConf.to_container(config, resolve=False)
    raw = parent[key] if isinstance(parent, (dict, list)) else "?"
    reason = one_line(str(error).splitlines()[0])
    mistakes.append(
        Mistake(path, raw, f"cannot be resolved ({reason})", "correct the interpolation or the key it names")
    )
    return UNRESOLVED


def components(value: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a `_target_` under `value` and its dotted path, outermost first."""
    if is_component(value):
        yield path, value
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from components(child, f"{path}.{key}" if path else str(key))


def section(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping at `key`; an empty one where there is none, which is told elsewhere."""
    found = tree.get(key)
    return found if isinstance(found, Mapping) else {}


def whole(value: Any) -> int | None:
    """`value` if it is a whole number (a truth value is none), else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None
