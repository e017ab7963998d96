"""Snake's rules on hand-drawn boards: who dies, who grows, what appears where.

In drawings: `P` the player's head, `1 2 3 …` its body away from the head; `X` another snake's head, `a b c …` its body;
`Y` a third snake's head; `A` apple, `B` banana, `.` free.
"""

from __future__ import annotations

import numpy as np
import pytest

from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.tsmg.snake_rules import (
    Board,
    Cell,
    draw_moves,
    free_moves,
    initial_board,
    move_all,
    neighbours,
    replenish,
    threatened,
)

UP, DOWN, LEFT, RIGHT = range(4)


def draw(*rows: str) -> Board:
    """The board of a drawing."""
    found: dict[str, list[Cell]] = {}
    for row, line in enumerate(rows):
        for column, letter in enumerate(line):
            found.setdefault(letter, []).append((row, column))

    def body(letters: str) -> tuple[Cell, ...]:
        return tuple(found[letter][0] for letter in letters if letter in found)

    others = tuple(cells for cells in (body("Xabcde"), body("Y")) if cells)
    return Board(
        size=len(rows),
        player=body("P123456789"),
        others=others,
        apples=tuple(sorted(found.get("A", []))),
        bananas=tuple(sorted(found.get("B", []))),
    )


def test_the_drawing_is_read_as_meant() -> None:
    board = draw("P1..", "A2.X", ".B.a", "A..Y")
    assert board == Board(
        size=4,
        player=((0, 0), (0, 1), (1, 1)),
        others=(((1, 3), (2, 3)), ((3, 3),)),
        apples=((1, 0), (3, 0)),
        bananas=((2, 1),),
    )


@pytest.mark.parametrize(("move", "cell"), [(UP, (0, 1)), (DOWN, (2, 1)), (LEFT, (1, 0)), (RIGHT, (1, 2))])
def test_a_move_shifts_the_head_by_one_cell(move: int, cell: Cell) -> None:
    assert move_all(draw("...", ".P.", "..."), move, []).board.player == (cell,)


@pytest.mark.parametrize(
    ("rows", "move"),
    [
        (("P..", "...", "..."), UP),
        (("P..", "...", "..."), LEFT),
        (("...", "...", "..P"), DOWN),
        (("...", "...", "..P"), RIGHT),
    ],
)
def test_the_wall_kills(rows: tuple[str, ...], move: int) -> None:
    moved = move_all(draw(*rows), move, [])
    assert moved.board.player == ()
    assert not moved.ate_apple


def test_the_body_follows_the_head() -> None:
    board = move_all(draw("....", ".P12", "....", "...."), LEFT, []).board
    assert board == draw("....", "P12.", "....", "....")


def test_own_neck_kills_a_snake_of_three() -> None:
    assert move_all(draw("....", ".P12", "....", "...."), RIGHT, []).board.player == ()


def test_own_body_kills_further_back() -> None:
    # 5 has a cell behind it, so it stays occupied: 4 → 5's place is not the tail's.
    board = draw("....", ".P1.", ".32.", ".45.")
    assert move_all(board, DOWN, []).board.player == ()


def test_a_snake_of_two_may_turn_round() -> None:
    # The tail leaves the cell in the very turn in which the head enters it.
    assert move_all(draw("...", "P1.", "..."), RIGHT, []).board.player == ((1, 1), (1, 0))


def test_own_tail_cell_is_free_because_the_tail_moves() -> None:
    board = move_all(draw("P1", "32"), DOWN, []).board
    assert board.player == ((1, 0), (0, 0), (0, 1), (1, 1))


def test_eating_grows_by_one_and_keeps_the_tail() -> None:
    moved = move_all(draw("....", "AP12", "....", "...."), LEFT, [])
    assert moved.board.player == ((1, 0), (1, 1), (1, 2), (1, 3))
    assert moved.board.apples == ()
    assert moved.ate_apple
    assert not moved.ate_banana


def test_growth_happens_once() -> None:
    board = move_all(draw("....", ".AP.", "....", "...."), LEFT, []).board
    assert len(board.player) == 2
    assert len(move_all(board, LEFT, []).board.player) == 2


def test_a_banana_is_no_apple() -> None:
    moved = move_all(draw("...", "BP.", "..A"), LEFT, [])
    assert moved.ate_banana
    assert not moved.ate_apple
    assert moved.board.bananas == ()
    assert moved.board.apples == ((2, 2),)


def test_another_body_kills() -> None:
    board = move_all(draw("....", ".PaX", "..b.", "..c."), RIGHT, [UP]).board
    assert board.player == ()
    assert board.others == (((0, 3), (1, 3), (1, 2), (2, 2)),)


