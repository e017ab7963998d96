"""How hard a scenario is: `python -m msgrpo_lab.oracle env=frozenlake num_maps=50 output=frozenlake.json`."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from msgrpo_lab.config import ConfigError, check_command_line, conf_dir
from msgrpo_lab.config.command_line import EXIT_CODE
from msgrpo_lab.config.components import Range, describe, fits
from msgrpo_lab.config.paths import file_mistakes
from msgrpo_lab.messages import Mistake, closest_first, did_you_mean
from msgrpo_lab.oracle.difficulty import Difficulty, difficulty
from msgrpo_lab.seeding import generator

KEYS: Mapping[str, tuple[Any, Any]] = {
    "num_maps": (Annotated[int, Range(1)], 50),
    "episodes_per_map": (Annotated[int, Range(2)], 20),
    "output": (str | None, "difficulty.json"),
}
"""The command's own keys: what fits, and an example."""


def check(settings: Mapping[str, Any]) -> Iterator[Mistake]:
    """Mistakes in the command's own keys."""
    known = {*KEYS, "env", "seed"}
    for key in settings.keys() - known:
        remedy = f"{did_you_mean(key, known)}the keys are: {', '.join(closest_first(key, known))}"
        yield Mistake(key, settings[key], "no such key", remedy)
    for key, (annotation, example) in KEYS.items():
        if key not in settings or not fits(settings[key], annotation):
            yield Mistake(
                key, settings.get(key), f"must be {describe(annotation)}", f"give for example {key}={example}"
            )
    output = settings.get("output")
    if isinstance(output, str):
        yield from file_mistakes("output", output, "give a file, for example output=difficulty.json")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all: beside its place first, and then renamed into it.

    Raises:
        OSError: it cannot be written; what stood there still does.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)  # temporary files are made private
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def report(found: Difficulty, env: str) -> str:
    """The means, for people."""
    first, last = found.maps[0].seed, found.maps[-1].seed
    how = "exact" if found.exact else "simulated"
    lines = [
        f"{env}: {type(found.game).__name__}, horizon {found.game.horizon}, {len(found.maps)} held-out maps "
        f"(seeds {first} to {last}), {how}; mean over maps and 95 % interval",
    ]
    for player, quantities in found.means.items():
        for quantity, mean in quantities.items():
            if found.exact and quantity == "return":
                continue  # Frozen Lake's return is its success
            interval = "" if math.isnan(mean.low) else f"  [{mean.low:.3f}, {mean.high:.3f}]"
            lines.append(f"  {player:<8} {quantity:<8} {mean.value:6.3f}{interval}")
    if "optimal" not in found.means:
        upper = "the search player is a reference, not the optimum" if "search" in found.means else "none is claimed"
        lines.append(f"  optimal: unknown for {type(found.game).__name__}; {upper}")
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="oracle")
def _job(config: DictConfig) -> None:
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    try:
        _measure(config, settings)
    except ConfigError as error:
        _refuse(error)


def _measure(config: DictConfig, settings: Mapping[str, Any]) -> None:
    env = HydraConfig.get().runtime.choices["env"]
    found = difficulty(
        instantiate(config.env, _partial_=True, _convert_="all"),
        settings["num_maps"],
        generator(settings["seed"], "reference"),
        episodes_per_map=settings["episodes_per_map"],
    )
    print(report(found, env))
    if settings["output"] is None:
        return
    path = Path(settings["output"]).expanduser().resolve()
    try:
        write_json(path, found.as_json(env=env, settings=settings["env"], seed=settings["seed"]))
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        mistake = Mistake("output", settings["output"], problem, "give a file on a disk with room that you may write")
        raise ConfigError([str(mistake)]) from error
    print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: mistakes on the command line are told in one line each, with exit code 2, before anything runs."""
    if arguments is not None:
        sys.argv = [sys.argv[0], *arguments]
    check_command_line(sys.argv[1:], "oracle", own=check)
    given = get_args_parser().parse_args(sys.argv[1:])
    if given.multirun or any(override.startswith("hydra.mode=") for override in given.overrides):
        _refuse(ConfigError(["command line: one scenario a call; leave out -m, and call it once for each"]))
    _job()


def _refuse(error: ConfigError) -> NoReturn:
    for line in error.mistakes:
        print(f"msgrpo_lab: {line}", file=sys.stderr)
    raise SystemExit(EXIT_CODE)


if __name__ == "__main__":
    main()
