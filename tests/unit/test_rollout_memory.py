"""What an engine computes, remembers and forgets between two syncs, and where a completion ends."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_made import ids, small_lab, small_policy

from msgrpo_lab.engines.base import draw_uniforms
from msgrpo_lab.engines.hf.engine import HFEngine
from msgrpo_lab.engines.naive import NaiveEngine
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.prompt import ActionTagParser, FirstWordParser, PromptBuilder, PromptTemplate
from msgrpo_lab.seeding import episode_generators
from msgrpo_lab.types import Sampling

OPENING = tuple(range(20, 32))
ONE = Sampling(max_new_tokens=1)
ACTIONS = ("Left", "Down", "Right", "Up")


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return small_policy()


@pytest.fixture
def ask(policy: LanguagePolicy) -> Callable[..., HFEngine]:
    """An engine that has been asked for prompts, turn by turn."""

    def asked(*turns: list[np.ndarray], rule: Sampling = ONE, **arguments: int) -> HFEngine:
        engine = HFEngine(**arguments)
        engine.sync(policy, 0)
        for prompts in turns:
            engine.generate(prompts, rule, episode_generators(0, "engine", 0, len(prompts)))
        return engine

    return asked


def after(*tokens: int) -> np.ndarray:
    return ids(*OPENING, *tokens)


@pytest.mark.parametrize("rule", [ONE, Sampling(choices=((11,), (12,)))])
def test_the_shared_prefix_is_read_once(ask: Callable[..., HFEngine], rule: Sampling) -> None:
    assert ask([after(1), after(2, 3)], rule=rule).computed_tokens == 12 + 1 + 2
    assert ask([after(1), after(2, 3)], [after(4)], [after(5, 6)], rule=rule).computed_tokens == 12 + 3 + 1 + 2


def test_a_prompt_that_leaves_the_prefix_early_shares_the_part_it_opens_with(ask: Callable[..., HFEngine]) -> None:
    early = ids(*OPENING[:9], 50)
    assert ask([after(1), after(2)], [early]).computed_tokens == 12 + 2 + 1
    strange = ids(*OPENING[:3], 50)
    assert ask([after(1), after(2)], [strange]).computed_tokens == 12 + 2 + 4, "too short to be worth it"


def test_a_prompt_that_is_all_prefix_is_still_read_to_its_end(ask: Callable[..., HFEngine]) -> None:
    assert ask([after(1), after(2)], [ids(*OPENING)]).computed_tokens == 12 + 2 + 1


def test_a_prompt_met_again_is_remembered(ask: Callable[..., HFEngine]) -> None:
    engine = ask([after(1), after(2, 3)], [after(2, 3), after(4), after(2, 3)])
    assert engine.computed_tokens == 12 + 1 + 2 + 1
    assert engine.metrics() == {
        "rollout_computed_tokens": 16.0,
        "cache_tokens": 12.0 + 1 + 2 + 1,
        "cache_hits": 1.0,
        "cache_evictions": 0.0,
    }


def test_constrained_decoding_counts_its_hits(ask: Callable[..., HFEngine]) -> None:
    engine = ask([after(1), after(1)], [after(1), after(2)], rule=Sampling(choices=((11,), (12,))))
    assert engine.metrics()["cache_hits"] == 1


def test_a_full_memory_is_emptied(ask: Callable[..., HFEngine]) -> None:
    engine = ask([after(1), after(2)], [after(3)], memory_tokens=3)
    assert (engine.metrics()["cache_evictions"], engine.metrics()["cache_tokens"]) == (0, 12 + 3)
    engine.generate([after(4)], ONE, episode_generators(0, "engine", 0, 1))
    assert (engine.metrics()["cache_evictions"], engine.metrics()["cache_tokens"]) == (4, 12)
    before = engine.computed_tokens
    engine.generate([after(1)], ONE, episode_generators(0, "engine", 0, 1))
    assert engine.computed_tokens == before + 1, "the prefix is still there"


def test_an_answer_written_again_costs_nothing(ask: Callable[..., HFEngine]) -> None:
    rule = Sampling(max_new_tokens=6, greedy=True)
    engine = ask([after(1), after(2)], rule=rule)
    before = engine.computed_tokens
    engine.generate([after(1), after(2)] * 3, rule, episode_generators(0, "engine", 0, 6))
    assert engine.computed_tokens == before
    longer = Sampling(max_new_tokens=7, greedy=True)
    engine.generate([after(1)], longer, episode_generators(0, "engine", 0, 1))
    assert engine.computed_tokens <= before + 1


def test_what_is_likely_is_read_ahead_and_never_drawn_from(policy: LanguagePolicy) -> None:
    """The second prompt's answer is read in fewer calls than it has tokens, and is what it would be alone."""
    rule = Sampling(max_new_tokens=6, top_k=2)

    def written(*turns: list[np.ndarray]) -> tuple[list[int], int]:
        engine = HFEngine()
        engine.sync(policy, 0)
        calls, made = 0, []
        for prompts in turns:
            assert engine._synced is not None
            pool = engine._synced.free.pool
            plain, calls = pool.extend, 0

            def counted(*arguments: Any, plain: Any = plain) -> Any:
                nonlocal calls
                calls += 1
                return plain(*arguments)

            pool.extend = counted  # type: ignore[method-assign]
            made = engine.generate(prompts, rule, episode_generators(3, "engine", 0, len(prompts)))
            pool.extend = plain  # type: ignore[method-assign]
        return made[0].token_ids.tolist(), calls

    alone, calls_alone = written([after(1)])
    behind_others, calls_behind = written([after(1)] * 40 + [after(2)] * 40, [after(1)])
    assert behind_others == alone
    assert calls_behind < calls_alone


