"""The plan of a forward pass, worked out by hand: which rows are seen, and where each sample's numbers come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lab_made import gradients, ids, move, plain_stats, small_policy, train_batch

from msgrpo_lab.lap.decoding import ChoiceTrie
from msgrpo_lab.lap.policy import MIN_SHARED_PREFIX, LanguagePolicy
from msgrpo_lab.lap.rows import ForwardPlan, pad_rows, plan_forward
from msgrpo_lab.types import Sampling


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return small_policy()


def test_rows_are_padded_on_the_right() -> None:
    rows = pad_rows([ids(1, 2, 3), ids(4)])
    assert rows.input_ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert rows.lengths.tolist() == [3, 1]
    assert rows.num_tokens == 4


@pytest.mark.parametrize(
    ("rows", "shared"),
    [
        ([(1, 2, 3), (1, 2, 4)], 2),
        ([(1, 2, 3), (1, 2)], 1),  # every row keeps a token of its own
        ([(1, 2, 3), (1, 2, 3)], 2),
        ([(1, 2), (3, 2)], 0),
        ([(5,), (5, 6)], 0),
        ([(0, 0), (0, 0, 0)], 1),  # token 0 is also the padding
        ([(1, 2, 3)], 2),
    ],
)
def test_shared_prefix(rows: list[tuple[int, ...]], shared: int) -> None:
    assert pad_rows([ids(*row) for row in rows]).shared_prefix() == shared


def test_one_word_answers_to_one_prompt_share_a_row_and_a_node() -> None:
    batch = train_batch([([1, 2, 3], [7]), ([1, 2, 3], [8]), ([1, 2, 3], [7])])
    (plan,) = plan_forward(batch, None, 8192)
    assert plan.rows.input_ids.tolist() == [[1, 2, 3]]
    assert (plan.node_row.tolist(), plan.node_col.tolist()) == ([0], [2])
    assert (plan.pair_node.tolist(), plan.pair_column.tolist()) == ([0, 0], [7, 8])
    assert plan.samples.tolist() == [0, 1, 2]
    assert plan.pair_of[:, 3].tolist() == [0, 1, 0]
    assert (plan.pair_of[:, :3] == 2).all(), "off the completion points one past the last pair"


def test_the_last_token_of_a_completion_is_never_read() -> None:
    batch = train_batch([([1, 2], [5, 6]), ([1, 2], [5, 7])])
    (plan,) = plan_forward(batch, None, 8192)
    assert plan.rows.input_ids.tolist() == [[1, 2, 5]]
    assert plan.node_col.tolist() == [1, 2]
    assert list(zip(plan.pair_node, plan.pair_column, strict=True)) == [(0, 5), (1, 6), (1, 7)]
    assert plan.pair_of.tolist() == [[3, 3, 0, 1], [3, 3, 0, 2]]


def test_equal_tokens_with_another_start_of_the_answer_are_other_rows() -> None:
    batch = train_batch([([1, 2, 3], [4]), ([1, 2], [3, 4])])
    plans = plan_forward(batch, None, 8192)
    assert [plan.rows.input_ids.tolist() for plan in plans] == [[[1, 2, 3], [1, 2, 3]]]
    (plan,) = plans
    assert sorted(plan.node_col.tolist()) == [1, 2, 2]


def test_a_constraint_gives_each_node_its_legal_columns() -> None:
    trie = ChoiceTrie(((11,), (12, 13), (12, 14)))
    batch = train_batch([([1, 2], [12, 14]), ([1, 2], [11])])
    (plan,) = plan_forward(batch, trie, 8192)
    assert plan.node_allowed is not None
    by_node = dict(
        zip(zip(plan.node_row.tolist(), plan.node_col.tolist(), strict=True), plan.node_allowed, strict=True)
    )
    read = {tuple(plan.rows.input_ids[row][: col + 1].tolist()): legal for (row, col), legal in by_node.items()}
    assert read[1, 2].tolist() == [True, True, False, False]  # columns 11, 12, 13, 14
    assert read[1, 2, 12].tolist() == [False, False, True, True]


def test_an_answer_that_is_not_legal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[12, 11\] is none of the legal answers"):
        plan_forward(train_batch([([1, 2], [12, 11])]), ChoiceTrie(((11,), (12, 13))), 8192)


def test_an_empty_completion_has_nothing_to_predict() -> None:
    plans = plan_forward(train_batch([([1, 2], []), ([1, 2], [3])]), None, 8192)
    assert [plan.samples.tolist() for plan in plans] == [[1]]
    assert plan_forward(train_batch([([1, 2], [])]), None, 8192) == []


def pass_shapes(plans: list[ForwardPlan]) -> list[tuple[int, int]]:
    return [plan.rows.input_ids.shape for plan in plans]


@pytest.mark.parametrize(
    ("budget", "shapes"),
    [
        (1, [(1, 2), (1, 2), (1, 3), (1, 5)]),  # at least one row each
        (4, [(2, 2), (1, 3), (1, 5)]),
        (9, [(3, 3), (1, 5)]),  # rows of like length go together
        (20, [(4, 5)]),
        (19, [(3, 3), (1, 5)]),
    ],
)
def test_the_token_budget_counts_padding(budget: int, shapes: list[tuple[int, int]]) -> None:
    batch = train_batch([([1, 2, 3, 4, 5], [9]), ([1, 2], [9]), ([3, 4], [9]), ([1, 2, 3], [9])])
    assert pass_shapes(plan_forward(batch, None, budget)) == shapes


@pytest.mark.parametrize("length", range(1, 2 * MIN_SHARED_PREFIX))
def test_prefixes_shorter_and_longer_than_the_least_shared_one(policy: LanguagePolicy, length: int) -> None:
    beginning = list(range(20, 20 + length))
    batch = train_batch([([*beginning, 7], [30, 31]), ([*beginning, 8, 9], [30]), ([*beginning, 8, 9], [32])])
    (plan,) = plan_forward(batch, None, 8192)
    with torch.no_grad():
        _, shared = policy.hidden_states(plan.rows, int(plan.node_col.min()))
        expected, _ = plain_stats(policy, batch, Sampling())
        found = policy.token_stats(plan, None, Sampling())
    assert shared == (length if length >= MIN_SHARED_PREFIX else 0)
    torch.testing.assert_close(found.logprobs[plan.samples.argsort()].double(), expected, atol=1e-5, rtol=1e-5)


def test_identical_prompts_never_hide_the_node_that_predicts_the_first_token(policy: LanguagePolicy) -> None:
    """The prompt's last position is a node, so it may not vanish into the shared prefix."""
    prompt = list(range(20, 32))
    batch = train_batch([(prompt, [7, 9, 5]), (prompt, [8, 9, 5]), (prompt, [8, 7])])
    (plan,) = plan_forward(batch, None, 8192)
    expected, entropy = plain_stats(policy, batch, Sampling())
    hidden_from = policy.hidden_states(plan.rows, int(plan.node_col.min()))[1]
    found = policy.token_stats(plan, None, Sampling())
    order = plan.samples.argsort()
    assert hidden_from == len(prompt) - 1
    torch.testing.assert_close(found.logprobs[order].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy[order].double(), entropy, atol=1e-5, rtol=1e-5)
    wanted, got = gradients(policy, expected.sum()), gradients(policy, found.logprobs.sum())
    assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_a_token_that_left_the_top_k_keeps_a_finite_gradient(policy: LanguagePolicy) -> None:
    prompt = [20, 21, 22]
    with torch.no_grad():
        unlikely = int(policy.model(input_ids=torch.tensor([prompt])).logits[0, -1].argmin())
    (plan,) = plan_forward(train_batch([(prompt, [unlikely])]), None, 8192)
    stats = policy.token_stats(plan, None, Sampling(top_k=3))
    assert torch.isfinite(stats.logprobs).all()
    gradient = gradients(policy, stats.logprobs.sum())
    assert torch.isfinite(gradient).all()
    assert float(gradient.norm()) > 0


