"""Rollouts for the tests of credit rules: what a rule reads is given, everything else is filler."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from msgrpo_lab.types import Completion, Episode, ParsedAction, RolloutBatch, Turn


@dataclass(frozen=True, kw_only=True)
class Played:
    """One episode as credit rules see it."""

    rewards: Sequence[float]
    states: Sequence[Hashable] | None = None
    """State key of each turn; None gives every turn the same."""
    tokens: Sequence[int] | None = None
    """Completion tokens of each turn; None gives every turn one."""
    success: bool = False
    truncated: bool = False
    exact: Sequence[float] | None = None


def episode(played: Played, group: int) -> Episode:
    ids = np.array([0])
    count = len(played.rewards)
    return Episode(
        group_id=int(group),
        seed=0,
        turns=tuple(
            Turn(
                observation="",
                state_key=state,
                completion=Completion(
                    prompt_ids=ids,
                    token_ids=np.zeros(tokens, dtype=np.int64),
                    logprobs=np.zeros(tokens),
                    text="",
                    finish_reason="stop",
                    policy_version=0,
                ),
                parsed=ParsedAction(action=0, span=(0, 0), error=None),
                executed_action=0,
                reward=float(reward),
                game_reward=0.0,
            )
            for reward, state, tokens in zip(
                played.rewards, played.states or [0] * count, played.tokens or [1] * count, strict=True
            )
        ),
        terminated=not played.truncated,
        truncated=played.truncated,
        success=played.success,
    )


def rollout_of(episodes: Sequence[Played], groups: Sequence[int] | np.ndarray) -> RolloutBatch:
    """A rollout of these episodes; the oracle has filled it if every episode says what it found."""
    exact_ET = None
    if episodes and all(played.exact is not None for played in episodes):
        exact_ET = np.zeros((len(episodes), max(len(played.rewards) for played in episodes)))
        for row, played in zip(exact_ET, episodes, strict=True):
            row[: len(played.rewards)] = played.exact
    return RolloutBatch(
        episodes=tuple(episode(played, group) for played, group in zip(episodes, groups, strict=True)),
        group_index=np.array(groups, dtype=np.int64),
        exact_adv=exact_ET,
    )


def batch_of(rewards: Sequence[Sequence[float]], groups: Sequence[int] | np.ndarray) -> RolloutBatch:
    """A rollout with these rewards, one list an episode, in which every turn meets the same state."""
    return rollout_of([Played(rewards=row) for row in rewards], groups)


def ragged(seed: int) -> tuple[list[Played], np.ndarray]:
    """4 interleaved groups of 5 episodes of 1 to 6 turns that meet 4 states, the same ones in every group."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat([0, 1, 2, 3], 5))
    episodes = []
    for _ in groups:
        count = int(rng.integers(1, 7))
        success = bool(rng.random() < 0.4)
        episodes.append(
            Played(
                rewards=list(rng.normal(size=count)),
                states=[f"s{n}" for n in rng.integers(4, size=count)],
                tokens=[int(n) for n in rng.integers(1, 6, size=count)],
                success=success,
                truncated=not success and bool(rng.random() < 0.5),
            )
        )
    return episodes, groups


def with_oracle(episodes: Sequence[Played], groups: np.ndarray) -> list[Played]:
    """The same episodes, with advantages that follow the rewards as an oracle's would.

    Turn return minus mean return of the group: shifts with nothing and scales with the rewards, as A^π does.
    """
    returns = np.array([sum(played.rewards) for played in episodes])
    return [
        replace(
            played,
            exact=[sum(played.rewards[t:]) - returns[groups == group].mean() for t in range(len(played.rewards))],
        )
        for played, group in zip(episodes, groups, strict=True)
    ]
