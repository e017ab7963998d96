"""Every credit rule under conf/credit keeps the contract, and the invariances that it declares."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from credit_made import Played, batch_of, ragged, rollout_of, with_oracle
from hydra.utils import instantiate
from omegaconf import OmegaConf

from msgrpo_lab.credit.base import ALWAYS, INVARIANCES
from msgrpo_lab.credit.discounted_step import DiscountedStep
from msgrpo_lab.credit.dr_grpo import DrGRPO
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.exact import Exact
from msgrpo_lab.credit.gagpo import GAGPO
from msgrpo_lab.credit.gigpo import GiGPO
from msgrpo_lab.credit.graph import Graph
from msgrpo_lab.credit.hgpo import HGPO
from msgrpo_lab.credit.mt_grpo import MTGRPO
from msgrpo_lab.credit.reward_to_go import RewardToGo
from msgrpo_lab.credit.rloo import RLOO

CONF = Path(__file__).resolve().parents[2] / "conf" / "credit"
CONFIGURED = {path.stem: instantiate(OmegaConf.load(path)) for path in sorted(CONF.glob("*.yaml"))}
VARIANTS = {
    "return-none": EpisodeReturn(normalise="none"),
    "return-floor": EpisodeReturn(min_std=0.5),
    "return-step": EpisodeReturn(baseline_weighting="step"),
    "return-token": EpisodeReturn(baseline_weighting="token"),
    "dr-token": DrGRPO(baseline_weighting="token"),
    "rloo-step": RLOO(baseline_weighting="step"),
    "togo-batch": RewardToGo(normalise="batch"),
    "togo-none": RewardToGo(normalise="none"),
    "togo-turn": RewardToGo(baseline="turn"),
    "togo-step": RewardToGo(baseline_weighting="step"),
    "togo-token": RewardToGo(baseline_weighting="token"),
    "togo-discounted": RewardToGo(gamma=0.9),
    "togo-turn-batch-step": RewardToGo(baseline="turn", normalise="batch", baseline_weighting="step"),
    "togo-rebn": RewardToGo(baseline="batch", baseline_weighting="step"),
    "togo-rebn-none": RewardToGo(baseline="batch", normalise="none"),
    "step-undiscounted": DiscountedStep(gamma=1.0, baseline_weighting="token"),
    "step-none": DiscountedStep(normalise="none"),
    "mt-last": MTGRPO(outcome="last"),
    "mt-group-token": MTGRPO(baseline="group", baseline_weighting="token"),
    "mt-none": MTGRPO(normalise="none"),
    "gigpo-episode": GiGPO(step_weight=0.0),
    "gigpo-undiscounted": GiGPO(gamma=1.0, baseline_weighting="episode"),
    "gigpo-same-turn": GiGPO(same_turn=True, normalise="none"),
    "hgpo-flat": HGPO(history=0, alpha=0.0, gamma=1.0, baseline_weighting="token"),
    "hgpo-episode": HGPO(episode_weight=1.0, normalise="none"),
    "gagpo-undiscounted": GAGPO(gamma=1.0, lam=1.0),
    "gagpo-none-loo": GAGPO(normalise="none", leave_one_out=True, lam=0.0),
    "gagpo-pool": GAGPO(value_pool="batch", gamma=1.0, same_turn=True, baseline_weighting="episode"),
    "graph-progress": Graph(episode_weight=0.0),
    "graph-none": Graph(normalise="none", relative_distance=False),
    "graph-episode": Graph(step_weight=0.0, min_std=0.5),
    "exact-batch": Exact(normalise="batch", baseline_weighting="token"),
}
RULES = CONFIGURED | VARIANTS
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def some_rules(chosen):
    """Parametrises a test by the rules for which `chosen(rule)` holds."""
    rules = {key: rule for key, rule in RULES.items() if chosen(rule)}
    return pytest.mark.parametrize("rule", rules.values(), ids=rules.keys())


NAMES = {
    "episode_return",
    "dr_grpo",
    "rloo",
    "reward_to_go",
    "discounted_step",
    "mt_grpo",
    "gigpo",
    "hgpo",
    "gagpo",
    "graph",
    "exact",
}


def made(episodes, groups):
    return rollout_of(with_oracle(episodes, groups), groups)


def adv_of(rule, episodes, groups):
    return rule(made(episodes, groups)).turn_adv


def with_rewards(episodes, change):
    """The same episodes with the rewards that `change(rewards, index of the episode)` makes of theirs."""
    return [replace(played, rewards=change(played.rewards, i)) for i, played in enumerate(episodes)]


def with_states(episodes, change):
    return [replace(played, states=[change(state) for state in played.states]) for played in episodes]


def test_there_are_configured_rules():
    assert set(CONFIGURED) >= NAMES


def configured(name):
    config = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"), resolve=True)
    del config["_target_"]
    return config


@pytest.mark.parametrize("name", CONFIGURED)
def test_config_names_every_argument(name):
    assert set(configured(name)) == {field.name for field in fields(CONFIGURED[name])}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_config_and_class_have_the_same_defaults(name):
    assert configured(name) == {field.name: field.default for field in fields(CONFIGURED[name])}


@EVERY_RULE
def test_declared_invariances_are_known(rule):
    assert rule.invariances <= set(INVARIANCES)
    assert rule.invariances >= ALWAYS


@EVERY_RULE
@pytest.mark.parametrize("seed", range(3))
def test_shapes_masks_and_zeros_past_the_end(rule, seed):
    episodes, groups = ragged(seed)
    credit = rule(made(episodes, groups))
    lengths = np.array([len(played.rewards) for played in episodes])
    assert credit.turn_adv.shape == credit.turn_mask.shape == (20, lengths.max())
    assert credit.episode_adv.shape == (20,)
    np.testing.assert_array_equal(credit.turn_mask.sum(axis=1), lengths)
    np.testing.assert_array_equal(credit.turn_mask, np.sort(credit.turn_mask, axis=1)[:, ::-1])
    np.testing.assert_array_equal(credit.turn_adv[~credit.turn_mask], 0.0)
    assert np.isfinite(credit.turn_adv).all()
    assert np.abs(credit.turn_adv).max() > 0.1


@some_rules(lambda rule: not isinstance(rule, EpisodeReturn))
def test_samplers_weight_by_ms_grpos_advantage(rule):
    batch = made(*ragged(0))
    expected = EpisodeReturn(delta=getattr(rule, "delta", 1e-6), min_std=getattr(rule, "min_std", 0.0))(
        batch
    ).episode_adv
    np.testing.assert_array_equal(rule(batch).episode_adv, expected)


@EVERY_RULE
def test_equal_episodes_earn_exactly_nothing(rule):
    credit = rule(rollout_of([Played(rewards=[0.1, 0.2], states=["a", "b"], exact=[0.0, 0.0])] * 4, [0] * 4))
    np.testing.assert_array_equal(credit.episode_adv, 0.0)


def compares_equal_states(rule):
    """Whether the rule compares a turn only with turns of the same state, or whole episodes."""
    of_other_states = isinstance(rule, RewardToGo | DiscountedStep) or (
        isinstance(rule, MTGRPO) and rule.baseline == "group"
    )
    return not of_other_states and not (isinstance(rule, GAGPO) and rule.normalise == "std")


@some_rules(compares_equal_states)
def test_equal_episodes_earn_exactly_nothing_where_equal_states_are_compared(rule):
    equal = [Played(rewards=[0.1, 0.2, 0.3], states=["a", "b", "c"], exact=[0.0] * 3)] * 3
    np.testing.assert_array_equal(rule(rollout_of(equal, [0] * 3)).turn_adv, 0.0)


@EVERY_RULE
def test_lone_episode_of_one_turn_earns_exactly_nothing(rule):
    credit = rule(rollout_of([Played(rewards=[5.0], success=True, exact=[0.0])], [3]))
    np.testing.assert_array_equal(credit.turn_adv, [[0.0]])


@EVERY_RULE
def test_groups_of_one_episode_give_finite_credit(rule):
    episodes, _ = ragged(5)
    credit = rule(made(episodes, np.arange(20)))
    assert np.isfinite(credit.turn_adv).all()
    np.testing.assert_array_equal(credit.episode_adv, 0.0)


@EVERY_RULE
def test_same_rollout_same_bits(rule):
    batch = made(*ragged(0))
    np.testing.assert_array_equal(rule(batch).turn_adv, rule(batch).turn_adv)


@EVERY_RULE
@pytest.mark.parametrize("seed", range(3))
def test_episode_permutation(rule, seed):
    episodes, groups = ragged(seed)
    order = np.random.default_rng(seed + 100).permutation(20)
    credit = rule(made(episodes, groups))
    moved = rule(made([episodes[i] for i in order], groups[order]))
    np.testing.assert_allclose(moved.turn_adv, credit.turn_adv[order], atol=1e-12)
    np.testing.assert_allclose(moved.episode_adv, credit.episode_adv[order], atol=1e-12)


@EVERY_RULE
def test_group_relabel(rule):
    episodes, groups = ragged(1)
    relabelled = np.array([40, -3, 17, 5])[groups]
    np.testing.assert_allclose(adv_of(rule, episodes, relabelled), adv_of(rule, episodes, groups), atol=1e-12)


@EVERY_RULE
def test_state_relabel(rule):
    episodes, groups = ragged(1)
    names = {"s0": ("map", 7), "s1": "s0", "s2": 3.5, "s3": frozenset()}
    renamed = with_states(episodes, names.__getitem__)
    np.testing.assert_allclose(adv_of(rule, renamed, groups), adv_of(rule, episodes, groups), atol=1e-12)


def declaring(name):
    return some_rules(lambda rule: name in rule.invariances)


def lacking(name):
    return some_rules(lambda rule: name not in rule.invariances)


def states_forgotten():
    episodes, groups = ragged(1)
    return episodes, with_states(episodes, lambda _: "s"), groups


@declaring("state_blind")
def test_state_blind(rule):
    before, after, groups = states_forgotten()
    np.testing.assert_array_equal(adv_of(rule, after, groups), adv_of(rule, before, groups))


@lacking("state_blind")
def test_states_matter_where_the_rule_does_not_say_that_they_do_not(rule):
    before, after, groups = states_forgotten()
    assert np.abs(adv_of(rule, after, groups) - adv_of(rule, before, groups)).max() > 1e-3


def other_group_changed():
    episodes, groups = ragged(2)
    changed = with_rewards(
        episodes, lambda rewards, i: [10.0 * r + 3.0 for r in rewards] if groups[i] == 3 else rewards
    )
    changed = [
        replace(played, states=["s0"] * len(played.rewards), success=not played.success) if group == 3 else played
        for played, group in zip(changed, groups, strict=True)
    ]
    return episodes, changed, groups


@declaring("group_independence")
def test_group_independence(rule):
    before, after, groups = other_group_changed()
    rest = groups != 3
    np.testing.assert_allclose(adv_of(rule, after, groups)[rest], adv_of(rule, before, groups)[rest], atol=1e-12)


@lacking("group_independence")
def test_group_dependence_is_not_undeclared_by_mistake(rule):
    before, after, groups = other_group_changed()
    rest = groups != 3
    assert np.abs(adv_of(rule, after, groups)[rest] - adv_of(rule, before, groups)[rest]).max() > 1e-3


def returns_shifted():
    episodes, groups = ragged(3)
    shift = np.array([1.0, -2.0, 0.5, 3.0])
    return episodes, with_rewards(episodes, lambda r, i: [*r[:-1], r[-1] + shift[groups[i]]]), groups


@declaring("return_shift")
def test_return_shift(rule):
    before, after, groups = returns_shifted()
    np.testing.assert_allclose(adv_of(rule, after, groups), adv_of(rule, before, groups), atol=1e-9)


@lacking("return_shift")
def test_return_shift_is_not_undeclared_by_mistake(rule):
    before, after, groups = returns_shifted()
    assert np.abs(adv_of(rule, after, groups) - adv_of(rule, before, groups)).max() > 1e-3


def scaled(factor):
    episodes, groups = ragged(4)
    return episodes, with_rewards(episodes, lambda rewards, _: [factor * r for r in rewards]), groups


@declaring("reward_scale")
@pytest.mark.parametrize("factor", [0.5, 3.0, 100.0])
def test_reward_scale(rule, factor):
    before, after, groups = scaled(factor)
    np.testing.assert_allclose(adv_of(rule, after, groups), adv_of(rule, before, groups), rtol=1e-4, atol=1e-5)


@lacking("reward_scale")
def test_reward_scale_is_not_undeclared_by_mistake(rule):
    before, after, groups = scaled(0.1)
    assert np.abs(adv_of(rule, after, groups) - adv_of(rule, before, groups)).max() > 1e-3


def test_an_unfilled_rollout_is_credited_by_every_rule_but_the_exact_one():
    batch = batch_of([[0.0, 1.0], [0.0]], [0, 0])
    for name in NAMES - {"exact"}:
        assert CONFIGURED[name](batch).turn_mask.sum() == 3


def large_rollout():
    """2,000 episodes of 8 to 20 turns in groups of 16 that meet 30 states each."""
    rng = np.random.default_rng(0)
    groups = np.arange(2000) // 16
    lengths = rng.integers(8, 21, size=2000)
    return made(
        [
            Played(rewards=rng.normal(size=n), states=[(g, int(s)) for s in rng.integers(30, size=n)], success=s > 0.5)
            for n, g, s in zip(lengths, groups, rng.random(2000), strict=True)
        ],
        groups,
    )


def test_every_rule_takes_well_under_a_second_for_two_thousand_episodes():
    batch = large_rollout()
    for name, rule in RULES.items():
        start = time.process_time()
        rule(batch)
        assert time.process_time() - start < 1.0, name
