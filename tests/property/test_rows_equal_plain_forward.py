"""Sharing rows, prefixes and pairs changes nothing: numbers and gradients are those of one plain forward a sample."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_made import gradients, move, plain_stats, small_policy, train_batch

from msgrpo_lab.decoder.plan import ForwardPlan, plan_forward
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.lap import policy as policy_module
from msgrpo_lab.lap.policy import LanguagePolicy, TokenStats
from msgrpo_lab.types import Sampling, TrainBatch

WORDS = ((11,), (12, 13), (12, 14), (15, 12, 11), (15, 12, 16))
"""Legal answers of one to three tokens; two pairs of them begin alike."""
RULES = [
    Sampling(),
    Sampling(temperature=0.7, top_k=3),
    Sampling(temperature=1.5, top_p=0.9),
    Sampling(choices=WORDS),
    Sampling(temperature=1.5, top_k=2, choices=WORDS),
]
Samples = list[tuple[list[int], list[int]]]

token = st.integers(6, 40)


@st.composite
def made_samples(draw: st.DrawFn, constrained: bool) -> Samples:
    """Prompts drawn from a small pool, so that rows repeat; most pools share a beginning of up to 12 tokens."""
    beginning = draw(st.lists(token, max_size=12))
    pool = draw(st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=3))
    answer = st.sampled_from([list(w) for w in WORDS]) if constrained else st.lists(token, min_size=1, max_size=4)
    pairs = draw(st.lists(st.tuples(st.sampled_from(pool), answer), min_size=1, max_size=9))
    return [([*beginning, *prompt], written) for prompt, written in pairs]


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return small_policy()


def shared_stats(policy: LanguagePolicy, batch: TrainBatch, rule: Sampling, token_budget: int = 8192) -> TokenStats:
    """`token_stats` of every forward pass, put back into the order of the samples."""
    trie = None if rule.choices is None else choice_trie(rule.choices)
    plans = plan_forward(batch, trie, token_budget)
    stats = [policy.token_stats(plan, trie, rule) for plan in plans]
    order = torch.cat([torch.from_numpy(plan.samples) for plan in plans]).argsort()
    return TokenStats(
        torch.cat([part.logprobs for part in stats])[order], torch.cat([part.entropy for part in stats])[order]
    )


def weighted(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A scalar in which every token's log-probability and entropy has a weight of its own."""
    weight = torch.linspace(-1.0, 2.0, logprobs.numel()).reshape(logprobs.shape)
    return (weight * logprobs.float()).sum() + (weight.cos() * entropy.float()).sum()


