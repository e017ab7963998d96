"""The plan of a forward pass, worked out by hand: which rows are seen, and where each sample's numbers come from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from lab_made import gradients, ids, move, plain_stats, small_policy, train_batch

from msgrpo_lab.decoder.decoding import ChoiceTrie
from msgrpo_lab.decoder.plan import Sharing, pad_rows, plan_forward
from msgrpo_lab.decoder.tree import cut_tree, group_by_length
from msgrpo_lab.lap.policy import LanguagePolicy
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


def test_what_prompts_begin_with_alike_is_read_once_wherever_they_part() -> None:
    batch = train_batch([([1, 2, 3, 4], [7]), ([1, 2, 3, 5], [8]), ([1, 2, 6], [7]), ([1, 2, 3, 4], [8])])
    (plan,) = plan_forward(batch, None, 8192)
    (group,) = plan.branches
    assert plan.rows.input_ids.tolist() == [[1, 2]]
    assert group.token_ids.tolist() == [[3, 4, 5, 6]]
    assert group.parent.tolist() == [[-1, 0, 0, -1]]
    assert group.nodes.tolist() == [1, 2, 3], "nothing is predicted after 3"
    assert (plan.num_tokens, plan.num_padded_tokens, plan.num_nodes) == (6, 6, 3)
    assert list(zip(plan.pair_node, plan.pair_column, strict=True)) == [(0, 7), (0, 8), (1, 8), (2, 7)]
    assert plan.pair_of[[0, 1, 3], 4].tolist() + plan.pair_of[[2], 3].tolist() == [0, 2, 1, 3]


def test_texts_without_a_common_beginning_have_roots_of_their_own() -> None:
    (plan,) = plan_forward(train_batch([([1, 2], [7]), ([3, 2, 4], [7]), ([3, 2, 5], [8])]), None, 8192)
    assert plan.rows.input_ids.tolist() == [[1, 2], [3, 2]]
    (group,) = plan.branches
    assert (group.prompt.tolist(), group.token_ids.tolist()) == ([1], [[4, 5]])
    assert (plan.node_row.tolist(), plan.node_col.tolist(), group.nodes.tolist()) == ([0], [1], [0, 1])


def test_the_last_token_of_a_completion_is_never_read() -> None:
    batch = train_batch([([1, 2], [5, 6]), ([1, 2], [5, 7])])
    (plan,) = plan_forward(batch, None, 8192)
    assert (plan.rows.input_ids.tolist(), plan.branches) == ([[1, 2, 5]], ())
    assert (plan.node_row.tolist(), plan.node_col.tolist()) == ([0, 0], [1, 2])
    assert list(zip(plan.pair_node, plan.pair_column, strict=True)) == [(0, 5), (1, 6), (1, 7)]
    assert plan.pair_of.tolist() == [[3, 3, 0, 1], [3, 3, 0, 2]]


WRITTEN = ([1, 2], [5, 6, 9]), ([1, 2, 3], [8, 8]), ([1, 2], [7]), ([1, 2], [5, 4, 9]), ([1, 2], [5, 6, 9])


def test_a_tree_of_completions_by_hand() -> None:
    """Texts are 1 2, 1 2 3 8, 1 2 5 4 and 1 2 5 6: a root 1 2, and one row in which 4 and 6 both follow 5."""
    (plan,) = plan_forward(train_batch(list(WRITTEN)), None, 8192)
    (group,) = plan.branches
    assert plan.rows.input_ids.tolist() == [[1, 2]]
    assert group.prompt.tolist() == [0]
    assert group.token_ids.tolist() == [[3, 8, 5, 4, 6]]
    assert group.parent.tolist() == [[-1, 0, -1, 2, 2]]
    assert group.depth.tolist() == [[0, 1, 0, 1, 1]]
    assert group.lengths.tolist() == [5]
    assert [np.flatnonzero(seen).tolist() for seen in group.ancestors()[0]] == [[0], [0, 1], [2], [2, 3], [2, 4]]
    # nodes: 0 and 1 end the prompts, 2 is 3 8, 3 is 5, 4 is 5 4, 5 is 5 6
    pairs = [(0, 5), (0, 7), (1, 8), (2, 8), (3, 4), (3, 6), (4, 9), (5, 9)]
    assert list(zip(plan.pair_node.tolist(), plan.pair_column.tolist(), strict=True)) == pairs
    assert plan.pair_of.tolist() == [
        [8, 8, 0, 5, 7],
        [8, 8, 8, 2, 3],
        [8, 8, 1, 8, 8],
        [8, 8, 0, 4, 6],
        [8, 8, 0, 5, 7],
    ]
    assert (plan.num_nodes, plan.num_tokens, plan.num_padded_tokens) == (6, 7, 7)
    assert plan.num_attended == (1 + 2) + (3 + 4) + (3 + 4 + 4)
    assert plan.columns == slice(2, 5)


def test_without_sharing_each_sample_is_a_row() -> None:
    (plan,) = plan_forward(train_batch(list(WRITTEN)), None, 8192, "none")
    assert plan.branches == ()
    assert sorted(map(tuple, plan.rows.input_ids.tolist())) == sorted(
        [(1, 2, 5, 6), (1, 2, 3, 8), (1, 2, 0, 0), (1, 2, 5, 4), (1, 2, 5, 6)]
    )
    assert plan.num_tokens == 4 + 4 + 2 + 4 + 4
    assert plan.num_attended == 10 + 10 + 3 + 10 + 10


def test_whole_rows_are_distinct_prompts_with_reads() -> None:
    (plan,) = plan_forward(train_batch(list(WRITTEN)), None, 8192, "rows")
    assert plan.rows.input_ids.tolist() == [[1, 2, 0, 0], [1, 2, 5, 6], [1, 2, 3, 8], [1, 2, 5, 4]]
    assert list(zip(plan.node_row.tolist(), plan.node_col.tolist(), strict=True)) == [
        (0, 1), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)
    ]  # fmt: skip


def test_padding_on_the_left_is_seen_through() -> None:
    batch = train_batch(list(WRITTEN))
    shift = 5 - batch.attention_mask.sum(dim=1)
    column = (torch.arange(5)[None] - shift[:, None]) % 5
    moved = {f: getattr(batch, f).gather(1, column) for f in ("input_ids", "attention_mask", "completion_mask")}
    (right,), (left,) = plan_forward(batch, None, 8192), plan_forward(replace(batch, **moved), None, 8192)
    assert left.rows.input_ids.tolist() == right.rows.input_ids.tolist()
    assert [g.token_ids.tolist() for g in left.branches] == [g.token_ids.tolist() for g in right.branches]
    assert left.pair_of.tolist() == torch.from_numpy(right.pair_of).gather(1, column).tolist()


def test_a_full_row_is_cut_and_the_next_repeats_the_ancestors() -> None:
    first, second, third = cut_tree([(5,), (1, 3, 4), (), (1, 2), (1, 3)], width=3)
    assert (first.token_ids, first.parent) == ((1, 2, 3), (-1, 0, 0))
    assert first.paths == {(1, 2): (0, 1), (1, 3): (0, 2)}
    assert (second.token_ids, second.parent, second.depth) == ((1, 3, 4), (-1, 0, 1), (0, 1, 2))
    assert third.token_ids == (5,)
    assert cut_tree([(1, 2, 3, 4)], width=2)[0].token_ids == (1, 2, 3, 4), "a path is never cut"
    assert cut_tree([()]) == []


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([], []),
        ([5], [[0]]),
        ([64, 3, 3, 4], [[1, 2, 3], [0]]),  # padding three short rows to 64 costs more than a call
        ([10, 9, 10], [[1, 0, 2]]),
        ([100, 50, 10, 100, 11], [[2, 4], [1], [0, 3]]),
    ],
)
def test_rows_of_like_length_share_a_call(lengths: list[int], groups: list[list[int]]) -> None:
    assert group_by_length(lengths, call_tokens=40) == groups


def test_equal_tokens_are_read_once_wherever_the_answer_starts() -> None:
    batch = train_batch([([1, 2, 3], [4]), ([1, 2], [3, 4])])
    (plan,) = plan_forward(batch, None, 8192)
    assert (plan.rows.input_ids.tolist(), plan.branches, plan.num_tokens) == ([[1, 2, 3]], (), 3)


def test_a_constraint_tells_a_prompt_from_another_with_the_beginning_of_an_answer() -> None:
    """After 1 2 12 the first sample may begin any answer and the second only go on with its own."""
    trie = ChoiceTrie(((11,), (12, 13), (12, 14)))
    (plan,) = plan_forward(train_batch([([1, 2, 12], [11]), ([1, 2], [12, 14])]), trie, 8192)
    assert plan.node_allowed is not None
    assert list(zip(plan.node_col.tolist(), plan.node_allowed.tolist(), strict=True)) == [
        (1, [True, True, False, False]),
        (2, [True, True, False, False]),
        (2, [False, False, True, True]),
    ]


def test_a_constraint_gives_each_node_its_legal_columns() -> None:
    trie = ChoiceTrie(((11,), (12, 13), (12, 14)))
    batch = train_batch([([1, 2], [12, 14]), ([1, 2], [11])])
    (plan,) = plan_forward(batch, trie, 8192)
    assert plan.node_allowed is not None
    assert plan.node_allowed.tolist() == [[True, True, False, False], [False, False, True, True]]  # 11, 12, 13, 14
    assert list(zip(plan.pair_node, plan.pair_column, strict=True)) == [(0, 0), (0, 1), (1, 3)]


@pytest.mark.parametrize("sharing", ["tree", "none"])
def test_a_completion_without_a_prompt_is_refused(sharing: Sharing) -> None:
    with pytest.raises(ValueError, match=r"^sample 1: a completion without a prompt"):
        plan_forward(train_batch([([1], [2]), ([], [3])]), None, 8192, sharing)


def test_an_answer_that_is_not_legal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[12, 11\] is none of the legal answers"):
        plan_forward(train_batch([([1, 2], [12, 11])]), ChoiceTrie(((11,), (12, 13))), 8192)


def test_an_empty_completion_has_nothing_to_predict() -> None:
    plans = plan_forward(train_batch([([1, 2], []), ([1, 2], [3])]), None, 8192)
    assert [plan.samples.tolist() for plan in plans] == [[1]]
    assert plan_forward(train_batch([([1, 2], [])]), None, 8192) == []


@pytest.mark.parametrize(
    ("budget", "passes"),
    [
        (1, [[1], [3], [0], [2]]),  # at least one text each
        (4, [[1, 3], [0], [2]]),
        (6, [[1, 3], [0], [2]]),
        (7, [[0, 1, 2, 3]]),
    ],
)
def test_the_token_budget_counts_padding(budget: int, passes: list[list[int]]) -> None:
    """Texts 1 2, 1 2 3 and 3 4, 1 2 3 4 5 as halves of sorted halves; roots of unequal length are padded."""
    batch = train_batch([([1, 2, 3, 4, 5], [9]), ([1, 2], [9]), ([3, 4], [9]), ([1, 2, 3], [9])])
    plans = plan_forward(batch, None, budget)
    assert [plan.samples.tolist() for plan in plans] == passes
    assert all(plan.num_padded_tokens <= max(budget, 5) for plan in plans)


@pytest.mark.parametrize("length", [1, 2, 7, 15])
def test_prompts_that_begin_alike(policy: LanguagePolicy, length: int) -> None:
    beginning = list(range(20, 20 + length))
    batch = train_batch([([*beginning, 7], [30, 31]), ([*beginning, 8, 9], [30]), ([*beginning, 8, 9], [32])])
    (plan,) = plan_forward(batch, None, 8192)
    with torch.no_grad():
        expected, _ = plain_stats(policy, batch, Sampling())
        found = policy.token_stats(plan, None, Sampling())
    assert plan.num_tokens == length + 4
    torch.testing.assert_close(found.logprobs[plan.samples.argsort()].double(), expected, atol=1e-5, rtol=1e-5)


def test_identical_prompts_never_hide_the_node_that_predicts_the_first_token(policy: LanguagePolicy) -> None:
    """The prompt's last position is a node, in the root that all texts share."""
    prompt = list(range(20, 32))
    batch = train_batch([(prompt, [7, 9, 5]), (prompt, [8, 9, 5]), (prompt, [8, 7])])
    (plan,) = plan_forward(batch, None, 8192)
    expected, entropy = plain_stats(policy, batch, Sampling())
    found = policy.token_stats(plan, None, Sampling())
    order = plan.samples.argsort()
    assert (plan.node_col.tolist(), plan.num_tokens) == ([len(prompt) - 1], len(prompt) + 4)
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
    # Not to the bit: trained norms and frozen ones round differently.
    torch.testing.assert_close(kept, before, atol=1e-5, rtol=1e-6)
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
    assert sorted(plan.samples.tolist() for plan in plans) == [[0, 1, 2, 3]]
    plans = plan_forward(batch, None, 3)
    assert [plan.samples.tolist() for plan in plans] == [[1, 3], [0, 2]]
    assert all(np.isin(plan.pair_of, range(len(plan.pair_node) + 1)).all() for plan in plans)


@pytest.mark.parametrize("budget", [70, 140, 200, 300])
def test_a_prompt_with_too_many_completions_is_split_within_the_budget(budget: int) -> None:
    digits = [[7 + n % 3, 7 + n // 3 % 3, 7 + n // 9 % 3, 7 + n // 27, 9, 30] for n in range(81)]
    plans = plan_forward(train_batch([([1, 2, 3], answer) for answer in digits]), None, budget)
    assert len(plans) > 1 or budget == 300
    assert all(plan.num_padded_tokens <= budget for plan in plans)
    assert sorted(sample for plan in plans for sample in plan.samples.tolist()) == list(range(81))
