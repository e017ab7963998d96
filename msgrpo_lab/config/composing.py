"""Composing the configuration of a job as Hydra does, with every mistake in one line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msgrpo_lab.config.hydra_errors import Vocabulary, explain, explain_syntax
from msgrpo_lab.config.overrides import LATER_KEYS, check_overrides
from msgrpo_lab.messages import ConfigError

_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)


class Composed(NamedTuple):
    """A job's configuration."""

    config: DictConfig
    lines: tuple[str, ...]
    """What was wrong with overrides, which are left out of it."""


class Composer:
    """Composes jobs, and turns what Hydra raises into lines."""

    def __init__(self, config_name: str, loader: ConfigLoader) -> None:
        self._config_name = config_name
        self._loader = loader
        self._parser = OverridesParser.create(config_loader=loader)

    def parse(self, arguments: Sequence[str]) -> list[Override]:
        """The overrides; a ConfigError names every one that cannot be read."""
        overrides: list[Override] = []
        lines: list[str] = []
        for argument in arguments:
            if not argument.partition("=")[0].strip():
                lines.append(f"{argument.strip() or repr(argument)}: the key is missing; write key=value")
                continue
            try:
                overrides += self._parser.parse_overrides([argument])
            except OverrideParseException as error:
                lines.append(explain_syntax(argument, error))
        if lines:
            raise ConfigError(lines)
        return overrides

    def compose_all(self, jobs: Sequence[Sequence[str]]) -> list[Composed]:
        """Every job's configuration; a ConfigError holds the mistakes of all of them."""
        composed: list[Composed] = []
        lines: list[str] = []
        for job in jobs:
            try:
                composed.append(self.compose(job))
            except ConfigError as error:
                lines += error.mistakes
        if lines:
            raise ConfigError([*(line for job in composed for line in job.lines), *lines])
        return composed

    def compose(self, overrides: Sequence[str]) -> Composed:
        """One job's configuration with Hydra's own node.

        A faulty override is explained and left out, and composing is tried again, so that every one is found.

        Raises:
            ConfigError: nothing can be composed, or an option was chosen that there is not, so that the rest of the
                command line may be meant for it.
        """
        useless = dict(self._useless(overrides))
        remaining = [override for override in overrides if override not in useless]
        lines = list(useless.values())
        misled = False
        while True:
            try:
                config = compose(self._config_name, remaining, return_hydra_config=True)
            except _COMPOSITION_ERRORS as error:
                words = self._vocabulary(remaining)
                explanation = explain(error, self.parse(remaining), words)
                lines.append(explanation.line)
                if explanation.override not in remaining:
                    raise ConfigError(lines) from error
                misled = misled or explanation.override.lstrip("+~").partition("=")[0] in words.groups
                remaining = [override for override in remaining if override != explanation.override]
                continue
            if misled:
                raise ConfigError(lines)
            return Composed(config, (*lines, *self._foreign(config)))

    def _foreign(self, config: DictConfig) -> Iterator[str]:
        """A preset of another command adds keys that nothing here reads, and all else would stay as it is."""
        preset = config.hydra.runtime.choices.get("experiment")
        if preset in (None, "null"):
            return
        foreign = [str(key) for key in config if key not in {*self._top_keys, *LATER_KEYS, "hydra"}]
        if foreign:
            problem = f"it sets {', '.join(foreign)}, which this command does not have"
            yield f"experiment={preset}: {problem}; give a preset of this command, or use it with the one it is for"

    @cached_property
    def _top_keys(self) -> frozenset[str]:
        """Top-level keys of the configuration without any override."""
        return frozenset(key.partition(".")[0] for key in self._vocabulary([]).keys)

    def _useless(self, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Overrides that Hydra would take, and no job can use."""
        changing = [one for one in self.parse(overrides) if one.is_add() or one.is_force_add() or one.is_delete()]
        if changing:
            yield from check_overrides(changing, self._top_keys, self._vocabulary([]).groups)

    def _vocabulary(self, overrides: Sequence[str]) -> Vocabulary:
        options = dict(self._options(""))
        choices = [o for o in overrides if (part := o.partition("="))[2] in options.get(part[0], ())]
        for attempt in (choices, []):
            try:
                config = compose(self._config_name, list(attempt))
            except _COMPOSITION_ERRORS:
                continue
            return Vocabulary(tuple(options), tuple(_dotted_keys(config)), options)
        return Vocabulary(tuple(options), (), options)

    def _options(self, parent: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Every group of configuration files under `parent`, and its options, those of folders in it included."""
        for name in self._loader.get_group_options(parent, results_filter=ObjectType.GROUP):
            group = f"{parent}/{name}" if parent else name
            nested = dict(self._options(group))
            inner = [f"{inner[len(group) + 1 :]}/{option}" for inner in nested for option in self._direct(inner)]
            yield group, (*self._direct(group), *inner)
            yield from nested.items()

    def _direct(self, group: str) -> list[str]:
        """The options that lie in a group's own folder."""
        return list(self._loader.get_group_options(group))


def _dotted_keys(config: DictConfig) -> Iterator[str]:
    tree = OmegaConf.to_container(config, resolve=False)
    pending: list[tuple[str, Any]] = [("", tree)]
    while pending:
        prefix, node = pending.pop()
        for key, value in node.items() if isinstance(node, dict) else ():
            name = f"{prefix}.{key}" if prefix else str(key)
            yield name
            pending.append((name, value))