def test_without_memory_every_prompt_is_read_again(ask: Callable[..., HFEngine]) -> None:
    engine = ask([after(1), after(2)], [after(1)], memory_tokens=0)
    assert engine.computed_tokens == 12 + 2 + 1
    assert engine.metrics()["cache_tokens"] == 12


def test_a_sync_forgets_all(ask: Callable[..., HFEngine], policy: LanguagePolicy) -> None:
    engine = ask([after(1), after(2)])
    engine.sync(policy, 1)
    assert set(engine.metrics().values()) == {0.0}
    engine.close()
    assert engine.metrics() == {}


def test_a_negative_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.memory_tokens=-1: must be at least 0; 0 remembers nothing"):
        HFEngine(memory_tokens=-1)


def test_the_naive_engine_shares_nothing(policy: LanguagePolicy) -> None:
    engine = NaiveEngine()
    engine.sync(policy, 0)
    for _ in range(2):
        engine.generate([after(1), after(1)], ONE, episode_generators(0, "engine", 0, 2))
    assert engine.metrics() == {"rollout_computed_tokens": 2 * 2 * 13.0}


def test_a_naive_engine_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"engine\.token_budget=0: must be at least 1"):
        NaiveEngine(token_budget=0)
    with pytest.raises(RuntimeError, match=r"call sync\(\) before generate\(\)"):
        NaiveEngine().generate([after(1)], ONE, episode_generators(0, "engine", 0, 1))


@pytest.mark.parametrize("engine", [HFEngine(), NaiveEngine()])
def test_a_generator_too_few_is_told(engine: Any, policy: LanguagePolicy) -> None:
    engine.sync(policy, 0)
    with pytest.raises(ValueError, match="rngs: 1 generators for 2 prompts; give one an episode"):
        engine.generate([after(1), after(2)], ONE, episode_generators(0, "engine", 0, 1))


def test_layers_that_do_not_see_the_whole_text_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    monkeypatch.setattr(policy.model.config, "layer_types", ["sliding_attention", "full_attention"], raising=False)
    with pytest.raises(ValueError, match=r"engine=hf: llama has layers of sliding_attention.*; use engine=naive"):
        HFEngine().sync(policy, 0)


@pytest.mark.parametrize("rule", [Sampling(max_new_tokens=4), Sampling(choices=((11,), (12, 13), (12, 14)))])
def test_either_attention_reads_the_tree(policy: LanguagePolicy, rule: Sampling) -> None:
    written = []
    for attention in ("sdpa", "eager"):
        other = small_policy()
        other.model.set_attn_implementation(attention)
        engine = HFEngine()
        engine.sync(other, 0)
        made = engine.generate([after(1), after(2, 3)] * 5, rule, episode_generators(0, "engine", 0, 10))
        written.append([(c.token_ids.tolist(), c.logprobs) for c in made])
    for (tokens, logprobs), (same, alike) in zip(*written, strict=True):
        assert tokens == same
        np.testing.assert_allclose(logprobs, alike, atol=1e-5)


def test_equal_completions_of_a_prompt_are_one_object(ask: Callable[..., HFEngine], policy: LanguagePolicy) -> None:
    engine = ask()
    rule = Sampling(max_new_tokens=3, greedy=True)
    made = engine.generate([after(1), after(2), after(1)], rule, episode_generators(0, "engine", 0, 3))
    assert made[0] is made[2]
    assert made[0] is not made[1]


