"""Exact policy gradients against finite differences and sampled estimates; induced gradients by hand."""

from __future__ import annotations

import numpy as np
import pytest

from msgrpo_lab.oracle.lake_values import (
    INVALID,
    LakeModel,
    TextIndex,
    exact_gradient,
    index_texts,
    induced_gradient,
    lake_model,
    lakes_of,
    policy_values,
    state_gradient,
)
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.lake import Lake


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def scenario(maps: int, **arguments: object) -> tuple[FrozenLake, LakeModel, TextIndex]:
    game = FrozenLake(**{"size": 3, "horizon": 5, "shaping": 0.2, "invalid_penalty": 0.4, **arguments})
    model = lake_model(game, lakes_of(game, range(maps)))
    return game, model, index_texts(model.lakes, game.observation)


@pytest.mark.parametrize(("slippery", "fallback"), [(False, "Right"), (True, "random")])
def test_state_gradient_is_that_of_finite_differences(slippery: bool, fallback: str) -> None:
    _, model, _ = scenario(2, slippery=slippery, fallback_action=fallback)
    logits_MSB = np.random.default_rng(0).normal(size=(*model.shape, 5))
    exact_MSB = state_gradient(policy_values(model, softmax(logits_MSB)))
    for index in np.ndindex(*logits_MSB.shape):
        step_MSB = np.zeros_like(logits_MSB)
        step_MSB[index] = 1e-5
        up, down = (policy_values(model, softmax(logits_MSB + s * step_MSB)).return_M for s in (1, -1))
        assert exact_MSB[index] == pytest.approx((up - down)[index[0]] / 2e-5, abs=1e-9)
    assert np.abs(exact_MSB).max() > 0.01


@pytest.mark.parametrize("slippery", [False, True])
@pytest.mark.parametrize("weights", [None, (0.5, 0.1, 0.1, 0.1, 0.2)])
def test_text_gradient_is_that_of_finite_differences(slippery: bool, weights: tuple[float, ...] | None) -> None:
    _, model, index = scenario(5, slippery=slippery)
    weight_M = np.full(5, 1 / 5) if weights is None else np.array(weights)
    logits_XB = np.random.default_rng(1).normal(size=(len(index.texts), 5))

    def mean_return(logits_XB: np.ndarray) -> float:
        return float(weight_M @ policy_values(model, index.spread(softmax(logits_XB))).return_M)

    values = policy_values(model, index.spread(softmax(logits_XB)))
    exact_XB = exact_gradient(values, index, None if weights is None else weight_M)
    for place in np.ndindex(*logits_XB.shape):
        step_XB = np.zeros_like(logits_XB)
        step_XB[place] = 1e-5
        numeric = (mean_return(logits_XB + step_XB) - mean_return(logits_XB - step_XB)) / 2e-5
        assert exact_XB[place] == pytest.approx(numeric, abs=1e-9)
    assert len(index.texts) < model.open_MS.sum(), "texts are shared, or states would do"


def test_exact_gradient_is_the_mean_of_sampled_unbiased_estimates() -> None:
    """REINFORCE with the return from turn t on, 27,000 real episodes: within 4 standard errors everywhere."""
    game, model, index = scenario(3, slippery=True, fallback_action="random", horizon=4)
    rng = np.random.default_rng(2)
    logits_XB = rng.normal(size=(len(index.texts), 5))
    prob_XB = softmax(logits_XB)
    exact_XB = exact_gradient(policy_values(model, index.spread(prob_XB)), index)
    estimates = np.stack([reinforce(game, model, index, prob_XB, 450, rng) for _ in range(60)])
    error_XB = estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
    met_XB = error_XB > 0
    assert met_XB.sum() > 30
    assert (np.abs(estimates.mean(axis=0) - exact_XB)[met_XB] < 4 * error_XB[met_XB]).all()
    assert np.abs(exact_XB[~met_XB]).max(initial=0) < 1e-3, "what was never met hardly matters"
    assert np.abs(exact_XB).max() > 20 * error_XB.max(), "a gradient of zero, or of the wrong sign, would be seen"


