"""A frozen lake as a table: one map, and gymnasium's own transition probabilities on it.

States are cells in row-major order; actions are gymnasium's (Left, Down, Right, Up). Axes: S states, A actions,
B outcomes of an action (1 on firm ice, 3 on slippery ice).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache

import numpy as np
from gymnasium.envs.toy_text.frozen_lake import FrozenLakeEnv, generate_random_map
from jaxtyping import Float, Int

from msgrpo_lab.tsmg.base import ObservationStyle
from msgrpo_lab.tsmg.offsets import offset

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
        return tuple(compact_state(self.rows, state) for state in range(len(self.letters)))

    @cached_property
    def relative_texts(self) -> tuple[str, ...]:
        """The relative view of every state."""
        return tuple(relative_state(self.rows, state) for state in range(len(self.letters)))

    def texts(self, observation: ObservationStyle) -> tuple[str, ...]:
        """Every state in one of the observation styles."""
        found: tuple[str, ...] = getattr(self, f"{observation}_texts")
        return found

    @cached_property
    def paper_texts(self) -> tuple[str, ...]:
        """The paper's view of every state."""
        return tuple(paper_state(self.rows, state) for state in range(len(self.letters)))


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


_NEIGHBOURS = (("Left", 0, -1), ("Up", -1, 0), ("Down", 1, 0), ("Right", 0, 1))
_CELL_WORDS = {"S": "ice", "F": "ice", "H": "hole", "G": "goal"}
_ENDINGS = {"H": "You fell into a hole.", "G": "You reached the goal."}


def compact_rules(*, slippery: bool) -> str:
    """What the game is, in two or three short sentences."""
    text = "Frozen Lake. Reach the goal, avoid holes."
    return text + " The ice is slippery: a move may slide to either side." if slippery else text


def compact_state(rows: Sequence[str], state: int) -> str:
    """Offset to the goal and the four neighbouring cells, one a line: a partial view (paper section 5; [D]).

    `Goal: 2 down and 1 right`, then `Left`, `Up`, `Down`, `Right`, each ice, hole, wall or goal. Cells further away are
    not shown, so different states can read the same. A terminal state reads as one closing sentence.
    """
    row, column = divmod(state, len(rows))
    if rows[row][column] in _ENDINGS:
        return _ENDINGS[rows[row][column]]
    goal_row, goal_column = _find(rows, "G")[0]
    lines = [f"Goal: {offset(goal_row - row, goal_column - column)}"]
    lines += [f"{word}: {_cell(rows, row + down, column + right)}" for word, down, right in _NEIGHBOURS]
    return "\n".join(lines)


def relative_rules(*, size: int, slippery: bool) -> str:
    """The compact rules, with the board's size and how holes are given."""
    return (
        f"{compact_rules(slippery=slippery)} The lake is {size} by {size}, the goal in its bottom right corner. "
        "Holes are told as seen from you."
    )


def relative_state(rows: Sequence[str], state: int) -> str:
    """The compact view and then every hole as an offset from the player: the complete state. [D]

    The last line is `Holes: 2 down and 1 right; 3 down` (nearest first, then by rows), or `Holes: none`.
    """
    row, column = divmod(state, len(rows))
    if rows[row][column] in _ENDINGS:
        return _ENDINGS[rows[row][column]]
    offsets = [(hole_row - row, hole_column - column) for hole_row, hole_column in _find(rows, "H")]
    offsets.sort(key=lambda place: (abs(place[0]) + abs(place[1]), place))
    holes = "; ".join(offset(*place) for place in offsets) or "none"
    return f"{compact_state(rows, state)}\nHoles: {holes}"


def paper_rules(*, size: int, slippery: bool, success_rate: float, horizon: int) -> str:
    """Instructions, the actions' meaning and the rules, as the author's prompts give them. [A]"""
    if slippery:
        side = (1 - success_rate) / 2
        ice = (
            f"The ice is slippery: with probability {success_rate:.2f} you move in the chosen direction, and with "
            f"probability {side:.2f} each you slide to one of the two directions at right angles to it."
        )
    else:
        ice = "The ice is not slippery: you always move in the chosen direction."
    return "\n".join(
        [
            f"You are playing Frozen Lake on a grid of {size} rows and {size} columns.",
            "Cross the frozen lake from the start to the goal without falling into a hole.",
            "Coordinates are (row, column); (0, 0) is the top left cell.",
            "Actions:",
            "- Left: move one column to the left",
            "- Down: move one row down",
            "- Right: move one column to the right",
            "- Up: move one row up",
            "Rules:",
            f"- {ice}",
            "- A move off the grid leaves you where you are.",
            "- Entering a hole ends the game with reward 0.",
            "- Reaching the goal ends the game with reward 1.",
            f"- You have at most {horizon} moves.",
        ]
    )


def paper_state(rows: Sequence[str], state: int) -> str:
    """Coordinates of player, goal and holes, and the drawn grid with its legend: the complete state. [A]"""
    row, column = divmod(state, len(rows))
    holes = _find(rows, "H")
    grid = [[letter if letter in "HG" else "." for letter in line] for line in rows]
    grid[row][column] = "P"
    return "\n".join(
        [
            f"Player: ({row}, {column})",
            f"Goal: {', '.join(str(cell) for cell in _find(rows, 'G'))}",
            f"Holes: {', '.join(str(cell) for cell in holes) if holes else 'none'}",
            "Grid:",
            *(" ".join(line) for line in grid),
            "Legend: P = player, G = goal, H = hole, . = ice",
        ]
    )


def _cell(rows: Sequence[str], row: int, column: int) -> str:
    if not (0 <= row < len(rows) and 0 <= column < len(rows)):
        return "wall"
    return _CELL_WORDS[rows[row][column]]


def _find(rows: Sequence[str], letter: str) -> list[tuple[int, int]]:
    return [(row, column) for row, line in enumerate(rows) for column, found in enumerate(line) if found == letter]
