"""From a configuration to the objects of a run: each setting arrives where it acts."""

from __future__ import annotations

import pytest
from lab_made import small_lab

from msgrpo_lab.engines.hf.engine import HFEngine
from msgrpo_lab.tsmg.snake import Snake
from msgrpo_lab.types import Sampling

FREE = "rollout.sampling.constrain=false"


def test_constrained_decoding_is_to_the_games_words() -> None:
    lab = small_lab("env=snake", "rollout.sampling.constrain=true")
    words = Snake.legal_actions
    assert lab.data.sampling.choices == tuple(tuple(lab.policy.tokenizer.encode(word)) for word in words)
    assert lab.module.trie is not None


def test_free_decoding_has_no_choices() -> None:
    lab = small_lab(FREE)
    assert lab.data.sampling.choices is None
    assert lab.module.trie is None


def test_the_decoding_rule_is_the_configurations() -> None:
    values = {"temperature": 1.5, "top_k": 3, "top_p": 0.9, "max_new_tokens": 11}
    overrides = [f"rollout.sampling.{key}={value}" for key, value in values.items()]
    lab = small_lab("prompt=think_plan_action", FREE, *overrides)
    assert lab.data.sampling == Sampling(**values, stop=("</action>",))  # type: ignore[arg-type]


def test_rollout_and_update_speak_of_one_distribution() -> None:
    lab = small_lab("rollout.sampling.temperature=1.3")
    assert lab.module.sampling is lab.data.sampling
    assert lab.module.policy is lab.data.policy is lab.policy


def test_numbers_arrive_where_they_act() -> None:
    lab = small_lab("seed=5", "rollout.num_groups=3", "rollout.group_size=6", "sampler.num_episodes=9",
                    "update.passes=2", "update.minibatches=3", "update.token_budget=777", "update.max_grad_norm=0.5",
                    "engine.token_budget=555", "trainer.max_epochs=7")  # fmt: skip
    data, module = lab.data, lab.module
    assert (data.seed, data.num_groups, data.group_size, data.sampler.num_episodes) == (5, 3, 6, 9)
    assert (data.passes, data.minibatches, data.token_budget) == (2, 3, 777)
    assert (module.token_budget, module.max_grad_norm, module.total_updates) == (777, 0.5, 7 * 6)
    assert isinstance(data.engine, HFEngine)
    assert data.engine.token_budget == 555


def test_settings_of_the_game_arrive() -> None:
    game = small_lab("env=frozenlake_big", "env.horizon=5", "env.observation=paper").data.collector.example_game
    assert (game.horizon, game.observation) == (5, "paper")


@pytest.mark.parametrize(("beta", "needed"), [(0.0, False), (0.1, True)])
def test_a_reference_is_kept_only_where_the_loss_needs_it(beta: float, needed: bool) -> None:
    lab = small_lab(f"loss.beta={beta}")
    assert lab.data.needs_reference is needed
    assert bool(lab.policy._reference) is needed