def test_another_tail_that_moves_away_does_not_kill() -> None:
    board = move_all(draw("....", ".PaX", "....", "...."), RIGHT, [UP]).board
    assert board.player == ((1, 2),)
    assert board.others == (((0, 3), (1, 3)),)


def test_another_tail_that_stays_because_its_owner_ate_kills() -> None:
    board = move_all(draw("...A", ".PaX", "....", "...."), RIGHT, [UP]).board
    assert board.player == ()
    assert board.others == (((0, 3), (1, 3), (1, 2)),)
    assert board.apples == ()


def test_two_heads_into_one_cell_both_die() -> None:
    board = move_all(draw("...", "P.X", "..."), RIGHT, [LEFT]).board
    assert board.player == ()
    assert board.others == ()


def test_two_heads_into_one_apple_both_die_and_the_apple_stays() -> None:
    moved = move_all(draw("...", "PAX", "..."), RIGHT, [LEFT])
    assert moved.board.player == ()
    assert moved.board.others == ()
    assert moved.board.apples == ((1, 1),)
    assert not moved.ate_apple


def test_three_heads_into_one_cell_all_die() -> None:
    board = move_all(draw(".Y.", "P.X", "..."), RIGHT, [LEFT, DOWN]).board
    assert (board.player, board.others) == ((), ())


@pytest.mark.parametrize(
    "rows",
    [
        ("....", ".PX.", "....", "...."),  # one against one
        ("....", "1PX.", "....", "...."),  # two against one
        ("....", ".PXa", "....", "...."),  # one against two
        ("....", "1PXa", "....", "...."),  # two against two
    ],
)
def test_heads_that_change_places_both_die_at_any_length(rows: tuple[str, ...]) -> None:
    board = move_all(draw(*rows), RIGHT, [LEFT]).board
    assert (board.player, board.others) == ((), ())


def test_following_another_head_into_its_cell_is_safe() -> None:
    board = move_all(draw("....", ".PX.", "....", "...."), RIGHT, [RIGHT]).board
    assert board.player == ((1, 2),)
    assert board.others == (((1, 3),),)


def test_another_head_that_ate_leaves_its_tail_behind() -> None:
    # A snake of length one that eats keeps its only cell as tail: entering it is deadly.
    board = move_all(draw("....", ".PXA", "....", "...."), RIGHT, [RIGHT]).board
    assert board.player == ()
    assert board.others == (((1, 3), (1, 2)),)


def test_a_snake_dead_of_the_wall_is_no_obstacle_in_that_turn() -> None:
    # X leaves the board; its body, which would have covered the cell, is gone at once (SnakeBench's order).
    board = move_all(draw("...X", "..Pa", "...b", "...."), RIGHT, [UP]).board
    assert board.player == ((1, 3),)
    assert board.others == ()


def test_a_snake_dead_of_a_body_is_an_obstacle_in_that_turn() -> None:
    # X runs into its own neck a and dies, yet its old head cell, now its moved body, still kills P.
    board = move_all(draw("....", ".P..", ".Xa.", "..b."), DOWN, [RIGHT]).board
    assert (board.player, board.others) == ((), ())


def test_simultaneous_body_deaths() -> None:
    # P's head enters X's body and X's head enters P's body in the same turn.
    board = Board(
        size=5,
        player=((2, 1), (1, 1), (1, 2), (1, 3)),
        others=(((2, 3), (3, 3), (3, 2), (3, 1), (2, 2), (4, 4)),),
        apples=(),
        bananas=(),
    )
    moved = move_all(board, RIGHT, [UP])
    # P → (2, 2), where X's body still is; X → (1, 3), P's vacated tail: X lives.
    assert moved.board.player == ()
    assert moved.board.others[0][0] == (1, 3)
    longer = Board(size=5, player=(*board.player, (0, 3)), others=board.others, apples=(), bananas=())
    both = move_all(longer, RIGHT, [UP])
    assert (both.board.player, both.board.others) == ((), ())


def test_another_snake_can_die_while_the_player_lives() -> None:
    board = move_all(draw("X..", "...", "..P"), UP, [UP]).board
    assert board.player == ((1, 2),)
    assert board.others == ()


def test_another_snake_eats_without_reward_for_the_player() -> None:
    moved = move_all(draw("XA.", "...", "..P"), UP, [RIGHT])
    assert moved.board.others == (((0, 1), (0, 0)),)
    assert moved.board.apples == ()
    assert not moved.ate_apple


def test_each_other_snake_gets_its_own_move() -> None:
    with pytest.raises(ValueError, match="zip"):
        move_all(draw("X..", "...", "..P"), UP, [])


