"""What the agent reads in Snake, word for word."""

from __future__ import annotations

import numpy as np
import pytest

from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.tsmg.snake_rules import (
    Board,
    Menu,
    compact_rules,
    compact_state,
    paper_rules,
    paper_state,
    relative_rules,
    relative_state,
)

GOOD = Menu(apple_reward=1.0, banana_reward=1.0)
POISON = Menu(apple_reward=-1.0, banana_reward=1.0)


def board(**changes: object) -> Board:
    fields = {"size": 5, "player": ((2, 2),), "others": (), "apples": (), "bananas": ()}
    return Board(**{**fields, **changes})


def test_compact_view_word_for_word() -> None:
    state = board(player=((0, 1), (0, 0)), apples=((3, 2),), others=(((0, 3),),))
    assert compact_state(state, GOOD) == "Apple: down and right\nUp: wall\nDown: free\nLeft: free\nRight: danger"


def test_relative_view_word_for_word() -> None:
    state = board(player=((0, 1), (0, 0)), apples=((3, 2), (1, 1)), others=(((0, 3), (1, 3)),), bananas=((4, 0),))
    assert relative_state(state, GOOD) == compact_state(state, GOOD) + (
        "\nWalls: 0 up, 4 down, 1 left, 3 right\nBody: 1 left\nSnake: 2 right; 1 down and 2 right"
        "\nApples: 1 down; 3 down and 1 right\nBananas: 4 down and 1 left"
    )


def test_relative_view_of_an_empty_board_and_of_a_dead_snake() -> None:
    assert relative_state(board(), GOOD).splitlines()[-4:] == [
        "Body: none",
        "Snake: none",
        "Apples: none",
        "Bananas: none",
    ]
    assert relative_state(board(player=()), GOOD) == compact_state(board(player=()), GOOD)
    rules = relative_rules(GOOD, size=5, num_apples=1, num_bananas=0, other_snakes=1)
    assert "The board is 5 by 5" in rules


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ((0, 2), "up"),
        ((4, 2), "down"),
        ((2, 0), "left"),
        ((2, 4), "right"),
        ((0, 0), "up and left"),
        ((0, 4), "up and right"),
        ((4, 0), "down and left"),
        ((4, 4), "down and right"),
    ],
)
def test_direction_is_given_by_signs_only(cell: tuple[int, int], words: str) -> None:
    assert compact_state(board(apples=(cell,)), GOOD).splitlines()[0] == f"Apple: {words}"


def test_nearest_item_wins_whatever_its_kind() -> None:
    state = board(apples=((0, 0),), bananas=((2, 4),))
    assert compact_state(state, GOOD).splitlines()[0] == "Banana: right"


def test_ties_go_to_the_topmost_then_leftmost() -> None:
    assert compact_state(board(apples=((0, 2), (2, 0), (2, 4), (4, 2))), GOOD).splitlines()[0] == "Apple: up"
    assert compact_state(board(apples=((2, 0), (2, 4))), GOOD).splitlines()[0] == "Apple: left"
    assert compact_state(board(apples=((2, 4),), bananas=((2, 0),)), GOOD).splitlines()[0] == "Banana: left"


def test_poison_is_never_the_goal_and_named_next_door() -> None:
    state = board(apples=((1, 2), (2, 1)), bananas=((4, 4),))
    assert compact_state(state, POISON).splitlines() == [
        "Banana: down and right",
        "Up: poison",
        "Down: free",
        "Left: poison",
        "Right: free",
    ]


def test_without_anything_good_there_is_no_food() -> None:
    assert compact_state(board(apples=((1, 2),)), POISON).splitlines()[0] == "Food: none"
    assert compact_state(board(), GOOD).splitlines()[0] == "Food: none"


def test_items_next_door_are_named() -> None:
    lines = compact_state(board(apples=((1, 2),), bananas=((3, 2),)), GOOD).splitlines()
    assert lines[1:] == ["Up: apple", "Down: banana", "Left: free", "Right: free"]


def test_own_body_is_shown_but_the_tail_that_leaves_is_not() -> None:
    lines = compact_state(board(player=((2, 2), (2, 1), (1, 1), (1, 2))), GOOD).splitlines()
    assert lines[1:] == ["Up: free", "Down: free", "Left: body", "Right: free"]


