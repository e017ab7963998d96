"""Every credit rule under conf/credit keeps the contract, and the invariances that it declares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.credit.base import INVARIANCES
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.reward_to_go import RewardToGo
from msgrpo_lab.types import Completion, Episode, ParsedAction, RolloutBatch, Turn

CONF = Path(__file__).resolve().parents[2] / "conf" / "credit"
CONFIGURED = {path.stem: instantiate(OmegaConf.load(path)) for path in sorted(CONF.glob("*.yaml"))}
VARIANTS = {
    "return-none": EpisodeReturn(normalise="none"),
    "return-floor": EpisodeReturn(min_std=0.5),
    "togo-batch": RewardToGo(normalise="batch"),
    "togo-none": RewardToGo(normalise="none"),
    "togo-turn": RewardToGo(baseline="turn"),
    "togo-step": RewardToGo(baseline_weighting="step"),
    "togo-discounted": RewardToGo(gamma=0.9),
    "togo-turn-batch-step": RewardToGo(baseline="turn", normalise="batch", baseline_weighting="step"),
}
RULES = CONFIGURED | VARIANTS
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def batch_of(rewards, group_index):
    ids = np.array([0])
    completion = Completion(
        prompt_ids=ids, token_ids=ids, logprobs=np.zeros(1), text="", finish_reason="stop", policy_version=0
    )
    parsed = ParsedAction(action=0, span=(0, 0), error=None)
    episodes = tuple(
        Episode(
            group_id=int(group),
            seed=0,
            turns=tuple(
                Turn(
                    observation="",
                    state_key=0,
                    completion=completion,
                    parsed=parsed,
                    executed_action=0,
                    reward=float(r),
                    game_reward=0.0,
                )
                for r in row
            ),
            terminated=True,
            truncated=False,
            success=False,
        )
        for row, group in zip(rewards, group_index, strict=True)
    )
    return RolloutBatch(episodes=episodes, group_index=np.array(group_index))


def ragged(seed):
    """Rewards of 4 interleaved groups of 5 episodes of 1 to 6 turns, and the group of each."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat([0, 1, 2, 3], 5))
    return [list(rng.normal(size=rng.integers(1, 7))) for _ in groups], groups


def test_there_are_configured_rules():
    assert {"episode_return", "reward_to_go"} <= set(CONFIGURED)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_names_every_argument(path):
    keys = set(OmegaConf.to_container(OmegaConf.load(path))) - {"_target_"}
    assert keys == set(type(CONFIGURED[path.stem]).__dataclass_fields__)


@EVERY_RULE
def test_declared_invariances_are_known(rule):
    assert rule.invariances <= set(INVARIANCES)
    assert "episode_permutation" in rule.invariances


@EVERY_RULE
@pytest.mark.parametrize("seed", range(3))
def test_shapes_masks_and_zeros_past_the_end(rule, seed):
    rewards, groups = ragged(seed)
    credit = rule(batch_of(rewards, groups))
    lengths = np.array([len(row) for row in rewards])
    assert credit.turn_adv.shape == credit.turn_mask.shape == (20, lengths.max())
    assert credit.episode_adv.shape == (20,)
    np.testing.assert_array_equal(credit.turn_mask.sum(axis=1), lengths)
    np.testing.assert_array_equal(credit.turn_mask, np.sort(credit.turn_mask, axis=1)[:, ::-1])
    np.testing.assert_array_equal(credit.turn_adv[~credit.turn_mask], 0.0)
    assert np.isfinite(credit.turn_adv).all()
    assert np.abs(credit.turn_adv).max() > 0.1


@EVERY_RULE
def test_equal_episodes_earn_exactly_nothing(rule):
    credit = rule(batch_of([[0.1, 0.2]] * 4, [0] * 4))
    np.testing.assert_array_equal(credit.episode_adv, 0.0)


