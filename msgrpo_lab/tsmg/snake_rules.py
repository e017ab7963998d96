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

from msgrpo_lab.tsmg.base import LAYOUT_STREAM, stream
from msgrpo_lab.tsmg.offsets import offset

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


WORDS = ("Up", "Down", "Left", "Right")
_DEAD = "You are dead."


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """What eating is worth; a negative reward is poison, a positive one is good."""

    apple_reward: float
    banana_reward: float

    def good(self, board: Board) -> list[tuple[str, Cell]]:
        """Kind and cell of every item on the board worth eating."""
        found = [("Apple", cell) for cell in board.apples] if self.apple_reward > 0 else []
        return found + ([("Banana", cell) for cell in board.bananas] if self.banana_reward > 0 else [])

    def nearest_good(self, board: Board) -> tuple[str, Cell] | None:
        """Kind and cell of the good item nearest to the player's head (ties: topmost, then leftmost); None without."""
        head = board.player[0]
        ranked = [(distance(head, cell), cell, kind) for kind, cell in self.good(board)]
        if not ranked:
            return None
        _, cell, kind = min(ranked)
        return kind, cell

    def poison(self, board: Board) -> frozenset[Cell]:
        """Cells of the items that cost something."""
        return frozenset(
            (board.apples if self.apple_reward < 0 else ()) + (board.bananas if self.banana_reward < 0 else ())
        )


def compact_rules(menu: Menu, *, num_apples: int, num_bananas: int) -> str:
    """What the game is, in a few short sentences."""
    parts = ["Snake."]
    kinds = (("apples", num_apples, menu.apple_reward), ("bananas", num_bananas, menu.banana_reward))
    for word, count, reward in kinds:
        if count and reward > 0:
            parts.append(f"Eat {word}.")
        elif count and reward < 0:
            parts.append(f"The {word} are poison.")
    parts.append("Avoid walls, bodies, snakes and danger.")
    return " ".join(parts)


def compact_state(board: Board, menu: Menu) -> str:
    """Direction of the nearest good item and the four neighbouring cells, one a line: a partial view. [D]

    `Apple: down and right` gives signs only (`Food: none` if nothing is good), then `Up`, `Down`, `Left`, `Right`, each

    - wall, body (the player's own, less the tail, which moves away) or snake (any cell of another snake);
    - apple, banana, or poison for one that costs something;
    - danger: a free cell that another snake's head may enter in the same turn;
    - free.

    Distances, cells further away, and whether an item's cell is contested are not shown.
    """
    if not board.player:
        return _DEAD
    nearest = menu.nearest_good(board)
    first = "Food: none" if nearest is None else f"{nearest[0]}: {_direction(board.player[0], nearest[1])}"
    words = _neighbour_words(board, menu)
    return "\n".join([first, *(f"{WORDS[move]}: {words[move]}" for move in range(4))])


def relative_rules(menu: Menu, *, size: int, num_apples: int, num_bananas: int, other_snakes: int) -> str:
    """The compact rules, with the board's size and how cells are given."""
    compact = compact_rules(menu, num_apples=num_apples, num_bananas=num_bananas)
    return (
        f"{compact} The board is {size} by {size}. Other snakes: {other_snakes}. "
        "Walls, snakes and food are told as seen from your head."
    )


def relative_state(board: Board, menu: Menu) -> str:
    """The compact view and then everything as offsets from the player's head: the complete state. [D]

    Behind the compact lines: the free cells up to each wall, the player's own body, each other snake from its head on,
    apples and bananas, these nearest first.
    """
    if not board.player:
        return _DEAD
    row, column = head = board.player[0]
    last = board.size - 1
    walls = f"Walls: {row} up, {last - row} down, {column} left, {last - column} right"
    snakes = [f"Snake: {_offsets(head, body)}" for body in sorted(board.others)]
    return "\n".join(
        [
            compact_state(board, menu),
            walls,
            f"Body: {_offsets(head, board.player[1:])}",
            *(snakes or ["Snake: none"]),
            f"Apples: {_offsets(head, _nearest_first(head, board.apples))}",
            f"Bananas: {_offsets(head, _nearest_first(head, board.bananas))}",
        ]
    )