def test_a_new_item_of_the_same_kind_appears_on_a_free_cell() -> None:
    board = draw("PA", "B.")
    for seed in range(20):
        # One cell is free, so the place is known.
        missing = Board(size=2, player=board.player, others=(), apples=(), bananas=board.bananas)
        new = replenish(missing, 2, 1, np.random.default_rng(seed))
        assert set(new.apples) == {(0, 1), (1, 1)}
        assert new.bananas == ((1, 0),)


def test_new_items_land_on_every_free_cell_equally_often() -> None:
    board = draw("P1.", "X.A", "a..")
    free = {(0, 2), (1, 1), (2, 1), (2, 2)}
    rng = np.random.default_rng(0)
    counts = dict.fromkeys(free, 0)
    for _ in range(2000):
        (new,) = set(replenish(board, 2, 0, rng).apples) - {(1, 2)}
        counts[new] += 1
    assert all(abs(count - 500) < 100 for count in counts.values()), counts


def test_both_kinds_are_replenished_at_once() -> None:
    new = replenish(draw("P..", "...", "..."), 3, 2, np.random.default_rng(0))
    assert (len(new.apples), len(new.bananas)) == (3, 2)
    assert len({*new.apples, *new.bananas, *new.player}) == 6
    assert new.apples == tuple(sorted(new.apples))


def test_a_full_board_is_left_as_it_is() -> None:
    board = draw("P1", "X2")
    assert replenish(board, 1, 1, np.random.default_rng(0)) == board


def test_nothing_missing_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    replenish(draw("PA", ".."), 1, 0, rng)
    assert rng.bit_generator.state == before


@pytest.mark.parametrize(
    ("rows", "moves"),
    [
        (("X..", "...", "..P"), [DOWN, RIGHT]),
        (("Xa.", ".b.", "..P"), [DOWN]),
        (("Xa.", "...", "..P"), [DOWN, RIGHT]),  # its tail moves away
        (("...", ".X.", "..P"), [UP, DOWN, LEFT, RIGHT]),
    ],
)
def test_other_snakes_may_move_where_neither_wall_nor_own_body_is(rows: tuple[str, ...], moves: list[int]) -> None:
    board = draw(*rows)
    assert free_moves(board.others[0], board.size) == moves
    rng = np.random.default_rng(1)
    drawn = [draw_moves(board, rng)[0] for _ in range(200)]
    assert set(drawn) == set(moves)


def test_other_snakes_walk_into_the_player() -> None:
    """They avoid walls and themselves, nothing else."""
    assert RIGHT in free_moves(draw("XP.", "...", "...").others[0], 3)


def test_a_trapped_snake_moves_anywhere_and_dies() -> None:
    board = Board(size=3, player=((2, 2),), others=(((0, 0), (0, 1), (1, 1), (1, 0), (2, 0)),), apples=(), bananas=())
    assert free_moves(board.others[0], 3) == []
    rng = np.random.default_rng(0)
    assert {draw_moves(board, rng)[0] for _ in range(100)} == {UP, DOWN, LEFT, RIGHT}
    for move in range(4):
        assert move_all(board, LEFT, [move]).board.others == ()


@pytest.mark.parametrize(
    ("rows", "cells"),
    [
        (("X..", "...", "..P"), {(1, 0), (0, 1)}),
        (("Xa.", ".b.", "..P"), {(1, 0)}),
        (("...", "..P", "..."), set()),
        (("X.Y", "...", "..P"), {(0, 1), (1, 0), (1, 2)}),
    ],
)
def test_threatened_cells(rows: tuple[str, ...], cells: set[Cell]) -> None:
    assert threatened(draw(*rows)) == cells


def test_neighbours_are_in_the_order_of_the_actions() -> None:
    assert neighbours((1, 1), 3) == ((0, 1), (2, 1), (1, 0), (1, 2))
    assert neighbours((0, 0), 3) == (None, (1, 0), None, (0, 1))
    assert neighbours((2, 2), 3) == ((1, 2), None, (2, 1), None)


@pytest.mark.parametrize("seed", range(10))
def test_initial_board_has_everything_on_distinct_cells(seed: int) -> None:
    board = initial_board(seed, 4, 5, 3, 2)
    cells = [*board.player, *(cell for body in board.others for cell in body), *board.apples, *board.bananas]
    assert len(cells) == len(set(cells)) == 1 + 2 + 5 + 3
    assert all(len(body) == 1 for body in (board.player, *board.others))
    assert all(0 <= row < 4 and 0 <= column < 4 for row, column in cells)


def test_initial_places_are_spread_over_the_board() -> None:
    heads = {initial_board(seed, 4, 1, 0, 0).player[0] for seed in range(300)}
    assert len(heads) == 16


# The game on top of the rules ---------------------------------------------------------------------------------------


