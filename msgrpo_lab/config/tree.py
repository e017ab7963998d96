"""A configuration as plain Python values, with whatever cannot be resolved reported rather than raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from msgrpo_lab.config.value_types import UNRESOLVED, is_component
from msgrpo_lab.messages import Mistake, one_line


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
