"""Snake as a text game: several snakes that move at once, apples, bananas and poison."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

from msgrpo_lab.tsmg import snake_rules as snake_text
from msgrpo_lab.tsmg.base import ObservationStyle, TextGame, real_number, whole_number
from msgrpo_lab.tsmg.snake_rules import Board, Menu, distance, draw_moves, initial_board, move_all, replenish


class Snake(TextGame):
    """Eat what is good, avoid what is not, stay alive.

    ## Description
    The player's snake shares a square board with other snakes that move at random, though not into walls or themselves
    while they can help it. [A] All snakes start with length one on random cells, as in SnakeBench; all move at once.
    Who dies when is said in `msgrpo_lab.tsmg.snake_rules`. The game goes on when the other snakes are dead. [D]

    ## Action Space
    `Discrete(4)`: 0 Up, 1 Down, 2 Left, 3 Right; `None` is ⊥.

    ## Observation Space
    `Text`. `compact`: direction of the nearest good item and the four neighbouring cells, one a line; a *partial* view
    with some hundreds of distinct texts. `relative`: the same, and walls, snakes and items as offsets from the head;
    complete. [D] `paper`: coordinates and the drawn grid; complete. [A]

    ## Rewards
    `apple_reward` or `banana_reward` for eating (the snake grows by one, a new item of that kind appears on a random
    free cell), `death_reward` for dying, else 0. [A] `step` adds shaping by Φ = 1 − distance/(2(size − 1)), Manhattan
    distance to the nearest good item (0 if nothing is good), and subtracts the ⊥ penalty; info's `game_reward` has
    neither. Eating moves the nearest item, so Φ jumps; it is a potential all the same.

    ## Episode End
    Terminated by the player's death; truncated after `horizon` turns. Success is being alive at the horizon.

    ## Arguments
    Keyword-only; out-of-range values raise `ValueError`.

    - `size`: rows and columns, 2 to 20.
    - `num_apples`, `num_bananas`: items kept on the board; at least 0.
    - `apple_reward`, `banana_reward`: reward of eating one; negative is poison.
    - `death_reward`: reward of dying; at most 0.
    - `other_snakes`: at least 0.
    - `horizon`, `observation`, `invalid_penalty`, `fallback_action`, `shaping`, `shaping_gamma`: see `TextGame`.

    ## Version History
    - v0: initial version.
    """

    legal_actions: ClassVar[tuple[str, ...]] = snake_text.WORDS

    def __init__(
        self,
        *,
        size: int = 10,
        num_apples: int = 5,
        num_bananas: int = 0,
        apple_reward: float = 1.0,
        banana_reward: float = 1.0,
        death_reward: float = -1.0,
        other_snakes: int = 1,
        horizon: int = 8,
        observation: ObservationStyle = "compact",
        invalid_penalty: float = 1.0,
        fallback_action: str = "random",
        shaping: float = 0.1,
        shaping_gamma: float = 1.0,
    ) -> None:
        """Check and keep the arguments."""
        super().__init__(
            horizon=horizon,
            observation=observation,
            invalid_penalty=invalid_penalty,
            fallback_action=fallback_action,
            shaping=shaping,
            shaping_gamma=shaping_gamma,
        )
        self.size = whole_number("size", size, low=2, high=20)
        self.num_apples = whole_number("num_apples", num_apples, low=0)
        self.num_bananas = whole_number("num_bananas", num_bananas, low=0)
        self.other_snakes = whole_number("other_snakes", other_snakes, low=0)
        self.death_reward = real_number("death_reward", death_reward, high=0)
        self.menu = Menu(
            apple_reward=real_number("apple_reward", apple_reward),
            banana_reward=real_number("banana_reward", banana_reward),
        )
        needed = num_apples + num_bananas + 1 + other_snakes
        if needed > size * size:
            raise ValueError(f"env.size={size}: too small for {needed} items and snakes; make it larger")
        if observation == "compact":
            self._rules = snake_text.compact_rules(self.menu, num_apples=num_apples, num_bananas=num_bananas)
        elif observation == "relative":
            self._rules = snake_text.relative_rules(
                self.menu, size=size, num_apples=num_apples, num_bananas=num_bananas, other_snakes=other_snakes
            )
        else:
            self._rules = snake_text.paper_rules(
                self.menu,
                size=size,
                num_apples=num_apples,
                num_bananas=num_bananas,
                other_snakes=other_snakes,
                death_reward=self.death_reward,
                horizon=horizon,
            )
        self._board: Board | None = None

    @property
    def board(self) -> Board:
        """The current position.

        Raises:
            RuntimeError: no episode was begun.
        """
        if self._board is None:
            raise RuntimeError("board: there is no position before reset(); call reset(seed=...) first")
        return self._board

    @property
    def rules(self) -> str:
        """Static text of the scenario."""
        return self._rules

    def render_text(self) -> str:
        """The state in the chosen observation style."""
        if self.observation == "compact":
            return snake_text.compact_state(self.board, self.menu)
        if self.observation == "relative":
            return snake_text.relative_state(self.board, self.menu)
        return snake_text.paper_state(self.board)

    def state_key(self) -> Hashable:
        """Size, snakes and items; the order of the other snakes does not matter."""
        board = self.board
        return (board.size, board.player, tuple(sorted(board.others)), board.apples, board.bananas)

    def potential(self) -> float:
        """Φ = 1 − distance/(2(size − 1)) to the nearest good item; 0 if there is none, and in terminal states."""
        board = self.board
        nearest = self.menu.nearest_good(board) if board.player else None
        if nearest is None:
            return 0.0
        return 1 - distance(board.player[0], nearest[1]) / (2 * (self.size - 1))

    def _succeeded(self) -> bool:
        return bool(self.board.player) and self.steps >= self.horizon

    def _begin(self, seed: int) -> None:
        self._board = initial_board(seed, self.size, self.num_apples, self.num_bananas, self.other_snakes)

    def _advance(self, action: int) -> tuple[float, bool]:
        moved = move_all(self.board, action, draw_moves(self.board, self.dynamics))
        if not moved.board.player:
            self._board = moved.board
            return self.death_reward, True
        self._board = replenish(moved.board, self.num_apples, self.num_bananas, self.dynamics)
        return self.menu.apple_reward * moved.ate_apple + self.menu.banana_reward * moved.ate_banana, False

    def _get_state(self) -> Any:
        return self.board

    def _set_state(self, state: Any) -> None:
        self._board = state

    def _settings(self) -> tuple[Hashable, ...]:
        return (
            "Snake",
            self.size,
            self.num_apples,
            self.num_bananas,
            self.menu,
            self.death_reward,
            self.horizon,
        )
