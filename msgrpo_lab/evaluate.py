"""Any policy on any scenario, on frozen seeds: `python -m msgrpo_lab.evaluate policy=base,random scenario=frozenlake`.

Every policy plays the same held-out episodes, so that policies are compared episode by episode. What has been played is
kept as it comes: a command that was killed goes on where it stopped, with the same numbers. See docs/evaluation.md.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.config import ConfigError, check_command_line, conf_dir
from msgrpo_lab.config.command_line import EXIT_CODE

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""
LIGHT_GROUPS = ("prompt", "engine", "remote", "logger")
"""What is constructed while the command line is checked. Not the model's source: players need none."""
LISTS = ("policy", "scenario", "decoding")
"""Keys whose value `a,b` is a list, where Hydra would see a sweep."""


def as_hydra(argument: str) -> str:
    """An argument as Hydra is to read it: `policy=a,b` is a list and no sweep, `env.<key>=…` sets a new key, and
    `logger=null` leaves a group out.
    """
    if argument == "logger=null":
        return "~logger"
    key, equals, text = argument.partition("=")
    if equals and key in LISTS and not text.startswith("["):
        items = [item.strip() for item in text.split(",") if item.strip()]
        quoted = ["'" + item.replace("\\", "\\\\").replace("'", "\\'") + "'" for item in items]
        return f"{key}=[{','.join(quoted)}]"
    return f"++{argument}" if equals and key.startswith("env.") else argument


def run(config: DictConfig, command: str) -> None:
    """Evaluates what a composed configuration asks for, and writes, tracks and tells what was found.

    Raises:
        ConfigError: something in it is wrong, or a result cannot be written; one line for every mistake.
    """
    # Heavy imports wait until the command line has been found right.
    from msgrpo_lab.evaluation.pairs import comparisons, pair_row, score_rows
    from msgrpo_lab.evaluation.play import evaluate
    from msgrpo_lab.evaluation.report import track, write_files, write_json
    from msgrpo_lab.evaluation.settings import read_settings
    from msgrpo_lab.messages import redact_text

    tree: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    settings = read_settings(tree, HydraConfig.get().runtime.choices, _say)
    found = evaluate(settings)
    command = redact_text(command)
    scores = score_rows(found)
    pairs = [pair_row(one) for one in comparisons(found, settings.against)]
    try:
        files = write_files(found, scores, pairs, command)
        if settings.output is not None:
            write_json(settings.output, scores)
            write_json(settings.output.with_name(f"{settings.output.stem}.pairs.json"), pairs)
    except OSError as error:
        problem = f"{error.filename} cannot be written ({error.strerror or error})"
        raise ConfigError([f"output={settings.output}: {problem}; give a file on a disk with room"]) from error
    if settings.logger is not None:
        try:
            track(found, settings.logger, config, command, files)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
    print((found.folder / "table.md").read_text(encoding="utf-8"), end="")
    for path in [found.folder, *([settings.output] if settings.output is not None else [])]:
        _say(f"wrote {path}")


def _say(text: str) -> None:
    """Remarks and progress go beside the table, so that it can be piped."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: mistakes on the command line are told in one line each, with exit code 2, before anything runs."""
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "msgrpo_lab.evaluate", *given])
    for argument in given:
        if argument.startswith("env="):
            _refuse(ConfigError([f"{argument}: no such key; name scenarios by scenario={argument[4:]}"]))
    sys.argv = [sys.argv[0], *map(as_hydra, given)]
    # Of the commands only this one can do without a logger, so the check, which all share, does not know of it.
    checked = [argument for argument in sys.argv[1:] if argument != "~logger"]
    check_command_line(checked, "evaluate", light_groups=LIGHT_GROUPS)
    asked = get_args_parser().parse_args(sys.argv[1:])
    if asked.multirun or any(override.startswith("hydra.mode=") for override in asked.overrides):
        _refuse(ConfigError(["command line: policies and scenarios are lists here; leave out -m"]))

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="evaluate")
    def job(config: DictConfig) -> None:
        try:
            run(config, command)
        except ConfigError as error:
            _refuse(error)
        except KeyboardInterrupt:
            _say("interrupted: what was played is kept; the same command goes on from there")
            raise SystemExit(INTERRUPTED) from None

    job()


def _refuse(error: ConfigError) -> NoReturn:
    for line in error.mistakes:
        print(f"msgrpo_lab: {line}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


if __name__ == "__main__":
    main()
