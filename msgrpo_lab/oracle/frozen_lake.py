"""Exact values of Frozen Lake by finite-horizon dynamic programming on the game's own transition table.

Success is reaching the goal within the horizon. The game's return is 1 on success and 0 otherwise, so every success
probability here is also the expected (unshaped, unpenalised) return. ⊥ is not part of it.

Axes: M maps of equal size, S states, A actions (Left, Down, Right, Up), T turns left (0 to the horizon), K mixes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import Lake

NUM_ACTIONS = 4
_STEPS = ((0, -1), (1, 0), (0, 1), (-1, 0))
_MIX_PARTS = 10


def has_oracle(game: Callable[..., object]) -> bool:
    """Whether the exact values of the games that this class makes are known: here, and of policies in `lake_values`."""
    return isinstance(game, type) and issubclass(game, FrozenLake)


@lru_cache(maxsize=4096)
def optimal_values(lake: Lake, horizon: int) -> Float[np.ndarray, "T S"]:
    """V*[t, s]: largest probability of reaching the goal from s with t turns left, for t = 0 to `horizon`.

    Bellman's recursion V*[t, s] = max_a Σ_s′ P(s′ | s, a) V*[t − 1, s′] with V*[0, s] = 1 at the goal, else 0.
    """
    value_S = _is_goal(lake)
    values = [value_S]
    for _ in range(horizon):
        value_S = (lake.move_ASS @ value_S).max(axis=0)
        values.append(value_S)
    value_TS = np.stack(values)
    value_TS.setflags(write=False)
    return value_TS


def optimal_success(game: FrozenLake) -> float:
    """Probability of success from the map's start under the best time-dependent play."""
    return float(optimal_values(game.lake, game.horizon)[game.horizon, game.lake.start])


def optimal_action(game: FrozenLake) -> int:
    """A best action in the game's current state with the turns it has left; ties go to the lowest index.

    Raises:
        ValueError: no turn is left, or the state is terminal.
    """
    left = game.horizon - game.steps
    if left < 1 or game.lake.is_terminal(game.position):
        raise ValueError(f"steps={game.steps}: the episode is over; ask for an action before its end")
    value_S = optimal_values(game.lake, game.horizon)[left - 1]
    # Rounding must not make two equally good actions differ, or the answer would depend on the order of summation.
    return int(np.argmax((game.lake.move_ASS[:, game.position] @ value_S).round(12)))


def policy_success(game: FrozenLake, action_prob_SA: Float[np.ndarray, "S A"]) -> float:
    """Probability of success from the map's start under a memoryless policy, by propagating the state distribution.

    Args:
        game: a game whose episode was begun; its map, slip and horizon count, its position does not.
        action_prob_SA: probability of each action in each state; rows of terminal states have no effect.

    Raises:
        ValueError: the shape is wrong, or a row is no distribution.
    """
    lake = game.lake
    check_distributions("action_prob_SA", action_prob_SA, (len(lake.letters), NUM_ACTIONS))
    move_SS = np.einsum("sa,ast->st", action_prob_SA, lake.move_ASS)
    occupancy_S = np.zeros(len(lake.letters))
    occupancy_S[lake.start] = 1.0
    for _ in range(game.horizon):
        occupancy_S = occupancy_S @ move_SS
    return float(occupancy_S[lake.goal])


def random_success(game: FrozenLake) -> float:
    """Probability of success when every action is equally likely."""
    return fixed_mix_success(game, np.full(NUM_ACTIONS, 1 / NUM_ACTIONS))


def fixed_mix_success(game: FrozenLake, mix_A: Float[np.ndarray, " A"]) -> float:
    """Probability of success of a player that ignores the prompt and draws every action from `mix_A`."""
    return policy_success(game, np.tile(mix_A, (len(game.lake.letters), 1)))


def hole_avoiding_policy(lake: Lake) -> Float[np.ndarray, "S A"]:
    """The memoryless reference that goes towards the goal and around adjacent holes, ties at random.

    Uniform over the moves that come closer to the goal and do not enter a hole; failing that, over the other moves to a
    cell that is no hole; failing that (an island), over all moves. It reads no more than the compact view shows, and
    takes no account of slipping.
    """
    policy_SA = np.zeros((len(lake.letters), NUM_ACTIONS))
    goal = divmod(lake.goal, lake.size)
    for state in range(len(lake.letters)):
        row, column = divmod(state, lake.size)
        closer, safe = [], []
        for action, (down, right) in enumerate(_STEPS):
            cell = (row + down, column + right)
            if not (0 <= cell[0] < lake.size and 0 <= cell[1] < lake.size) or lake.rows[cell[0]][cell[1]] == "H":
                continue
            safe.append(action)
            if abs(goal[0] - cell[0]) + abs(goal[1] - cell[1]) < abs(goal[0] - row) + abs(goal[1] - column):
                closer.append(action)
        chosen = closer or safe or list(range(NUM_ACTIONS))
        policy_SA[state, chosen] = 1 / len(chosen)
    return policy_SA


def hole_avoiding_success(game: FrozenLake) -> float:
    """Probability of success of `hole_avoiding_policy`."""
    return policy_success(game, hole_avoiding_policy(game.lake))


def best_fixed_mix(lakes: Sequence[Lake], horizon: int) -> tuple[Float[np.ndarray, " A"], float]:
    """The best prompt-ignoring player on these maps: the mix of actions with the highest mean success, and that mean.

    Grid search over all mixes in tenths (286 of them), on the very maps it is reported for: an upper end for players
    that ignore the prompt, up to the grid. Ties go to the first mix of the grid.
    """
    mix_KA = np.array(_compositions(_MIX_PARTS, NUM_ACTIONS), dtype=np.float64) / _MIX_PARTS
    total_K = np.zeros(len(mix_KA))
    for lake in lakes:
        value_SK = np.tile(_is_goal(lake)[:, None], (1, len(mix_KA)))
        for _ in range(horizon):
            value_SK = np.einsum("ka,ask->sk", mix_KA, lake.move_ASS @ value_SK)
        total_K += value_SK[lake.start]
    best = int(np.argmax(total_K.round(12)))
    return mix_KA[best], float(total_K[best] / len(lakes))


def _is_goal(lake: Lake) -> Float[np.ndarray, " S"]:
    value_S = np.zeros(len(lake.letters))
    value_S[lake.goal] = 1.0
    return value_S


def _compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of `parts` whole numbers ≥ 0."""
    if parts == 1:
        return [(total,)]
    return [(first, *rest) for first in range(total + 1) for rest in _compositions(total - first, parts - 1)]


def check_distributions(name: str, prob: Float[np.ndarray, ...], shape: tuple[int, ...]) -> None:
    """Raises `ValueError` unless `prob` has this shape and its last axis holds distributions (to 1e-6)."""
    if prob.shape != shape:
        raise ValueError(f"{name}: has shape {prob.shape}; must be {shape}")
    if not (prob >= 0).all() or not np.allclose(prob.sum(axis=-1), 1.0, atol=1e-6):
        raise ValueError(f"{name}: each row must be a distribution; make it non-negative and sum to 1")
