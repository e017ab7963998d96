"""Rollouts in files: Parquet, one row a turn, with all that is needed to know what is true of them without the model.

A file holds every turn to the bit, and in its metadata the game's settings, the decoding rule and the sampling policy's
action probabilities on every text of every map played. So any credit rule can be held against the exact values later,
by dynamic programming alone. Columns and their meaning: `columns.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import numpy as np

from msgrpo_lab.fidelity.columns import as_columns, from_columns
from msgrpo_lab.fidelity.parquet import read_rows, told, write_rows
from msgrpo_lab.oracle.frozen_lake import has_oracle
from msgrpo_lab.rollout.action_probs import ActionTable
from msgrpo_lab.rollout.truth import LakeTruth, lake_truth
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import RolloutBatch, Sampling

GAMES: Mapping[str, Callable[..., TextGame]] = {FrozenLake.__name__: FrozenLake}
"""Games with an oracle, by the name that a file holds. A file names no code to be run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GameSettings:
    """The scenario of a rollout."""

    game: str
    """Name of the game's class."""
    settings: Mapping[str, Any]
    """Its arguments, all of them."""

    @classmethod
    def of(cls, make_game: Callable[[], TextGame]) -> GameSettings:
        """The settings that a game class, or a partial call of one (a file of `conf/env`), makes games with."""
        of_class = make_game.func if isinstance(make_game, partial) else make_game
        given = make_game.keywords if isinstance(make_game, partial) else {}
        if not isinstance(of_class, type):
            raise ValueError(f"make_game={make_game!r}: must be a game's class, or functools.partial of one")
        defaults = {
            name: one.default
            for name, one in signature(of_class).parameters.items()
            if one.default is not Parameter.empty
        }
        return cls(game=of_class.__name__, settings={**defaults, **given})


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedRollout:
    """A rollout, and under what it was played."""

    batch: RolloutBatch
    scenario: GameSettings
    sampling: Sampling
    table: ActionTable | None
    """The sampling policy on every text of every map played; None where nobody has asked it."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Where the rollout comes from, for people: plain values by name."""

    def truth(self) -> LakeTruth:
        """The exact values of the policy that has sampled it, computed anew.

        Raises:
            ValueError: the game has no oracle, the file holds no action probabilities, or not those of this rollout.
        """
        make = GAMES.get(self.scenario.game)
        if make is None or not has_oracle(make):
            raise ValueError(
                f"game {self.scenario.game} has no oracle to hold credit against; save a rollout of {', '.join(GAMES)} "
                "(env=frozenlake)"
            )
        if self.table is None:
            raise ValueError(
                "no action probabilities are saved with the rollout; save it by callbacks.rollouts, which asks for them"
            )
        try:
            game = make(**self.scenario.settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings of {self.scenario.game}: {error}; save the rollout again") from error
        _check_played(self.batch, game)
        _check_answers(self.table, len(game.legal_actions) + 1)
        return lake_truth(self.batch, game=game, table_of=self.table.select)


def _check_played(batch: RolloutBatch, game: TextGame) -> None:
    """Refuses turns that the game has no place for; `LakeTruth.turns` tells whether they are of its maps."""
    actions = len(game.legal_actions)
    for number, episode in enumerate(batch.episodes):
        if episode.length > game.horizon:
            problem = f"has {episode.length} turns, where horizon={game.horizon}"
            raise ValueError(f"episode {number}: {problem}; save the rollout again")
        for time, turn in enumerate(episode.turns):
            key, action = turn.state_key, turn.parsed.action
            if not _is_cell(key):
                problem = f"state_key={key!r} is no map with one of its cells"
            elif action is not None and not 0 <= action < actions:
                problem = f"action={action}, where there are {actions} actions, 0 to {actions - 1}"
            else:
                continue
            raise ValueError(f"episode {number}, turn {time}: {problem}; save the rollout again")


def _is_cell(key: Hashable) -> bool:
    if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str) and isinstance(key[1], int)):
        return False
    return 0 <= key[1] < len(key[0].replace("/", ""))


def _check_answers(table: ActionTable, answers: int) -> None:
    """Refuses what are no action probabilities of so many answers, ⊥ among them."""
    prob_XB = table.prob_XB
    if prob_XB.shape[1] != answers or not (prob_XB >= 0).all() or not np.allclose(prob_XB.sum(axis=1), 1.0, atol=1e-6):
        raise ValueError(
            f"action probabilities have the shape {prob_XB.shape}, or do not add up to 1: there must be {answers} for "
            "each text; save the rollout again"
        )


def save_rollout(path: Path, saved: SavedRollout) -> None:
    """Writes a rollout whole or not at all; loading it gives back an equal one, to the bit.

    Raises:
        OSError: it cannot be written; what stood there still does.
        ValueError: an episode without turns, or a value that no column can hold.
    """
    meta = {
        **asdict(saved.scenario),
        "sampling": asdict(saved.sampling),
        "table": None if saved.table is None else _plain_table(saved.table),
        "origin": dict(saved.origin),
    }
    write_rows(path, as_columns(saved.batch), meta)


def load_rollout(path: Path) -> SavedRollout:
    """Reads a rollout.

    Raises:
        ValueError: there is no file, or not one that this version reads; one line that says which, and what to do.
    """
    columns, meta = read_rows(path)
    try:
        sampling = meta["sampling"]
        choices = sampling["choices"]
        return SavedRollout(
            batch=from_columns(columns),
            scenario=GameSettings(game=str(meta["game"]), settings=dict(meta["settings"])),
            sampling=Sampling(
                **{
                    **sampling,
                    "stop": tuple(sampling["stop"]),
                    "choices": None if choices is None else tuple(map(tuple, choices)),
                }
            ),
            table=None if meta["table"] is None else _table(meta["table"]),
            origin=dict(meta["origin"]),
        )
    except (KeyError, TypeError, ValueError, SyntaxError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(told(path, f"holds what no rollout has ({reason})", "save the rollout again")) from error


def _plain_table(table: ActionTable) -> dict[str, Any]:
    return {
        "texts": list(table.texts),
        "prob": table.prob_XB.tolist(),
        "standard_error": table.standard_error_XB.tolist(),
        "exact": table.exact,
    }


def _table(plain: Mapping[str, Any]) -> ActionTable:
    texts = tuple(plain["texts"])
    prob_XB, error_XB = (np.array(plain[name], dtype=np.float64) for name in ("prob", "standard_error"))
    if prob_XB.ndim != 2 or prob_XB.shape != error_XB.shape or len(prob_XB) != len(texts):
        raise ValueError(f"{len(texts)} texts with probabilities {prob_XB.shape} and errors {error_XB.shape}")
    return ActionTable(texts=texts, prob_XB=prob_XB, standard_error_XB=error_XB, exact=bool(plain["exact"]))
