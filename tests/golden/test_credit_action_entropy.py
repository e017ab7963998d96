"""The bonus on the entropy of actions, by hand; and it is the gradient of that entropy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lab_made import rollout, turn

from msgrpo_lab.credit.action_entropy import action_surprise

PROMPT, OTHER = (7, 8, 9), (7, 8, 10)


def test_surprise_by_hand() -> None:
    """At one prompt Left three times and Down once: −log ¾ and −log ¼, less H = 0.5623; an illegal answer has 0."""
    left, down = {"action": 0, "prompt": PROMPT}, {"action": 1, "prompt": PROMPT}
    batch = rollout(
        (0, False, [turn(**left), turn(**left)]),
        (0, False, [turn(**down)]),
        (1, True, [turn(**left), turn(action=None, prompt=PROMPT), turn(action=2, prompt=OTHER)]),
    )
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    likely, rare = -math.log(0.75) - entropy, -math.log(0.25) - entropy
    expected = [[likely, likely, 0.0], [rare, 0.0, 0.0], [likely, 0.0, 0.0]]
    np.testing.assert_allclose(action_surprise(batch), expected, atol=1e-12)
    assert entropy == pytest.approx(0.5623, abs=1e-4)


def test_the_mean_over_a_prompts_turns_is_zero() -> None:
    rng = np.random.default_rng(0)
    turns = [turn(action=int(a), prompt=(7, int(p))) for a, p in rng.integers((4, 3), size=(60, 2))]
    surprise = action_surprise(rollout((0, False, turns)))[0]
    for prompt in range(3):
        chosen = [turn.completion.prompt_ids[1] == prompt for turn in turns]
        assert surprise[chosen].mean() == pytest.approx(0.0, abs=1e-12)


def test_it_is_the_gradient_of_the_actions_entropy() -> None:
    """Four texts, two of them for one action: Σ_y p(y) ∇ log p(y) · surprise is dH/dθ, by differences."""
    theta, action_of = np.array([0.3, -0.2, 0.9, 0.1]), np.array([0, 0, 1, 2])

    def entropy(logits: np.ndarray) -> float:
        prob = np.exp(logits) / np.exp(logits).sum()
        share = np.bincount(action_of, prob)
        return float(-(share * np.log(share)).sum())

    prob = np.exp(theta) / np.exp(theta).sum()
    counts = np.round(prob * 200_000).astype(int)
    turns = [
        turn(action=int(a), prompt=PROMPT) for a, n in zip(action_of, counts, strict=True) for _ in range(int(n / 100))
    ]
    surprise = action_surprise(rollout((0, False, turns)))[0]
    text = np.repeat(np.arange(4), [int(n / 100) for n in counts])
    score = np.eye(4)[text] - prob
    found = (score * surprise[:, None]).mean(axis=0)
    steps = 1e-5 * np.eye(4)
    expected = [(entropy(theta + step) - entropy(theta - step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(found, expected, atol=5e-3)


def test_without_a_legal_answer_there_is_nothing() -> None:
    assert not action_surprise(rollout((0, False, [turn(action=None)]))).any()
