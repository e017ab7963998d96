"""What `python -m msgrpo_lab.compare` is asked for: `conf/compare.yaml` with the command line's `key=value` on top.

Hydra is not asked: on its command line `credit=a,b` is a sweep of two jobs, here it is a list of two rules. The files
of `conf/credit`, `conf/sampler` and `conf/logger` are the same ones, and so is the way a mistake is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from msgrpo_lab.config import components as trees
from msgrpo_lab.config import conf_dir
from msgrpo_lab.config.choices import Found, build, no_such_option, nodes_of
from msgrpo_lab.config.components import Range, describe, fits
from msgrpo_lab.config.paths import folder_mistakes
from msgrpo_lab.config.rules import LARGEST_SEED
from msgrpo_lab.credit.base import CreditAssigner
from msgrpo_lab.fidelity.meter import Reduction
from msgrpo_lab.messages import ConfigError, Mistake, closest_first, did_you_mean, one_line
from msgrpo_lab.sampler.base import EpisodeSampler

NAME = "compare"
MISSING = "???"
"""Stands in YAML for a value that must be given."""
LISTS = ("credit", "sampler")
"""Keys that hold names of the files of a folder of `conf/`, and under whose names single keys of them are set."""
LOGGERS = ("mlflow",)
KEYS: Mapping[str, tuple[Any, Any]] = {
    "rollouts": (str, "outputs/runs/…/rollouts/update_000000.parquet"),
    "num_episodes": (Annotated[int, Range(1)] | None, 1024),
    "draws": (Annotated[int, Range(2)], 8),
    "resamples": (Annotated[int, Range(4)], 200),
    "reduction": (Literal[get_args(Reduction)], "sum"),
    "seed": (Annotated[int, Range(0, LARGEST_SEED)], 0),
    "output": (str | None, "compare"),
}
"""Plain keys: what fits, and an example."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """A checked command line."""

    rollouts: Path
    rules: Mapping[str, CreditAssigner]
    samplers: Mapping[str, Mapping[str, Any]]
    """Nodes that only lack their number of episodes."""
    num_episodes: int | None
    draws: int
    resamples: int
    reduction: Reduction
    seed: int
    output: Path | None
    logger: Any
    """An `MLflowTracking`, or None."""
    plain: Mapping[str, Any]
    """All of it as plain values, for the record."""

    def make_samplers(self, num_episodes: int) -> dict[str, EpisodeSampler]:
        """The samplers, drawing so many episodes."""
        return {name: instantiate({**node, "num_episodes": num_episodes}) for name, node in self.samplers.items()}


def usage() -> str:
    """The keys and what they mean."""
    return (conf_dir() / f"{NAME}.yaml").read_text(encoding="utf-8").rstrip()


def read_settings(arguments: Sequence[str]) -> CompareSettings:
    """Reads and checks a command line.

    Raises:
        ConfigError: one line for every mistake.
    """
    found = Found()
    plain = _plain(arguments, found)
    found.add(_key_mistakes(plain))
    nodes = {group: nodes_of(group, plain[group], plain["set"].get(group, {}), found) for group in LISTS}
    if not nodes["credit"] and not found.lines:
        found.add([Mistake("credit", plain["credit"], "no rule is named", "give all, or names of conf/credit")])
    rules = {name: rule for name, node in nodes["credit"].items() if (rule := build(f"credit.{name}", node, found))}
    for name, node in nodes["sampler"].items():
        build(f"sampler.{name}", node, found)
    if nodes["sampler"] and not found.lines and plain["resamples"] < 2 * plain["draws"]:
        problem, remedy = f"must be at least 2 for each of draws={plain['draws']}", "give more, or draw less often"
        found.add([Mistake("resamples", plain["resamples"], problem, remedy)])
    logger = _logger(plain, found)
    found.stop()
    output = plain["output"]
    return CompareSettings(
        rollouts=Path(plain["rollouts"]).expanduser(),
        rules=rules,
        samplers=nodes["sampler"],
        **{key: plain[key] for key in ("num_episodes", "draws", "resamples", "reduction", "seed")},
        output=None if output is None else Path(output).expanduser().resolve(),
        logger=logger,
        plain={**{key: value for key, value in plain.items() if key != "set"}, **nodes},
    )


def _plain(arguments: Sequence[str], found: Found) -> dict[str, Any]:
    """Plain values by key, and under `set` those of single rules and samplers.

    Raises:
        ConfigError: a `${…}` stands for nothing, or keys contradict each other, so that there is nothing to check.
    """
    composed = _composed(arguments, found)
    mistakes: list[Mistake] = []
    values: dict[str, Any] = trees.plain(composed, mistakes)
    if OmegaConf.is_missing(composed, "rollouts"):
        values["rollouts"] = MISSING  # told with an example of a file
    if unresolved := [mistake for mistake in mistakes if mistake.value != MISSING]:
        found.add(unresolved)
        raise ConfigError(found.lines)
    return values


def _composed(arguments: Sequence[str], found: Found) -> DictConfig:
    """The file with the command line on top. `credit.<rule>.<key>=…` is kept under `set`, the logger's keys in it."""
    base = OmegaConf.load(conf_dir() / f"{NAME}.yaml")
    assert isinstance(base, DictConfig)
    known = [str(key) for key in base]
    tree = OmegaConf.merge(base, {"set": {}})
    assert isinstance(tree, DictConfig)
    later: list[tuple[str, Any]] = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key.startswith("-"):
            found.add([f"command line: {argument!r} is no key=value; --help lists the keys"])
            continue
        head, _, rest = key.partition(".")
        nested = head in (*LISTS, "logger", "paths")
        if head == "paths" and rest not in base["paths"]:
            folders = [f"paths.{name}" for name in base["paths"]]
            problem = "no such key" if rest else "must be a section of keys"
            found.add([Mistake(key, text, problem, f"give {' or '.join(f'{name}=…' for name in reversed(folders))}")])
            continue
        if head not in known or "" in key.split(".") or (rest and not nested):
            remedy = f"{did_you_mean(key, known)}the keys are: {', '.join(closest_first(key, known))}"
            found.add([Mistake(key, text, "no such key", remedy)])
            continue
        try:
            value = _value(text)
        except (YAMLError, OmegaConfBaseException):
            found.add([Mistake(key, text, "cannot be read", "put quotes around text that is no plain word")])
            continue
        if rest and head == "logger":
            later.append((key, value))
        else:
            OmegaConf.update(tree, f"set.{key}" if rest and head in LISTS else key, value)
    _choose_logger(tree, later, found)
    return tree