def test_the_reference_of_an_adapter_is_the_base_model() -> None:
    adapted, base = small_policy(lora_rank=4), small_policy()
    move(adapted)
    batch = train_batch([([20, 21, 22], [7, 8]), ([20, 21], [9])])
    (plan,) = plan_forward(batch, None, 8192)
    with adapted.as_reference() as reference:
        found = reference.token_stats(plan, None, Sampling()).logprobs
    with torch.no_grad():
        expected = base.token_stats(plan, None, Sampling()).logprobs
        moved = adapted.token_stats(plan, None, Sampling()).logprobs
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert float((moved - expected).abs().max()) > 1e-3, "the adapter is on again afterwards"


def test_only_the_adapter_is_trained() -> None:
    adapted = small_policy(lora_rank=4)
    move(adapted)
    (plan,) = plan_forward(train_batch([([20, 21, 22], [7, 8])]), None, 8192)
    adapted.token_stats(plan, None, Sampling()).logprobs.sum().backward()
    with_gradient = {name for name, p in adapted.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert with_gradient
    assert all("lora_" in name for name in with_gradient)
    assert {name for name, p in adapted.model.named_parameters() if p.requires_grad} == {
        name for name, _ in adapted.model.named_parameters() if "lora_" in name
    }


def test_full_training_keeps_its_first_weights_as_reference() -> None:
    policy = small_policy()
    policy.keep_reference()
    (plan,) = plan_forward(train_batch([([20, 21, 22], [7, 8])]), None, 8192)
    with torch.no_grad():
        before = policy.token_stats(plan, None, Sampling()).logprobs
    optimizer = torch.optim.AdamW(policy.trainable_parameters(), lr=1e-2)
    policy.token_stats(plan, None, Sampling()).logprobs.sum().backward()
    optimizer.step()
    policy.keep_reference()  # a second call must not take the moved weights
    with policy.as_reference() as reference:
        kept = reference.token_stats(plan, None, Sampling()).logprobs
    after = policy.token_stats(plan, None, Sampling()).logprobs
    assert torch.equal(kept, before)
    assert not kept.requires_grad
    assert float((after - before).abs().max().detach()) > 1e-3


def test_the_reference_is_in_no_checkpoint() -> None:
    policy = small_policy()
    names = set(policy.state_dict())
    policy.keep_reference()
    assert set(policy.state_dict()) == names


def test_a_reference_that_was_never_kept_is_told() -> None:
    with pytest.raises(RuntimeError, match="keep_reference"), small_policy().as_reference():
        pass


def test_models_that_change_their_logits_are_refused() -> None:
    policy = small_policy()
    policy.model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        LanguagePolicy(policy.model, policy.tokenizer, torch.float32)


def test_end_tokens_are_the_tokenizers_and_the_models() -> None:
    policy = small_policy()
    policy.model.generation_config.eos_token_id = [1, 2]
    assert policy.end_token_ids == frozenset({1, 2, policy.tokenizer.eos_token_id})
    policy.model.generation_config.eos_token_id = None
    assert policy.end_token_ids == frozenset({policy.tokenizer.eos_token_id})


def test_samples_of_a_row_go_where_the_row_goes() -> None:
    batch = train_batch([([1, 2, 3, 4], [9]), ([1], [9]), ([1, 2, 3, 4], [8]), ([1], [7])])
    plans = plan_forward(batch, None, 4)
    assert [plan.samples.tolist() for plan in plans] == [[1, 3], [0, 2]]
    assert all(np.isin(plan.pair_of, range(len(plan.pair_node) + 1)).all() for plan in plans)
