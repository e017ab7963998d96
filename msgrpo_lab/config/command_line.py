"""The check of a command line before Hydra runs it: every job that it asks for is composed and validated."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict

from msgrpo_lab.config.components import check_component, components, plain
from msgrpo_lab.config.composing import Composer, check_hydra
from msgrpo_lab.config.paths import conf_dir
from msgrpo_lab.config.validation import LIGHT_GROUPS, validate
from msgrpo_lab.messages import ConfigError, Mistake, one_line

VERSION_BASE = "1.3"
EXIT_CODE = 2
OwnCheck = Callable[[Mapping[str, Any]], Iterable[Mistake]]


class Job(NamedTuple):
    """One run that a command line asks for."""

    config: DictConfig
    """Composed and sound, without Hydra's own node."""
    choices: dict[str, str | None]
    """The option chosen of each group."""


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
    information are let through. Nothing is written.

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
        _sound_jobs(arguments, config_name, config_dir, light_groups, own)
    except ConfigError as error:
        for line in error.mistakes:
            print(f"msgrpo_lab: {line}", file=sys.stderr)
        raise SystemExit(EXIT_CODE) from None


def sound_jobs(argv: Sequence[str], config_name: str, *, config_dir: Path | None = None) -> list[Job]:
    """The jobs that a command line asks for, checked as `check_command_line` does; nothing is written.

    Raises:
        ConfigError: something is wrong; the message holds one line for every mistake.
    """
    return _sound_jobs(_parse_arguments(argv), config_name, config_dir, LIGHT_GROUPS, None)


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


def _sound_jobs(
    arguments: argparse.Namespace,
    config_name: str,
    config_dir: Path | None,
    light_groups: Sequence[str],
    own: OwnCheck | None,
) -> list[Job]:
    if arguments.config_path is not None:
        raise ConfigError([f"--config-path={arguments.config_path}: is fixed; add a folder with --config-dir"])
    folder = str((config_dir or conf_dir()).resolve())
    with initialize_config_dir(config_dir=folder, version_base=VERSION_BASE, job_name="check"):
        composer = Composer(arguments.config_name or config_name, GlobalHydra.instance().config_loader())
        overrides = composer.parse([*arguments.overrides, *_added_folder(arguments.config_dir)])
        fixed = composer.compose([str(o.input_line) for o in overrides if not o.is_sweep_override()])
        base = fixed.config
        sweeping = arguments.multirun or base.hydra.mode == RunMode.MULTIRUN
        if sweeping:
            composed = composer.compose_all(_expand(overrides, base, composer))
            _refuse_unseen_sweeps(base, [one.config for one in composed])
        elif any(override.is_sweep_override() for override in overrides):
            composed = composer.compose_all([[str(override.input_line) for override in overrides]])
        else:
            composed = [fixed]
        lines = [str(mistake) for mistake in check_hydra(base, sweeping)]
        lines += [line for one in composed for line in one.lines]
        jobs = [Job(one.config, dict(one.config.hydra.runtime.choices)) for one in composed]
        for job in jobs:
            lines += _mistakes(job, light_groups, own)
    if lines:
        raise ConfigError(lines)
    return jobs


def _mistakes(job: Job, light_groups: Sequence[str], own: OwnCheck | None) -> list[str]:
    """The lines for one composed job, Hydra's callbacks included; Hydra's own node is taken out of it."""
    config, choices = job
    unresolvable: list[Mistake] = []
    callbacks = plain(config.hydra.callbacks, unresolvable, "hydra.callbacks") if config.hydra.callbacks else {}
    lines = [str(mistake) for mistake in unresolvable]
    for path, node in components(callbacks, "hydra.callbacks"):
        lines += [str(mistake) for mistake in check_component(path, node)]
    with open_dict(config):
        del config["hydra"]
    try:
        validate(config, light_groups=light_groups, choices=choices)
    except ConfigError as error:
        lines += error.mistakes
    if own is not None:
        lines += [str(mistake) for mistake in own(plain(config, []))]
    return lines


def _expand(overrides: Sequence[Override], base: DictConfig, composer: Composer) -> list[list[str]]:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """Arguments that `check_command_line` has let through."""

    config_name: str
    overrides: tuple[str, ...]
    base: DictConfig
    """What is composed without the keys that are swept over, Hydra's own node included."""
    sweeping: bool
    added: tuple[str, ...]
    """`--config-dir` as an override."""

    def jobs(self) -> list[list[str]]:
        """The overrides of every job in the order of their numbers. Of another sweeper than Hydra's, none is known."""
        if not self.sweeping:
            return [list(self.overrides)]
        sweeper = self.base.hydra.sweeper
        if not str(sweeper.get("_target_", "")).endswith(BasicSweeper.__name__):
            return []
        params = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        parsed = OverridesParser.create().parse_overrides([*params, *self.overrides])
        return [list(job) for batch in BasicSweeper.split_arguments(parsed, None) for job in batch]

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """A job's configuration, Hydra's own node included; inside `command_line` only."""
        return compose(self.config_name, [*overrides, *self.added], return_hydra_config=True)


def runs_jobs(argv: Sequence[str]) -> bool:
    """Whether arguments ask for jobs to be run, and not for help, a configuration or other information."""
    arguments = get_args_parser().parse_args(list(argv))
    asked = (arguments.help, arguments.hydra_help, arguments.shell_completion, arguments.cfg, arguments.info)
    return not any(asked)


@contextmanager
def command_line(argv: Sequence[str], config_name: str) -> Iterator[CommandLine]:
    """The arguments after the program's name, taken apart."""
    arguments = get_args_parser().parse_args(list(argv))
    added = (f"hydra.searchpath=['file://{arguments.config_dir}']",) if arguments.config_dir is not None else ()
    with initialize_config_dir(config_dir=str(conf_dir().resolve()), version_base="1.3", job_name="train"):
        parsed = OverridesParser.create().parse_overrides(list(arguments.overrides))
        steady = [str(override.input_line) for override in parsed if not override.is_sweep_override()]
        name = arguments.config_name or config_name
        base = compose(name, [*steady, *added], return_hydra_config=True)
        yield CommandLine(
            config_name=name,
            overrides=tuple(arguments.overrides),
            base=base,
            sweeping=bool(arguments.multirun or base.hydra.mode == RunMode.MULTIRUN),
            added=added,
        )