def reinforce(
    game: FrozenLake, model: LakeModel, index: TextIndex, prob_XB: np.ndarray, episodes: int, rng: np.random.Generator
) -> np.ndarray:
    """One unbiased estimate from real games: Σ_t G_t ∇ log π, the maps in turn and each as often."""
    assert episodes % len(model.lakes) == 0
    shape = (episodes, game.horizon)
    reward_ET, mask_ET = np.zeros(shape), np.zeros(shape, dtype=bool)
    row_ET, answer_ET = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    cumulative_XB = prob_XB.cumsum(axis=1)
    first = int(rng.integers(2**31))
    for episode in range(episodes):
        number = episode % len(model.lakes)
        game.reset(seed=number, options={"member": first + episode})
        done, turn = False, 0
        while not done:
            row = index.text_MS[number, game.position]
            answer = int(np.searchsorted(cumulative_XB[row], rng.random(), side="right"))
            _, reward, terminated, truncated, _ = game.step(None if answer == INVALID else answer)
            place = (episode, turn)
            reward_ET[place], mask_ET[place], row_ET[place], answer_ET[place] = reward, True, row, answer
            done, turn = terminated or truncated, turn + 1
    to_go_ET = reward_ET[:, ::-1].cumsum(axis=1)[:, ::-1]
    return induced_gradient(to_go_ET, mask_ET, row_ET, answer_ET, prob_XB)


# Induced gradients by hand ------------------------------------------------------------------------------------------


def test_induced_gradient_by_hand() -> None:
    """Two episodes: one answers 0 in row 0 with advantage 2 and 1 in row 1 with −1, the other 1 in row 0 with 3.

    Row 0, π = (¼, ¼, ½): 2 (1 − ¼, −¼, −½) + 3 (−¼, 1 − ¼, −½) = (3/4, 7/4, −5/2), halved for E = 2.
    Row 1, π = (½, ½, 0): −1 (−½, 1 − ½, 0), halved. The turn that is masked has no effect.
    """
    prob_XB = np.array([[0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    gradient_XB = induced_gradient(
        np.array([[2.0, -1.0], [3.0, 1e9]]),
        np.array([[True, True], [True, False]]),
        np.array([[0, 1], [0, 2]]),
        np.array([[0, 1], [1, 1]]),
        prob_XB,
    )
    np.testing.assert_allclose(
        gradient_XB, np.array([[3 / 4, 7 / 4, -5 / 2], [1 / 2, -1 / 2, 0], [0, 0, 0]]) / 2, atol=1e-15
    )


def test_texts_are_numbered_and_added_up_by_hand() -> None:
    """Both maps start with the same view; a cell with another view has a row of its own; holes and goal have none."""
    lakes = [Lake(rows, slippery=False, success_rate=1 / 3) for rows in (("SF", "FG"), ("SH", "FG"), ("SF", "FG"))]
    index = index_texts(lakes, "compact")
    assert index.texts == tuple(sorted({lake.compact_texts[s] for lake in lakes for s in lake.open_S}))
    row_of = index.row_of
    assert index.text_MS[0, 0] == index.text_MS[2, 0] == row_of[lakes[0].compact_texts[0]]
    assert index.text_MS[1, 0] != index.text_MS[0, 0]
    assert index.text_MS[0, 3] == index.text_MS[1, 1] == len(index.texts)
    ones_MSB = np.ones((3, 4, 2)) * np.array([1.0, 10.0])
    total_XB = index.add_up(ones_MSB)
    assert total_XB[row_of[lakes[0].compact_texts[0]]].tolist() == [2, 20]
    assert total_XB.sum() == 11 * 8, "8 states to be in"
    spread_MSB = index.spread(np.arange(len(index.texts))[:, None] * np.ones(2))
    assert (spread_MSB[..., 0] == np.where(index.text_MS < len(index.texts), index.text_MS, 0.5)).all()


def test_paper_texts_are_of_one_state_each() -> None:
    game = FrozenLake(observation="paper")
    lakes = list(dict.fromkeys(lakes_of(game, range(10))))
    assert len(index_texts(lakes, "paper").texts) == sum(len(lake.open_S) for lake in lakes)