def paper_rules(
    menu: Menu, *, size: int, num_apples: int, num_bananas: int, other_snakes: int, death_reward: float, horizon: int
) -> str:
    """Instructions, the actions' meaning and the rules, as the author's prompts give them. [A]"""
    items = [
        f"- Eating {article} {word} gives reward {reward:+g} and makes you one cell longer."
        + (f" The {word}s are poisonous: avoid them." if reward < 0 else "")
        for article, word, count, reward in (
            ("an", "apple", num_apples, menu.apple_reward),
            ("a", "banana", num_bananas, menu.banana_reward),
        )
        if count
    ]
    return "\n".join(
        [
            f"You are a snake on a board of {size} rows and {size} columns.",
            "Coordinates are (row, column); (0, 0) is the top left cell.",
            "Actions:",
            "- Up: move your head one row up",
            "- Down: move your head one row down",
            "- Left: move your head one column to the left",
            "- Right: move your head one column to the right",
            "Rules:",
            f"- All snakes move at the same time. Other snakes: {other_snakes}.",
            *items,
            "- An eaten item is replaced by a new one of its kind on a random free cell.",
            f"- You die, with reward {death_reward:+g}, if your head hits a wall, any snake's body or another head.",
            f"- The game ends when you die or after {horizon} moves.",
        ]
    )


def paper_state(board: Board) -> str:
    """Coordinates of snakes and items, and the drawn grid with its legend: the complete state. [A]"""
    if not board.player:
        return _DEAD
    grid = [["."] * board.size for _ in range(board.size)]
    _draw(grid, board.apples, "A")
    _draw(grid, board.bananas, "B")
    for body in board.others:
        _draw(grid, body, "s")
        _draw(grid, body[:1], "S")
    _draw(grid, board.player, "p")
    _draw(grid, board.player[:1], "P")
    others = [f"Other snake: head {body[0]}, body {_cells(body[1:])}" for body in board.others]
    return "\n".join(
        [
            f"You: head {board.player[0]}, body {_cells(board.player[1:])}",
            *(others or ["Other snake: none"]),
            f"Apples: {_cells(board.apples)}",
            f"Bananas: {_cells(board.bananas)}",
            "Grid:",
            *(" ".join(line) for line in grid),
            "Legend: P = your head, p = your body, S = other snake's head, s = other snake's body, "
            "A = apple, B = banana, . = free",
        ]
    )


def _neighbour_words(board: Board, menu: Menu) -> list[str]:
    poison, threats = menu.poison(board), threatened(board)
    own = board.player[:-1]
    words = []
    for cell in neighbours(board.player[0], board.size):
        if cell is None:
            words.append("wall")
        elif cell in own:
            words.append("body")
        elif any(cell in body for body in board.others):
            words.append("snake")
        elif cell in poison:
            words.append("poison")
        elif cell in board.apples:
            words.append("apple")
        elif cell in board.bananas:
            words.append("banana")
        else:
            words.append("danger" if cell in threats else "free")
    return words


def _direction(head: Cell, target: Cell) -> str:
    down, right = target[0] - head[0], target[1] - head[1]
    parts = []
    if down:
        parts.append("down" if down > 0 else "up")
    if right:
        parts.append("right" if right > 0 else "left")
    return " and ".join(parts)


def _nearest_first(head: Cell, cells: Sequence[Cell]) -> list[Cell]:
    return sorted(cells, key=lambda cell: (distance(head, cell), cell))


def _offsets(head: Cell, cells: Sequence[Cell]) -> str:
    return "; ".join(offset(cell[0] - head[0], cell[1] - head[1]) for cell in cells) or "none"


def _cells(cells: Sequence[Cell]) -> str:
    return ", ".join(str(cell) for cell in cells) if cells else "none"


def _draw(grid: list[list[str]], cells: Sequence[Cell], letter: str) -> None:
    for row, column in cells:
        grid[row][column] = letter