def at(board: Board, **arguments: object) -> Snake:
    """A game in the position of `board`."""
    game = Snake(
        **{
            "size": board.size,
            "num_apples": len(board.apples),
            "num_bananas": len(board.bananas),
            "other_snakes": len(board.others),
            "shaping": 0.0,
            **arguments,
        }
    )
    game.reset(seed=0)
    game._set_state(board)
    return game


def test_eating_an_apple_pays_and_another_appears() -> None:
    game = at(draw("...", "PA.", "..."), apple_reward=1.0)
    _, reward, terminated, _, info = game.step(RIGHT)
    assert (reward, info["game_reward"], terminated) == (1.0, 1.0, False)
    assert game.board.player == ((1, 1), (1, 0))
    assert len(game.board.apples) == 1
    assert game.board.apples[0] not in game.board.player


def test_poison_costs_and_still_grows() -> None:
    game = at(draw("...", "PA.", "..."), apple_reward=-1.0)
    assert game.step(RIGHT)[1] == -1.0
    assert len(game.board.player) == 2


def test_banana_pays_its_own_reward() -> None:
    game = at(draw("...", "PB.", "..A"), apple_reward=-1.0, banana_reward=0.5)
    assert game.step(RIGHT)[1] == 0.5
    assert (len(game.board.apples), len(game.board.bananas)) == (1, 1)


def test_a_plain_step_pays_nothing() -> None:
    assert at(draw("...", "P..", "..A")).step(RIGHT)[1] == 0.0


def test_death_pays_its_reward_ends_the_episode_and_is_no_success() -> None:
    game = at(draw("...", "P..", "..A"), death_reward=-2.0)
    text, reward, terminated, truncated, info = game.step(LEFT)
    assert (reward, terminated, truncated, info["success"]) == (-2.0, True, False, False)
    assert text == "You are dead."
    assert game.potential() == 0.0


def test_dying_on_the_last_turn_is_no_success() -> None:
    game = at(draw("...", "P..", "..A"), horizon=1)
    _, _, terminated, truncated, info = game.step(LEFT)
    assert (terminated, truncated, info["success"]) == (True, False, False)


def test_being_alive_at_the_horizon_is_success() -> None:
    game = at(draw("...", "P..", "..A"), horizon=2)
    assert game.step(RIGHT)[4]["success"] is False
    _, _, terminated, truncated, info = game.step(LEFT)
    assert (terminated, truncated, info["success"]) == (False, True, True)


def test_the_game_goes_on_without_other_snakes() -> None:
    # X is walled in: up and left are walls, down and right its body. It dies whatever it does.
    board = Board(size=3, player=((2, 2),), others=(((0, 0), (0, 1), (1, 1), (1, 0), (2, 0)),), apples=(), bananas=())
    game = at(board, horizon=5)
    _, _, terminated, _, _ = game.step(UP)
    assert not terminated
    assert game.board.others == ()
    assert game.step(DOWN)[2] is False


def test_potential_is_the_distance_to_the_nearest_good_item() -> None:
    # Nearest apple 2 moves away on a board whose furthest distance is 2·(4 − 1) = 6.
    game = at(draw("P...", "....", "A..A", "...."), shaping=1.0)
    assert game.potential() == pytest.approx(1 - 2 / 6)
    # One step nearer: Φ rises by 1/6, and that is the whole reward.
    game._potential = game.potential()
    assert game.step(DOWN)[1] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("apple_reward", "banana_reward", "expected"),
    [(1.0, 1.0, 1 - 1 / 4), (-1.0, 1.0, 1 - 3 / 4), (1.0, -1.0, 1 - 1 / 4), (-1.0, -1.0, 0.0), (0.0, 1.0, 1 - 3 / 4)],
)
def test_potential_counts_good_items_only(apple_reward: float, banana_reward: float, expected: float) -> None:
    game = at(draw("PA.", "..B", "..."), apple_reward=apple_reward, banana_reward=banana_reward)
    assert game.potential() == pytest.approx(expected)


def test_state_key_ignores_the_order_of_the_other_snakes() -> None:
    game = at(draw("X.Y", "...", "P.."))
    key = game.state_key()
    board = game.board
    game._set_state(
        Board(size=3, player=board.player, others=board.others[::-1], apples=board.apples, bananas=board.bananas)
    )
    assert game.state_key() == key


def test_board_before_reset_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"reset\(seed"):
        _ = Snake().board


def test_too_small_a_board_is_told() -> None:
    with pytest.raises(ValueError, match=r"env\.size=2: too small for 7 items and snakes"):
        Snake(size=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_apples", -1),
        ("num_bananas", 1.5),
        ("other_snakes", -1),
        ("death_reward", 0.5),
        ("apple_reward", float("nan")),
        ("banana_reward", "1"),
    ],
)
def test_mistaken_snake_argument_is_told_in_one_line(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"env\.{key}={value!r}: must be [^\n]*$"):
        Snake(**{key: value})
