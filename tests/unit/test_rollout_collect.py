"""Playing episodes: groups share a beginning, episodes end when the game does, and turns say what happened."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from lab_made import small_policy

from msgrpo_lab.engines.hf.engine import HFEngine
from msgrpo_lab.engines.scripted import ScriptedEngine
from msgrpo_lab.lap.prompt import FirstWordParser, PromptBuilder, PromptTemplate
from msgrpo_lab.lap.sources import word_tokenizer
from msgrpo_lab.oracle.players import FixedPlayer, Player, RandomPlayer
from msgrpo_lab.rollout.collect import Collector
from msgrpo_lab.seeding import FIRST_HELD_OUT_SEED, episode_generators, generator, held_out_seeds
from msgrpo_lab.tsmg.base import TextGame
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.types import RolloutBatch, Sampling, Turn

SEEDS = (3, 11, 42)
TEMPLATE = PromptTemplate(user="{observation}", system="{rules}", parser=FirstWordParser())


class Notes:
    """Writes down what an observer is told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []

    def on_turn(self, turn: int, horizon: int, live: int) -> None:
        self.told.append((turn, horizon, live))


def collector(game: type[TextGame] = FrozenLake, **settings: Any) -> Collector:
    return Collector(partial(game, **settings), PromptBuilder(TEMPLATE, word_tokenizer()))


def collected(
    by: Collector, player: Player, seeds: Sequence[int] = SEEDS, group_size: int = 4, rng_seed: int = 0, **more: Any
) -> RolloutBatch:
    return by.collect(
        seeds=seeds,
        group_size=group_size,
        members=more.pop("members", range(len(seeds) * group_size)),
        engine=ScriptedEngine(player=player),
        sampling=Sampling(),
        rngs=episode_generators(rng_seed, "engine", 0, len(seeds) * group_size),
        **more,
    )


def turns_of(batch: RolloutBatch) -> list[Turn]:
    return [turn for episode in batch.episodes for turn in episode.turns]


@pytest.fixture(scope="module")
def firm() -> RolloutBatch:
    return collected(collector(), RandomPlayer(), group_size=8)


def test_episodes_stand_in_group_order(firm: RolloutBatch) -> None:
    assert [episode.group_id for episode in firm.episodes] == [0] * 8 + [1] * 8 + [2] * 8
    assert [episode.seed for episode in firm.episodes] == [3] * 8 + [11] * 8 + [42] * 8
    assert firm.group_index.tolist() == [0] * 8 + [1] * 8 + [2] * 8


@pytest.mark.parametrize("game", [FrozenLake, Snake])
def test_a_group_shares_its_initial_state_and_groups_differ(game: type[TextGame]) -> None:
    batch = collected(collector(game), RandomPlayer())
    first = [(episode.turns[0].observation, episode.turns[0].state_key) for episode in batch.episodes]
    for group in range(3):
        assert len(set(first[4 * group : 4 * group + 4])) == 1
    assert len({key for _, key in first}) == 3


def test_members_of_a_group_slip_independently() -> None:
    by = collector(slippery=True, horizon=15, frozen_probability=1.0)
    batch = collected(by, FixedPlayer("Right"), seeds=(5,), group_size=12)
    assert len({tuple(turn.state_key for turn in episode.turns) for episode in batch.episodes}) > 6


def test_the_same_members_slip_alike() -> None:
    by = collector(slippery=True, horizon=15, frozen_probability=1.0)
    batch = collected(by, FixedPlayer("Right"), seeds=(5,), group_size=3, members=(7, 7, 8))
    paths = [tuple(turn.state_key for turn in episode.turns) for episode in batch.episodes]
    assert paths[0] == paths[1] != paths[2]


@pytest.mark.parametrize("player", [RandomPlayer(), FixedPlayer("Down")])
def test_an_episode_has_no_turn_after_its_end(player: Player) -> None:
    by = collector()
    batch = collected(by, player, seeds=range(12))
    assert any(episode.terminated for episode in batch.episodes)
    for episode in batch.episodes:
        game = FrozenLake()
        game.reset(seed=episode.seed)
        over = [game.step(turn.executed_action)[2:4] for turn in episode.turns]
        assert [any(flags) for flags in over] == [False] * (episode.length - 1) + [True]
        assert (episode.terminated, episode.truncated) == over[-1]


def test_turns_say_what_happened(firm: RolloutBatch) -> None:
    """Each episode replayed beside a game of its own."""
    for episode in firm.episodes:
        game = FrozenLake()
        observation, _ = game.reset(seed=episode.seed)
        for turn in episode.turns:
            assert turn.observation == observation
            assert turn.state_key == game.state_key(), "the state before the move"
            assert turn.completion.text == game.legal_actions[turn.executed_action]
            assert turn.parsed.action == turn.executed_action
            observation, reward, _, _, info = game.step(turn.executed_action)
            assert turn.reward == pytest.approx(float(reward))
            assert turn.game_reward == info["game_reward"]
        assert episode.success == info["success"]


def test_reward_is_shaped_and_game_reward_is_not(firm: RolloutBatch) -> None:
    assert {turn.game_reward for turn in turns_of(firm)} <= {0.0, 1.0}
    assert any(turn.reward not in (0.0, 1.0) for turn in turns_of(firm))
    plain = collected(collector(shaping=0.0), RandomPlayer(), group_size=8)
    assert all(turn.reward == turn.game_reward for turn in turns_of(plain))


