"""Worked examples of the recipes: what they show is what the game itself would write, and their actions are sound."""

from __future__ import annotations

import pytest
from hydra.utils import instantiate
from lab_made import composed

from msgrpo_lab.tsmg.lake import compact_state, relative_state

LAKES = ["frozenlake", "frozenlake_slippery", "frozenlake_big"]
NEIGHBOURS = {"Left": (0, -1), "Up": (-1, 0), "Down": (1, 0), "Right": (0, 1)}
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def cell_of(offset: str) -> tuple[int, int]:
    """(rows down, columns right) of `2 down and 1 left`."""
    places = [0, 0]
    for part in offset.split(" and "):
        number, word = part.split()
        down, right = STEPS[word]
        places[0] += int(number) * down
        places[1] += int(number) * right
    return places[0], places[1]


def lake_of(text: str, size: int) -> tuple[list[str], tuple[int, int]]:
    """A map of size × size with the goal at the bottom right that holds what the view says, and the player's cell."""
    lines = dict(line.split(": ") for line in text.splitlines())
    down, right = cell_of(lines["Goal"])
    row, column = size - 1 - down, size - 1 - right
    rows = [["F"] * size for _ in range(size)]
    rows[-1][-1] = "G"
    holes = [NEIGHBOURS[word] for word in NEIGHBOURS if lines[word] == "hole"]
    if lines.get("Holes", "none") != "none":
        holes += [cell_of(hole) for hole in lines["Holes"].split("; ")]
    for hole_down, hole_right in holes:
        rows[row + hole_down][column + hole_right] = "H"
    return ["".join(line) for line in rows], (row, column)


@pytest.mark.parametrize("view", ["compact", "relative"])
@pytest.mark.parametrize("template", ["action_only", "think_action"])
@pytest.mark.parametrize("lake", LAKES)
def test_worked_examples_of_the_lake_are_positions_of_it(lake: str, template: str, view: str) -> None:
    config = composed(f"env={lake}", f"prompt={template}", f"env.observation={view}")
    render = {"compact": compact_state, "relative": relative_state}[view]
    parse = instantiate(config.prompt.parser)
    words = instantiate(config.env).legal_actions
    assert len(config.prompt.examples) == 4
    for text, answer in config.prompt.examples:
        rows, (row, column) = lake_of(text, config.env.size)
        assert render(rows, row * config.env.size + column) == text
        action = parse(answer, words).action
        assert action is not None
        down, right = STEPS[words[action].lower()]
        assert 0 <= row + down < config.env.size
        assert 0 <= column + right < config.env.size
        assert rows[row + down][column + right] in "FG", f"{text!r} → {answer!r} steps into a hole"
