"""Exact values of any policy on Frozen Lake: what credit is assigned from, to the last term.

Finite-horizon dynamic programming on the game's own transition table, for the reward that `TextGame.step` pays: game
reward, shaping and ⊥ penalty, with the game's fallback action (paper section 1; Bellman's recursion). Time counts turns
taken; the horizon ends the game.

Axes: M maps of equal size, T turns (0 to horizon − 1), S states, A legal actions, B = A + 1 answers, the last one ⊥.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.oracle.frozen_lake import NUM_ACTIONS, check_distributions
from msgrpo_lab.tsmg import lake as lake_tables
from msgrpo_lab.tsmg.base import ObservationStyle
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import Lake

INVALID = NUM_ACTIONS
"""Column of ⊥ among the answers."""
NUM_ANSWERS = NUM_ACTIONS + 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LakeModel:
    """Some maps under the rules of one scenario: where a move leads, and what it pays."""

    lakes: tuple[Lake, ...]
    horizon: int
    invalid_penalty: float
    move_MSAS: Float[np.ndarray, "M S A S"]  # noqa: N815  axis letters
    """Probability of the next state when a legal action is executed; holes and the goal keep to themselves."""
    reward_MSA: Float[np.ndarray, "M S A"]  # noqa: N815
    """Expected reward of executing a legal action, shaping included; 0 in holes and at the goal."""
    fallback_A: Float[np.ndarray, " A"]  # noqa: N815
    """Probability of each action to be executed with ⊥."""
    open_MS: Bool[np.ndarray, "M S"]  # noqa: N815
    """States in which a turn can be taken: neither hole nor goal."""
    start_M: Int[np.ndarray, " M"]  # noqa: N815
    goal_M: Int[np.ndarray, " M"]  # noqa: N815

    @property
    def shape(self) -> tuple[int, int]:
        """Maps and states."""
        maps, states = self.open_MS.shape
        return maps, states


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyValues:
    """A policy on some maps, and everything that is expected of it. Undiscounted, in units of the reward."""

    model: LakeModel
    prob_MTSB: Float[np.ndarray, "M T S B"]  # noqa: N815
    """The policy π_t(b|s) itself; uniform in holes and at the goal, where it has no effect."""
    value_MTS: Float[np.ndarray, "M T S"]  # noqa: N815
    """V^π_t(s): expected reward of turns t to the end from s; 0 in holes and at the goal."""
    action_value_MTSB: Float[np.ndarray, "M T S B"]  # noqa: N815
    """Q^π_t(s, b): the same if the answer at turn t is b, whatever π says."""
    occupancy_MTS: Float[np.ndarray, "M T S"]  # noqa: N815
    """d_t(s): probability that s is the state before turn t. Holes and the goal hold the episodes that have ended, so
    that each row sums to 1."""
    success_M: Float[np.ndarray, " M"]  # noqa: N815
    """Probability of reaching the goal within the horizon: the expected game return."""

    @property
    def advantage_MTSB(self) -> Float[np.ndarray, "M T S B"]:  # noqa: N802
        """A^π_t(s, b) = Q^π_t(s, b) − V^π_t(s)."""
        advantage_MTSB: Float[np.ndarray, "M T S B"] = self.action_value_MTSB - self.value_MTS[..., None]
        return advantage_MTSB

    @property
    def return_M(self) -> Float[np.ndarray, " M"]:  # noqa: N802
        """J: expected return of an episode, shaping and penalties included."""
        return_M: Float[np.ndarray, " M"] = self.value_MTS[np.arange(len(self.value_MTS)), 0, self.model.start_M]
        return return_M


def lakes_of(game: FrozenLake, seeds: Sequence[int]) -> list[Lake]:
    """The map of each seed under the scenario that `game` plays; the game itself is left alone."""
    return [
        lake_tables.lake(
            lake_tables.random_map(game.size, game.frozen_probability, int(seed)), game.slippery, game.success_rate
        )
        for seed in seeds
    ]


def step_pay(lake: Lake, *, shaping: float, shaping_gamma: float) -> Float[np.ndarray, "S S"]:
    """What `TextGame.step` pays for a legal action that leads from one state to another [from, to], to the bit.

    1 at the goal, plus shaping·(γΦ(s′) − Φ(s)); ⊥ pays `invalid_penalty` less. 0 in rows of holes and the goal, from
    which no step is taken. A truncated episode keeps shaping·Φ(s_T) (γ = 1), so the horizon needs no term of its own.
    """
    potential_S = np.array(lake.potentials)
    game_S = np.zeros(len(lake.letters))
    game_S[lake.goal] = 1.0
    pay_SS = game_S[None, :] + shaping * (shaping_gamma * potential_S[None, :] - potential_S[:, None])
    is_open_S = np.zeros(len(lake.letters), dtype=bool)
    is_open_S[lake.open_S] = True
    return np.where(is_open_S[:, None], pay_SS, 0.0)


def lake_model(game: FrozenLake, lakes: Sequence[Lake]) -> LakeModel:
    """The maps under the rules of `game`: horizon, shaping, ⊥ penalty and fallback. Remembered for equal arguments.

    Raises:
        ValueError: no maps, or maps of different sizes.
    """
    if not lakes or len({lake.size for lake in lakes}) != 1:
        raise ValueError(f"lakes: {len(lakes)} maps; give at least one, all of one size")
    if game.fallback_action == "random":
        fallback = (1 / NUM_ACTIONS,) * NUM_ACTIONS
    else:
        fallback = tuple(float(word == game.fallback_action) for word in game.legal_actions)
    return _model(tuple(lakes), game.horizon, game.invalid_penalty, fallback, game.shaping, game.shaping_gamma)


@lru_cache(maxsize=8)
def _model(
    lakes: tuple[Lake, ...],
    horizon: int,
    invalid_penalty: float,
    fallback: tuple[float, ...],
    shaping: float,
    shaping_gamma: float,
) -> LakeModel:
    # In memory order, so that (state, action) is one axis without copying.
    move_MSAS = np.ascontiguousarray(np.stack([lake.move_ASS.transpose(1, 0, 2) for lake in lakes]))
    pay_MSS = np.stack([step_pay(lake, shaping=shaping, shaping_gamma=shaping_gamma) for lake in lakes])
    open_MS = np.zeros(pay_MSS.shape[:2], dtype=bool)
    for open_S, lake in zip(open_MS, lakes, strict=True):
        open_S[lake.open_S] = True
    arrays = {
        "move_MSAS": move_MSAS,
        "reward_MSA": np.einsum("msat,mst->msa", move_MSAS, pay_MSS),
        "fallback_A": np.array(fallback),
        "open_MS": open_MS,
        "start_M": np.array([lake.start for lake in lakes]),
        "goal_M": np.array([lake.goal for lake in lakes]),
    }
    for array in arrays.values():
        array.setflags(write=False)
    return LakeModel(lakes=lakes, horizon=horizon, invalid_penalty=invalid_penalty, **arrays)


def policy_values(model: LakeModel, prob: Float[np.ndarray, "M S B"] | Float[np.ndarray, "M T S B"]) -> PolicyValues:
    """V, Q, occupancy, return and success of a policy.

    Backwards from V_T = 0: Q_t(s, a) = E[r | s, a] + Σ_s′ P(s′|s, a) V_{t+1}(s′) for a legal action, Q_t(s, ⊥) = the
    mean of that over the fallback action, less the penalty, and V_t(s) = Σ_b π_t(b|s) Q_t(s, b). Forwards from the
    start: d_{t+1}(s′) = Σ_s d_t(s) Σ_a P(s′|s, a) π_t(a is executed|s).

    Args:
        model: maps and rules.
        prob: probability of each answer in each state, the same at every turn or one table a turn; rows of holes and
            the goal have no effect.

    Raises:
        ValueError: the shape is wrong, or a row is no distribution.
    """
    prob_MTSB = _checked(model, prob)
    maps, horizon, states, _ = prob_MTSB.shape
    value_MTS = np.empty((maps, horizon, states))
    action_value_MTSB = np.empty((maps, horizon, states, NUM_ANSWERS))
    following_MS = np.zeros((maps, states))
    for turn in reversed(range(horizon)):
        action_value_MTSB[:, turn] = _action_values(model, following_MS)
        following_MS = (prob_MTSB[:, turn] * action_value_MTSB[:, turn]).sum(axis=2)
        value_MTS[:, turn] = following_MS
    occupancy_MTS = np.empty((maps, horizon, states))
    present_MS = np.zeros((maps, states))
    present_MS[np.arange(maps), model.start_M] = 1.0
    for turn in range(horizon):
        occupancy_MTS[:, turn] = present_MS
        if turn == 0 or prob.ndim == 4:
            move_MSS = _policy_moves(model, prob_MTSB[:, turn])
        present_MS = (present_MS[:, None] @ move_MSS)[:, 0]
    return PolicyValues(
        model=model,
        prob_MTSB=prob_MTSB,
        value_MTS=value_MTS,
        action_value_MTSB=action_value_MTSB,
        occupancy_MTS=occupancy_MTS,
        success_M=present_MS[np.arange(maps), model.goal_M],
    )


def uniform_policy(model: LakeModel) -> Float[np.ndarray, "M S B"]:
    """Every legal action with the same probability, never ⊥."""
    prob_MSB = np.full((*model.shape, NUM_ANSWERS), 1 / NUM_ACTIONS)
    prob_MSB[..., INVALID] = 0.0
    return prob_MSB


def optimal_policy(model: LakeModel) -> Float[np.ndarray, "M T S B"]:
    """A best answer in every state at every turn, for the reward that is paid; ties go to the lowest index.

    `policy_values` of it gives V* and Q*. ⊥ is never better than the best legal action, since no penalty is negative.
    """
    maps, states = model.shape
    prob_MTSB = np.zeros((maps, model.horizon, states, NUM_ANSWERS))
    value_MS = np.zeros((maps, states))
    for turn in reversed(range(model.horizon)):
        action_value_MSB = _action_values(model, value_MS)
        # Rounding must not make two equally good actions differ, or ties would depend on the order of summation.
        best_MS = np.argmax(action_value_MSB.round(12), axis=2)[..., None]
        np.put_along_axis(prob_MTSB[:, turn], best_MS, 1.0, axis=2)
        value_MS = np.take_along_axis(action_value_MSB, best_MS, axis=2)[..., 0]
    return prob_MTSB


def _action_values(model: LakeModel, following_MS: Float[np.ndarray, "M S"]) -> Float[np.ndarray, "M S B"]:
    """Q of one turn, given the values after it; 0 in holes and at the goal, which pay nothing and lead nowhere."""
    maps, states = model.shape
    flat_MXS = model.move_MSAS.reshape(maps, states * NUM_ACTIONS, states)
    value_MSB = np.empty((maps, states, NUM_ANSWERS))
    legal_MSA = value_MSB[..., :NUM_ACTIONS]
    legal_MSA[:] = model.reward_MSA + (flat_MXS @ following_MS[..., None]).reshape(maps, states, NUM_ACTIONS)
    value_MSB[..., INVALID] = legal_MSA @ model.fallback_A - model.invalid_penalty * model.open_MS
    return value_MSB


def _policy_moves(model: LakeModel, prob_MSB: Float[np.ndarray, "M S B"]) -> Float[np.ndarray, "M S S"]:
    """Probability of the next state under a policy; holes and the goal keep to themselves."""
    executed_MSA = prob_MSB[..., :NUM_ACTIONS] + prob_MSB[..., INVALID:] * model.fallback_A
    move_MSS: Float[np.ndarray, "M S S"] = (executed_MSA[:, :, None] @ model.move_MSAS)[:, :, 0]
    return move_MSS


def _checked(model: LakeModel, prob: Float[np.ndarray, ...]) -> Float[np.ndarray, "M T S B"]:
    """The policy with an axis for the turns, once it is found to be one; uniform in holes and at the goal."""
    maps, states = model.shape
    turns = (model.horizon,) if prob.ndim == 4 else ()
    shape = (maps, *turns, states, NUM_ANSWERS)
    if prob.shape != shape:
        raise ValueError(f"prob: has shape {prob.shape}; must be {shape}")
    by_turn = prob if turns else prob[:, None]
    by_turn = np.where(model.open_MS[:, None, :, None], by_turn, 1 / NUM_ANSWERS)
    check_distributions("prob", by_turn, by_turn.shape)
    prob_MTSB: Float[np.ndarray, "M T S B"] = np.broadcast_to(by_turn, (maps, model.horizon, states, NUM_ANSWERS))
    return prob_MTSB


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TextIndex:
    """Which text each state of some maps reads as; states that read the same share a row."""

    texts: tuple[str, ...]
    """X distinct texts of the states in which a turn can be taken, in alphabetical order."""
    text_MS: Int[np.ndarray, "M S"]  # noqa: N815  axis letters
    """Number of each state's text; X in holes and at the goal."""

    @property
    def row_of(self) -> dict[str, int]:
        """Number of each text."""
        return {text: row for row, text in enumerate(self.texts)}

    def spread(self, table_XB: Float[np.ndarray, "X B"]) -> Float[np.ndarray, "M S B"]:
        """The row of each state's text; uniform in holes and at the goal."""
        last_B = np.full((1, table_XB.shape[1]), 1 / table_XB.shape[1])
        spread_MSB: Float[np.ndarray, "M S B"] = np.concatenate([table_XB, last_B])[self.text_MS]
        return spread_MSB

    def add_up(self, values_MSB: Float[np.ndarray, "M S B"]) -> Float[np.ndarray, "X B"]:
        """Sums over the states that read the same; holes and the goal are left out."""
        rows, columns = len(self.texts) + 1, values_MSB.shape[-1]
        index = (self.text_MS[..., None] * columns + np.arange(columns)).ravel()
        total = np.bincount(index, weights=values_MSB.ravel(), minlength=rows * columns)
        return total.reshape(rows, columns)[:-1]


