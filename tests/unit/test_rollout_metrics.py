"""What a rollout says of itself, computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from lab_made import rollout, turn

from msgrpo_lab.rollout.collect import action_entropy, rollout_metrics, top_action_share
from msgrpo_lab.types import RolloutBatch


@pytest.fixture
def batch() -> RolloutBatch:
    """Two groups of two; group 0 scores alike in shaped return, group 1 does not."""
    return rollout(
        (0, True, [turn(reward=0.5, game_reward=0.0), turn(reward=0.5, game_reward=1.0, tokens=(5, 6))]),
        (0, False, [turn(reward=1.0, game_reward=0.0, prompt=(1, 2))]),
        (1, False, [turn(reward=-1.0, game_reward=0.0, action=None, tokens=(5, 6, 7))]),
        (1, False, [turn(reward=0.0, game_reward=3.0), turn(action=1), turn(action=2), turn(action=None)]),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("return_mean", (1 + 0 + 0 + 3) / 4),
        ("return_std", math.sqrt((0 + 1 + 1 + 4) / 4)),  # population
        ("shaped_return_mean", (1 + 1 - 1 + 0) / 4),
        ("success_rate", 1 / 4),
        ("valid_action_rate", 6 / 8),  # over turns
        ("episode_length", (2 + 1 + 1 + 4) / 4),  # over episodes
        ("completion_tokens", (1 + 2 + 1 + 3 + 4) / 8),
        ("zero_std_groups", 1 / 2),
        ("distinct_prompts", 2.0),
    ],
)
def test_rollout_metrics(batch: RolloutBatch, name: str, value: float) -> None:
    assert rollout_metrics(batch)[name] == pytest.approx(value)


def test_a_spread_of_rounding_is_no_spread() -> None:
    episodes = [(0, False, [turn(reward=r) for r in (0.1, 0.2, 0.3)]), (0, False, [turn(reward=0.6)])]
    assert sum((0.1, 0.2, 0.3)) != 0.6
    assert rollout_metrics(rollout(*episodes))["zero_std_groups"] == 1.0


def test_constrained_action_entropy_is_the_mean_surprise_of_the_answers() -> None:
    batch = rollout(
        (0, False, [turn(tokens=(5, 6), logprobs=(-1.0, -0.5)), turn(logprobs=(-0.25,))]),
        (0, False, [turn(logprobs=(-2.0,))]),
    )
    assert action_entropy(batch, constrained=True) == pytest.approx((1.5 + 0.25 + 2.0) / 3)


def test_free_action_entropy_is_of_the_actions_seen_at_equal_prompts() -> None:
    prompt_a = [turn(action=a, prompt=(1,)) for a in (0, 0, 0, 2)]
    prompt_b = [turn(action=a, prompt=(2,)) for a in (1, None)]
    once = [turn(action=3, prompt=(3,))]
    batch = rollout((0, False, [*prompt_a, *prompt_b, *once]))
    in_a = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) + 1 / 8  # Miller and Madow: (kinds − 1) / (2 n)
    in_b = math.log(2) + 1 / 4
    assert action_entropy(batch, constrained=False) == pytest.approx((4 * in_a + 2 * in_b) / 6)


def test_free_action_entropy_sees_actions_not_texts() -> None:
    same = [turn(action=0, tokens=(token,), logprobs=(-3.0,)) for token in range(6)]
    assert action_entropy(rollout((0, False, same)), constrained=False) == 0.0


def test_prompts_met_once_say_nothing_of_entropy() -> None:
    batch = rollout((0, False, [turn(prompt=(1,)), turn(prompt=(2,))]))
    assert math.isnan(action_entropy(batch, constrained=False))


def test_free_action_entropy_is_near_the_true_one_for_small_counts() -> None:
    """The correction for small counts: 40 prompts of 16 uniform draws from 4 actions come out at ln 4 to 2 %."""
    actions = np.random.default_rng(0).integers(4, size=(40, 16))
    turns = [turn(action=int(action), prompt=(row,)) for row in range(40) for action in actions[row]]
    found = action_entropy(rollout((0, False, turns)), constrained=False)
    plain = np.mean([-sum(p * math.log(p) for p in np.bincount(row) / 16 if p > 0) for row in actions])
    assert found == pytest.approx(math.log(4), rel=0.02)
    assert plain < 0.95 * math.log(4)


def test_the_share_of_the_most_frequent_action() -> None:
    played = [turn(action=action) for action in (0, 1, 1, 3)]
    assert top_action_share(rollout((0, True, played[:1]), (0, False, played[1:]))) == 0.5
    assert top_action_share(rollout((0, True, [turn(action=None), turn(action=0)]))) == 1.0, "the fallback was played"
