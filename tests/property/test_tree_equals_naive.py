"""`update.sharing=tree` against `none`: the same log-probabilities, loss and gradient, whatever is shared and however
passes are cut, for more than one architecture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_made import gradient_of, move, small_policy, train_batch
from transformers import Qwen2Config, Qwen2ForCausalLM

from msgrpo_lab.decoder import tree as forest
from msgrpo_lab.decoder.plan import Sharing, plan_forward
from msgrpo_lab.decoder.tree import cut_tree
from msgrpo_lab.engines.hf.constrained import choice_trie
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.lap.sources import word_tokenizer
from msgrpo_lab.loss import MSGRPOLoss, Reduction, sum_stats
from msgrpo_lab.types import Sampling, TrainBatch

WORDS = ((11,), (12, 13), (12, 14), (15, 12, 11), (15, 12, 16))
RULES = [
    Sampling(),
    Sampling(temperature=0.7, top_k=3),
    Sampling(temperature=1.5, top_p=0.9),
    Sampling(choices=WORDS),
    Sampling(temperature=1.5, top_k=2, choices=WORDS),
]
token = st.integers(6, 40)


def qwen2(**changed: Any) -> LanguagePolicy:
    """Two small layers with grouped heads, biases and untied embeddings, whose weights are sharp enough to matter."""
    tokenizer = word_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settled = {"num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, **changed}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes, **settled))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(8.0) if parameter.ndim == 2 else parameter.add_(0.3 * torch.randn(parameter.shape))
    return LanguagePolicy(model, tokenizer, torch.float32)


def eager(policy: LanguagePolicy) -> LanguagePolicy:
    policy.model.set_attn_implementation("eager")  # type: ignore[operator]
    return policy


def with_adapter() -> LanguagePolicy:
    policy = small_policy(lora_rank=4)
    move(policy)
    return policy


def by_library(policy: LanguagePolicy) -> LanguagePolicy:
    """As if the block decoder did not know the model."""
    policy.blocks = None
    return policy


POLICIES = {
    "llama-blocks": small_policy,
    "llama-library": lambda: by_library(small_policy()),
    "llama-lora-blocks": with_adapter,
    "llama-lora-library": lambda: by_library(with_adapter()),
    "llama-eager-library": lambda: by_library(eager(small_policy())),
    "qwen2-blocks": qwen2,
    "qwen2-library": lambda: by_library(qwen2()),
}


@pytest.fixture(scope="module", params=POLICIES)
def policy(request: pytest.FixtureRequest) -> LanguagePolicy:
    return POLICIES[request.param]()


@st.composite
def made_batch(draw: st.DrawFn, constrained: bool) -> TrainBatch:
    """Prompts that open alike for up to 12 tokens or not at all; answers that open alike, repeat, or are empty."""
    beginning = draw(st.lists(token, max_size=12))
    pool = [
        [*(beginning if draw(st.integers(0, 5)) else []), *draw(st.lists(token, min_size=1, max_size=6))]
        for _ in range(draw(st.integers(1, 4)))
    ]
    opening = draw(st.lists(token, max_size=3))
    free = st.one_of(
        st.lists(st.sampled_from([7, 8]), max_size=6),
        st.lists(token, max_size=4).map(lambda tail: [*opening, *tail]),
    )
    answer = st.sampled_from([list(w) for w in (*WORDS, ())]) if constrained else free
    first = (draw(st.sampled_from(pool)), list(WORDS[1]))
    samples = [first, *draw(st.lists(st.tuples(st.sampled_from(pool), answer), max_size=11))]
    batch = train_batch(samples)
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    # Around what an untrained model of 402 words says, as old log-probabilities are: ratios of e⁴ would only magnify
    # the rounding of float32.
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers)

    shape = batch.input_ids.shape
    return replace(
        batch,
        old_logprobs=(drawn(*shape) - 6.0).masked_fill(~batch.completion_mask, 0.0),
        ref_logprobs=(drawn(*shape) - 6.0).masked_fill(~batch.completion_mask, 0.0),
        advantage=drawn(shape[0]),
        weight=drawn(shape[0]).exp(),
        num_turns=torch.randint(1, 4, (shape[0],), generator=numbers),
    )


def stats_of(policy: LanguagePolicy, batch: TrainBatch, rule: Sampling, budget: int, sharing: Sharing) -> Any:
    """Log-probabilities and entropies [S, L] from all passes, each pass's columns only, the rest left at 0."""
    trie = None if rule.choices is None else choice_trie(rule.choices)
    logprobs, entropy = torch.zeros(batch.input_ids.shape), torch.zeros(batch.input_ids.shape)
    for plan in policy.plan(batch, trie, budget, sharing):
        stats = policy.token_stats(plan, trie, rule, plan.columns)
        rows = torch.from_numpy(plan.samples)[:, None]
        columns = torch.arange(plan.columns.start, plan.columns.stop)[None]
        logprobs = logprobs.index_put((rows, columns), stats.logprobs.float())
        entropy = entropy.index_put((rows, columns), stats.entropy.float())
    return logprobs, entropy


