"""V, Q, occupancy and return of a policy on Frozen Lake: by hand, against brute force, and against real games."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from msgrpo_lab.oracle.frozen_lake import optimal_values, random_success
from msgrpo_lab.oracle.lake_values import (
    INVALID,
    LakeModel,
    PolicyValues,
    lake_model,
    lakes_of,
    optimal_policy,
    policy_values,
    step_pay,
    uniform_policy,
)
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import Lake

LEFT, DOWN, RIGHT, UP = range(4)
FREE = ("SF", "FG")
CORRIDOR = ("SFG", "HHH", "HHH")


def model_on(*maps: tuple[str, ...], **arguments: object) -> LakeModel:
    game = FrozenLake(**{"size": len(maps[0]), "shaping": 0.0, **arguments})
    lakes = [Lake(rows, slippery=game.slippery, success_rate=game.success_rate) for rows in maps]
    return lake_model(game, lakes)


def always(model: LakeModel, answer: int) -> np.ndarray:
    prob_MSB = np.zeros((*model.shape, 5))
    prob_MSB[..., answer] = 1.0
    return prob_MSB


def random_policy(model: LakeModel, rng: np.random.Generator) -> np.ndarray:
    return rng.dirichlet(np.ones(5), size=model.shape)


# A corridor: S F G in the upper row, holes below, always Right. With probability p it goes on, with q = (1 − p)/2 it
# slides up (against the wall: stays) and with q down (a hole). Here p = 1/2, q = 1/4. Reaching the goal at turn n ≥ 2
# takes two moves and n − 2 stays: (n − 1) p² q^(n−2).
#   H = 2: 1/4.  H = 3: 1/4 + 2·1/4·1/4 = 3/8.  H = 4: 3/8 + 3·1/4·1/16 = 27/64.
@pytest.mark.parametrize(("horizon", "expected"), [(1, 0.0), (2, 1 / 4), (3, 3 / 8), (4, 27 / 64)])
def test_corridor_with_slip(horizon: int, expected: float) -> None:
    model = model_on(CORRIDOR, slippery=True, success_rate=0.5, horizon=horizon)
    values = policy_values(model, always(model, RIGHT))
    assert values.success_M[0] == pytest.approx(expected, abs=1e-15)
    assert values.return_M[0] == pytest.approx(expected, abs=1e-15), "unshaped and always legal: return is success"


# The same with shaping c and γ = 1: Φ = 1/2, 3/4 in cells 0, 1 (distances 2, 1 of at most 4), 0 where it ends.
#   V_1(1) = 1/2 (1 − 3c/4) + 1/4·0 + 1/4 (−3c/4) = 1/2 − 9c/16
#   V_1(0) = 1/2 (c/4) + 1/4·0 + 1/4 (−c/2) = 0
#   V_0(0) = 1/2 (c/4 + V_1(1)) + 1/4 V_1(0) + 1/4 (−c/2) = 1/4 − 9c/32
#   V_0(1) = 1/2 (1 − 3c/4) + 1/4 V_1(1) + 1/4 (−3c/4) = 5/8 − 45c/64
# ⊥ executes Up (p: bump, stays; q: slides Left; q: slides Right), less a penalty of 2:
#   Q_1(0, ⊥) = 3/4·0 + 1/4 (c/4) − 2 = c/16 − 2
#   Q_1(1, ⊥) = 1/2·0 + 1/4 (−c/4) + 1/4 (1 − 3c/4) − 2 = −7/4 − c/4
# The last turn in cell 0, where V_1(0) = 0: Left stays or slides Down into the hole, 1/4 (−c/2) = −c/8; Down falls with
# 1/2 and slides Right with 1/4, 1/2 (−c/2) + 1/4 (c/4) = −3c/16; Up goes on with 1/4, c/16.
def test_corridor_with_shaping_and_penalty() -> None:
    c = 0.1
    model = model_on(
        CORRIDOR, slippery=True, success_rate=0.5, horizon=2, shaping=c, invalid_penalty=2.0, fallback_action="Up"
    )
    values = policy_values(model, always(model, RIGHT))
    np.testing.assert_allclose(values.value_MTS[0, 0, :3], [1 / 4 - 9 * c / 32, 5 / 8 - 45 * c / 64, 0], atol=1e-15)
    np.testing.assert_allclose(values.value_MTS[0, 1, :3], [0, 1 / 2 - 9 * c / 16, 0], atol=1e-15)
    np.testing.assert_allclose(values.action_value_MTSB[0, 1, :3, INVALID], [c / 16 - 2, -7 / 4 - c / 4, 0], atol=1e-15)
    np.testing.assert_allclose(values.advantage_MTSB[0, 1, 0], [-c / 8, -3 * c / 16, 0, c / 16, c / 16 - 2], atol=1e-15)
    assert values.return_M[0] == values.value_MTS[0, 0, 0]
    np.testing.assert_allclose(
        values.occupancy_MTS[0], [[1, 0, 0, 0, 0, 0, 0, 0, 0], [1 / 4, 1 / 2, 0, 1 / 4, 0, 0, 0, 0, 0]], atol=1e-15
    )
    assert (values.value_MTS[0, :, 3:] == 0).all()
    assert (values.action_value_MTSB[0, :, 2:] == 0).all(), "nothing can be answered in a hole or at the goal"


@pytest.mark.parametrize(("shaping_gamma", "expected"), [(1.0, 0.1 * (3 / 4 - 1 / 2)), (0.5, 0.1 * (3 / 8 - 1 / 2))])
def test_a_truncated_episode_keeps_its_potential(shaping_gamma: float, expected: float) -> None:
    """One firm move to the right, and the horizon: from Φ = 1/2 to Φ = 3/4, which counts though nothing follows."""
    model = model_on(CORRIDOR, horizon=1, shaping=0.1, shaping_gamma=shaping_gamma)
    assert policy_values(model, always(model, RIGHT)).return_M[0] == pytest.approx(expected, abs=1e-15)


# Only ⊥ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fallback", "horizon", "success", "turns"),
    [("Right", 2, 1.0, 2), ("Right", 8, 1.0, 2), ("Right", 1, 0.0, 1), ("Down", 8, 0.0, 1), ("Left", 8, 0.0, 8)],
)
def test_bottom_only_with_a_fallback_word(fallback: str, horizon: int, success: float, turns: int) -> None:
    """On the firm corridor: Right arrives after two turns, Down ends in a hole after one, Left stays for ever."""
    model = model_on(CORRIDOR, horizon=horizon, invalid_penalty=0.25, fallback_action=fallback)
    values = policy_values(model, always(model, INVALID))
    assert values.success_M[0] == success
    assert values.return_M[0] == success - 0.25 * turns


# FREE at random (see test_oracle_frozen_lake): success 1/8 within 2 turns, 1/4 within 3. It ends early, after 2 of 3
# turns, with 1/8: 3 − 1/8 turns are paid for.
@pytest.mark.parametrize(("horizon", "expected"), [(1, -0.5), (2, 1 / 8 - 1.0), (3, 1 / 4 - 0.5 * (3 - 1 / 8))])
def test_bottom_only_with_a_random_fallback(horizon: int, expected: float) -> None:
    model = model_on(FREE, horizon=horizon, invalid_penalty=0.5, fallback_action="random")
    values = policy_values(model, always(model, INVALID))
    assert values.return_M[0] == pytest.approx(expected, abs=1e-15)
    assert values.success_M[0] == pytest.approx(policy_values(model, uniform_policy(model)).success_M[0], abs=1e-15)


# Against other ways of computing it ---------------------------------------------------------------------------------


def test_uniform_and_optimal_policies_agree_with_the_success_oracle() -> None:
    game = FrozenLake(slippery=True, frozen_probability=0.9, horizon=7, shaping=0.0)
    model = lake_model(game, lakes_of(game, range(20)))
    uniform, best = policy_values(model, uniform_policy(model)), policy_values(model, optimal_policy(model))
    for number, lake in enumerate(model.lakes):
        game.reset(seed=number)
        assert game.lake is lake, "lakes_of makes the maps that a reset does"
        assert uniform.success_M[number] == pytest.approx(random_success(game), abs=1e-12)
        np.testing.assert_allclose(
            best.value_MTS[number][:, lake.open_S], optimal_values(lake, 7)[:0:-1, lake.open_S], atol=1e-12
        )


@pytest.mark.parametrize("slippery", [False, True])
def test_no_answer_improves_on_the_optimal_policy(slippery: bool) -> None:
    game = FrozenLake(slippery=slippery, horizon=6, shaping=0.3, shaping_gamma=0.9)
    model = lake_model(game, lakes_of(game, range(10)))
    best = policy_values(model, optimal_policy(model))
    assert best.advantage_MTSB.max() < 1e-12
    rng = np.random.default_rng(0)
    for _ in range(5):
        other = policy_values(model, random_policy(model, rng))
        assert (other.value_MTS <= best.value_MTS + 1e-12).all()


@pytest.mark.parametrize("slippery", [False, True])
def test_values_equal_the_sum_over_all_histories(slippery: bool) -> None:
    """Brute force: every answer, every fallback, every outcome, written out as a recursion over single histories."""
    horizon, penalty, shaping, gamma = 3, 0.7, 0.2, 0.9
    rows = ("SFF", "FHF", "FFG")
    model = model_on(
        rows, slippery=slippery, horizon=horizon, invalid_penalty=penalty, shaping=shaping, shaping_gamma=gamma
    )
    lake = model.lakes[0]
    prob_TSB = np.random.default_rng(1).dirichlet(np.ones(5), size=(horizon, 9))

    def value(turn: int, state: int) -> float:
        if turn == horizon or lake.is_terminal(state):
            return 0.0
        return sum(prob_TSB[turn, state, answer] * action_value(turn, state, answer) for answer in range(5))

    def action_value(turn: int, state: int, answer: int) -> float:
        if answer == INVALID:
            return sum(action_value(turn, state, action) for action in range(4)) / 4 - penalty
        total, before = 0.0, 0.0
        for level, following, reward, _ in lake.outcomes[state][answer]:
            paid = reward + shaping * (gamma * lake.potentials[following] - lake.potentials[state])
            total += (level - before) * (paid + value(turn + 1, following))
            before = level
        return total

    values = policy_values(model, prob_TSB[None])
    for turn, state in itertools.product(range(horizon), lake.open_S):
        assert values.value_MTS[0, turn, state] == pytest.approx(value(turn, state), abs=1e-12)
        for answer in range(5):
            assert values.action_value_MTSB[0, turn, state, answer] == pytest.approx(
                action_value(turn, state, answer), abs=1e-12
            )


def test_maps_side_by_side_are_the_maps_one_by_one() -> None:
    game = FrozenLake(slippery=True, horizon=5)
    lakes = lakes_of(game, range(6))
    together = lake_model(game, lakes)
    prob_MSB = random_policy(together, np.random.default_rng(2))
    values = policy_values(together, prob_MSB)
    for number, lake in enumerate(lakes):
        one = policy_values(lake_model(game, [lake]), prob_MSB[number : number + 1])
        np.testing.assert_allclose(one.action_value_MTSB[0], values.action_value_MTSB[number], atol=1e-14)
        np.testing.assert_allclose(one.occupancy_MTS[0], values.occupancy_MTS[number], atol=1e-14)


def play(game: FrozenLake, seed: int, member: int, prob_SB: np.ndarray, rng: np.random.Generator) -> tuple[float, bool]:
    game.reset(seed=seed, options={"member": member})
    total, done, success = 0.0, False, False
    cumulative_SB = prob_SB.cumsum(axis=1)
    while not done:
        answer = int(np.searchsorted(cumulative_SB[game.position], rng.random(), side="right"))
        _, reward, terminated, truncated, info = game.step(None if answer >= INVALID else answer)
        total += reward
        done, success = terminated or truncated, info["success"]
    return total, success


@pytest.mark.parametrize(
    ("success_rate", "fallback", "won_somewhere"), [(None, "random", 0.2), (1 / 3, "Down", 0.03), (0.7, "random", 0.1)]
)
def test_fifty_maps_against_real_games(success_rate: float | None, fallback: str, won_somewhere: float) -> None:
    """Brute-force Monte-Carlo on 50 random maps: return and success within 4 standard errors on each."""
    episodes = 300
    ice = {} if success_rate is None else {"slippery": True, "success_rate": success_rate}
    game = FrozenLake(**ice, fallback_action=fallback, horizon=8, shaping=0.2, invalid_penalty=0.3)
    model = lake_model(game, lakes_of(game, range(50)))
    rng = np.random.default_rng(3)
    # Towards the goal, so that it is reached, and every answer now and then.
    prob_MSB = 0.5 * random_policy(model, rng) + 0.5 * policy_towards_goal(model)
    values = policy_values(model, prob_MSB)
    for number in range(50):
        played = [play(game, number, member, prob_MSB[number], rng) for member in range(episodes)]
        returns = np.array([total for total, _ in played])
        won = np.mean([success for _, success in played])
        error = returns.std(ddof=1) / np.sqrt(episodes)
        assert abs(returns.mean() - values.return_M[number]) < 4 * error
        expected = values.success_M[number]
        assert abs(won - expected) < 4 * np.sqrt(expected * (1 - expected) / episodes)
    assert values.success_M.max() > won_somewhere, "or there would be little to see"


def policy_towards_goal(model: LakeModel) -> np.ndarray:
    prob_MSB = np.zeros((*model.shape, 5))
    prob_MSB[..., [DOWN, RIGHT]] = 0.5
    return prob_MSB


# Shapes and mistakes ------------------------------------------------------------------------------------------------


def test_one_table_a_turn_may_differ_by_turn() -> None:
    """On the firm free map: Right, then Down wins; the other order of turns is Down at the start first."""
    model = model_on(FREE, horizon=2)
    prob_MTSB = np.stack([always(model, RIGHT), always(model, DOWN)], axis=1)
    values: PolicyValues = policy_values(model, prob_MTSB)
    assert values.success_M[0] == 1.0
    assert policy_values(model, always(model, RIGHT)).success_M[0] == 0.0


def test_rows_of_holes_have_no_effect() -> None:
    model = model_on(CORRIDOR, horizon=4)
    prob_MSB = uniform_policy(model)
    expected = policy_values(model, prob_MSB).return_M[0]
    prob_MSB[:, 2:] = np.nan
    assert policy_values(model, prob_MSB).return_M[0] == expected


def test_models_are_remembered_and_read_only() -> None:
    game = FrozenLake(horizon=5)
    lakes = lakes_of(game, range(3))
    assert lake_model(game, lakes) is lake_model(FrozenLake(horizon=5), list(lakes))
    for other in ({"horizon": 6}, {"shaping": 0.2}, {"shaping_gamma": 0.9}, {"invalid_penalty": 0.0}):
        assert lake_model(game, lakes) is not lake_model(FrozenLake(**{"horizon": 5, **other}), lakes)
    with pytest.raises(ValueError, match="read-only"):
        lake_model(game, lakes).reward_MSA[0, 0, 0] = 1.0


@pytest.mark.parametrize("maps", [[], [FREE, CORRIDOR]])
def test_nothing_and_a_mixture_of_sizes_are_refused(maps: list[tuple[str, ...]]) -> None:
    lakes = [Lake(rows, slippery=False, success_rate=1 / 3) for rows in maps]
    with pytest.raises(ValueError, match=f"lakes: {len(maps)} maps; give at least one"):
        lake_model(FrozenLake(), lakes)


def test_what_is_no_policy_is_refused() -> None:
    model = model_on(FREE, horizon=2)
    with pytest.raises(ValueError, match=r"prob: has shape \(1, 4, 4\); must be \(1, 4, 5\)"):
        policy_values(model, np.full((1, 4, 4), 0.25))
    with pytest.raises(ValueError, match=r"must be \(1, 2, 4, 5\)"):
        policy_values(model, np.full((1, 3, 4, 5), 0.2))
    for wrong in (np.full((1, 4, 5), 0.25), np.full((1, 4, 5), np.nan)):
        with pytest.raises(ValueError, match="prob: each row must be a distribution"):
            policy_values(model, wrong)


def test_step_pay_by_hand() -> None:
    lake = Lake(CORRIDOR, slippery=False, success_rate=1 / 3)
    pay_SS = step_pay(lake, shaping=0.4, shaping_gamma=0.5)
    assert pay_SS[0, 1] == pytest.approx(0.4 * (0.5 * 0.75 - 0.5))
    assert pay_SS[1, 2] == pytest.approx(1 - 0.4 * 0.75)
    assert pay_SS[1, 4] == pytest.approx(-0.4 * 0.75)
    assert (pay_SS[2:] == 0).all()
