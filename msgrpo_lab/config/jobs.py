"""A sound command line as Hydra's own sweeper takes it apart: what does not vary, and every job."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from msgrpo_lab.config.paths import conf_dir


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