def step_of(
    policy: LanguagePolicy, batch: TrainBatch, rule: Sampling, loss: MSGRPOLoss, budget: int, sharing: Sharing
) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step taken in passes of `budget` tokens, each backward on its own."""
    trie = None if rule.choices is None else choice_trie(rule.choices)
    policy.zero_grad()
    parts = []
    for plan in policy.plan(batch, trie, budget, sharing):
        part = batch.select(torch.from_numpy(plan.samples))
        stats = loss(*policy.token_stats(plan, trie, rule), part)
        stats.loss.backward()
        parts.append(stats._replace(loss=stats.loss.detach()))
    return float(sum_stats(parts).loss), gradient_of(policy)


def assert_same_step(
    policy: LanguagePolicy, batch: TrainBatch, rule: Sampling, loss: MSGRPOLoss, budget: int, rel: float = 1e-4
) -> None:
    expected, expected_gradient = step_of(policy, batch, rule, loss, 10**9, "none")
    for sharing in get_args(Sharing):
        found, gradient = step_of(policy, batch, rule, loss, budget, sharing)
        # Single terms reach some 50 and cancel, so their rounding is not that of the sum.
        assert found == pytest.approx(expected, rel=1e-6, abs=2e-5), sharing
        assert float((gradient - expected_gradient).norm()) <= rel * float(expected_gradient.norm()) + 1e-7, sharing


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), budget=st.integers(1, 160))
def test_log_probabilities(policy: LanguagePolicy, rule: Sampling, data: st.DataObject, budget: int) -> None:
    batch = data.draw(made_batch(rule.choices is not None))
    with torch.no_grad():
        expected = stats_of(policy, batch, rule, 10**9, "none")
        for found, wanted in zip(stats_of(policy, batch, rule, budget, "tree"), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("rule", [RULES[0], RULES[3]], ids=str)
@settings(max_examples=8, deadline=None)
@given(data=st.data(), budget=st.integers(1, 160), reduction=st.sampled_from(get_args(Reduction)))
def test_loss_and_gradient(
    policy: LanguagePolicy, rule: Sampling, beta: float, data: st.DataObject, budget: int, reduction: Reduction
) -> None:
    batch = data.draw(made_batch(rule.choices is not None))
    constant = 4.0 if reduction == "dr_grpo" else None
    assert_same_step(policy, batch, rule, MSGRPOLoss(beta=beta, reduction=reduction, constant=constant), budget)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), budget=st.integers(1, 160), width=st.integers(1, 5))
def test_rows_cut_anywhere(policy: LanguagePolicy, data: st.DataObject, budget: int, width: int) -> None:
    """Narrow rows, so that trees are cut inside and one prompt's completions go to several rows and passes."""
    batch = data.draw(made_batch(constrained=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forest, "cut_tree", lambda rests, _: cut_tree(rests, width))
        assert_same_step(policy, batch, Sampling(), MSGRPOLoss(beta=0.1), budget)


def many_answers() -> TrainBatch:
    """Three prompts of unequal length with dozens of answers: several rows of branches and several lengths of them."""
    pool = [[*range(6, 18), *tail] for tail in ([20], [21, 22, 23], [24, 25])]
    digits = [[7 + n % 3, 7 + n // 3 % 3, 7 + n // 9 % 3, 9 + n % 5, 30] for n in range(60)]
    batch = train_batch([(pool[0], d) for d in digits] + [(pool[1], d) for d in digits[:5]] + [(pool[2], [7, 8])])
    numbers = torch.Generator().manual_seed(0)
    return replace(batch, advantage=torch.randn(66, generator=numbers))


@pytest.mark.parametrize("budget", [10**9, 100, 30])
def test_many_answers_to_one_prompt(policy: LanguagePolicy, budget: int) -> None:
    batch = many_answers()
    assert_same_step(policy, batch, Sampling(), MSGRPOLoss(), budget)
    plans = plan_forward(batch, None, budget)
    if budget == 10**9:
        (plan,) = plans
        assert plan.num_tokens < 0.2 * int(batch.attention_mask.sum())
    else:
        assert len(plans) > 1
        assert sum(0 in plan.samples for plan in plans) == 1
        assert sum(len(plan.samples) for plan in plans) == 66


def test_bfloat16_agrees_to_its_own_precision() -> None:
    """Under autocast both paths are equally far from float32, and the tree is not farther than a cast explains."""
    batch, exact = many_answers(), small_policy(sharpness=2.0)
    rounded = LanguagePolicy(exact.model, exact.tokenizer, torch.bfloat16)
    with torch.no_grad():
        expected, _ = stats_of(exact, batch, Sampling(), 10**9, "none")
        error = {
            sharing: float((stats_of(rounded, batch, Sampling(), 10**9, sharing)[0] - expected).abs().max())
            for sharing in get_args(Sharing)
        }
    assert 0 < error["none"] < 0.05
    assert error["tree"] < 2 * error["none"] + 0.005
    _, exact_gradient = step_of(exact, batch, Sampling(), MSGRPOLoss(), 10**9, "none")
    _, gradient = step_of(rounded, batch, Sampling(), MSGRPOLoss(), 10**9, "tree")
    assert float((gradient - exact_gradient).norm()) < 0.05 * float(exact_gradient.norm())


def test_a_model_with_a_sliding_window_reads_whole_rows(caplog: pytest.LogCaptureFixture) -> None:
    """Its cache forgets positions and its mask is not ours to make."""
    policy = qwen2(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert policy.blocks is None
    assert not policy.library.branches
    plans = policy.plan(many_answers(), None, 10**9)
    assert all(plan.branches == () for plan in plans)
    assert_same_step(policy, many_answers(), Sampling(), MSGRPOLoss(), 400)
    told = [record.getMessage() for record in caplog.records if record.name == "msgrpo_lab.lap.policy"]
    assert told == ["model: qwen2 cannot branch behind a cache; updates read each distinct row as a whole"]
    assert qwen2().library.branches
