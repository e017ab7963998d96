"""The check of a command line before Hydra runs it: every job that it asks for is composed and validated."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msgrpo_lab.config.components import check_component
from msgrpo_lab.config.hydra_errors import Vocabulary, explain, explain_syntax
from msgrpo_lab.config.mistakes import ConfigError, Mistake, one_line
from msgrpo_lab.config.overrides import check_hydra, check_overrides, why_unwritable
from msgrpo_lab.config.paths import conf_dir
from msgrpo_lab.config.tree import components, plain
from msgrpo_lab.config.validation import LIGHT_GROUPS, validate

VERSION_BASE = "1.3"
EXIT_CODE = 2
OwnCheck = Callable[[Mapping[str, Any]], Iterable[Mistake]]
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OSError)


def check_command_line(
    argv: Sequence[str],
    config_name: str,
    *,
    config_dir: Path | None = None,
    light_groups: Sequence[str] = LIGHT_GROUPS,
    own: OwnCheck | None = None,
) -> None:
    """Check a command line, and return only if every job that it asks for is sound.

    Sweeps are expanded as Hydra's own sweeper does, and every job is composed and validated. Requests for help or
    information are let through.

    Args:
        argv: the arguments after the program's name.
        config_name: primary configuration, without `.yaml`.
        config_dir: folder of configuration files; the project's by default.
        light_groups: components that are constructed; see `validate`.
        own: what a command checks besides, in the resolved values of a job.

    Raises:
        SystemExit: with code 2, after one line on stderr for every mistake.
    """
    try:
        arguments = _parse_arguments(argv)
        if _asks_for_information(arguments):
            return
        if arguments.config_path is not None:
            raise ConfigError([f"--config-path={arguments.config_path}: is fixed; add a folder with --config-dir"])
        folder = str((config_dir or conf_dir()).resolve())
        with initialize_config_dir(config_dir=folder, version_base=VERSION_BASE, job_name="check"):
            _check_jobs(arguments, arguments.config_name or config_name, light_groups, own)
    except ConfigError as error:
        for line in error.mistakes:
            print(f"msgrpo_lab: {line}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def _parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return get_args_parser().parse_args(list(argv))
    except SystemExit as error:
        if not error.code:
            raise
        reason = printed.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        remedy = (
            "write -m and other options before the overrides" if "=" in reason else "--hydra-help lists the options"
        )
        raise ConfigError([f"command line: {reason}; {remedy}"]) from None


def _asks_for_information(arguments: argparse.Namespace) -> bool:
    return bool(arguments.help or arguments.hydra_help or arguments.shell_completion or arguments.info is not None)


def _check_jobs(
    arguments: argparse.Namespace, config_name: str, light_groups: Sequence[str], own: OwnCheck | None
) -> None:
    composer = _Composer(config_name, GlobalHydra.instance().config_loader())
    overrides = composer.parse([*arguments.overrides, *_added_folder(arguments.config_dir)])
    base = composer.compose([o.input_line for o in overrides if not o.is_sweep_override() and o.input_line is not None])
    sweeping = arguments.multirun or base.hydra.mode == RunMode.MULTIRUN
    if sweeping:
        jobs = composer.compose_all(_expand(overrides, base, composer))
        _refuse_unseen_sweeps(base, jobs)
    elif any(override.is_sweep_override() for override in overrides):
        jobs = composer.compose_all([[str(override.input_line) for override in overrides]])
    else:
        jobs = [base]
    lines = [str(mistake) for mistake in check_hydra(base, sweeping)]
    for config in jobs:
        lines += _mistakes(config, light_groups, own)
    if not lines and arguments.cfg is None:
        lines = _make_output_folders({str(config.paths.outputs) for config in jobs if "paths" in config})
    if lines:
        raise ConfigError(lines)


def _make_output_folders(folders: Collection[str]) -> list[str]:
    """Makes the folders that runs are written to; a line for each that cannot be made."""
    lines = []
    for folder in sorted(folders):
        reason = why_unwritable(Path(folder))
        if reason is None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        else:
            problem = f"this folder cannot be written ({reason})"
            lines.append(str(Mistake("paths.outputs", folder, problem, "give a folder you may write to")))
    return lines


def _mistakes(config: DictConfig, light_groups: Sequence[str], own: OwnCheck | None) -> list[str]:
    """The lines for one composed job, Hydra's callbacks included."""
    unresolvable: list[Mistake] = []
    callbacks = plain(config.hydra.callbacks, unresolvable, "hydra.callbacks") if config.hydra.callbacks else {}
    lines = [str(mistake) for mistake in unresolvable]
    for path, node in components(callbacks, "hydra.callbacks"):
        lines += [str(mistake) for mistake in check_component(path, node)]
    choices = dict(config.hydra.runtime.choices)
    with open_dict(config):
        del config["hydra"]
    try:
        validate(config, light_groups=light_groups, choices=choices)
    except ConfigError as error:
        lines += error.mistakes
    if own is not None:
        lines += [str(mistake) for mistake in own(plain(config, []))]
    return lines


