"""Plays what has not been played: cell by cell, each kept as soon as it is complete."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from msgrpo_lab.config import ConfigError
from msgrpo_lab.engines.remote.transport import RemoteModelError
from msgrpo_lab.evaluation.contender import Contender, Decoding, Opened
from msgrpo_lab.evaluation.results import CellKey, Played, Store, code_digest, digest_of
from msgrpo_lab.evaluation.scenarios import Scenario
from msgrpo_lab.evaluation.settings import Settings
from msgrpo_lab.oracle.players import Score
from msgrpo_lab.rollout.collect import Collector
from msgrpo_lab.rollout.held_out import held_out_references, play_held_out, reference_ends

LIBRARIES = ("torch", "transformers", "numpy", "gymnasium")
"""Another version of one of these may give other numbers."""


class PolicyOnScenario(NamedTuple):
    """One policy on one scenario under one decoding."""

    contender: Contender
    scenario: Scenario
    decoding: Decoding
    key: CellKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A cell that has been played, with its scores."""

    contender: Contender
    scenario: str
    decoding: Decoding
    played: Played
    scores: Mapping[str, float]
    """By name, as in the metrics; nan where a score is not defined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything that was found."""

    results: Sequence[Result]
    references: Mapping[str, Mapping[str, Score]]
    """The reference players' scores, by scenario and player."""
    ends: Mapping[str, tuple[float, float] | None]
    """Returns at 0 and at 1 of the normalised score, by scenario."""
    folder: Path
    digest: str
    """Of the whole request."""


def evaluate(settings: Settings) -> Evaluation:
    """Plays every cell of a request, or takes it from the folder.

    Raises:
        ConfigError: a policy cannot be loaded, or a file not be read or written; one line.
    """
    cells = list(cells_of(settings))
    digest = digest_of([cell.key.digest for cell in cells])
    folder = settings.folder or settings.outputs / "evaluations" / digest[:16]
    store = Store(folder / "cells", resume=settings.resume)
    try:
        references, ends = _references(settings, store)
        played = _played(cells, store, settings)
    except (ValueError, RemoteModelError) as error:
        raise ConfigError([str(error)]) from error
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise ConfigError([f"folder={folder}: {problem}; give a folder on a disk with room"]) from error
    results = [
        Result(
            contender=cell.contender,
            scenario=cell.scenario.name,
            decoding=cell.decoding,
            played=played[cell.key],
            scores=played[cell.key].scores(ends[cell.scenario.name]),
        )
        for cell in cells
    ]
    return Evaluation(results=results, references=references, ends=ends, folder=folder, digest=digest)


def cells_of(settings: Settings) -> Iterator[PolicyOnScenario]:
    """Every cell that is asked for, a policy's together."""
    for contender in settings.contenders:
        for scenario in settings.scenarios:
            for decoding in contender.decodings:
                asked = decoding in settings.decodings or contender.kind == "player"
                if asked and contender.plays(scenario.game_class):
                    yield PolicyOnScenario(contender, scenario, decoding, _key(settings, contender, scenario, decoding))


def _key(settings: Settings, contender: Contender, scenario: Scenario, decoding: Decoding) -> CellKey:
    plain = {
        **_program(),
        "policy": dict(contender.identity),
        "scenario": dict(scenario.seen_as(contender.view)),
        "decoding": decoding,
        "episodes": settings.episodes,
    }
    return CellKey(policy=contender.label, scenario=scenario.name, decoding=decoding, digest=digest_of(plain))


@lru_cache(maxsize=1)
def _program() -> dict[str, str]:
    return {"code": code_digest(), **{name: version(name) for name in LIBRARIES}}


def _references(
    settings: Settings, store: Store
) -> tuple[dict[str, dict[str, Score]], dict[str, tuple[float, float] | None]]:
    """The reference players' scores and the ends of the normalised score, by scenario."""
    references, ends = {}, {}
    for scenario in settings.scenarios:
        plain = {
            **_program(),
            "scenario": dict(scenario.settings),
            "episodes": settings.episodes,
            "simulations": settings.reference_simulations,
        }
        key = CellKey(policy="references", scenario=scenario.name, decoding="scores", digest=digest_of(plain))
        kept = store.read_plain(key)
        if kept is None:
            found = held_out_references(scenario.maker(), settings.episodes, settings.reference_simulations)
            kept = {name: asdict(score) for name, score in found.items()}
            store.write_plain(key, kept)
        references[scenario.name] = {name: Score(**score) for name, score in kept.items()}
        ends[scenario.name] = reference_ends(scenario.maker()(), references[scenario.name])
    return references, ends


def _played(cells: Sequence[PolicyOnScenario], store: Store, settings: Settings) -> dict[CellKey, Played]:
    played = {cell.key: kept for cell in cells if (kept := store.read(cell.key)) is not None}
    if played:
        settings.say(f"{len(played)} of {len(cells)} results are in {store.folder} and are not played again")
    collectors: dict[tuple[str, int], Collector] = {}
    opened: Opened | None = None
    owner: Contender | None = None
    missing = [cell for cell in cells if cell.key not in played]
    try:
        for number, cell in enumerate(missing, start=1):
            started = time.perf_counter()
            if opened is None or owner is not cell.contender:
                if opened is not None:
                    opened.engine.close()
                opened, owner = None, cell.contender  # let go of before the next is loaded
                opened = cell.contender.open()
            # Games and rendered prompts are used again by every policy that sees the scenario alike.
            seen = (digest_of(dict(cell.scenario.seen_as(cell.contender.view))), id(opened.prompt))
            if seen not in collectors:
                collectors[seen] = Collector(cell.scenario.maker(cell.contender.view), opened.prompt)
            played[cell.key] = _play(cell, opened, collectors[seen], settings.episodes)
            store.write(cell.key, played[cell.key])
            outcomes = played[cell.key].outcomes
            settings.say(
                f"[{number}/{len(missing)}] {cell.contender.label} on {cell.scenario.name}, {cell.decoding}: "
                f"return {outcomes.returns.mean():.3f}, success {outcomes.success.mean():.3f} "
                f"({time.perf_counter() - started:.1f} s)"
            )
    finally:
        if opened is not None:
            opened.engine.close()
    return played


def _play(cell: PolicyOnScenario, opened: Opened, collector: Collector, episodes: int) -> Played:
    greedy = cell.decoding == "greedy"
    sampling = replace(opened.sampling(collector.example_game), greedy=greedy)
    opened.sync()
    rollout = play_held_out(collector, opened.engine, sampling, episodes)
    return Played.of(
        rollout,
        drawn=cell.contender.has_logprobs and not greedy,
        constrained=sampling.choices is not None,
    )
