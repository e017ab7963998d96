"""Snake's rules as pure functions of a board: moving, collisions, eating, new items. No text, no turns.

Cells are (row, column), (0, 0) at the top left. The rules are those of the public SnakeBench game (paper section 5),
judged in its order once every snake has moved:

1. A head off the board dies of the wall.
2. Heads that meet die: two or more on one cell, or two that change places. (SnakeBench lets two snakes of length one
   pass through each other; here a head that meets a head always dies. [D])
3. The bodies that count are those of the snakes still alive after 1 and 2, *as moved*: a tail that has just left its
   cell is out of the way, a tail that stays because its owner ate is not. A head on one of them, its own included,
   dies; deaths of this kind are simultaneous.
4. Survivors on an item eat it: the tail stays for that turn, so the snake grows by one. The item of a snake that died
   stays on the board. Dead snakes disappear.

A snake of length one or two may turn round on the spot, since its tail moves away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from msgrpo_lab.tsmg.chance import LAYOUT_STREAM, stream

Cell = tuple[int, int]
Body = tuple[Cell, ...]
"""A snake's cells, head first."""

MOVES: tuple[Cell, ...] = ((-1, 0), (1, 0), (0, -1), (0, 1))
"""Row and column steps of Up, Down, Left, Right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """A position. Items are kept sorted, so that equal positions are equal values."""

    size: int
    player: Body
    """Empty once the player is dead."""
    others: tuple[Body, ...]
    """The other snakes that are alive."""
    apples: tuple[Cell, ...]
    bananas: tuple[Cell, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A board after all snakes moved, before eaten items are replaced, and what the player ate."""

    board: Board
    ate_apple: bool
    ate_banana: bool


@lru_cache(maxsize=4096)
def neighbours(cell: Cell, size: int) -> tuple[Cell | None, ...]:
    """The cells that Up, Down, Left and Right lead to; None for a wall."""
    row, column = cell
    return tuple(
        (row + down, column + right) if 0 <= row + down < size and 0 <= column + right < size else None
        for down, right in MOVES
    )


def distance(one: Cell, other: Cell) -> int:
    """Manhattan distance in moves."""
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


def free_moves(body: Body, size: int) -> list[int]:
    """Moves of a snake that meet neither a wall nor its own body; its tail counts as gone."""
    own = body[:-1]
    return [move for move, cell in enumerate(neighbours(body[0], size)) if cell is not None and cell not in own]


def threatened(board: Board) -> frozenset[Cell]:
    """Cells that the head of another snake may enter in the next turn."""
    cells: set[Cell] = set()
    for body in board.others:
        ways = [cell for cell in neighbours(body[0], board.size) if cell is not None]
        cells.update([cell for cell in ways if cell not in body[:-1]] or ways)
    return frozenset(cells)


def draw_moves(board: Board, rng: np.random.Generator) -> list[int]:
    """A move for each other snake: uniform over its free moves, over all four (it dies) if it has none. [A]"""
    chosen = []
    for body in board.others:
        moves = free_moves(body, board.size) or [0, 1, 2, 3]
        chosen.append(moves[int(rng.integers(len(moves)))])
    return chosen


def move_all(board: Board, player_move: int, other_moves: Sequence[int]) -> Moved:
    """Move every snake at once and judge collisions and eating by the rules above.

    Args:
        board: a position in which the player is alive.
        player_move: index into `MOVES`.
        other_moves: one move for each of `board.others`, in their order.
    """
    bodies = (board.player, *board.others)
    moves = (player_move, *other_moves)
    heads = [neighbours(body[0], board.size)[move] for body, move in zip(bodies, moves, strict=True)]
    moved: list[Body] = [_moved(body, head, board) for body, head in zip(bodies, heads, strict=True)]
    alive = [head is not None for head in heads]
    alive = [alive[i] and not _meets_head(i, heads, bodies, alive) for i in range(len(bodies))]
    blocked = {cell for i, body in enumerate(moved) if alive[i] for cell in body[1:]}
    alive = [alive[i] and head not in blocked for i, head in enumerate(heads)]
    eaten = {head for i, head in enumerate(heads) if alive[i]}
    return Moved(
        board=Board(
            size=board.size,
            player=moved[0] if alive[0] else (),
            others=tuple(body for i, body in enumerate(moved) if i > 0 and alive[i]),
            apples=tuple(cell for cell in board.apples if cell not in eaten),
            bananas=tuple(cell for cell in board.bananas if cell not in eaten),
        ),
        ate_apple=alive[0] and heads[0] in board.apples,
        ate_banana=alive[0] and heads[0] in board.bananas,
    )


def replenish(board: Board, num_apples: int, num_bananas: int, rng: np.random.Generator) -> Board:
    """Put a new item of its kind on a random free cell for each one missing; a full board stays as it is."""
    missing_apples, missing_bananas = num_apples - len(board.apples), num_bananas - len(board.bananas)
    if not missing_apples and not missing_bananas:
        return board
    taken = {*board.player, *board.apples, *board.bananas, *(cell for body in board.others for cell in body)}
    free = [(row, column) for row in range(board.size) for column in range(board.size) if (row, column) not in taken]
    new = [free.pop(int(rng.integers(len(free)))) for _ in range(min(missing_apples + missing_bananas, len(free)))]
    return Board(
        size=board.size,
        player=board.player,
        others=board.others,
        apples=tuple(sorted([*board.apples, *new[:missing_apples]])),
        bananas=tuple(sorted([*board.bananas, *new[missing_apples:]])),
    )


@lru_cache(maxsize=16384)
def initial_board(seed: int, size: int, num_apples: int, num_bananas: int, other_snakes: int) -> Board:
    """The initial position of a seed: snakes of length one and items on distinct random cells, as SnakeBench has it."""
    order = stream(seed, LAYOUT_STREAM).permutation(size * size).tolist()
    cells: list[Cell] = [divmod(index, size) for index in order]
    snakes, cells = cells[: 1 + other_snakes], cells[1 + other_snakes :]
    return Board(
        size=size,
        player=(snakes[0],),
        others=tuple((cell,) for cell in snakes[1:]),
        apples=tuple(sorted(cells[:num_apples])),
        bananas=tuple(sorted(cells[num_apples : num_apples + num_bananas])),
    )


def _moved(body: Body, head: Cell | None, board: Board) -> Body:
    """The body after its head moved; unchanged if the head left the board, longer by one if it met an item."""
    if head is None:
        return body
    return (head, *body) if head in board.apples or head in board.bananas else (head, *body[:-1])


def _meets_head(i: int, heads: Sequence[Cell | None], bodies: Sequence[Body], alive: Sequence[bool]) -> bool:
    """Whether the head of snake i meets another living head: on one cell, or by changing places."""
    return any(
        j != i and alive[j] and (heads[i] == heads[j] or (heads[i] == bodies[j][0] and heads[j] == bodies[i][0]))
        for j in range(len(bodies))
    )