def assert_same(policy: LanguagePolicy, batch: TrainBatch, rule: Sampling, token_budget: int) -> None:
    logprobs, entropy = plain_stats(policy, batch, rule)
    stats = shared_stats(policy, batch, rule, token_budget)
    torch.testing.assert_close(stats.logprobs.double(), logprobs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    expected = gradients(policy, weighted(logprobs, entropy))
    found = gradients(policy, weighted(stats.logprobs, stats.entropy))
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7


@settings(max_examples=50, deadline=None)
@given(samples=made_samples(constrained=False), temperature=st.sampled_from([0.7, 1.0, 1.5]), budget=st.integers(1, 99))
def test_free_decoding(policy: LanguagePolicy, samples: Samples, temperature: float, budget: int) -> None:
    assert_same(policy, train_batch(samples), Sampling(temperature=temperature), budget)


@settings(max_examples=50, deadline=None)
@given(samples=made_samples(constrained=True), temperature=st.sampled_from([0.7, 1.0, 1.5]), budget=st.integers(1, 99))
def test_constrained_decoding(policy: LanguagePolicy, samples: Samples, temperature: float, budget: int) -> None:
    assert_same(policy, train_batch(samples), Sampling(temperature=temperature, choices=WORDS), budget)


@settings(max_examples=15, deadline=None)
@given(prompts=st.lists(st.lists(token, min_size=1, max_size=16), min_size=1, max_size=4), data=st.data())
def test_top_k_and_top_p_where_the_kept_tokens_were_sampled(
    policy: LanguagePolicy, prompts: list[list[int]], data: st.DataObject
) -> None:
    """What was sampled under top-k or top-p is inside its own cut, so the plain distribution is the one meant."""
    rule = data.draw(st.sampled_from([Sampling(top_k=3), Sampling(top_p=0.9, temperature=0.7), Sampling(top_k=1)]))
    samples = []
    for prompt in prompts:
        written: list[int] = []
        for _ in range(data.draw(st.integers(1, 3))):
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([prompt + written])).logits[0, -1]
            written.append(int(logits.topk(1).indices[0]))  # the most likely token survives every cut
        samples.append((prompt, written))
    assert_same(policy, train_batch(samples), rule, 64)


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_a_sample_is_the_same_alone_as_among_others(
    policy: LanguagePolicy, rule: Sampling, data: st.DataObject
) -> None:
    """Tokens that top-k or top-p would cut off are among them: one sample must not widen another's distribution."""
    samples = data.draw(made_samples(constrained=rule.choices is not None))
    with torch.no_grad():
        together = shared_stats(policy, train_batch(samples), rule)
        for row, (prompt, written) in enumerate(samples):
            alone = shared_stats(policy, train_batch([(prompt, written)]), rule)
            own = slice(len(prompt), len(prompt) + len(written))
            torch.testing.assert_close(together.logprobs[row, own], alone.logprobs[0, own], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(together.entropy[row, own], alone.entropy[0, own], atol=1e-4, rtol=1e-4)


@settings(max_examples=10, deadline=None)
@given(samples=made_samples(constrained=True))
def test_low_rank_adapters_get_the_same_gradients(adapted: LanguagePolicy, samples: Samples) -> None:
    assert_same(adapted, train_batch(samples), Sampling(choices=WORDS), 64)


@pytest.fixture(scope="module")
def adapted() -> LanguagePolicy:
    policy = small_policy(lora_rank=4)
    move(policy)
    return policy


@settings(max_examples=25, deadline=None)
@given(samples=made_samples(constrained=True), temperature=st.floats(0.3, 3.0))
def test_log_probabilities_of_all_legal_words_sum_to_one(
    policy: LanguagePolicy, samples: Samples, temperature: float
) -> None:
    prompt = samples[0][0]
    batch = train_batch([(prompt, list(word)) for word in WORDS])
    with torch.no_grad():
        stats = shared_stats(policy, batch, Sampling(choices=WORDS, temperature=temperature))
    assert float(stats.logprobs.double().sum(dim=1).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def readings(plan: ForwardPlan) -> list[tuple[int, ...]]:
    """The whole text up to and with every token that the pass reads."""
    texts = []
    for row, length in zip(plan.rows.input_ids.tolist(), plan.rows.lengths.tolist(), strict=True):
        texts += [tuple(row[: end + 1]) for end in range(length)]
    for group in plan.branches:
        for row, prompt in enumerate(group.prompt.tolist()):
            before = tuple(plan.rows.input_ids[prompt, : plan.rows.lengths[prompt]].tolist())
            for column in range(int(group.lengths[row])):
                seen = np.flatnonzero(group.ancestors()[row, column])
                assert group.depth[row, column] == len(seen) - 1
                texts.append((*before, *group.token_ids[row, seen].tolist()))
    return texts


@settings(max_examples=60, deadline=None)
@given(samples=made_samples(constrained=True), rule=st.sampled_from(RULES), budget=st.integers(1, 200))
def test_every_sample_is_served_once_within_the_budget(samples: Samples, rule: Sampling, budget: int) -> None:
    trie = None if rule.choices is None else choice_trie(rule.choices)
    plans = plan_forward(train_batch(samples), trie, budget)
    served = sorted(sample for plan in plans for sample in plan.samples.tolist())
    assert served == list(range(len(samples)))
    for plan in plans:
        alone = len(plan.rows.lengths) == 1 and sum(len(group.prompt) for group in plan.branches) <= 1
        assert alone or plan.num_padded_tokens <= budget
        assert (plan.pair_node[:-1] <= plan.pair_node[1:]).all()


@settings(max_examples=60, deadline=None)
@given(samples=made_samples(constrained=False))
def test_in_one_pass_no_text_is_read_twice(samples: Samples) -> None:
    (plan,) = plan_forward(train_batch(samples), None, 10**6)
    beginnings = {(*prompt, *written)[:stop] for prompt, written in samples for stop in range(1, len(prompt + written))}
    assert sorted(readings(plan)) == sorted(beginnings)
    assert plan.num_tokens == len(beginnings)


@settings(max_examples=10, deadline=None)
@given(samples=made_samples(constrained=False), nodes=st.integers(1, 4))
def test_a_vocabulary_taken_in_chunks_of_nodes_changes_nothing(
    policy: LanguagePolicy, samples: Samples, nodes: int
) -> None:
    batch = train_batch(samples)
    whole = shared_stats(policy, batch, Sampling(temperature=0.7))
    expected = gradients(policy, weighted(*whole))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "NODES_PER_CHUNK", nodes)
        chunked = shared_stats(policy, batch, Sampling(temperature=0.7))
        found = gradients(policy, weighted(*chunked))
    torch.testing.assert_close(chunked.logprobs, whole.logprobs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(chunked.entropy, whole.entropy, atol=1e-6, rtol=1e-6)
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-7