def index_texts(lakes: Sequence[Lake], observation: ObservationStyle) -> TextIndex:
    """Numbers what can be read on some maps of one size."""
    texts_M = [lake.texts(observation) for lake in lakes]
    distinct = sorted({texts[state] for lake, texts in zip(lakes, texts_M, strict=True) for state in lake.open_S})
    row_of = {text: row for row, text in enumerate(distinct)}
    text_MS = np.full((len(lakes), len(lakes[0].letters)), len(distinct), dtype=np.int64)
    for number, (lake, texts) in enumerate(zip(lakes, texts_M, strict=True)):
        text_MS[number, lake.open_S] = [row_of[texts[state]] for state in lake.open_S]
    return TextIndex(texts=tuple(distinct), text_MS=text_MS)


def state_gradient(values: PolicyValues) -> Float[np.ndarray, "M S B"]:
    """∂J_m/∂logit(s, b) = Σ_t d_t(s) π(b|s) A_t(s, b): each map's gradient, if every state had logits of its own.

    The policy-gradient theorem (Sutton et al. 2000) for a finite horizon, undiscounted. With a policy that changes with
    the turn it is the gradient of a shift of the logits of all turns together. Rows sum to 0.
    """
    gradient_MSB: Float[np.ndarray, "M S B"] = np.einsum(
        "mts,mtsb,mtsb->msb", values.occupancy_MTS, values.prob_MTSB, values.advantage_MTSB
    )
    return gradient_MSB


