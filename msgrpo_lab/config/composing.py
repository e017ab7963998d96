"""Composing the configuration of a job as Hydra does, with every mistake in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msgrpo_lab.config.components import describe
from msgrpo_lab.config.paths import why_unwritable
from msgrpo_lab.config.schemas import expected_at
from msgrpo_lab.messages import ConfigError, Mistake, closest_first, did_you_mean, one_line, show

LATER_KEYS = frozenset({"ckpt_path", "resume"})
"""Keys that the main job reads and a configuration need not hold, so that they may be added with +."""
OPTIONAL_GROUPS = frozenset({"experiment", "debug", "local"})
"""Groups that may be taken out with ~."""


def check_overrides(
    overrides: Sequence[Override], keys: Collection[str], groups: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Overrides that Hydra takes and no job can use: a key added that nothing reads, a section taken out.

    Args:
        overrides: as they were typed.
        keys: top-level keys of the configuration without them.
        groups: groups of configuration files.

    Yields:
        The override as it was typed, and its line.
    """
    known = {*keys, *groups, *LATER_KEYS, "hydra"}
    for override in overrides:
        top = (override.package or override.key_or_group).partition(".")[0]
        typed = str(override.input_line)
        if override.is_delete() and override.key_or_group in known - OPTIONAL_GROUPS:
            yield typed, f"{typed}: the job needs it; leave {typed} out, and set {top}=… for another value"
        elif not override.is_delete() and top.partition("/")[0] not in known and top not in known:
            near = f"{did_you_mean(top, known)}the nearest keys are: {', '.join(closest_first(top, known)[:8])}"
            yield typed, f"{typed.lstrip('+')}: no such key; {near}"


def check_hydra(config: DictConfig, sweeping: bool) -> Iterator[Mistake]:
    """Mistakes in Hydra's own node that would be met after the check: the job's folder, and the number of jobs at once.

    Args:
        config: a composed configuration, with the node.
        sweeping: whether the jobs of a sweep are run.
    """
    hydra = config.hydra
    if hydra.get("output_subdir") is not None:
        yield from _check_folder(config, "sweep" if sweeping else "run")
    if hydra.launcher.get("n_jobs", 1) == 0:
        yield Mistake("hydra.launcher.n_jobs", 0, "there must be a job at a time", "give 2, or -1 for all cores")


def _check_folder(config: DictConfig, node: str) -> Iterator[Mistake]:
    key = f"hydra.{node}.dir"
    try:
        folder = str(config.hydra[node].dir)
        outputs = OmegaConf.select(config, "paths.outputs")
    except OmegaConfBaseException as error:
        raw = str(config.hydra[node]._get_node("dir"))
        if "${paths." not in raw:  # those are told by themselves
            yield Mistake(key, raw, f"cannot be resolved ({one_line(str(error))})", "give a folder")
        return
    if not folder.strip():
        yield Mistake(key, folder, "must not be empty", "give a folder, or leave the key out")
    elif outputs and Path(folder).is_relative_to(str(outputs)):
        return  # and so is this one
    elif (reason := why_unwritable(Path(folder))) is not None:
        yield Mistake(key, folder, f"cannot be written ({reason})", "give a folder you may write to")


_MISSING = re.compile(r"Could not (?:find|load) '([^']+)'")
_NAMED_IN = re.compile(r"^In '([^']+)'")
_QUOTED = re.compile(r"'([^']*)'")


@dataclass(frozen=True, slots=True)
class Explanation:
    """One line for the user, and the override that is to blame where one is."""

    line: str
    override: str | None = None


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The names that would have been right."""

    groups: tuple[str, ...]
    keys: tuple[str, ...]
    """Dotted keys of the configuration without the faulty override."""
    options: dict[str, tuple[str, ...]]
    """Options of every group."""


@dataclass(frozen=True, slots=True)
class _Failure:
    error: Exception
    overrides: Sequence[Override]
    words: Vocabulary

    @property
    def quoted(self) -> str:
        """What the message puts in quotes first: the key, or the override."""
        match = _QUOTED.search(str(self.error))
        return match.group(1) if match else "?"

    def typed(self, key: str) -> str | None:
        """The override of `key` as it was typed; the last one counts."""
        found = None
        for override in self.overrides:
            if override.get_key_element().lstrip("+~") == key or override.key_or_group == key:
                found = override.input_line
        return found


def explain_syntax(override: str, error: OverrideParseException) -> str:
    """An override that Hydra's grammar does not accept."""
    key, equals, value = one_line(override).partition("=")
    if not equals and not override.startswith("~"):
        return f"{key}: has no value; write {key}=… (for a flag, its dashes: --help)"
    reason = one_line(error.message.split("See https")[0])
    if not value.strip() or value.endswith(","):
        return f"{key}={value}: a value is missing ({reason}); write {key}=value, or {key}=null for none"
    return f"{key}={value}: cannot be read ({reason}); quote a text with special characters, as in '{key}=\"…\"'"


def explain(error: Exception, overrides: Sequence[Override], words: Vocabulary) -> Explanation:
    """What a composition error means."""
    failure = _Failure(error, overrides, words)
    if isinstance(error, MissingConfigException):
        return _missing(failure)
    if isinstance(error, YAMLError):
        return Explanation(_yaml(error))
    text = str(error)
    for beginning, explanation in _BY_BEGINNING.items():
        if text.startswith(beginning):
            return explanation(failure)
    cause = f" ({one_line(str(error.__cause__))})" if error.__cause__ else ""
    return Explanation(f"configuration: {one_line(text)}{cause}; correct the file or the override that it names")