def _value(text: str) -> Any:
    """A value as Hydra's command line reads it: numbers, truth values, null, lists, else text, the empty one too."""
    if text == "":
        return ""
    tree = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    assert isinstance(tree, dict)
    return tree["value"]


def _choose_logger(tree: DictConfig, later: Sequence[tuple[str, Any]], found: Found) -> None:
    name = tree["logger"]
    if name is None:
        if later:
            found.add([Mistake(later[0][0], later[0][1], "there is no logger (logger=null)", "leave one of them out")])
        return
    if name not in LOGGERS:
        found.add([no_such_option("logger", str(name), [*LOGGERS, "null"])])
        return
    tree["logger"] = OmegaConf.load(conf_dir() / "logger" / f"{name}.yaml")
    for key, value in later:
        OmegaConf.update(tree, key, value)


def _key_mistakes(plain: Mapping[str, Any]) -> Iterator[Mistake]:
    for name, folder in plain["paths"].items():
        if not isinstance(folder, str) or not folder.strip():
            problem = "must not be empty" if folder == "" else "must be text"
            yield Mistake(f"paths.{name}", folder, problem, "give a folder, or leave the key out")
    for key, (annotation, example) in KEYS.items():
        if key == "rollouts" and plain[key] == MISSING:
            yield Mistake(key, "???", "a value is missing", f"give a saved rollout, for example {key}={example}")
        elif not fits(plain[key], annotation):
            yield Mistake(key, plain[key], f"must be {describe(annotation)}", f"give for example {key}={example}")
    if isinstance(plain["output"], str):
        yield from folder_mistakes("output", plain["output"], "give a folder, or null to write nothing")


def _logger(plain: Mapping[str, Any], found: Found) -> Any:
    if plain["logger"] is None or plain["output"] is None or found.lines:
        return None
    logger = build("logger", plain["logger"], found)
    if logger is not None:
        try:
            logger.check()
        except ValueError as error:
            found.add([one_line(str(error))])
    return logger