def _expand(overrides: Sequence[Override], base: DictConfig, composer: _Composer) -> list[list[str]]:
    """The overrides of every job of a sweep, `hydra.sweeper.params` included.

    Another sweeper than Hydra's own chooses its values as it goes: what does not vary is then all that can be checked.
    """
    sweeper = base.hydra.sweeper
    if not str(sweeper.get("_target_", "")).endswith(BasicSweeper.__name__):
        return [[str(override.input_line) for override in overrides if not override.is_sweep_override()]]
    params = composer.parse([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()])
    try:
        batches = BasicSweeper.split_arguments([*params, *overrides], None)
    except HydraException as error:
        raise ConfigError([f"command line: {one_line(str(error))}; sweep over listed values, as in key=a,b"]) from None
    return [job for batch in batches for job in batch]


def _refuse_unseen_sweeps(base: DictConfig, jobs: Sequence[DictConfig]) -> None:
    """Hydra reads the sweep that a preset brings before it expands the command line's: presets that are themselves
    swept over would each run a single job, and nothing would say so.

    Raises:
        ConfigError: a job's preset brings a sweep that is not run.
    """
    lines = []
    for job in jobs:
        if job.hydra.sweeper.get("params") != base.hydra.sweeper.get("params"):
            preset = job.hydra.runtime.choices.get("experiment")
            problem = "it brings a sweep of its own (hydra.sweeper.params), which a sweep over presets leaves out"
            lines.append(str(Mistake("experiment", preset, problem, "run it by itself, with -m")))
    if lines:
        raise ConfigError(lines)


def _added_folder(folder: str | None) -> list[str]:
    """`--config-dir` as an override."""
    if folder is None:
        return []
    if not Path(folder).is_dir():
        raise ConfigError([f"--config-dir={folder}: there is no such folder; give one that holds YAML files"])
    return [f"hydra.searchpath=['file://{Path(folder).resolve()}']"]


class _Composer:
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

    def compose_all(self, jobs: Sequence[Sequence[str]]) -> list[DictConfig]:
        """Every job's configuration; a ConfigError holds the mistakes of all of them."""
        configs: list[DictConfig] = []
        lines: list[str] = []
        for job in jobs:
            try:
                configs.append(self.compose(job))
            except ConfigError as error:
                lines += error.mistakes
        if lines:
            raise ConfigError(lines)
        return configs

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """One job's configuration with Hydra's own node.

        A faulty override is explained and left out, and composing is tried again, so that every one is found.
        """
        useless = dict(self._useless(overrides))
        remaining = [override for override in overrides if override not in useless]
        lines = list(useless.values())
        while True:
            try:
                config = compose(self._config_name, remaining, return_hydra_config=True)
            except _COMPOSITION_ERRORS as error:
                explanation = explain(error, self.parse(remaining), self._vocabulary(remaining))
                lines.append(explanation.line)
                if explanation.override not in remaining:
                    raise ConfigError(lines) from error
                remaining = [override for override in remaining if override != explanation.override]
                continue
            if lines:
                raise ConfigError(lines)
            return config

    def _useless(self, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Overrides that Hydra would take, and no job can use."""
        changing = [one for one in self.parse(overrides) if one.is_add() or one.is_force_add() or one.is_delete()]
        if changing:
            words = self._vocabulary([])
            yield from check_overrides(changing, {key.partition(".")[0] for key in words.keys}, words.groups)

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