def _missing(failure: _Failure) -> Explanation:
    match = _MISSING.search(str(failure.error))
    if match is None:
        wanted = failure.quoted
        return Explanation(
            f"--config-name={wanted}: there is no {wanted}.yaml; leave it out for the usual configuration"
        )
    group, _, option = match.group(1).rpartition("/")
    options = failure.words.options.get(group) or tuple(getattr(failure.error, "options", None) or ())
    known = ", ".join(closest_first(option, options)) or "none"
    typed = failure.typed(group)
    source = _NAMED_IN.search(str(failure.error))
    where = "" if typed or source is None else f" (named in {source.group(1)}.yaml)"
    line = f"{group}={option}: no such option{where}; {did_you_mean(option, options)}there are: {known}"
    return Explanation(line, typed)


def _yaml(error: YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{Path(mark.name).name}:{mark.line + 1} ({mark.name})" if mark is not None else "a configuration file"
    problem = getattr(error, "problem", None) or one_line(str(error))
    return f"{where}: is not valid YAML ({one_line(problem)}); correct the file"


def _ambiguous(failure: _Failure) -> Explanation:
    raw = failure.quoted
    key, _, value = raw.partition("=")
    line = f"{raw}: several values are a sweep; add -m to run each of them, or write {key}=[{value}] for a list"
    return Explanation(line, failure.typed(key))


def _sweep(failure: _Failure) -> Explanation:
    raw = failure.quoted
    return Explanation(f"{raw}: is a sweep; add -m to run each value", failure.typed(raw.partition("=")[0]))


def _appended(failure: _Failure) -> Explanation:
    key = failure.quoted
    typed = failure.typed(key) or f"+{key}"
    return Explanation(f"{typed}: the key is there already; write it without +", typed)


def _misfit(failure: _Failure) -> Explanation:
    raw = one_line(str(failure.error).removeprefix("Error merging override"))
    cause, key = failure.error.__cause__, raw.partition("=")[0]
    reason = one_line(str(cause).split("full_key")[0]) if cause else "it does not fit"
    remedy = "give a value of the type that the key holds"
    if (expected := expected_at(key.lstrip("+"))) is not None and not is_dataclass(expected[0]):
        reason, remedy = f"must be {describe(expected[0])}", f"give for example {key.lstrip('+')}={show(expected[1])}"
    elif raw.startswith("~"):
        reason, remedy = "this key cannot be left out", f"give it a value, as in {raw[1:].partition('=')[0]}=…"
    return Explanation(f"{raw}: {reason}; {remedy}", failure.typed(key.lstrip("~")))


def _unknown_key(failure: _Failure) -> Explanation:
    key, keys = failure.quoted, failure.words.keys
    typed = failure.typed(key)
    parent, _, last = key.rpartition(".")
    siblings = {name[len(parent) + 1 :].partition(".")[0] for name in keys if name.startswith(f"{parent}.")}
    if not parent:
        names: Iterable[str] = {name.partition(".")[0] for name in keys} | set(failure.words.groups)
        rest = f"{did_you_mean(key, names)}the nearest keys are: {', '.join(closest_first(key, names)[:8])}"
    elif siblings:
        rest = f"{did_you_mean(last, siblings)}the keys of {parent} are: {', '.join(closest_first(last, siblings))}"
    else:
        rest = f"{did_you_mean(key, keys)}the nearest keys are: {', '.join(closest_first(key, keys)[:5])}"
    return Explanation(f"{typed or key}: no such key; {rest}", typed)


def _bad_option(failure: _Failure) -> Explanation:
    for override in failure.overrides:
        group = override.key_or_group
        if group in failure.words.options and not isinstance(override.value(), (str, list)):
            known = ", ".join(failure.words.options[group])
            line = f"{override.input_line}: a group takes the name of one option; there are: {known}"
            return Explanation(line, override.input_line)
    return Explanation("configuration: a group takes the name of one option; correct the defaults list")


def _unresolved_choice(failure: _Failure) -> Explanation:
    """A recipe's name is put together from choices, and one of them is a list or was taken out."""
    for override in failure.overrides:
        options = failure.words.options.get(override.key_or_group)
        if options is not None and (override.is_delete() or isinstance(override.value(), list)):
            line = f"{override.input_line}: one option must be chosen; there are: {', '.join(options)}"
            return Explanation(line, override.input_line)
    return Explanation(f"configuration: {one_line(str(failure.error))}; correct the defaults list")


_BY_BEGINNING: Mapping[str, Callable[[_Failure], Explanation]] = {
    "Could not override": _unknown_key,
    "Could not delete": _unknown_key,
    "Ambiguous value for argument": _ambiguous,
    "Sweep parameters": _sweep,
    "Could not append to config": _appended,
    "Config group override must be a string": _bad_option,
    "Error merging override": _misfit,
    "Error resolving interpolation": _unresolved_choice,
}
"""How Hydra 1.3's messages begin, and what explains them; any other message is passed on as one line."""


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
