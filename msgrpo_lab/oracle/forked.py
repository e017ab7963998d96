"""Action values by forked continuations, for games whose values cannot be computed: Snake.

From one state every action is tried in several continuations. Continuation m meets the same chance events and the same
draws of the player under every action (common random numbers), so that what differs between two actions is due to the
actions. The noise that they share cancels in differences, which is what credit is made of.

Sources: Monte-Carlo values from a state, as VinePPO takes them for credit (arXiv 2410.01679); common random numbers,
Glasserman & Yao 1992. The draws stay aligned while the game makes equally many of them; where they part (Snake, after
something was eaten) variance is lost and nothing else.

Axes: A legal actions, N continuations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from msgrpo_lab.oracle.players import Player
from msgrpo_lab.tsmg.base import Snapshot, TextGame, stream

_GAME, _PLAYER = 0, 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ForkedValues:
    """Sampled returns from one state on, shaping and penalties included; column n of every row is continuation n."""

    return_AN: Float[np.ndarray, "A N"]  # noqa: N815  axis letters
    """Return of each continuation that begins with each legal action."""
    own_return_N: Float[np.ndarray, " N"]  # noqa: N815
    """Return of each continuation that begins with the player's own choice."""

    @property
    def value(self) -> tuple[float, float]:
        """V^π: mean and standard error."""
        mean, error = _mean_and_error(self.own_return_N)
        return float(mean), float(error)

    @property
    def action_value_A(self) -> tuple[Float[np.ndarray, " A"], Float[np.ndarray, " A"]]:  # noqa: N802
        """Q^π of each legal action: means and standard errors."""
        return _mean_and_error(self.return_AN)

    @property
    def advantage_A(self) -> tuple[Float[np.ndarray, " A"], Float[np.ndarray, " A"]]:  # noqa: N802
        """A^π = Q^π − V^π: means and standard errors of the paired differences."""
        return _mean_and_error(self.return_AN - self.own_return_N)

    @property
    def difference_AA(self) -> tuple[Float[np.ndarray, "A A"], Float[np.ndarray, "A A"]]:  # noqa: N802
        """Q^π(row) − Q^π(column): means and standard errors of the paired differences."""
        return _mean_and_error(self.return_AN[:, None] - self.return_AN[None, :])


def forked_values(
    game: TextGame,
    player: Player,
    rng: np.random.Generator,
    *,
    continuations: int,
    common_random_numbers: bool = True,
) -> ForkedValues:
    """Q^π of every legal action in the game's current state, by playing on. The game is left as it was.

    Args:
        game: in the state to judge, an episode that is not over.
        player: the policy π that plays on after the first action.
        rng: all chance; one number is drawn from it.
        continuations: N, a first action each; at least 2.
        common_random_numbers: whether continuation n meets the same chance under every action. False is there to
            measure what that is worth.

    Raises:
        ValueError: too few continuations, or the episode is over.
    """
    if continuations < 2:
        raise ValueError(f"continuations={continuations}: a standard error needs at least 2")
    snapshot = game.snapshot()
    if snapshot.over:
        raise ValueError(f"steps={game.steps}: the episode is over; fork a state before its end")
    entropy = int(rng.integers(2**63))
    actions = len(game.legal_actions)
    return_AN = np.empty((actions + 1, continuations))
    for number in range(continuations):
        for action in range(actions + 1):
            key = (number, 0) if common_random_numbers else (number, action)
            fork = replace(snapshot, dynamics_state=stream(entropy, _GAME, *key).bit_generator.state)
            first = None if action == actions else action
            return_AN[action, number] = _play_on(game, fork, player, stream(entropy, _PLAYER, *key), first)
    game.restore(snapshot)
    return ForkedValues(return_AN=return_AN[:-1], own_return_N=return_AN[-1])


def _play_on(game: TextGame, fork: Snapshot, player: Player, rng: np.random.Generator, first: int | None) -> float:
    """Return from `fork` on: `first`, or the player's own choice where it is None, and then the player."""
    game.restore(fork)
    # The player draws even where its choice is not asked for, so that its later draws are the same under every action.
    own = game.text_to_action(player(game, rng))
    action = own if first is None else first
    total, done = 0.0, False
    while not done:
        _, reward, terminated, truncated, _ = game.step(action)
        total += float(reward)
        done = terminated or truncated
        if not done:
            action = game.text_to_action(player(game, rng))
    return total


def _mean_and_error(
    sample: Float[np.ndarray, "*axes N"],
) -> tuple[Float[np.ndarray, "*axes"], Float[np.ndarray, "*axes"]]:
    """Mean over the last axis, and its standard error."""
    mean = sample.mean(axis=-1)
    return mean, sample.std(axis=-1, ddof=1) / np.sqrt(sample.shape[-1])