def test_every_cell_of_another_snake_is_shown() -> None:
    lines = compact_state(board(others=(((1, 2), (1, 1), (2, 1)),)), GOOD).splitlines()
    assert lines[1:] == ["Up: snake", "Down: free", "Left: snake", "Right: free"]


def test_danger_is_a_free_cell_another_head_can_enter() -> None:
    # The other head at (2, 4) may enter (2, 3); the cells above and below the player are out of its reach.
    lines = compact_state(board(others=(((2, 4),),)), GOOD).splitlines()
    assert lines[1:] == ["Up: free", "Down: free", "Left: free", "Right: danger"]


def test_another_snakes_own_body_keeps_it_from_threatening() -> None:
    # Its head at (2, 4) has its neck at (2, 3): that cell reads snake; nothing next to the player is in reach.
    lines = compact_state(board(others=(((2, 4), (2, 3), (1, 3)),)), GOOD).splitlines()
    assert lines[1:] == ["Up: free", "Down: free", "Left: free", "Right: snake"]


def test_contested_item_reads_as_the_item() -> None:
    lines = compact_state(board(others=(((2, 4),),), apples=((2, 3),)), GOOD).splitlines()
    assert lines[4] == "Right: apple"


@pytest.mark.parametrize("text", [compact_state(board(player=()), GOOD), paper_state(board(player=()))])
def test_a_dead_snake_reads_one_sentence(text: str) -> None:
    assert text == "You are dead."


def test_paper_view_word_for_word() -> None:
    state = Board(size=3, player=((0, 0), (1, 0)), others=(((2, 2), (2, 1)),), apples=((0, 2), (1, 1)), bananas=())
    assert paper_state(state).splitlines() == [
        "You: head (0, 0), body (1, 0)",
        "Other snake: head (2, 2), body (2, 1)",
        "Apples: (0, 2), (1, 1)",
        "Bananas: none",
        "Grid:",
        "P . A",
        "p A .",
        ". s S",
        "Legend: P = your head, p = your body, S = other snake's head, s = other snake's body, A = apple, B = banana, "
        ". = free",
    ]


def test_paper_view_without_other_snakes() -> None:
    lines = paper_state(board(bananas=((0, 0),))).splitlines()
    assert lines[1] == "Other snake: none"
    assert lines[3] == "Bananas: (0, 0)"
    assert lines[5] == "B . . . ."


def test_poison_is_told_in_both_rules() -> None:
    assert "The apples are poison." in compact_rules(POISON, num_apples=5, num_bananas=3)
    assert "Eat bananas." in compact_rules(POISON, num_apples=5, num_bananas=3)
    text = paper_rules(POISON, size=10, num_apples=5, num_bananas=3, other_snakes=1, death_reward=-1.0, horizon=20)
    assert "Eating an apple gives reward -1" in text
    assert "poisonous" in text
    assert "Eating a banana gives reward +1" in text


def test_rules_are_silent_about_items_that_are_not_there() -> None:
    assert "banana" not in compact_rules(GOOD, num_apples=5, num_bananas=0)
    text = paper_rules(GOOD, size=10, num_apples=5, num_bananas=0, other_snakes=1, death_reward=-1.0, horizon=8)
    assert "banana" not in text
    assert "poison" not in text


@pytest.mark.parametrize(("death_reward", "words"), [(-1.0, "reward -1"), (-0.5, "reward -0.5")])
def test_paper_rules_tell_the_price_of_dying(death_reward: float, words: str) -> None:
    text = paper_rules(GOOD, size=10, num_apples=5, num_bananas=0, other_snakes=1, death_reward=death_reward, horizon=8)
    assert words in text


def test_compact_view_stays_small() -> None:
    """Random play meets some hundreds of distinct texts, not thousands: each is computed once an update."""
    rng = np.random.default_rng(0)
    game, texts, turns = Snake(horizon=20), set(), 0
    for seed in range(600):
        text, _ = game.reset(seed=seed)
        done = False
        while not done:
            texts.add(text)
            turns += 1
            text, _, terminated, truncated, _ = game.step(int(rng.integers(4)))
            done = terminated or truncated
    assert turns > 5000
    assert len(texts) < 500
