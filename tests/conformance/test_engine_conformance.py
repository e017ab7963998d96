"""Every engine under conf/engine completes prompts; those that sample the policy report its own log-probabilities.

A new file is picked up unasked.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.utils import get_class, instantiate
from lab_made import ids, move, plain_distribution, plain_stats, small_policy, train_batch
from remote_made import TEMPLATE, ChatServer

from msgrpo_lab.config import conf_dir
from msgrpo_lab.decoder.plan import plan_forward
from msgrpo_lab.engines.base import RolloutEngine
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.engines.remote.engine import OpenAIEngine
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.seeding import episode_generators
from msgrpo_lab.tsmg.frozen_lake import FrozenLake
from msgrpo_lab.types import Completion, Sampling

ENGINES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((conf_dir() / "engine").glob("*.yaml"))}
SAMPLING_ENGINES = [name for name, node in ENGINES.items() if get_class(node["_target_"]).samples_policy]
WORDS = ((11,), (12, 13), (12, 14), (15, 12, 11))
BEGINNING = tuple(range(20, 30))
PROMPTS = [ids(*BEGINNING, 7, 8), ids(*BEGINNING, 9), ids(*BEGINNING, 7, 8), ids(40, 41), ids(*BEGINNING, 7, 8)]
RULES = {
    "free": Sampling(max_new_tokens=5),
    "free-hot-top-k": Sampling(max_new_tokens=5, temperature=1.5, top_k=3),
    "free-cold-top-p": Sampling(max_new_tokens=5, temperature=0.7, top_p=0.9),
    "words": Sampling(choices=WORDS),
    "words-hot-top-k": Sampling(choices=WORDS, temperature=1.5, top_k=2),
    "words-cold-top-p": Sampling(choices=WORDS, temperature=0.7, top_p=0.9),
}


def rngs(count: int, seed: int = 0) -> list[np.random.Generator]:
    return episode_generators(seed, "engine", 0, count)


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return small_policy()


@pytest.fixture(scope="module")
def remote() -> Iterator[dict[str, Any]]:
    """What an engine of remote models needs to be one here: a server to ask."""
    with ChatServer() as server:
        yield {"base_url": server.base_url, "model": "fake", "constrain_by": "structured_outputs"}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, policy: LanguagePolicy, remote: dict[str, Any]) -> Iterator[RolloutEngine]:
    made = build(request.param, **(remote if "base_url" in ENGINES[request.param] else {}))
    made.sync(policy, 3)
    yield made
    made.close()


@pytest.fixture(params=SAMPLING_ENGINES)
def sampling_engine(request: pytest.FixtureRequest, policy: LanguagePolicy) -> Iterator[RolloutEngine]:
    made = build(request.param)
    made.sync(policy, 3)
    yield made
    made.close()


def build(name: str, **changes: Any) -> Any:
    return instantiate({**ENGINES[name], **changes})


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Sampling:
    return RULES[request.param]


def generate(
    engine: RolloutEngine, rule: Sampling, seed: int = 0, prompts: Sequence[np.ndarray] = PROMPTS
) -> list[Completion]:
    """Completions of the prompts, each said to be of a game that has just begun."""
    games = [FrozenLake(horizon=8) for _ in prompts]
    for game in games:
        game.reset(seed=1)
    engine.observe(games)
    return engine.generate(prompts, rule, rngs(len(prompts), seed))


def written(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids.tolist() for completion in completions]


def in_its_terms(engine: RolloutEngine, rule: Sampling) -> tuple[Sequence[np.ndarray], Sampling]:
    """The prompts and the rule as the engine reads them: an engine may bring a prompt builder of its own."""
    if not isinstance(engine, OpenAIEngine):
        return PROMPTS, rule
    prompt = engine.prompt(TEMPLATE)
    chats = [prompt.render("rules", str(ids.tolist()), ("Left", "Up")) for ids in PROMPTS]
    return chats, rule if rule.choices is None else replace(rule, choices=prompt.choices(("Left", "Up")))


# Any engine ---------------------------------------------------------------------------------------------------------


def test_one_completion_a_prompt_in_order(engine: RolloutEngine, rule: Sampling) -> None:
    prompts, rule = in_its_terms(engine, rule)
    completions = generate(engine, rule, prompts=prompts)
    assert [completion.prompt_ids.tolist() for completion in completions] == [prompt.tolist() for prompt in prompts]
    for completion in completions:
        assert len(completion.token_ids) == len(completion.logprobs) > 0
        assert (completion.logprobs <= 0).all() or not engine.samples_policy
        assert completion.policy_version == 3
        assert completion.finish_reason in ("stop", "length")


def test_the_same_generator_gives_the_same_completions(engine: RolloutEngine, rule: Sampling) -> None:
    prompts, rule = in_its_terms(engine, rule)
    one, other = generate(engine, rule, 5, prompts), generate(engine, rule, 5, prompts)
    assert written(one) == written(other)
    assert [completion.text for completion in one] == [completion.text for completion in other]


def test_nothing_is_drawn_from_a_global_generator(engine: RolloutEngine, rule: Sampling) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    prompts, rule = in_its_terms(engine, rule)
    generate(engine, rule, prompts=prompts)
    assert torch.equal(torch.random.get_rng_state(), before)


# Engines that sample the policy ---------------------------------------------------------------------------------------


def test_log_probabilities_are_the_teacher_forced_ones(
    sampling_engine: RolloutEngine, policy: LanguagePolicy, rule: Sampling
) -> None:
    completions = generate(sampling_engine, rule, seed=2)
    batch = train_batch([(c.prompt_ids.tolist(), c.token_ids.tolist()) for c in completions])
    with torch.no_grad():
        expected, _ = plain_stats(policy, batch, rule)
    for completion, row, mask in zip(completions, expected, batch.completion_mask, strict=True):
        np.testing.assert_allclose(completion.logprobs, row[mask].numpy(), atol=1e-5)


def test_trainer_and_engine_agree(sampling_engine: RolloutEngine, policy: LanguagePolicy, rule: Sampling) -> None:
    """The log-probability gap that training reports is rounding, whatever the rule."""
    completions = generate(sampling_engine, rule, seed=3)
    batch = train_batch([(c.prompt_ids.tolist(), c.token_ids.tolist()) for c in completions])
    trie = None if rule.choices is None else choice_trie(rule.choices)
    for plan in plan_forward(batch, trie, 40):
        with torch.no_grad():
            stats = policy.token_stats(plan, trie, rule)
        for place, sample in enumerate(plan.samples.tolist()):
            row = stats.logprobs[place][batch.completion_mask[sample]]
            np.testing.assert_allclose(row.numpy(), completions[sample].logprobs, atol=1e-5)


def test_equal_prompts_get_independent_draws(sampling_engine: RolloutEngine, rule: Sampling) -> None:
    completions = generate(sampling_engine, rule, prompts=[PROMPTS[0]] * 40)
    assert len({tuple(tokens) for tokens in written(completions)}) > 1


def test_constrained_answers_are_legal_words(sampling_engine: RolloutEngine, policy: LanguagePolicy) -> None:
    completions = generate(sampling_engine, RULES["words"], prompts=PROMPTS * 10)
    assert {tuple(tokens) for tokens in written(completions)} <= set(WORDS)
    assert {completion.finish_reason for completion in completions} == {"stop"}
    for completion in completions:
        assert completion.text == policy.tokenizer.decode(completion.token_ids.tolist())


@pytest.mark.parametrize("kind", ["words", "words-hot-top-k", "free-hot-top-k"])
def test_frequencies_are_the_probabilities(sampling_engine: RolloutEngine, policy: LanguagePolicy, kind: str) -> None:
    rule = replace(RULES[kind], max_new_tokens=1)
    count = 8000
    seen = Counter(tuple(tokens) for tokens in written(generate(sampling_engine, rule, 7, [PROMPTS[0]] * count)))
    answers = list(WORDS) if rule.choices else [(token,) for token in range(len(policy.tokenizer))]
    with torch.no_grad():
        chance = {answer: math.exp(logprob_of(policy, answer, rule)) for answer in answers}
    assert sum(chance.values()) == pytest.approx(1.0, abs=1e-6)
    possible = {answer: p * count for answer, p in chance.items() if p > 0}
    assert set(seen) <= set(possible)
    chi_square = sum((seen[answer] - wanted) ** 2 / wanted for answer, wanted in possible.items())
    assert chi_square < 16.27, "0.999 quantile with 3 degrees of freedom, the most there are"


def logprob_of(policy: LanguagePolicy, answer: tuple[int, ...], rule: Sampling) -> float:
    total = 0.0
    for place, token in enumerate(answer):
        read = torch.tensor([[*PROMPTS[0].tolist(), *answer[:place]]])
        total += float(plain_distribution(policy.model(input_ids=read).logits[0, -1], rule, answer[:place])[token])
    return total


@pytest.mark.parametrize("kind", ["free", "words"])
def test_greedy_is_the_mode_of_each_token(sampling_engine: RolloutEngine, policy: LanguagePolicy, kind: str) -> None:
    rule = replace(RULES[kind], greedy=True)
    completions = generate(sampling_engine, rule)
    assert written(completions) == written(generate(sampling_engine, rule, seed=99))
    for completion in completions:
        tokens = completion.token_ids.tolist()
        for place, token in enumerate(tokens):
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([completion.prompt_ids.tolist() + tokens[:place]])).logits
            assert token == int(plain_distribution(logits[0, -1], rule, tuple(tokens[:place])).argmax())


# The in-process engine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_budget", [1, 13, 30, 8192])
def test_the_token_budget_changes_no_completion(policy: LanguagePolicy, rule: Sampling, token_budget: int) -> None:
    completions = []
    for budget in (token_budget, 100_000):
        engine = build("hf", token_budget=budget)
        engine.sync(policy, 0)
        completions.append(engine.generate(PROMPTS * 3, rule, rngs(15, 1)))
    assert written(completions[0]) == written(completions[1])
    for one, other in zip(*completions, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", ["free", "free-hot-top-k", "free-cold-top-p"])
def test_free_decoding_is_the_whole_model_run_again_for_every_token(policy: LanguagePolicy, kind: str) -> None:
    """No cache, no sharing: the same uniform numbers give the same tokens."""
    rule = replace(RULES[kind], max_new_tokens=8)
    engine = build("hf")
    engine.sync(policy, 0)
    found = written(engine.generate(PROMPTS * 2, rule, rngs(10, 4)))
    uniforms = [generator.random(rule.max_new_tokens) for generator in rngs(10, 4)]
    expected = [plainly_decoded(policy, p.tolist(), rule, row) for p, row in zip(PROMPTS * 2, uniforms, strict=True)]
    assert found == expected
    assert len({tuple(tokens) for tokens in found}) > 3


@torch.no_grad()
def plainly_decoded(policy: LanguagePolicy, prompt: list[int], rule: Sampling, uniforms: np.ndarray) -> list[int]:
    tokens: list[int] = []
    for uniform in uniforms:
        logits = policy.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
        reached = itertools.accumulate(plain_distribution(logits, rule).exp().tolist())
        tokens.append(next(token for token, mass in enumerate(reached) if mass > uniform))
        if tokens[-1] == policy.tokenizer.eos_token_id:
            break
    return tokens


@pytest.fixture
def hf(policy: LanguagePolicy) -> Any:
    engine = build("hf")
    engine.sync(policy, 0)
    return engine


def forced(policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch, *tokens: int) -> None:
    """Makes the policy write these tokens, whatever it reads."""
    steps = iter(tokens)
    current = [next(steps)]

    def project(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = torch.full((len(hidden), len(weight)), -100.0)
        logits[:, current[0]] = 0.0
        current[0] = next(steps, current[0])
        return logits

    monkeypatch.setattr(policy, "project", project)


def test_the_end_token_ends_a_completion_and_is_kept(
    hf: Any, policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, end = policy.tokenizer.encode("Left")[0], policy.tokenizer.eos_token_id
    forced(policy, monkeypatch, left, end, left)
    (made,) = hf.generate(PROMPTS[:1], Sampling(max_new_tokens=5), rngs(1))
    assert (made.token_ids.tolist(), made.finish_reason, made.text) == ([left, end], "stop", "Left")


def test_a_completion_without_an_end_is_cut(hf: Any, policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    left = policy.tokenizer.encode("Left")[0]
    forced(policy, monkeypatch, left)
    (made,) = hf.generate(PROMPTS[:1], Sampling(max_new_tokens=3), rngs(1))
    assert (made.token_ids.tolist(), made.finish_reason, made.text) == ([left] * 3, "length", "LeftLeftLeft")


def test_a_stop_text_across_tokens_ends_a_completion(
    hf: Any, policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = policy.tokenizer.encode("<action>Up</action> and more", add_special_tokens=False)
    forced(policy, monkeypatch, *tokens)
    (made,) = hf.generate(PROMPTS[:1], Sampling(max_new_tokens=50, stop=("</action>",)), rngs(1))
    assert (made.text, made.finish_reason) == ("<action>Up</action>", "stop")
    assert made.token_ids.tolist() == tokens[: len(made.token_ids)]


def test_an_end_at_the_last_place_is_a_stop(hf: Any, policy: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    forced(policy, monkeypatch, policy.tokenizer.eos_token_id)
    (made,) = hf.generate(PROMPTS[:1], Sampling(max_new_tokens=1), rngs(1))
    assert made.finish_reason == "stop"


def test_no_prompts_no_completions(hf: Any) -> None:
    assert hf.generate([], Sampling(), rngs(0)) == []


def test_each_distinct_prompt_is_computed_once(hf: Any) -> None:
    inner = 3  # tokens of the words' tree that are read: 12, 15, 15 12
    rule = RULES["words"]
    hf.generate(PROMPTS, rule, rngs(5))
    once = 12 + 1 + 2 + 3 * inner  # the second prompt begins with ten tokens of the first
    assert hf.computed_tokens == once
    hf.generate(PROMPTS * 5, rule, rngs(25, 1))
    hf.generate(PROMPTS, replace(rule, temperature=2.0, greedy=True), rngs(5, 1))
    assert hf.computed_tokens == once, "all of it is remembered"
    hf.generate([*PROMPTS, ids(50, 51, 52)], rule, rngs(6))
    assert hf.computed_tokens == once + 3 + inner


def test_free_decoding_reads_each_distinct_prompt_once(hf: Any) -> None:
    hf.generate(PROMPTS * 4, Sampling(max_new_tokens=1), rngs(20))
    assert hf.computed_tokens == 12 + 1 + 2, "the second prompt begins with ten tokens of the first"


def test_free_decoding_continues_each_distinct_text_once(hf: Any) -> None:
    hf.generate([PROMPTS[0]] * 20, Sampling(max_new_tokens=4, greedy=True), rngs(20))
    assert hf.computed_tokens == 12 + 3, "twenty equal texts are one"


def test_a_moved_policy_is_computed_anew() -> None:
    policy = small_policy()
    engine = build("hf")
    engine.sync(policy, 0)
    first = engine.generate(PROMPTS, RULES["words"], rngs(5))
    computed = engine.computed_tokens
    move(policy)
    engine.sync(policy, 1)
    assert engine.computed_tokens == 0
    second = engine.generate(PROMPTS, RULES["words"], rngs(5))
    assert engine.computed_tokens == computed
    assert {completion.policy_version for completion in second} == {1}
    assert any(not np.array_equal(a.logprobs, b.logprobs) for a, b in zip(first, second, strict=True))


def test_after_a_sync_nothing_depends_on_what_was_asked_before(rule: Sampling, policy: LanguagePolicy) -> None:
    """To the bit: a rollout is the same whether or not an evaluation of the same policy came before it."""
    engine = build("hf")
    engine.sync(policy, 0)
    fresh = engine.generate(PROMPTS, rule, rngs(5))
    engine.sync(policy, 0)
    engine.generate([ids(*BEGINNING, *range(20)), PROMPTS[0]], rule, rngs(2))
    engine.sync(policy, 0)
    assert engine.computed_tokens == 0
    again = engine.generate(PROMPTS, rule, rngs(5))
    assert [completion.logprobs.tolist() for completion in fresh] == [
        completion.logprobs.tolist() for completion in again
    ]


def test_another_policy_of_the_same_version_is_another_policy() -> None:
    engine = build("hf")
    engine.sync(small_policy(init_seed=0), 0)
    first = engine.generate(PROMPTS, RULES["words"], rngs(5))
    engine.sync(small_policy(init_seed=1), 0)
    second = engine.generate(PROMPTS, RULES["words"], rngs(5))
    assert any(not np.array_equal(a.logprobs, b.logprobs) for a, b in zip(first, second, strict=True))


def test_an_engine_that_was_never_told_of_a_policy_says_so() -> None:
    engine = build("hf")
    assert engine.computed_tokens == 0
    with pytest.raises(RuntimeError, match=r"call sync\(\) before generate\(\)"):
        engine.generate(PROMPTS, Sampling(), rngs(5))


def test_a_closed_engine_holds_no_policy(hf: Any) -> None:
    hf.close()
    with pytest.raises(RuntimeError, match="sync"):
        hf.generate(PROMPTS, Sampling(), rngs(5))


def test_a_token_budget_below_1_is_refused() -> None:
    with pytest.raises(Exception, match=r"engine\.token_budget=0: must be at least 1"):
        build("hf", token_budget=0)


# Scripted players -----------------------------------------------------------------------------------------------------


def test_a_scripted_engine_writes_its_players_words(policy: LanguagePolicy) -> None:
    player = {"_target_": "msgrpo_lab.oracle.players.FixedPlayer", "word": "Up"}
    engine = build("scripted", player=player)
    engine.sync(policy, 2)
    completions = generate(engine, Sampling())
    assert [completion.text for completion in completions] == ["Up"] * len(PROMPTS)
    assert [policy.tokenizer.decode(tokens) for tokens in written(completions)] == ["Up"] * len(PROMPTS)


def test_a_scripted_engine_needs_to_see_the_games(policy: LanguagePolicy) -> None:
    engine = build("scripted")
    engine.sync(policy, 0)
    with pytest.raises(RuntimeError, match="5 prompts for 0 observed games"):
        engine.generate(PROMPTS, Sampling(), rngs(5))


def test_only_engines_that_sample_the_policy_say_so() -> None:
    assert {name: build(name).samples_policy for name in ("hf", "scripted")} == {"hf": True, "scripted": False}
