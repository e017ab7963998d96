"""What `python -m msgrpo_lab.evaluate` is asked for: the composed `conf/evaluate.yaml`, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from hydra.utils import instantiate

from msgrpo_lab.config.choices import Found
from msgrpo_lab.config.components import Range, describe, fits
from msgrpo_lab.config.paths import file_mistakes, folder_mistakes
from msgrpo_lab.evaluation.contender import DECODINGS, Contender, Decoding, PolicySpec
from msgrpo_lab.evaluation.names import Directory
from msgrpo_lab.evaluation.policies import ModelShelf
from msgrpo_lab.evaluation.scenarios import Scenario, scenarios_of
from msgrpo_lab.evaluation.trained import RunSource
from msgrpo_lab.messages import Mistake, closest_first, did_you_mean
from msgrpo_lab.tracking.tracking import MLflowTracking

DEVICES = ("auto", "cpu", "cuda", "mps")
FIRST, ALL = "first", "all"
"""Words of `against`: the first policy named, and every pair."""
KEYS: Mapping[str, tuple[Any, Any]] = {
    "episodes": (Annotated[int, Range(1)], 400),
    "temperature": (Annotated[float, Range(1e-4)] | None, 1.0),
    "against": (str | None, FIRST),
    "reference_simulations": (Annotated[int, Range(1)], 2000),
    "output": (str | None, "scores.json"),
    "folder": (str | None, "evaluation"),
    "resume": (Literal["auto"] | None, "auto"),
    "device": (str, "auto"),
}
"""Plain keys: what fits, and an example."""
OTHERS = (
    "policy",
    "scenario",
    "decoding",
    "seed",
    "env",
    "rollout",
    "source",
    "paths",
    "model",
    "prompt",
    "engine",
    "remote",
    "logger",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A checked request."""

    contenders: Sequence[Contender]
    scenarios: Sequence[Scenario]
    decodings: Sequence[Decoding]
    episodes: int
    against: str | None
    reference_simulations: int
    output: Path | None
    folder: Path | None
    outputs: Path
    resume: bool
    logger: MLflowTracking | None
    say: Callable[[str], None]
    """Takes remarks and progress, for people."""


def read_settings(tree: Mapping[str, Any], choices: Mapping[str, str], say: Callable[[str], None]) -> Settings:
    """Checks a composed configuration, and finds every policy and scenario that it names; loads no model.

    Args:
        tree: resolved plain values.
        choices: the option chosen of each group.
        say: takes remarks and progress.

    Raises:
        ConfigError: one line for every mistake.
    """
    found = Found()
    found.add(_mistakes(tree))
    found.stop()
    logger = None if tree.get("logger") is None else instantiate(tree["logger"])
    if logger is not None and not isinstance(logger, MLflowTracking):
        found.add([Mistake("logger", choices["logger"], "keeps no evaluations", "give mlflow, or null for none")])
    changes = {str(key): value for key, value in tree["env"].items()}
    scenarios = scenarios_of(_names(tree["scenario"]), changes, found)
    contenders = _directory(tree, str(choices["model"]), logger, say).contenders(_names(tree["policy"]), found)
    labels = [one.label for one in contenders]
    if tree["against"] not in (None, FIRST, ALL, *labels) and not found.lines:
        remedy = f"give {FIRST}, {ALL}, null or one of: {', '.join(closest_first(tree['against'], labels))}"
        found.add([Mistake("against", tree["against"], "no such policy is evaluated", remedy)])
    found.add(_idle(contenders, scenarios, say))
    found.stop()
    return Settings(
        contenders=contenders,
        scenarios=scenarios,
        decodings=[one for one in DECODINGS if one in tree["decoding"]],
        **{key: tree[key] for key in ("episodes", "against", "reference_simulations")},
        resume=tree["resume"] == "auto",
        output=_path(tree["output"]),
        folder=_path(tree["folder"]),
        outputs=Path(tree["paths"]["outputs"]).expanduser().resolve(),
        logger=logger,
        say=say,
    )


def _directory(tree: Mapping[str, Any], model: str, logger: Any, say: Callable[[str], None]) -> Directory:
    default = f"sqlite:///{Path(tree['paths']['outputs']).expanduser().resolve()}/mlflow.db"
    source = tree["source"]
    return Directory(
        spec=PolicySpec(
            model=tree["model"],
            prompt=tree["prompt"],
            engine=tree["engine"],
            sampling=tree["rollout"]["sampling"],
            temperature=tree["temperature"] or 1.0,
        ),
        model=model,
        temperature=tree["temperature"],
        remote=tree["remote"],
        shared={key: tree[key] for key in ("seed", "paths")},
        runs=RunSource(
            tracking_uri=source["tracking_uri"] or getattr(logger, "tracking_uri", default),
            experiment=source["experiment"] or getattr(logger, "experiment", "msgrpo"),
        ),
        shelf=ModelShelf(tree["device"]),
        say=say,
    )


def _names(chosen: Any) -> list[str]:
    """The names in a list, or in a text that separates them by commas."""
    items = chosen if isinstance(chosen, list) else str(chosen).split(",")
    return [text for item in items if (text := str(item).strip())]


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser().resolve()


def _mistakes(tree: Mapping[str, Any]) -> Iterator[Mistake]:
    known = {*KEYS, *OTHERS}
    for key in tree.keys() - known:
        remedy = f"{did_you_mean(key, known)}the keys are: {', '.join(closest_first(key, known))}"
        yield Mistake(key, tree[key], "no such key", remedy)
    for key, (annotation, example) in KEYS.items():
        if not fits(tree[key], annotation):
            yield Mistake(key, tree[key], f"must be {describe(annotation)}", f"give for example {key}={example}")
    if not isinstance(tree["env"], Mapping):
        yield Mistake("env", tree["env"], "must be keys of the scenarios", "name scenarios by scenario=…")
    for one in _names(tree["decoding"]) or ["[]"]:
        if one not in DECODINGS:
            yield Mistake("decoding", one, "no such decoding", f"give some of: {', '.join(DECODINGS)}")
    if tree["device"] not in DEVICES:
        yield Mistake("device", tree["device"], "no such device", f"give one of: {', '.join(DEVICES)}")
    if isinstance(tree["output"], str):
        yield from file_mistakes("output", tree["output"], "give a file, for example output=scores.json")
    if isinstance(tree["folder"], str):
        yield from folder_mistakes("folder", tree["folder"], "give a folder, or leave the key out")


def _idle(
    contenders: Sequence[Contender], scenarios: Sequence[Scenario], say: Callable[[str], None]
) -> Iterator[Mistake]:
    """Policies that play none of the scenarios; that one does not play some is a remark."""
    for one in contenders:
        refused = [scenario.name for scenario in scenarios if not one.plays(scenario.game_class)]
        if refused and len(refused) == len(scenarios):
            others = ", ".join(each.label for each in contenders if each is not one) or "random"
            yield Mistake(
                "policy",
                one.label,
                f"does not play {', '.join(refused)}",
                f"give another scenario=…, or policy={others}",
            )
        elif refused:
            say(f"policy={one.label}: does not play {', '.join(refused)}; left out there")
