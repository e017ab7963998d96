"""What holds in every position that Snake can reach, whatever is played."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msgrpo_lab.oracle.players import SearchPlayer
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.tsmg.snake_rules import Board, draw_moves, free_moves, move_all, neighbours

SEEDS = st.integers(0, 10_000)
ACTIONS = st.lists(st.integers(0, 3), min_size=1, max_size=25)


@st.composite
def games(draw: st.DrawFn) -> Snake:
    """Small crowded boards, so that eating, growing and dying happen often."""
    return Snake(
        size=draw(st.integers(5, 7)),  # room enough that no board fills up
        num_apples=draw(st.integers(0, 4)),
        num_bananas=draw(st.integers(0, 3)),
        other_snakes=draw(st.integers(0, 3)),
        apple_reward=draw(st.sampled_from([-1.0, 1.0])),
        horizon=25,
        shaping=0.0,
    )


def visited(game: Snake, seed: int, member: int, actions: list[int]) -> list[tuple[Board, dict[str, Any], float, bool]]:
    """Board after each turn, with info, reward and whether the player died."""
    game.reset(seed=seed, options={"member": member})
    record = []
    for action in actions:
        _, reward, terminated, truncated, info = game.step(action)
        record.append((game.board, info, reward, terminated))
        if terminated or truncated:
            break
    return record


@settings(max_examples=150, deadline=None)
@given(games(), SEEDS, st.integers(0, 50), ACTIONS)
def test_every_position_is_well_formed(game: Snake, seed: int, member: int, actions: list[int]) -> None:
    for board, _, _, _ in visited(game, seed, member, actions):
        snakes = [cell for body in (board.player, *board.others) for cell in body]
        items = [*board.apples, *board.bananas]
        assert len(snakes) == len(set(snakes)), "no cell belongs to two snakes, or twice to one"
        assert len(items) == len(set(items))
        assert not set(items) & set(snakes), "an item lies on a free cell"
        assert all(0 <= row < board.size and 0 <= column < board.size for row, column in [*snakes, *items])
        for body in (board.player, *board.others):
            for (row, column), (next_row, next_column) in itertools.pairwise(body):
                assert abs(row - next_row) + abs(column - next_column) == 1, "a body is connected"


@settings(max_examples=150, deadline=None)
@given(games(), SEEDS, ACTIONS)
def test_item_counts_are_constant_while_the_player_lives(game: Snake, seed: int, actions: list[int]) -> None:
    for board, _, _, died in visited(game, seed, 0, actions):
        if not died:
            assert len(board.apples) == game.num_apples
            assert len(board.bananas) == game.num_bananas


@settings(max_examples=150, deadline=None)
@given(games(), SEEDS, ACTIONS)
def test_length_counts_what_was_eaten_and_the_return_adds_up(game: Snake, seed: int, actions: list[int]) -> None:
    game.reset(seed=seed)
    length, total = 1, 0.0
    for board, info, reward, died in visited(game, seed, 0, actions):
        assert reward == info["game_reward"]
        if died:
            assert reward == game.death_reward
            assert board.player == ()
        else:
            assert reward in (0.0, game.menu.apple_reward, game.menu.banana_reward)
            assert len(board.player) == length + (reward != 0.0)
            length = len(board.player)
            total += abs(reward)
    assert length == 1 + total, "all items here are worth ±1"


@settings(max_examples=150, deadline=None)
@given(games(), SEEDS, ACTIONS)
def test_other_snakes_never_grow_in_number_nor_shrink_in_length(game: Snake, seed: int, actions: list[int]) -> None:
    game.reset(seed=seed)
    before = game.board.others
    for board, _, _, _ in visited(game, seed, 0, actions):
        assert len(board.others) <= len(before)
        assert sum(map(len, board.others)) <= sum(map(len, before)) + len(board.others)
        before = board.others


@settings(max_examples=100, deadline=None)
@given(games(), SEEDS, ACTIONS, st.integers(0, 2**32 - 1))
def test_player_and_other_snakes_are_treated_alike(game: Snake, seed: int, actions: list[int], draws: int) -> None:
    """Swapping the roles of the player and another snake swaps who dies and who grows, and nothing else."""
    rng = np.random.default_rng(draws)
    visited(game, seed, 0, actions)
    board = game.board
    if not board.player or not board.others:
        return
    move, others = int(rng.integers(4)), draw_moves(board, rng)
    swapped = Board(
        size=board.size,
        player=board.others[0],
        others=(board.player, *board.others[1:]),
        apples=board.apples,
        bananas=board.bananas,
    )
    first = move_all(board, move, others).board
    second = move_all(swapped, others[0], [move, *others[1:]]).board
    assert {body for body in (first.player, *first.others) if body} == {
        body for body in (second.player, *second.others) if body
    }
    assert (first.apples, first.bananas) == (second.apples, second.bananas)


@settings(max_examples=100, deadline=None)
@given(games(), SEEDS, ACTIONS)
def test_a_move_to_a_cell_that_reads_free_is_survived(game: Snake, seed: int, actions: list[int]) -> None:
    """The compact view's words are promises: `free` is survived whatever the others do, `wall` and `body` are not."""
    game.reset(seed=seed)
    for action in actions:
        words = [line.split(": ")[1] for line in game.render_text().splitlines()[1:]]
        _, reward, terminated, truncated, _ = game.step(action)
        if words[action] == "free":
            assert not terminated
            assert reward == 0.0
        if words[action] in ("wall", "body"):
            assert terminated
        if terminated or truncated:
            break


@settings(max_examples=60, deadline=None)
@given(games(), SEEDS, st.integers(0, 2**32 - 1))
def test_search_player_never_walks_into_certain_death_where_it_can_live(game: Snake, seed: int, draws: int) -> None:
    rng = np.random.default_rng(draws)
    game.reset(seed=seed)
    done = False
    while not done:
        board = game.board
        action = game.text_to_action(SearchPlayer()(game, rng))
        assert action is not None
        if free_moves(board.player, board.size):
            cell = neighbours(board.player[0], board.size)[action]
            blocked = {cell for body in board.others for cell in body}
            open_moves = [
                move
                for move in free_moves(board.player, board.size)
                if neighbours(board.player[0], board.size)[move] not in blocked
            ]
            if open_moves:
                assert action in open_moves
                assert cell is not None
        _, _, terminated, truncated, _ = game.step(action)
        done = terminated or truncated


@pytest.mark.parametrize("count", [1, 3])
def test_other_snakes_hit_no_wall_and_not_themselves(count: int) -> None:
    """Alone with an absent-minded player, an untrapped snake only dies of others."""
    for seed in range(30):
        game = Snake(size=8, num_apples=2, other_snakes=count, horizon=30)
        game.reset(seed=seed)
        rng = np.random.default_rng(seed)
        for _ in range(30):
            board = game.board
            moves = draw_moves(board, rng)
            for body, move in zip(board.others, moves, strict=True):
                cell = neighbours(body[0], board.size)[move]
                if free_moves(body, board.size):
                    assert cell is not None
                    assert cell not in body[:-1]
            if game.step(int(rng.integers(4)))[2]:
                break
