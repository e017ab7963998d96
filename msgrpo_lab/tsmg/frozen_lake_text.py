"""Frozen Lake as text: pure functions from a map and a position to what the agent reads."""

from __future__ import annotations

from collections.abc import Sequence

from msgrpo_lab.tsmg.offsets import offset

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
