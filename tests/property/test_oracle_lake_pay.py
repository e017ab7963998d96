"""What the oracle says a step pays is what real games pay, to the bit; and identities of values under all settings."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from msgrpo_lab.oracle.lake_values import (
    INVALID,
    exact_gradient,
    index_texts,
    lake_model,
    lakes_of,
    policy_values,
    state_gradient,
    step_pay,
)
from msgrpo_lab.tsmg.frozen_lake import FrozenLake

GAMES = st.fixed_dictionaries(
    {
        "size": st.integers(2, 6),
        "frozen_probability": st.sampled_from([0.6, 0.8, 1.0]),
        "slippery": st.booleans(),
        "success_rate": st.sampled_from([0.0, 1 / 3, 0.7, 1.0]),
        "horizon": st.integers(1, 9),
        "observation": st.sampled_from(["compact", "paper"]),
        "invalid_penalty": st.sampled_from([0.0, 0.3, 1.0]),
        "fallback_action": st.sampled_from(["random", "Left", "Down", "Right", "Up"]),
        "shaping": st.sampled_from([0.0, 0.1, 0.37]),
        "shaping_gamma": st.sampled_from([0.0, 0.9, 1.0]),
    }
)
SEEDS = st.integers(0, 2**20)


@settings(max_examples=80, deadline=None)
@given(arguments=GAMES, seed=SEEDS, answers=st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=9, max_size=9))
def test_a_step_pays_what_the_oracle_says(arguments: dict[str, object], seed: int, answers: list[int | None]) -> None:
    game = FrozenLake(**arguments)
    (lake,) = lakes_of(game, [seed])
    game.reset(seed=seed)
    assert game.lake is lake
    pay_SS = step_pay(lake, shaping=game.shaping, shaping_gamma=game.shaping_gamma)
    for answer in answers:
        before = game.position
        _, reward, terminated, truncated, info = game.step(answer)
        assert reward == pay_SS[before, game.position] - (game.invalid_penalty if answer is None else 0.0)
        assert lake.move_ASS[info["executed_action"], before, game.position] > 0
        if terminated or truncated:
            break


@settings(max_examples=40, deadline=None)
@given(arguments=GAMES, seed=SEEDS)
def test_values_hold_their_identities(arguments: dict[str, object], seed: int) -> None:
    game = FrozenLake(**arguments)
    model = lake_model(game, lakes_of(game, range(seed, seed + 3)))
    index = index_texts(model.lakes, game.observation)
    prob_XB = np.random.default_rng(seed).dirichlet(np.ones(5), size=len(index.texts))
    values = policy_values(model, index.spread(prob_XB))
    np.testing.assert_allclose(values.occupancy_MTS.sum(axis=2), 1.0, atol=1e-12)
    centred_MTS = (values.prob_MTSB * values.advantage_MTSB).sum(axis=3)
    np.testing.assert_allclose(centred_MTS, 0.0, atol=1e-12)
    np.testing.assert_allclose(exact_gradient(values, index).sum(axis=1), 0.0, atol=1e-12)
    np.testing.assert_allclose(
        exact_gradient(values, index).sum(axis=0), state_gradient(values).sum(axis=(0, 1)) / 3, atol=1e-12
    )
    # Performance difference: what π gains on another policy μ is what π's visits gain in μ's advantages.
    uniform_MSB = np.full((*model.shape, 5), 0.2)
    other = policy_values(model, uniform_MSB)
    gained_M = np.einsum("mts,mtsb,mtsb->m", values.occupancy_MTS, values.prob_MTSB, other.advantage_MTSB)
    np.testing.assert_allclose(values.return_M - other.return_M, gained_M, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(arguments=GAMES, seed=SEEDS)
def test_shaping_telescopes(arguments: dict[str, object], seed: int) -> None:
    """With γ = 1: J = P(success) + c (E[Φ(s_T)] − Φ(s_0)) − penalty · E[number of ⊥]; see `TextGame.step`."""
    game = FrozenLake(**{**arguments, "shaping_gamma": 1.0})
    model = lake_model(game, lakes_of(game, [seed]))
    lake = model.lakes[0]
    prob_MSB = np.random.default_rng(seed).dirichlet(np.ones(5), size=model.shape)
    values = policy_values(model, prob_MSB)
    longer = FrozenLake(**{**arguments, "shaping_gamma": 1.0, "horizon": game.horizon + 1})
    end_S = policy_values(lake_model(longer, [lake]), prob_MSB).occupancy_MTS[0, -1]
    potential_S = np.array(lake.potentials)
    visits_S = values.occupancy_MTS[0].sum(axis=0) * model.open_MS[0]
    expected = (
        end_S[lake.goal]
        + game.shaping * (end_S @ potential_S - potential_S[lake.start])
        - game.invalid_penalty * visits_S @ prob_MSB[0, :, INVALID]
    )
    np.testing.assert_allclose(values.return_M[0], expected, atol=1e-12)
    np.testing.assert_allclose(values.success_M[0], end_S[lake.goal], atol=1e-14)