def test_an_illegal_answer_is_bottom_and_the_fallback_is_played() -> None:
    by = collector(fallback_action="Up", invalid_penalty=0.25, shaping=0.0)
    batch = collected(by, FixedPlayer("zzz"), seeds=(3,), group_size=2)
    for turn in turns_of(batch):
        assert turn.parsed.action is None
        assert turn.parsed.error == "no legal word in 'zzz'"
        assert turn.executed_action == FrozenLake.legal_actions.index("Up")
        assert turn.reward == -0.25
        assert turn.game_reward == 0.0
    assert [episode.ret for episode in batch.episodes] == [-2.0, -2.0]
    assert [episode.truncated for episode in batch.episodes] == [True, True]


def test_bottom_with_free_decoding_of_an_untrained_policy() -> None:
    policy = small_policy()
    by = Collector(partial(FrozenLake, shaping=0.0), PromptBuilder(TEMPLATE, policy.tokenizer))
    engine = HFEngine()
    engine.sync(policy, 0)
    batch = by.collect(
        seeds=SEEDS,
        group_size=4,
        members=range(12),
        engine=engine,
        sampling=Sampling(max_new_tokens=3),
        rngs=episode_generators(0, "engine", 0, 12),
    )
    illegal = [turn for turn in turns_of(batch) if turn.parsed.action is None]
    assert illegal
    assert all(turn.reward == turn.game_reward - 1.0 for turn in illegal)
    assert all(0 <= turn.executed_action < 4 for turn in illegal)


def test_prompts_are_of_the_current_state_only(firm: RolloutBatch) -> None:
    prompt = PromptBuilder(TEMPLATE, word_tokenizer())
    rules = FrozenLake().rules
    for turn in turns_of(firm):
        expected = prompt.render(rules, turn.observation, FrozenLake.legal_actions)
        assert np.array_equal(turn.completion.prompt_ids, expected)


def test_equal_observations_hold_one_prompt_array(firm: RolloutBatch) -> None:
    arrays: dict[str, int] = {}
    for turn in turns_of(firm):
        assert arrays.setdefault(turn.observation, id(turn.completion.prompt_ids)) == id(turn.completion.prompt_ids)


def test_observers_see_the_live_episodes_dwindle(firm: RolloutBatch) -> None:
    notes = Notes()
    batch = collected(collector(), RandomPlayer(), group_size=8, observers=[notes])
    lengths = [episode.length for episode in batch.episodes]
    assert notes.told == [(turn, 8, sum(length > turn for length in lengths)) for turn in range(max(lengths))]
    assert len({live for *_, live in notes.told}) > 2


def test_the_same_generator_gives_the_same_episodes(firm: RolloutBatch) -> None:
    again = collected(collector(), RandomPlayer(), group_size=8)
    other = collected(collector(), RandomPlayer(), group_size=8, rng_seed=1)

    def played(batch: RolloutBatch) -> list[list[int]]:
        return [[turn.executed_action for turn in episode.turns] for episode in batch.episodes]

    assert played(again) == played(firm)
    assert played(other) != played(firm)


def test_games_are_made_once_and_carry_nothing_over() -> None:
    made: list[TextGame] = []

    def make() -> TextGame:
        made.append(Snake())
        return made[-1]

    by = Collector(make, PromptBuilder(TEMPLATE, word_tokenizer()))
    first = collected(by, FixedPlayer("Up"), seeds=(1, 2), group_size=2)
    assert by.example_game is made[0]
    collected(by, FixedPlayer("Left"), seeds=(8,), group_size=2)
    again = collected(by, FixedPlayer("Up"), seeds=(1, 2), group_size=2)
    assert len(made) == 4
    assert seen(first) == seen(again)


def seen(batch: RolloutBatch) -> list[tuple[Any, ...]]:
    return [(turn.observation, turn.state_key, turn.reward) for turn in turns_of(batch)]


def test_a_wrong_number_of_members_is_told() -> None:
    with pytest.raises(ValueError, match="members: 3 given for 2 groups of 2"):
        collected(collector(), RandomPlayer(), seeds=(1, 2), group_size=2, members=(1, 2, 3))


def test_streams_are_their_own() -> None:
    drawn = {
        (seed, stream, epoch): generator(seed, stream, epoch).random()
        for seed in (0, 1)
        for stream in ("env_seeds", "members", "engine", "sampler", "data_order", "evaluation", "reference")
        for epoch in (0, 1)
    }
    assert len(set(drawn.values())) == len(drawn)
    assert generator(0, "engine", 1).random() == drawn[0, "engine", 1]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_training_seeds_and_held_out_seeds_never_meet(seed: int) -> None:
    training = generator(seed, "env_seeds").integers(FIRST_HELD_OUT_SEED, size=10_000)
    assert training.max() < min(held_out_seeds(400))
    assert len(set(training.tolist())) > 9_900


def test_held_out_seeds_of_fewer_episodes_are_the_first_of_more() -> None:
    assert held_out_seeds(400)[:50] == held_out_seeds(50)
    assert len(set(held_out_seeds(400))) == 400