def exact_gradient(
    values: PolicyValues, index: TextIndex, weight_M: Float[np.ndarray, " M"] | None = None
) -> Float[np.ndarray, "X B"]:
    """∂J/∂logit(x, b) of a policy on texts, J = Σ_m w_m J_m: `state_gradient` summed over states that read the same.

    Args:
        values: of the policy, the same in all states that read the same.
        index: which text each state reads as.
        weight_M: weight of each map; 1/M each by default.
    """
    maps = len(values.value_MTS)
    weights = np.full(maps, 1 / maps) if weight_M is None else weight_M
    assert weights.shape == (maps,)
    return index.add_up(weights[:, None, None] * state_gradient(values))


def induced_gradient(
    adv_ET: Float[np.ndarray, "E T"],
    mask_ET: Bool[np.ndarray, "E T"],
    row_ET: Int[np.ndarray, "E T"],
    answer_ET: Int[np.ndarray, "E T"],
    prob_XB: Float[np.ndarray, "X B"],
) -> Float[np.ndarray, "X B"]:
    """The gradient that advantages induce: 1/E Σ_i Σ_t adv_{i,t} ∇ log π(b_{i,t}|x_{i,t}), with respect to the logits.

    ∂ log π(b|x)/∂logit(x, c) = 1[b = c] − π(c|x). With unbiased advantages, such as the return from turn t on, its
    expectation is `exact_gradient`, the maps weighted as they were drawn. A normaliser of another kind (1/T_i, a loss
    weight) is multiplied into `adv_ET` first.

    Args:
        adv_ET: advantage of each turn.
        mask_ET: the turns that were taken; what stands elsewhere has no effect.
        row_ET: number of the text (or state) that was read.
        answer_ET: the answer that was given, B − 1 for ⊥.
        prob_XB: the sampling policy.
    """
    assert adv_ET.shape == mask_ET.shape == row_ET.shape == answer_ET.shape
    rows, columns = prob_XB.shape
    adv, row, answer = adv_ET[mask_ET], row_ET[mask_ET], answer_ET[mask_ET]
    of_answer = np.bincount(row * columns + answer, weights=adv, minlength=rows * columns).reshape(rows, columns)
    of_row = np.bincount(row, weights=adv, minlength=rows)
    gradient_XB: Float[np.ndarray, "X B"] = (of_answer - of_row[:, None] * prob_XB) / len(adv_ET)
    return gradient_XB
