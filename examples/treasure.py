"""Treasure as a text game: walk to a treasure on an open field."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

from msgrpo_lab.tsmg.base import LAYOUT_STREAM, ObservationStyle, TextGame, stream, whole_number

_STEPS = ((-1, 0), (1, 0), (0, -1), (0, 1))


class Treasure(TextGame):
    """Walk to the treasure.

    ## Description
    A player and a treasure stand on random cells of an open square field.

    ## Action Space
    `Discrete(4)`: 0 Up, 1 Down, 2 Left, 3 Right; `None` is ⊥. A move off the field changes nothing.

    ## Observation Space
    `Text`. `compact`: the offset and the four neighbouring cells. `paper` and `relative`: both coordinates; complete.

    ## Rewards
    1 on reaching the treasure, else 0; shaping by Φ = 1 − distance/(2(size − 1)).

    ## Episode End
    Terminated at the treasure (success); truncated after `horizon` turns.

    ## Arguments
    `size`: rows and columns, 2 to 16. The others: see `TextGame`.

    ## Version History
    - v0: initial version.
    """

    legal_actions: ClassVar[tuple[str, ...]] = ("Up", "Down", "Left", "Right")

    def __init__(
        self,
        *,
        size: int = 5,
        horizon: int = 12,
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
        self.player = self.treasure = (0, 0)

    @property
    def rules(self) -> str:
        """Static text of the scenario."""
        if self.observation == "compact":
            return "Reach the goal."
        actions = "\n".join(f"- {word}: move one cell" for word in self.legal_actions)
        return f"Walk to the treasure. (0, 0) is the top left cell.\n{actions}\nYou have at most {self.horizon} moves."

    def render_text(self) -> str:
        """The state in the chosen observation style."""
        if self.observation != "compact":
            return f"Player: {self.player}\nTreasure: {self.treasure}"
        down, right = self.treasure[0] - self.player[0], self.treasure[1] - self.player[1]
        cells = [f"{word}: {self._cell(move)}" for move, word in enumerate(self.legal_actions)]
        return "\n".join([f"Goal: {down} down and {right} right", *cells])

    def state_key(self) -> Hashable:
        """Both cells."""
        return (self.player, self.treasure)

    def potential(self) -> float:
        """Φ = 1 − distance/(2(size − 1)); 0 at the treasure, which is terminal."""
        distance = sum(abs(a - b) for a, b in zip(self.player, self.treasure, strict=True))
        return 1 - distance / (2 * (self.size - 1)) if distance else 0.0

    def _succeeded(self) -> bool:
        return self.player == self.treasure

    def _begin(self, seed: int) -> None:
        cells = stream(seed, LAYOUT_STREAM).permutation(self.size**2)[:2].tolist()
        self.player, self.treasure = (divmod(cell, self.size) for cell in cells)

    def _advance(self, action: int) -> tuple[float, bool]:
        self.player = self._after(action) or self.player
        return float(self._succeeded()), self._succeeded()

    def _get_state(self) -> Any:
        return (self.player, self.treasure)

    def _set_state(self, state: Any) -> None:
        self.player, self.treasure = state

    def _settings(self) -> tuple[Hashable, ...]:
        return ("Treasure", self.size, self.horizon)

    def _after(self, action: int) -> tuple[int, int] | None:
        row, column = self.player[0] + _STEPS[action][0], self.player[1] + _STEPS[action][1]
        return (row, column) if 0 <= row < self.size and 0 <= column < self.size else None

    def _cell(self, action: int) -> str:
        after = self._after(action)
        return "wall" if after is None else "goal" if after == self.treasure else "free"
