"""A frozen lake as a table: one map, and gymnasium's own transition probabilities on it.

States are cells in row-major order; actions are gymnasium's (Left, Down, Right, Up). Axes: S states, A actions,
B outcomes of an action (1 on firm ice, 3 on slippery ice).
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map
from jaxtyping import Float, Int

from msgrpo_lab.tsmg import frozen_lake_text
from msgrpo_lab.tsmg.base import ObservationStyle

Outcome = tuple[float, int, float, bool]
"""Cumulative probability, next state, reward, terminal: one row of gymnasium's table."""


class Lake:
    """One map with its dynamics, shared by all games on it; never changed after it is made.

    Args:
        rows: the map's rows in gymnasium's letters (S start, F frozen, H hole, G goal).
        slippery: whether a move may slide to either side.
        success_rate: probability of going where one meant to go on slippery ice; the rest is split over both sides.
    """

    def __init__(self, rows: tuple[str, ...], *, slippery: bool, success_rate: float) -> None:
        """Read gymnasium's table for the map."""
        self.rows = rows
        self.size = len(rows)
        self.letters = "".join(rows)
        self.key = "/".join(rows)
        self.start = self.letters.index("S")
        self.goal = self.letters.index("G")
        env = FrozenLakeEnv(desc=list(rows), is_slippery=slippery, success_rate=success_rate)
        self.outcomes: list[list[list[Outcome]]] = []
        for state in range(len(self.letters)):
            self.outcomes.append([_cumulate(env.P[state][action]) for action in range(4)])
        self._table = env.P

    def is_terminal(self, state: int) -> bool:
        """Whether `state` is a hole or the goal."""
        return self.letters[state] in "GH"

    def draw(self, state: int, action: int, uniform: float) -> Outcome:
        """The outcome that a uniform number in [0, 1) picks: gymnasium's inverse-cdf rule, bit for bit."""
        outcomes = self.outcomes[state][action]
        for outcome in outcomes:
            if outcome[0] > uniform:
                return outcome
        return outcomes[0]  # as gymnasium's argmax over all-false does when rounding leaves the sum below `uniform`

    @cached_property
    def potentials(self) -> tuple[float, ...]:
        """Φ of every state: 1 − distance/(2(size − 1)), Manhattan distance to the goal; 0 in terminal states. [D]"""
        goal_row, goal_column = divmod(self.goal, self.size)
        furthest = 2 * (self.size - 1)
        return tuple(
            0.0 if self.is_terminal(state) else 1 - (abs(goal_row - row) + abs(goal_column - column)) / furthest
            for state in range(len(self.letters))
            for row, column in [divmod(state, self.size)]
        )

    @cached_property
    def move_ASS(self) -> Float[np.ndarray, "A S S"]:  # noqa: N802  axis letters
        """Probability of next state [.., .., s′] when action a is played in s; terminal states keep to themselves."""
        count = len(self.letters)
        move_ASS = np.zeros((4, count, count))
        for state, actions in self._table.items():
            for action, outcomes in actions.items():
                for probability, following, _, _ in outcomes:
                    move_ASS[action, state, following] += probability
        return move_ASS

    @cached_property
    def open_S(self) -> Int[np.ndarray, " open"]:  # noqa: N802  axis letters
        """Indices of the states in which a turn can be taken: all but holes and the goal."""
        return np.array([state for state in range(len(self.letters)) if not self.is_terminal(state)], dtype=np.int64)

    @cached_property
    def compact_texts(self) -> tuple[str, ...]:
        """The compact view of every state."""
        return tuple(frozen_lake_text.compact_state(self.rows, state) for state in range(len(self.letters)))

    @cached_property
    def relative_texts(self) -> tuple[str, ...]:
        """The relative view of every state."""
        return tuple(frozen_lake_text.relative_state(self.rows, state) for state in range(len(self.letters)))

    def texts(self, observation: ObservationStyle) -> tuple[str, ...]:
        """Every state in one of the observation styles."""
        found: tuple[str, ...] = getattr(self, f"{observation}_texts")
        return found

    @cached_property
    def paper_texts(self) -> tuple[str, ...]:
        """The paper's view of every state."""
        return tuple(frozen_lake_text.paper_state(self.rows, state) for state in range(len(self.letters)))


@lru_cache(maxsize=16384)
def random_map(size: int, frozen_probability: float, seed: int) -> tuple[str, ...]:
    """gymnasium's random map with a path from start to goal."""
    return tuple(generate_random_map(size=size, p=frozen_probability, seed=seed))


@lru_cache(maxsize=4096)
def lake(rows: tuple[str, ...], slippery: bool, success_rate: float) -> Lake:
    """The lake of a map, built once."""
    return Lake(rows, slippery=slippery, success_rate=success_rate)


def _cumulate(rows: list[tuple[float, int, float, bool]]) -> list[Outcome]:
    cumulative = np.cumsum([row[0] for row in rows])
    return [
        (float(level), int(following), float(reward), bool(terminal))
        for level, (_, following, reward, terminal) in zip(cumulative, rows, strict=True)
    ]
