"""Gradients in parameter space, against finite differences of the exact expected return itself."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from fidelity_made import credit_of
from lab_made import Lab, small_lab

from msgrpo_lab.fidelity.action_probs import exact_table
from msgrpo_lab.fidelity.gradients import ParameterSpace
from msgrpo_lab.fidelity.truth import LakeTruth, lake_truth
from msgrpo_lab.types import RolloutBatch

LAKE = ("env=frozenlake_slippery", "env.horizon=5", "rollout.num_groups=4")


@pytest.fixture(scope="module", params=["all weights", "adapter"])
def lab(request: pytest.FixtureRequest) -> Lab:
    """Weights far from their start, so that the texts matter and an adapter has a gradient in both factors."""
    made = small_lab(*LAKE, f"model.lora_rank={'null' if request.param == 'all weights' else 4}")
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in made.data.policy.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def batch(lab: Lab) -> RolloutBatch:
    return lab.data.collect(0, 0)


def truth_of(lab: Lab, batch: RolloutBatch) -> LakeTruth:
    data, game = lab.data, lab.data.collector.example_game
    make = partial(exact_table, policy=data.policy, prompt=data.collector.prompt, game=game, sampling=data.sampling)
    return lake_truth(batch, game=game, table_of=make)


def space_of(lab: Lab, **changes: object) -> ParameterSpace:
    data = lab.data
    made = ParameterSpace(
        policy=data.policy,
        prompt=data.collector.prompt,
        game=data.collector.example_game,
        sampling=data.sampling,
        token_budget=512,
    )
    return replace(made, **changes)


def test_it_is_the_gradient_of_the_expected_return(lab: Lab, batch: RolloutBatch) -> None:
    """J(θ + hd) − J(θ − hd) over 2h along random directions, by dynamic programming at both ends."""
    truth = truth_of(lab, batch)
    gradient_P = space_of(lab).gradient(truth.texts.texts, truth.gradient(batch))
    parameters = list(lab.data.policy.trainable_parameters())
    assert gradient_P.size == sum(parameter.numel() for parameter in parameters)
    assert all(parameter.grad is None for parameter in parameters), "the update's own gradient is left alone"
    weight_M = np.bincount([truth.map_of_seed[episode.seed] for episode in batch.episodes]) / len(batch.episodes)
    step = 1e-3

    def moved(direction_P: np.ndarray, by: float) -> float:
        start = 0
        with torch.no_grad():
            for parameter in parameters:
                part = direction_P[start : start + parameter.numel()].reshape(parameter.shape)
                parameter.add_(torch.from_numpy(by * part).to(parameter))
                start += parameter.numel()
        return float(truth_of(lab, batch).values.return_M @ weight_M)

    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = gradient_P / np.linalg.norm(gradient_P) + rng.normal(size=gradient_P.size) / gradient_P.size**0.5
        up = moved(direction, step)
        down = moved(direction, -2 * step)
        moved(direction, step)
        assert (up - down) / (2 * step) == pytest.approx(float(gradient_P @ direction), rel=0.04)


def test_exact_credit_points_where_the_exact_gradient_does(lab: Lab, batch: RolloutBatch) -> None:
    truth = truth_of(lab, batch)
    exact_ET = truth.advantages(batch)
    made = credit_of_batch(batch, exact_ET)
    space = space_of(lab)
    induced_P = space.gradient(truth.texts.texts, truth.induced(batch, exact_ET))
    exact_P = space.gradient(truth.texts.texts, truth.gradient(batch))
    expected = induced_P @ exact_P / np.linalg.norm(induced_P) / np.linalg.norm(exact_P)
    assert space.cosine(truth, batch, made) == pytest.approx(expected, abs=1e-6)
    assert space.cosine(truth, batch, credit_of_batch(batch, -exact_ET)) == pytest.approx(-expected, abs=1e-6)
    assert np.isnan(space.cosine(truth, batch, credit_of_batch(batch, 0 * exact_ET))), "no credit points nowhere"


def credit_of_batch(batch: RolloutBatch, adv_ET: np.ndarray) -> object:
    class Holder:
        pass

    holder = Holder()
    holder.batch = batch  # type: ignore[attr-defined]
    return credit_of(holder, adv_ET)  # type: ignore[arg-type]


def test_the_split_into_passes_changes_nothing(lab: Lab, batch: RolloutBatch) -> None:
    truth = truth_of(lab, batch)
    found = [
        space_of(lab, **changes).gradient(truth.texts.texts, truth.gradient(batch))
        for changes in ({}, {"token_budget": 100_000}, {"sharing": "none"})
    ]
    scale = np.abs(found[0]).max()
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-4 * scale)


def test_free_decoding_is_refused(lab: Lab) -> None:
    with pytest.raises(ValueError, match=r"^rollout.sampling.constrain=false: gradients in parameter space need"):
        space_of(lab, sampling=replace(lab.data.sampling, choices=None))


def test_two_words_for_one_answer_are_refused(lab: Lab, batch: RolloutBatch) -> None:
    class Deaf:
        def __getattr__(self, name: str) -> object:
            return getattr(lab.data.collector.prompt, name)

        def parse(self, text: str, legal: tuple[str, ...]) -> object:
            return lab.data.collector.prompt.parse("nothing" if text in ("Left", "Up") else text, legal)

    truth = truth_of(lab, batch)
    with pytest.raises(ValueError, match="choices: two words mean answer 4, one of them 'Up'"):
        space_of(lab, prompt=Deaf()).gradient(truth.texts.texts, truth.gradient(batch))


def test_an_answer_without_a_word_has_no_gradient(lab: Lab, batch: RolloutBatch) -> None:
    truth = truth_of(lab, batch)
    gradient_XB = truth.gradient(batch).copy()
    gradient_XB[0, 4] = 0.1
    with pytest.raises(ValueError, match="gradient_XB: answer 4 has a gradient, but no legal word means it"):
        space_of(lab).gradient(truth.texts.texts, gradient_XB)
