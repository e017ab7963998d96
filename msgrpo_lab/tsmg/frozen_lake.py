"""Frozen Lake as a text game: gymnasium's own maps and transition table under the TSMG interface."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

from msgrpo_lab.tsmg import lake as frozen_lake_text
from msgrpo_lab.tsmg.base import ObservationStyle, TextGame, real_number, truth, whole_number
from msgrpo_lab.tsmg.lake import Lake, lake, random_map


class FrozenLake(TextGame):
    """Cross a frozen lake on a random map.

    ## Description
    A player walks on a square grid of ice from the top left cell to the goal at the bottom right. Holes lie in the way.
    Map and dynamics are gymnasium's `generate_random_map` and `FrozenLakeEnv`; there is always a path.

    ## Action Space
    `Discrete(4)` in gymnasium's order: 0 Left, 1 Down, 2 Right, 3 Up; `None` is ⊥. On slippery ice the move goes where
    it was meant to with probability `success_rate`, and to either side with half of the rest.

    ## Observation Space
    `Text`. `compact`: the offset to the goal and the four neighbouring cells, one a line; a *partial* view, whose best
    memoryless player does not reach the game's optimum. `relative`: the same and every hole as an offset from the
    player; complete, and short. [D] `paper`: coordinates and the drawn grid; complete. [A]

    ## Rewards
    1 on reaching the goal, else 0. [A] `step` adds shaping by Φ = 1 − distance/(2(size − 1)), Manhattan distance to
    the goal, and subtracts the ⊥ penalty; info's `game_reward` has neither.

    ## Episode End
    Terminated at the goal (success) or in a hole; truncated after `horizon` turns.

    ## Arguments
    Keyword-only; out-of-range values raise `ValueError`.

    - `size`: rows and columns, 2 to 16.
    - `frozen_probability`: probability that a cell is ice, 0.5 to 1 (below, a map with a path may take for ever).
    - `slippery`: whether moves may slide.
    - `success_rate`: probability of an unslipped move, 0 to 1; without effect unless `slippery`.
    - `horizon`, `observation`, `invalid_penalty`, `fallback_action`, `shaping`, `shaping_gamma`: see `TextGame`.

    ## Version History
    - v0: initial version.
    """

    legal_actions: ClassVar[tuple[str, ...]] = ("Left", "Down", "Right", "Up")

    def __init__(
        self,
        *,
        size: int = 4,
        frozen_probability: float = 0.8,
        slippery: bool = False,
        success_rate: float = 1 / 3,
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
        self.size = whole_number("size", size, low=2, high=16)
        self.frozen_probability = real_number("frozen_probability", frozen_probability, low=0.5, high=1)
        self.slippery = truth("slippery", slippery)
        self.success_rate = real_number("success_rate", success_rate, low=0, high=1)
        if observation == "compact":
            self._rules = frozen_lake_text.compact_rules(slippery=slippery)
        elif observation == "relative":
            self._rules = frozen_lake_text.relative_rules(size=size, slippery=slippery)
        else:
            self._rules = frozen_lake_text.paper_rules(
                size=size, slippery=slippery, success_rate=success_rate, horizon=horizon
            )
        self._lake: Lake | None = None
        self.position = 0
        """The player's cell, row-major."""

    @property
    def lake(self) -> Lake:
        """The current map with its dynamics.

        Raises:
            RuntimeError: no episode was begun.
        """
        if self._lake is None:
            raise RuntimeError("lake: there is no map before reset(); call reset(seed=...) first")
        return self._lake

    @property
    def rules(self) -> str:
        """Static text of the scenario."""
        return self._rules

    def render_text(self) -> str:
        """The state in the chosen observation style."""
        return self.lake.texts(self.observation)[self.position]

    def state_key(self) -> Hashable:
        """The map's letters and the player's cell."""
        return (self.lake.key, self.position)

    def potential(self) -> float:
        """Φ = 1 − distance/(2(size − 1)); 0 in terminal states."""
        return self.lake.potentials[self.position]

    def _succeeded(self) -> bool:
        return self.position == self.lake.goal

    def _begin(self, seed: int) -> None:
        rows = random_map(self.size, self.frozen_probability, seed)
        self._lake = lake(rows, self.slippery, self.success_rate)
        self.position = self._lake.start

    def _advance(self, action: int) -> tuple[float, bool]:
        uniform = float(self.dynamics.random()) if self.slippery else 0.0
        _, self.position, reward, terminal = self.lake.draw(self.position, action, uniform)
        return reward, terminal

    def _get_state(self) -> Any:
        return (self.lake.rows, self.position)

    def _set_state(self, state: Any) -> None:
        rows, self.position = state
        self._lake = lake(rows, self.slippery, self.success_rate)

    def _settings(self) -> tuple[Hashable, ...]:
        return ("FrozenLake", self.size, self.slippery, self.success_rate, self.horizon)
