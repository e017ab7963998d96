"""Players without a language model: reference lines, and policies for tests. Each returns the word it plays."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from jaxtyping import Float

from msgrpo_lab.oracle.frozen_lake import hole_avoiding_policy, optimal_action
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import Lake
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.tsmg.snake_rules import Board, Cell, distance, free_moves, neighbours, threatened


class Player(Protocol):
    """Something that plays a text game."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """The word it plays in the game's current state; all its chance comes from `rng`."""
        ...


@dataclass(frozen=True, slots=True)
class RandomPlayer:
    """Every legal action with the same probability."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """A legal word drawn uniformly."""
        return game.legal_actions[int(rng.integers(len(game.legal_actions)))]


@dataclass(frozen=True, slots=True)
class FixedPlayer:
    """The same word in every state, legal or not."""

    word: str

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:  # noqa: ARG002  the interface's
        """The word."""
        return self.word


@dataclass(frozen=True, slots=True)
class MixPlayer:
    """Ignores the prompt: every word is drawn from one distribution.

    Raises:
        ValueError: the probabilities are negative, or do not sum to 1.
    """

    probabilities: Mapping[str, float]
    _words: tuple[str, ...] = field(init=False, repr=False, compare=False)
    _cumulative: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Check that it is a distribution."""
        values = list(self.probabilities.values())
        if min(values, default=-1.0) < 0 or abs(sum(values) - 1) > 1e-6:
            raise ValueError(f"probabilities={dict(self.probabilities)}: must be non-negative and sum to 1")
        object.__setattr__(self, "_words", tuple(self.probabilities))
        object.__setattr__(self, "_cumulative", tuple(np.cumsum(values).tolist()))

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:  # noqa: ARG002  the interface's
        """A word drawn from the distribution."""
        index = int(np.searchsorted(self._cumulative, rng.random() * self._cumulative[-1], side="right"))
        return self._words[index]


@dataclass(frozen=True, slots=True)
class TextPlayer:
    """A memoryless policy on texts: the stand-in for a language policy whose action probabilities are known.

    Args:
        prob_of: for each text, the probabilities of the legal actions in their order and, last, of ⊥.
    """

    prob_of: Mapping[str, Float[np.ndarray, " B"]]

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """A word drawn for the text that the game shows; the empty word is ⊥.

        Raises:
            ValueError: the text is not in the table.
        """
        text = game.render_text()
        if text not in self.prob_of:
            raise ValueError(f"TextPlayer: knows {len(self.prob_of)} texts, not {text!r}; add it to the table")
        cumulative_B = np.cumsum(self.prob_of[text])
        answer = int(np.searchsorted(cumulative_B, rng.random() * cumulative_B[-1], side="right"))
        return (*game.legal_actions, "")[answer]


@dataclass(frozen=True, slots=True)
class HoleAvoidingPlayer:
    """Frozen Lake: towards the goal and around adjacent holes, ties at random (see `hole_avoiding_policy`)."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """A word drawn from the policy.

        Raises:
            ValueError: the game is not Frozen Lake.
        """
        lake_game = _frozen_lake(self, game)
        probability_A = _hole_avoiding(lake_game.lake)[lake_game.position]
        return game.legal_actions[int(rng.choice(len(probability_A), p=probability_A))]


@dataclass(frozen=True, slots=True)
class OptimalPlayer:
    """Frozen Lake: the best action for the turns that are left, by dynamic programming."""

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:  # noqa: ARG002  the interface's
        """The word of a best action.

        Raises:
            ValueError: the game is not Frozen Lake, or the episode is over.
        """
        return game.legal_actions[optimal_action(_frozen_lake(self, game))]


@dataclass(frozen=True, slots=True)
class SearchPlayer:
    """Snake: breadth-first search to the nearest reachable good item. A named reference, not the optimum. [D]

    It treats the board as it stands as fixed: it never enters walls, its own body (less the tail), other snakes' cells,
    cells another head may enter next, or poison. Without a path it moves to a neighbouring cell free of all that, with
    the most ways on and at random among those; failing that, to the least bad one.
    """

    def __call__(self, game: TextGame, rng: np.random.Generator) -> str:
        """The word of the first move on a shortest path, or of a safe move.

        Raises:
            ValueError: the game is not Snake, or the snake is dead.
        """
        if not isinstance(game, Snake):
            raise ValueError(f"SearchPlayer: plays Snake only, not {type(game).__name__}; choose RandomPlayer instead")
        board = game.board
        if not board.player:
            raise ValueError("SearchPlayer: the snake is dead; ask for a move before the episode's end")
        solid = {*board.player[:-1], *(cell for body in board.others for cell in body)}
        poison = game.menu.poison(board)
        targets = {cell for _, cell in game.menu.good(board)}
        move = _first_move(board, targets, solid | poison, solid | poison | threatened(board))
        return game.legal_actions[_safe_move(board, solid, poison, rng) if move is None else move]


def _first_move(board: Board, targets: set[Cell], avoided: set[Cell], avoided_next: set[Cell]) -> int | None:
    """First move of a shortest path from the head to a target; None if there is no path.

    Threatened cells count for the first move only: by the second, the other snakes are elsewhere.
    """
    head = board.player[0]
    queue: deque[tuple[Cell, int]] = deque()
    seen = {head}
    entries = [
        (min((distance(cell, target) for target in targets), default=0), move, cell)
        for move, cell in enumerate(neighbours(head, board.size))
        if cell is not None and cell not in avoided_next
    ]
    for _, move, cell in sorted(entries):
        seen.add(cell)
        queue.append((cell, move))
    while queue:
        cell, first = queue.popleft()
        if cell in targets:
            return first
        for following in neighbours(cell, board.size):
            if following is not None and following not in seen and following not in avoided:
                seen.add(following)
                queue.append((following, first))
    return None


def _safe_move(board: Board, solid: set[Cell], poison: frozenset[Cell], rng: np.random.Generator) -> int:
    """A random move among those of the mildest danger: none, then poison, then another head, then certain death."""
    threats = threatened(board)

    def danger(cell: Cell | None) -> tuple[int, int]:
        if cell is None or cell in solid:
            return (3, 0)
        ways_on = len(free_moves((cell, *board.player[:-1]), board.size))
        return (2 if cell in threats else 1 if cell in poison else 0, -ways_on)

    dangers = [danger(cell) for cell in neighbours(board.player[0], board.size)]
    mildest = [move for move in range(4) if dangers[move] == min(dangers)]
    return mildest[int(rng.integers(len(mildest)))]


@lru_cache(maxsize=4096)
def _hole_avoiding(lake: Lake) -> Float[np.ndarray, "S A"]:
    return hole_avoiding_policy(lake)


def _frozen_lake(player: object, game: TextGame) -> FrozenLake:
    if not isinstance(game, FrozenLake):
        raise ValueError(
            f"{type(player).__name__}: plays FrozenLake only, not {type(game).__name__}; choose RandomPlayer instead"
        )
    return game
