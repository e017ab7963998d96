"""The scenarios of an evaluation: files of `conf/env`, with the command line's keys and a policy's own view on top."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.config import conf_dir
from msgrpo_lab.config.choices import ALL, Found, build, no_such_option, options_of
from msgrpo_lab.config.components import locate
from msgrpo_lab.messages import Mistake
from msgrpo_lab.tsmg.base import TextGame

VIEW = "observation"
"""The key of a game that says what of it a policy reads; it changes no rule and no score."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A game with its settings."""

    name: str
    settings: Mapping[str, Any]
    """Its file's keys, `_target_` among them, with those of the command line on top."""
    view_is_given: bool = False
    """Whether the command line says what every policy reads."""

    @property
    def game_class(self) -> type[TextGame]:
        """The class of its games."""
        found = locate(self.settings["_target_"])
        assert isinstance(found, type)
        assert issubclass(found, TextGame)
        return found

    def seen_as(self, view: str | None) -> Mapping[str, Any]:
        """The settings for a policy that was trained with this view; None: as the scenario is."""
        return self.settings if view is None or self.view_is_given else {**self.settings, VIEW: view}

    def maker(self, view: str | None = None) -> Callable[[], TextGame]:
        """What makes its games, seen like that."""
        return instantiate(dict(self.seen_as(view)), _partial_=True, _convert_="all")  # type: ignore[no-any-return]


def scenarios_of(names: Sequence[str], changes: Mapping[str, Any], found: Found) -> list[Scenario]:
    """The named scenarios; what is wrong with them is added to `found`.

    Args:
        names: files of `conf/env`, or `all`.
        changes: keys of every scenario.
        found: takes the mistakes.
    """
    options = options_of("env")
    wanted = options if ALL in names else list(dict.fromkeys(names))
    if not wanted:
        found.add([Mistake("scenario", "[]", "no scenario is named", f"give all, or some of: {', '.join(options)}")])
    scenarios = []
    for name in wanted:
        if name not in options:
            found.add([no_such_option("scenario", name, [*options, ALL])])
            continue
        node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "env" / f"{name}.yaml"), resolve=True)
        assert isinstance(node, dict)
        settings = {str(key): value for key, value in node.items()} | dict(changes)
        if build("env", settings, found) is not None:
            scenarios.append(Scenario(name=name, settings=settings, view_is_given=VIEW in changes))
    return scenarios