# Draws ----------------------------------------------------------------------------------------------------------------


def test_greedy_decoding_draws_nothing() -> None:
    rngs = episode_generators(0, "engine", 0, 3)
    assert not draw_uniforms(rngs, 4, Sampling(greedy=True)).any()
    fresh = draw_uniforms(rngs, 4, Sampling())
    np.testing.assert_array_equal(fresh, draw_uniforms(episode_generators(0, "engine", 0, 3), 4, Sampling()))


def test_every_episodes_generator_is_its_own() -> None:
    def drawn(seed: int, stream: Any, epoch: int, count: int) -> list[list[float]]:
        return [rng.random(20).tolist() for rng in episode_generators(seed, stream, epoch, count)]

    places = [(seed, stream, epoch) for seed in (0, 1) for stream in ("engine", "evaluation") for epoch in (0, 1)]
    numbers = [number for place in places for row in drawn(*place, 50) for number in row]
    assert len(set(numbers)) == len(numbers)
    assert drawn(3, "engine", 2, 5) == drawn(3, "engine", 2, 9)[:5], "whatever their number"
    assert abs(np.mean([row[0] for row in drawn(0, "engine", 0, 2000)]) - 0.5) < 0.03


# Where a completion ends ----------------------------------------------------------------------------------------------

TEXTS = st.lists(st.sampled_from(["Left", "up", "Down", "ward", "s", " ", ".", "\n", "_", "é", "�", "<b>"])).map(
    "".join
)


@given(text=TEXTS, more=TEXTS)
@settings(max_examples=400)
def test_a_settled_text_reads_the_same_whatever_follows(text: str, more: str) -> None:
    parser = FirstWordParser()
    if parser.is_settled(text, ACTIONS):
        assert parser(text, ACTIONS).action is not None
        assert parser(text + more, ACTIONS) == parser(text, ACTIONS)
        grown = re.sub(r"�+\Z", "é", text)  # the bytes that were missing
        assert parser(grown + more, ACTIONS) == parser(text, ACTIONS)


@pytest.mark.parametrize(
    ("text", "settled"),
    [("Left", False), ("Left ", True), ("Lefty ", False), ("I go Left.", True), ("Left�", False), ("", False)],
)
def test_a_word_is_settled_once_something_ends_it(text: str, settled: bool) -> None:
    assert FirstWordParser().is_settled(text, ACTIONS) is settled


def builder(policy: LanguagePolicy, **settings: Any) -> PromptBuilder:
    template = {"user": "{observation}", "parser": FirstWordParser(), **settings}
    return PromptBuilder(PromptTemplate(**template), policy.tokenizer)


def test_only_a_parser_that_can_tell_is_asked(policy: LanguagePolicy) -> None:
    assert builder(policy, parser=ActionTagParser()).settled(ACTIONS) is None
    assert builder(policy, stop_at_action=False).settled(ACTIONS) is None
    settled = builder(policy).settled(ACTIONS)
    assert settled is not None
    assert (settled("Left ."), settled("Left"), settled("Left .")) == (True, False, True)


@pytest.mark.parametrize("engine", [HFEngine(), NaiveEngine()])
def test_a_completion_ends_at_its_action(engine: Any, policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(policy.tokenizer.encode("Go Left . Then Up .", add_special_tokens=False))

    def project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), len(weight)), -100.0)
        logits[:, next(steps)] = 0.0
        return logits

    monkeypatch.setattr(policy, "project", project)
    engine.sync(policy, 0)
    settled = builder(policy).settled(ACTIONS)
    (made,) = engine.generate([after(1)], Sampling(max_new_tokens=12), episode_generators(0, "engine", 0, 1), settled)
    assert made.finish_reason == "stop"
    assert FirstWordParser()(made.text, ACTIONS).action == 0
    assert "Left" in made.text
    assert "Then" not in made.text
    assert len(made.logprobs) == len(made.token_ids) < 12


def test_a_rollouts_metrics_tell_of_the_memory() -> None:
    lab = small_lab("rollout.sampling.constrain=false", "rollout.sampling.max_new_tokens=2")
    next(iter(lab.data.batches(epoch=0, version=0)))
    assert lab.data.metrics["perf/cache_hits"] > 0
    assert lab.data.metrics["perf/cache_tokens"] > 0
    assert lab.data.metrics["perf/cache_evictions"] == 0
    assert lab.data.metrics["perf/rollout_computed_tokens"] > 0
