"""What is true of a rollout: exact advantages and the exact policy gradient, where the game is small enough to know.

Frozen Lake's states can be counted, and so can the texts they read as. The policy's action probabilities on those texts
and the game's own table give every value by dynamic programming (`oracle/lake_values.py`), for the very maps, horizon,
shaping, penalty and fallback that the rollout was played under.

Axes: E episodes, T turns of the longest one, M distinct maps, S states, X distinct texts, B answers (the last one ⊥).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Bool, Float, Int

from msgrpo_lab.fidelity.action_probs import ActionTable, TableMaker
from msgrpo_lab.oracle.lake_values import (
    INVALID,
    PolicyValues,
    TextIndex,
    exact_gradient,
    index_texts,
    induced_gradient,
    lake_model,
    lakes_of,
    policy_values,
)
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import RolloutBatch


class TurnIndex(NamedTuple):
    """Where each turn of a rollout stands in the tables of a `LakeTruth`; 0 past an episode's end."""

    taken: Bool[np.ndarray, "E T"]
    """Which turns there are."""
    lake: Int[np.ndarray, "E T"]
    state: Int[np.ndarray, "E T"]
    text: Int[np.ndarray, "E T"]
    answer: Int[np.ndarray, "E T"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LakeTruth:
    """The sampling policy's exact values on the maps of a rollout."""

    values: PolicyValues
    """V, Q, A and occupancy on the M distinct maps."""
    table: ActionTable
    """The policy's action probabilities on the X texts."""
    texts: TextIndex
    map_of_seed: Mapping[int, int]
    """Number of the map that each environment seed gives."""

    def turns(self, batch: RolloutBatch) -> TurnIndex:
        """Map, state, text and answer of every turn.

        Raises:
            ValueError: an episode's seed is unknown, or it was played on another map or text than its seed and the
                scenario give.
        """
        shape = (len(batch.episodes), int(batch.num_turns.max(initial=0)))
        lake_ET, state_ET, text_ET, answer_ET = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        row_of = self.texts.row_of
        for episode_number, episode in enumerate(batch.episodes):
            if episode.seed not in self.map_of_seed:
                raise ValueError(f"seed={episode.seed}: not among the seeds of this truth; make one of this rollout")
            number = self.map_of_seed[episode.seed]
            lake_ET[episode_number] = number
            key = self.values.model.lakes[number].key
            for turn_number, turn in enumerate(episode.turns):
                played_on, state = cast("tuple[str, int]", turn.state_key)
                text = row_of.get(turn.observation, -1)
                if played_on != key or text != self.texts.text_MS[number, state]:
                    raise ValueError(
                        f"episode {episode_number}: was played on the map {played_on}, and reads otherwise than seed "
                        f"{episode.seed} of this scenario (map {key}); give the env settings of the rollout"
                    )
                action = turn.parsed.action
                place = (episode_number, turn_number)
                state_ET[place], text_ET[place] = state, text
                answer_ET[place] = INVALID if action is None else action
        taken_ET = np.arange(shape[1]) < batch.num_turns[:, None]
        return TurnIndex(taken_ET, lake_ET, state_ET, text_ET, answer_ET)

    def advantages(self, batch: RolloutBatch) -> Float[np.ndarray, "E T"]:
        """A^π_t(s_t, b_t) of every turn; 0 past an episode's end."""
        turns = self.turns(batch)
        time_T = np.arange(turns.taken.shape[1])
        adv_ET = self.values.advantage_MTSB[turns.lake, time_T, turns.state, turns.answer]
        return np.where(turns.taken, adv_ET, 0.0)

    def gradient(self, batch: RolloutBatch) -> Float[np.ndarray, "X B"]:
        """∂J/∂logit(x, b), each map weighted by its share of the episodes: what an unbiased rule estimates."""
        count_M = np.bincount(
            [self.map_of_seed[episode.seed] for episode in batch.episodes], minlength=len(self.values.value_MTS)
        )
        return exact_gradient(self.values, self.texts, count_M / count_M.sum())

    def induced(self, batch: RolloutBatch, adv_ET: Float[np.ndarray, "E T"]) -> Float[np.ndarray, "X B"]:
        """The gradient in the same space that advantages of the rollout's turns induce; see `induced_gradient`."""
        turns = self.turns(batch)
        return induced_gradient(adv_ET, turns.taken, turns.text, turns.answer, self.table.prob_XB)


def lake_truth(batch: RolloutBatch, *, game: TextGame, table_of: TableMaker) -> LakeTruth:
    """Exact values of the policy that sampled a rollout of Frozen Lake.

    Args:
        batch: the rollout.
        game: a game of its scenario; it is left alone.
        table_of: gives the sampling policy's action probabilities on some texts, for example
            `partial(exact_table, policy=…, prompt=…, game=…, sampling=…)`. The policy must still be the one that
            sampled. With estimated probabilities the values are those of the estimated policy.

    Raises:
        ValueError: the game has no oracle; the line names it and what to use instead.
    """
    if not isinstance(game, FrozenLake):
        raise ValueError(
            f"env={type(game).__name__}: has no exact values; use a Frozen Lake scenario (env=frozenlake), or "
            "oracle.forked for sampled values of single states"
        )
    seeds = sorted({episode.seed for episode in batch.episodes})
    lakes = lakes_of(game, seeds)
    distinct = list(dict.fromkeys(lakes))
    number_of = {lake: number for number, lake in enumerate(distinct)}
    texts = index_texts(distinct, game.observation)
    table = table_of(texts.texts)
    values = policy_values(lake_model(game, distinct), texts.spread(table.prob_XB))
    return LakeTruth(
        values=values,
        table=table,
        texts=texts,
        map_of_seed={seed: number_of[lake] for seed, lake in zip(seeds, lakes, strict=True)},
    )


def annotate(batch: RolloutBatch, *, game: TextGame, table_of: TableMaker) -> RolloutBatch:
    """The same rollout with `exact_adv`, A^π_t(s_t, a_t) of the policy that sampled it; see `lake_truth`."""
    truth = lake_truth(batch, game=game, table_of=table_of)
    return replace(batch, exact_adv=truth.advantages(batch))
