"""What will it cost? `python -m msgrpo_lab.plan experiment=paper/frozenlake output=plan.json`.

Takes what `python -m msgrpo_lab.train -m` takes, and says before anything is run what that command would cost: jobs,
episodes and tokens, memory part by part, hours on named devices, and all that is assumed. No weight is loaded and
nothing is downloaded. See docs/planning.md.
"""

from __future__ import annotations

import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

from msgrpo_lab.config import ConfigError
from msgrpo_lab.config.command_line import EXIT_CODE, sound_jobs
from msgrpo_lab.config.components import Range, describe, fits
from msgrpo_lab.config.paths import file_mistakes
from msgrpo_lab.messages import Mistake, one_line

USAGE = """\
python -m msgrpo_lab.plan [override …] [output=<file.json>] [answer_tokens=<n>]

  override        what python -m msgrpo_lab.train -m would be given, such as experiment=paper/frozenlake seed=0,1
  output          JSON file to write the plan to, for scripts
  answer_tokens   tokens of an answer where decoding is free; half of rollout.sampling.max_new_tokens unless given"""
ANSWER_TOKENS = Annotated[int, Range(1)]


class Request(NamedTuple):
    """What the command line asks for."""

    overrides: tuple[str, ...]
    """Of the main job."""
    output: Path | None
    answer_tokens: int | None


def read_request(arguments: Sequence[str]) -> Request:
    """The command's own keys and the main job's overrides.

    Raises:
        ConfigError: one of its own keys is wrong; one line for every mistake.
    """
    own: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("output", "answer_tokens"):
            own[key] = value
        elif argument not in ("-m", "--multirun"):  # a plan is of the whole sweep anyway
            overrides.append(argument)
    lines = []
    output = own.get("output")
    if output is not None:
        lines = [str(mistake) for mistake in file_mistakes("output", output, "give a file such as output=plan.json")]
    text = own.get("answer_tokens")
    tokens = int(text) if text is not None and text.isdecimal() else None
    if text is not None and not fits(tokens, ANSWER_TOKENS):
        problem = f"must be {describe(ANSWER_TOKENS)}"
        lines.append(str(Mistake("answer_tokens", text, problem, "give for example answer_tokens=100")))
    if lines:
        raise ConfigError(lines)
    return Request(tuple(overrides), None if output is None else Path(output).expanduser().resolve(), tokens)


def run(request: Request) -> None:
    """Plans, prints and writes.

    Raises:
        ConfigError: the configuration cannot be planned, or the file not be written; one line for every mistake.
    """
    jobs = sound_jobs(["-m", *request.overrides], "train")
    # Heavy imports wait until the command line has been found right.
    from msgrpo_lab.planner.report import as_json, as_text, plan_cells

    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
    try:
        cells = plan_cells(jobs, request.answer_tokens)
    except ValueError as error:
        raise ConfigError([one_line(str(error))]) from error
    command = shlex.join(["python", "-m", "msgrpo_lab.train", "-m", *request.overrides])
    print(as_text(cells, command))
    if request.output is not None:
        _write(request.output, as_json(cells, command))
        print(f"wrote {request.output}")


def _write(path: Path, plan: Mapping[str, Any]) -> None:
    import json

    from msgrpo_lab.files import written_whole

    try:
        with written_whole(path) as stream:
            stream.write((json.dumps(plan, indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        mistake = Mistake("output", path, problem, "give a file on a disk with room that you may write")
        raise ConfigError([str(mistake)]) from error


def main(arguments: list[str] | None = None) -> None:
    """Entry point: mistakes on the command line are told in one line each, with exit code 2, and nothing is written."""
    given = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(given):
        print(USAGE)
        return
    try:
        run(read_request(given))
    except ConfigError as error:
        _refuse(error)


def _refuse(error: ConfigError) -> NoReturn:
    for line in error.mistakes:
        print(f"msgrpo_lab: {line}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


if __name__ == "__main__":
    main()
