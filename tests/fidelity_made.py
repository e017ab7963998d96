"""Rollouts of Frozen Lake by a policy that is a table, with what is true of them: no model, a tenth of a second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from lab_made import completion

from msgrpo_lab.fidelity.action_probs import ActionTable
from msgrpo_lab.fidelity.meter import Yardstick, measure, yardstick_of
from msgrpo_lab.fidelity.rollout_file import GameSettings, SavedRollout
from msgrpo_lab.fidelity.statistics import Score, resample_groups
from msgrpo_lab.fidelity.truth import LakeTruth, lake_truth
from msgrpo_lab.oracle.lake_values import INVALID, index_texts, lake_model, lakes_of, optimal_policy, uniform_policy
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import Credit, Episode, ParsedAction, RolloutBatch, Sampling, Turn

SAMPLING = Sampling(choices=((28,), (30,)), temperature=0.7)


class Played(NamedTuple):
    """A rollout with `exact_adv`, and what it was played under."""

    batch: RolloutBatch
    truth: LakeTruth
    table: ActionTable
    game: FrozenLake
    make_game: partial[FrozenLake]

    @property
    def yardstick(self) -> Yardstick:
        return yardstick_of(self.batch, self.truth)

    @property
    def saved(self) -> SavedRollout:
        return SavedRollout(
            batch=self.batch,
            scenario=GameSettings.of(self.make_game),
            sampling=SAMPLING,
            table=self.table,
            origin={"env": "frozenlake_slippery", "update": 7},
        )


def skilled_table(game: FrozenLake, seeds: Sequence[int], skill: float, silence: float) -> ActionTable:
    """On each text, with probability `skill` the mean optimal answer to its states, else a random one; ⊥ at times."""
    lakes = list(dict.fromkeys(lakes_of(game, sorted(set(seeds)))))
    # Discounted shaping charges for dawdling: without it, waiting is as good as walking while there is time.
    hurried = FrozenLake(slippery=game.slippery, horizon=game.horizon, shaping=1.0, shaping_gamma=0.9)
    model, texts = lake_model(hurried, lakes), index_texts(lakes, game.observation)
    best_XB, any_XB = (texts.add_up(prob) for prob in (optimal_policy(model)[:, 0], uniform_policy(model)))
    prob_XB = skill * best_XB / best_XB.sum(axis=1, keepdims=True) + (1 - skill) * any_XB / any_XB.sum(
        axis=1, keepdims=True
    )
    prob_XB = (1 - silence) * prob_XB
    prob_XB[:, INVALID] += silence
    return ActionTable(texts=texts.texts, prob_XB=prob_XB, standard_error_XB=np.zeros_like(prob_XB), exact=True)


def play(
    *,
    groups: int = 40,
    group_size: int = 8,
    skill: float = 0.6,
    silence: float = 0.02,
    slippery: bool = True,
    horizon: int = 10,
    seed: int = 0,
) -> Played:
    """Groups of episodes by a policy of some skill."""
    make_game = partial(FrozenLake, frozen_probability=0.85, slippery=slippery, horizon=horizon)
    game, rng = make_game(), np.random.default_rng(seed)
    seeds = rng.integers(10_000, size=groups).tolist()
    table = skilled_table(game, seeds, skill, silence)
    rows = table.prob_of
    episodes = [
        _episode(game, rows, group, env_seed, group * group_size + member, rng)
        for group, env_seed in enumerate(seeds)
        for member in range(group_size)
    ]
    batch = RolloutBatch(episodes=tuple(episodes), group_index=np.repeat(np.arange(groups), group_size))
    truth = lake_truth(batch, game=game, table_of=table.select)
    return Played(replace(batch, exact_adv=truth.advantages(batch)), truth, table, game, make_game)


def _episode(game, rows, group, env_seed, member, rng):  # type: ignore[no-untyped-def]
    text, _ = game.reset(seed=env_seed, options={"member": member})
    turns, over = [], False
    while not over:
        answer = int(rng.choice(INVALID + 1, p=rows[text]))
        key, action = game.state_key(), None if answer == INVALID else answer
        following, reward, terminated, truncated, info = game.step(action)
        word = "" if action is None else game.legal_actions[action]
        turns.append(
            Turn(
                observation=text,
                state_key=key,
                completion=completion(text=word, tokens=(answer,), logprobs=(float(np.log(rows[text][answer])),)),
                parsed=ParsedAction(
                    action=action,
                    span=None if action is None else (0, len(word)),
                    error="no legal word" if action is None else None,
                ),
                executed_action=info["executed_action"],
                reward=float(reward),
                game_reward=float(info["game_reward"]),
            )
        )
        text, over = following, terminated or truncated
    return Episode(
        group_id=group,
        seed=env_seed,
        turns=tuple(turns),
        terminated=terminated,
        truncated=truncated,
        success=bool(info["success"]),
    )


def credit_of(played: Played, adv_ET: np.ndarray) -> Credit:
    """Credit with these advantages of played turns, whatever stands past an episode's end."""
    mask_ET = np.arange(adv_ET.shape[1]) < played.batch.num_turns[:, None]
    return Credit(turn_adv=np.where(mask_ET, adv_ET, 0.0), turn_mask=mask_ET, episode_adv=np.zeros(len(adv_ET)))


def scores_of(played: Played, *credits: Credit, resamples: int = 200) -> list[dict[str, Score]]:
    """Each credit's scores, on the same resamples."""
    yardstick = played.yardstick
    times_RG = resample_groups(yardstick.num_groups, resamples, np.random.default_rng(0))
    return [measure(yardstick, credit, times_RG) for credit in credits]
