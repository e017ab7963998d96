"""Credit rules against their definitions written out plainly, and where one rule is another."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from credit_made import ragged, rollout_of
from hypothesis import given
from hypothesis import strategies as st

from msgrpo_lab.credit.base import group_states_of, last_turns, turns_of
from msgrpo_lab.credit.discounted_step import DiscountedStep
from msgrpo_lab.credit.dr_grpo import DrGRPO
from msgrpo_lab.credit.episode_return import EpisodeReturn
from msgrpo_lab.credit.gagpo import GAGPO, generalised_advantage
from msgrpo_lab.credit.gigpo import GiGPO
from msgrpo_lab.credit.graph import Graph, distances_to_success
from msgrpo_lab.credit.hgpo import HGPO
from msgrpo_lab.credit.mt_grpo import MTGRPO
from msgrpo_lab.credit.reward_to_go import RewardToGo, reward_to_go
from msgrpo_lab.credit.rloo import RLOO

CASES = st.integers(0, 2**32 - 1).map(ragged)
GAMMAS = st.sampled_from([0.0, 0.5, 0.95, 1.0])
WEIGHTINGS = st.sampled_from(["episode", "step", "token"])
NORMALISE = st.sampled_from(["std", "none"])


def only_at_the_end(episodes):
    """The same episodes with their last reward alone."""
    return [replace(played, rewards=[*[0.0] * (len(played.rewards) - 1), played.rewards[-1]]) for played in episodes]


def by_turn(episodes, groups, gamma):
    """(group, states up to and with this turn, turn return, episode, tokens) of every turn, by the plainest code."""
    rows = []
    for e, (played, group) in enumerate(zip(episodes, groups, strict=True)):
        for t in range(len(played.rewards)):
            value = sum(gamma**k * r for k, r in enumerate(played.rewards[t:]))
            rows.append((int(group), tuple(played.states[: t + 1]), value, e, played.tokens[t]))
    return rows


def weight_of(row, members, weighting):
    """How much `row` counts among `members`, of which it is one."""
    if weighting == "step":
        return 1.0
    if weighting == "token":
        return float(row[4])
    return 1.0 / sum(member[3] == row[3] for member in members)


def mean_and_std(members, weighting):
    weights = [weight_of(row, members, weighting) for row in members]
    mean = sum(w * row[2] for w, row in zip(weights, members, strict=True)) / sum(weights)
    variance = sum(w * (row[2] - mean) ** 2 for w, row in zip(weights, members, strict=True)) / sum(weights)
    return mean, variance**0.5


@given(CASES, GAMMAS, WEIGHTINGS, NORMALISE)
def test_gigpo_is_its_definition(case, gamma, weighting, normalise):
    episodes, groups = case
    batch = rollout_of(episodes, groups)
    credit = GiGPO(gamma=gamma, baseline_weighting=weighting, normalise=normalise)(batch)
    rows = by_turn(episodes, groups, gamma)
    expected = []
    for row in rows:
        members = [other for other in rows if other[0] == row[0] and other[1][-1] == row[1][-1]]
        mean, std = mean_and_std(members, weighting)
        expected.append((row[2] - mean) / (std + 1e-6 if normalise == "std" else 1.0))
    episode_part = EpisodeReturn(normalise=normalise)(batch).turn_adv
    np.testing.assert_allclose((credit.turn_adv - episode_part)[credit.turn_mask], expected, atol=1e-6)


@given(CASES, GAMMAS, WEIGHTINGS, st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.0]))
def test_hgpo_is_its_definition(case, gamma, weighting, history, alpha):
    episodes, groups = case
    rule = HGPO(history=history, alpha=alpha, gamma=gamma, baseline_weighting=weighting, normalise="none")
    credit = rule(rollout_of(episodes, groups))
    rows = by_turn(episodes, groups, gamma)
    expected = []
    for row in rows:
        total, weight = 0.0, 0.0
        for k in range(min(history, len(row[1]) - 1) + 1):
            past = row[1][-k - 1 :]
            members = [other for other in rows if other[0] == row[0] and other[1][-k - 1 :] == past]
            mean, std = mean_and_std(members, weighting)
            if std > 1e-12:
                total, weight = total + (k + 1) ** alpha * (row[2] - mean), weight + (k + 1) ** alpha
        expected.append(total / weight if weight else 0.0)
    np.testing.assert_allclose(credit.turn_adv[credit.turn_mask], expected, atol=1e-9)


@given(CASES, GAMMAS, WEIGHTINGS)
def test_gagpo_with_lambda_one_is_turn_return_minus_value(case, gamma, weighting):
    episodes, groups = case
    rule = GAGPO(gamma=gamma, lam=1.0, baseline_weighting=weighting, normalise="none")
    credit = rule(rollout_of(episodes, groups))
    rows = by_turn(episodes, groups, gamma)
    expected = []
    for row in rows:
        members = [other for other in rows if other[0] == row[0] and other[1][-1] == row[1][-1]]
        expected.append(row[2] - mean_and_std(members, weighting)[0])
    np.testing.assert_allclose(credit.turn_adv[credit.turn_mask], expected, atol=1e-9)


@given(CASES, GAMMAS)
def test_values_without_own_visits_do_not_depend_on_own_rewards(case, gamma):
    episodes, _ = case
    # Every episode meets every state, so that there is always another one that was there.
    everywhere = [replace(p, states=["s0"] * len(p.rewards)) for p in episodes]
    groups = np.zeros(len(everywhere), dtype=int)
    changed = [replace(everywhere[0], rewards=[r + 5.0 for r in everywhere[0].rewards]), *everywhere[1:]]
    rule = GAGPO(gamma=gamma, lam=1.0, leave_one_out=True, normalise="none")
    before, after = (rule(rollout_of(case, groups)).turn_adv[0] for case in (everywhere, changed))
    raised = reward_to_go(np.full((1, len(everywhere[0].rewards)), 5.0), gamma)[0]
    np.testing.assert_allclose((after - before)[: raised.size], raised, atol=1e-9)


@given(CASES, GAMMAS, st.floats(0.0, 1.0))
def test_generalised_advantages_satisfy_their_recursion(case, gamma, lam):
    episodes, groups = case
    turns = turns_of(rollout_of(episodes, groups))
    value_ET = np.where(turns.mask, np.sin(1.0 + np.arange(turns.mask.size)).reshape(turns.mask.shape), 0.0)
    adv_ET = generalised_advantage(turns.reward, value_ET, gamma=gamma, lam=lam)
    following = np.pad(value_ET, ((0, 0), (0, 1)))[:, 1:], np.pad(adv_ET, ((0, 0), (0, 1)))[:, 1:]
    expected = turns.reward + gamma * following[0] - value_ET + gamma * lam * following[1]
    np.testing.assert_allclose(adv_ET, expected, atol=1e-12)
    np.testing.assert_array_equal(adv_ET[~turns.mask], 0.0)


@given(CASES)
def test_distances_on_the_graph_are_the_shortest_ways(case):
    episodes, groups = case
    batch = rollout_of(episodes, groups)
    turns = turns_of(batch)
    success_N = np.array([played.success for played in episodes])[turns.episode]
    states = group_states_of(batch, turns, same_turn=False)
    start, end = distances_to_success(states, turns, last_turns(turns), success_N)
    for group in np.unique(groups):
        members = [played for played, g in zip(episodes, groups, strict=True) if g == group]
        nodes = {state for played in members for state in played.states}
        distance = dict.fromkeys(nodes, np.inf)
        for _ in nodes:
            for played in members:
                for t, state in enumerate(played.states):
                    at_end = 0.0 if played.success else np.inf
                    ahead = distance[played.states[t + 1]] if t + 1 < len(played.states) else at_end
                    distance[state] = min(distance[state], ahead + 1.0)
        beyond = 1.0 + max((d for d in distance.values() if d < np.inf), default=0.0)
        left = [min(distance[state], beyond) for played in members for state in played.states]
        led_to = [
            min(d, beyond)
            for played in members
            for d in [*(distance[state] for state in played.states[1:]), 0.0 if played.success else np.inf]
        ]
        inside = groups[turns.episode] == group
        np.testing.assert_array_equal(start[inside], left)
        np.testing.assert_array_equal(end[inside], led_to)


@given(CASES)
def test_a_step_on_a_shortest_way_is_never_worse_than_another_from_the_same_state(case):
    episodes, groups = case
    batch = rollout_of(episodes, groups)
    turns = turns_of(batch)
    success_N = np.array([played.success for played in episodes])[turns.episode]
    states = group_states_of(batch, turns, same_turn=False)
    start, end = distances_to_success(states, turns, last_turns(turns), success_N)
    adv = Graph(episode_weight=0.0)(batch).turn_adv[turns.mask]
    assert (adv[end == start - 1.0] >= 0.0).all()


@given(CASES, GAMMAS, NORMALISE)
def test_a_states_advantages_sum_to_zero(case, gamma, normalise):
    episodes, groups = case
    batch = rollout_of(episodes, groups)
    turns = turns_of(batch)
    states = group_states_of(batch, turns, same_turn=False)
    episode_part = EpisodeReturn(normalise=normalise)(batch).turn_adv
    for rule in (GiGPO(gamma=gamma, normalise=normalise), Graph(gamma=gamma, normalise=normalise)):
        step_part = (rule(batch).turn_adv - episode_part)[turns.mask]
        np.testing.assert_allclose(np.bincount(states, step_part), 0.0, atol=1e-8)


@given(CASES, NORMALISE)
def test_rules_without_their_turn_part_are_ms_grpo(case, normalise):
    batch = rollout_of(*case)
    expected = EpisodeReturn(normalise=normalise)(batch).turn_adv
    for rule in (
        GiGPO(step_weight=0.0, normalise=normalise),
        Graph(step_weight=0.0, normalise=normalise),
        MTGRPO(turn_weight=0.0, normalise=normalise),
    ):
        np.testing.assert_array_equal(rule(batch).turn_adv, expected)


@given(CASES, GAMMAS, WEIGHTINGS)
def test_gigpo_is_hgpo_without_history_and_with_the_episodes_advantage(case, gamma, weighting):
    batch = rollout_of(*case)
    np.testing.assert_allclose(
        HGPO(history=0, episode_weight=1.0, gamma=gamma, baseline_weighting=weighting)(batch).turn_adv,
        GiGPO(gamma=gamma, baseline_weighting=weighting)(batch).turn_adv,
        atol=1e-9,
    )


@given(CASES, GAMMAS, WEIGHTINGS)
def test_gigpo_is_dr_grpo_and_gagpo_with_lambda_one(case, gamma, weighting):
    batch = rollout_of(*case)
    np.testing.assert_allclose(
        GiGPO(gamma=gamma, baseline_weighting=weighting, normalise="none")(batch).turn_adv,
        DrGRPO()(batch).turn_adv
        + GAGPO(gamma=gamma, lam=1.0, baseline_weighting=weighting, normalise="none")(batch).turn_adv,
        atol=1e-9,
    )


@given(CASES)
def test_where_no_state_is_met_twice_only_episodes_are_compared(case):
    episodes, groups = case
    apart = [replace(p, states=[(e, t) for t in range(len(p.rewards))]) for e, p in enumerate(episodes)]
    batch = rollout_of(apart, groups)
    np.testing.assert_array_equal(GiGPO()(batch).turn_adv, EpisodeReturn()(batch).turn_adv)
    np.testing.assert_array_equal(HGPO()(batch).turn_adv, 0.0)
    np.testing.assert_array_equal(GAGPO(normalise="none")(batch).turn_adv, 0.0)
    np.testing.assert_array_equal(Graph()(batch).turn_adv, EpisodeReturn()(batch).turn_adv)


@given(CASES, GAMMAS, WEIGHTINGS, NORMALISE)
def test_discounted_step_is_reward_to_go_with_a_group_baseline(case, gamma, weighting, normalise):
    batch = rollout_of(*case)
    arguments = {"gamma": gamma, "baseline_weighting": weighting, "normalise": normalise}
    np.testing.assert_array_equal(DiscountedStep(**arguments)(batch).turn_adv, RewardToGo(**arguments)(batch).turn_adv)


@given(CASES, WEIGHTINGS, NORMALISE)
def test_undiscounted_turn_returns_of_one_last_reward_are_ms_grpo(case, weighting, normalise):
    episodes, groups = case
    batch = rollout_of(only_at_the_end(episodes), groups)
    arguments = {"baseline_weighting": weighting, "normalise": normalise}
    np.testing.assert_allclose(
        DiscountedStep(gamma=1.0, **arguments)(batch).turn_adv, EpisodeReturn(**arguments)(batch).turn_adv, atol=1e-9
    )


@given(CASES)
def test_leave_one_out_is_the_deviation_stretched_by_the_groups_size(case):
    # Every group has five episodes.
    batch = rollout_of(*case)
    np.testing.assert_allclose(RLOO()(batch).turn_adv, 5 / 4 * DrGRPO()(batch).turn_adv, atol=1e-12)


@given(CASES, WEIGHTINGS)
def test_leave_one_out_is_its_definition(case, weighting):
    episodes, groups = case
    credit = RLOO(baseline_weighting=weighting)(rollout_of(episodes, groups))
    count = {"episode": lambda _: 1, "step": lambda p: len(p.rewards), "token": lambda p: sum(p.tokens)}[weighting]
    for i, played in enumerate(episodes):
        others = [p for j, p in enumerate(episodes) if j != i and groups[j] == groups[i]]
        baseline = sum(count(p) * sum(p.rewards) for p in others) / sum(count(p) for p in others)
        np.testing.assert_allclose(credit.turn_adv[i, 0], sum(played.rewards) - baseline, atol=1e-9)


@given(CASES)
def test_equal_completions_make_tokens_and_steps_alike(case):
    episodes, groups = case
    batch = rollout_of([replace(p, tokens=[3] * len(p.rewards)) for p in episodes], groups)
    for rule in (RewardToGo, DiscountedStep, GiGPO, HGPO, GAGPO, Graph, EpisodeReturn, RLOO, DrGRPO):
        np.testing.assert_allclose(
            rule(baseline_weighting="token")(batch).turn_adv,
            rule(baseline_weighting="step")(batch).turn_adv,
            atol=1e-6,
        )
