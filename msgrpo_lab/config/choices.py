"""Credit rules, samplers and loggers by the names of their files under `conf/`, and mistakes in how they are set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.config import ConfigError, conf_dir
from msgrpo_lab.config.components import check_component
from msgrpo_lab.messages import Mistake, closest_first, did_you_mean, one_line

ALL = "all"
"""Stands for every file of a folder."""


class Found:
    """Mistakes so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, mistakes: Iterable[Mistake | str]) -> None:
        """Takes further ones down."""
        self.lines += [str(mistake) for mistake in mistakes]

    def stop(self) -> None:
        """Raises ConfigError if there are any."""
        if self.lines:
            raise ConfigError(self.lines)


def build_option(group: str, name: str) -> Any:
    """The component of a file of `conf/<group>`, as it stands.

    Raises:
        ValueError: there is no such file; one line that tells what there is.
    """
    options = options_of(group)
    if name not in options:
        raise ValueError(str(no_such_option(group, name, options)))
    return instantiate(OmegaConf.load(conf_dir() / group / f"{name}.yaml"))


def options_of(group: str) -> list[str]:
    """Names of the files of `conf/<group>`."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def no_such_option(group: str, name: str, options: Sequence[str]) -> Mistake:
    """A name that is not among the options."""
    remedy = f"{did_you_mean(name, options)}there are: {', '.join(closest_first(name, options))}"
    return Mistake(group, name, "no such option", remedy)


def nodes_of(group: str, chosen: Any, changes: Any, found: Found) -> dict[str, dict[str, Any]]:
    """The chosen files of `conf/<group>` by name, with the keys that the command line sets in them."""
    options, names = options_of(group), _names(chosen)
    if ALL in names:
        names = [*options, *(name for name in names if name not in (*options, ALL))]
    nodes: dict[str, dict[str, Any]] = {}
    for name in names:
        if name not in options:
            found.add([no_such_option(group, name, [*options, ALL])])
            continue
        node = OmegaConf.to_container(OmegaConf.load(conf_dir() / group / f"{name}.yaml"), resolve=True)
        assert isinstance(node, dict)
        nodes[name] = {str(key): value for key, value in node.items()}
    for name, keys in changes.items() if isinstance(changes, Mapping) else ():
        if not isinstance(keys, Mapping):
            found.add([Mistake(f"{group}.{name}", keys, "no key is named", f"give {group}.{name}.<key>=…")])
        elif name not in nodes:
            problem, remedy = f"{name} is not among the chosen", f"name it in {group}=…, or leave the key out"
            found.add(Mistake(f"{group}.{name}.{key}", value, problem, remedy) for key, value in keys.items())
        elif "num_episodes" in keys:
            problem = "all samplers draw the same number of episodes"
            found.add([Mistake(f"{group}.{name}.num_episodes", keys["num_episodes"], problem, "set num_episodes=…")])
        else:
            nodes[name].update(keys)
    return nodes


def _names(chosen: Any) -> list[str]:
    """The names in a list, or in a text that separates them by commas; none for null."""
    items = chosen if isinstance(chosen, list) else [] if chosen is None else str(chosen).strip("[]").split(",")
    return list(dict.fromkeys(text for item in items if (text := str(item).strip())))


def build(path: str, node: Mapping[str, Any], found: Found) -> Any:
    """The component; None with its mistakes added."""
    mistakes = check_component(path, node)
    found.add(mistakes)
    if mistakes:
        return None
    try:
        return instantiate(dict(node))
    except InstantiationException as error:
        text = one_line(str(error.__cause__ or error))
        group = f"{path.partition('.')[0]}."
        found.add([text.replace(group, f"{path}.", 1) if text.startswith(group) else f"{path}: {text}"])
        return None
