"""Snake as text: pure functions from a board to what the agent reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from msgrpo_lab.tsmg.offsets import offset
from msgrpo_lab.tsmg.snake_rules import Board, Cell, distance, neighbours, threatened

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