@EVERY_RULE
def test_lone_episode_of_one_turn_earns_exactly_nothing(rule):
    credit = rule(batch_of([[5.0]], [3]))
    np.testing.assert_array_equal(credit.turn_adv, [[0.0]])


@EVERY_RULE
def test_same_rollout_same_bits(rule):
    batch = batch_of(*ragged(0))
    np.testing.assert_array_equal(rule(batch).turn_adv, rule(batch).turn_adv)


@EVERY_RULE
@pytest.mark.parametrize("seed", range(3))
def test_episode_permutation(rule, seed):
    rewards, groups = ragged(seed)
    order = np.random.default_rng(seed + 100).permutation(20)
    credit = rule(batch_of(rewards, groups))
    moved = rule(batch_of([rewards[i] for i in order], groups[order]))
    np.testing.assert_allclose(moved.turn_adv, credit.turn_adv[order], atol=1e-12)
    np.testing.assert_allclose(moved.episode_adv, credit.episode_adv[order], atol=1e-12)


def declaring(name):
    rules = {key: rule for key, rule in RULES.items() if name in rule.invariances}
    return pytest.mark.parametrize("rule", rules.values(), ids=rules.keys())


def lacking(name):
    rules = {key: rule for key, rule in RULES.items() if name not in rule.invariances}
    return pytest.mark.parametrize("rule", rules.values(), ids=rules.keys())


@declaring("group_relabel")
def test_group_relabel(rule):
    rewards, groups = ragged(1)
    relabelled = np.array([40, -3, 17, 5])[groups]
    np.testing.assert_allclose(
        rule(batch_of(rewards, relabelled)).turn_adv, rule(batch_of(rewards, groups)).turn_adv, atol=1e-12
    )


def other_group_changed():
    rewards, groups = ragged(2)
    changed = [[10.0 * r + 3.0 for r in row] if g == 3 else row for row, g in zip(rewards, groups, strict=True)]
    return batch_of(rewards, groups), batch_of(changed, groups), groups != 3


@declaring("group_independence")
def test_group_independence(rule):
    before, after, rest = other_group_changed()
    np.testing.assert_allclose(rule(after).turn_adv[rest], rule(before).turn_adv[rest], atol=1e-12)


@lacking("group_independence")
def test_group_dependence_is_not_undeclared_by_mistake(rule):
    before, after, rest = other_group_changed()
    assert np.abs(rule(after).turn_adv[rest] - rule(before).turn_adv[rest]).max() > 1e-3


def returns_shifted():
    rewards, groups = ragged(3)
    shift = np.array([1.0, -2.0, 0.5, 3.0])
    shifted = [[*row[:-1], row[-1] + shift[g]] for row, g in zip(rewards, groups, strict=True)]
    return batch_of(rewards, groups), batch_of(shifted, groups)


@declaring("return_shift")
def test_return_shift(rule):
    before, after = returns_shifted()
    np.testing.assert_allclose(rule(after).turn_adv, rule(before).turn_adv, atol=1e-9)


@lacking("return_shift")
def test_return_shift_is_not_undeclared_by_mistake(rule):
    before, after = returns_shifted()
    assert np.abs(rule(after).turn_adv - rule(before).turn_adv).max() > 1e-3


def scaled(factor):
    rewards, groups = ragged(4)
    return batch_of(rewards, groups), batch_of([[factor * r for r in row] for row in rewards], groups)


@declaring("reward_scale")
@pytest.mark.parametrize("factor", [0.5, 3.0, 100.0])
def test_reward_scale(rule, factor):
    before, after = scaled(factor)
    np.testing.assert_allclose(rule(after).turn_adv, rule(before).turn_adv, rtol=1e-5, atol=1e-5)


@lacking("reward_scale")
def test_reward_scale_is_not_undeclared_by_mistake(rule):
    before, after = scaled(0.1)
    assert np.abs(rule(after).turn_adv - rule(before).turn_adv).max() > 1e-3
