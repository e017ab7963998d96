"""What the benchmark derives: distinct work, operations, ratios. By hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lab_made import ids, small_policy

from benchmarks.flops import distinct_counts, linear_layers, measure_peak, update_flops, work_of
from benchmarks.legal_text import EveryTextParser
from benchmarks.ratios import paired_ratio

ACTIONS = ("Left", "Down", "Right", "Up")


def test_common_beginnings_count_once() -> None:
    # Read: 1 2 3 | 1 2 3 7 | 1 2 4 → tokens 1, 2, 3, 7, 4; a token is predicted behind 3, 7 and 4.
    rows = [(ids(1, 2, 3), ids(9)), (ids(1, 2, 3), ids(7, 8)), (ids(1, 2, 4), ids(9))]
    assert distinct_counts(rows) == (5, 3)


def test_the_last_token_and_empty_completions_cost_nothing() -> None:
    assert distinct_counts([(ids(1, 2), ids(5)), (ids(1, 2), ids(6)), (ids(8, 9), ids())]) == (2, 1)


def test_equal_tokens_behind_different_beginnings_are_distinct() -> None:
    assert distinct_counts([(ids(1, 5), ids(9)), (ids(2, 5), ids(9))]) == (4, 2)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=4), st.lists(st.integers(0, 2), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_distinct_tokens_are_the_distinct_beginnings(rows: list[tuple[list[int], list[int]]]) -> None:
    read = [(p, [*p, *c[:-1]]) for p, c in rows if c]
    tokens = {tuple(row[:end]) for _, row in read for end in range(1, len(row) + 1)}
    nodes = {tuple(row[:end]) for p, row in read for end in range(len(p), len(row) + 1)}
    assert distinct_counts([(ids(*p), ids(*c)) for p, c in rows]) == (len(tokens), len(nodes))


def test_operations_of_a_model_that_is_trained_whole() -> None:
    policy = small_policy()
    # Two layers: q, k, v, o of 32×32 and gate, up, down of 32×64.
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    vocabulary = policy.output_weight(None).numel()
    assert sum(out * inp for out, inp, _ in linear_layers(policy)) == matrices
    assert update_flops(policy, 10, 3) == 6 * (matrices * 10 + vocabulary * 3)


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    policy = small_policy(lora_rank=4)
    frozen = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    adapter = 2 * (4 * 4 * (32 + 32) + 3 * 4 * (32 + 64))
    assert update_flops(policy, 10, 0) == 10 * (4 * frozen + 6 * adapter)
    assert update_flops(policy, 0, 1) == 4 * policy.output_weight(None).numel()


def test_constrained_answers_need_no_vocabulary() -> None:
    policy, rows = small_policy(), [(ids(1, 2), ids(3, 4))]
    free, constrained = (work_of(policy, rows, constrained=flag) for flag in (False, True))
    assert free.distinct_tokens == constrained.distinct_tokens == 3
    assert free.flops - constrained.flops == 6 * 2 * policy.output_weight(None).numel()


def test_the_peak_is_measured_at_the_models_type_and_tokens() -> None:
    peak = measure_peak(small_policy(), 16, side=64, repetitions=2)
    assert (peak.dtype, peak.tokens) == ("float32", 16)
    assert peak.square > 0 < peak.model_shapes


def test_a_ratio_is_taken_pair_by_pair() -> None:
    # Pairs 4, 2, 9; the ratio of the medians (8 / 2) would be 4 as well, so the ends tell them apart.
    ratio = paired_ratio([8.0, 4.0, 9.0], [2.0, 2.0, 1.0])
    assert (ratio.median, ratio.low, ratio.high, ratio.spread) == (4.0, 2.0, 9.0, "min-max")
    assert str(ratio) == "4.00 [2.00, 9.00]"


def test_many_pairs_get_an_interval_that_is_narrower_than_the_ends() -> None:
    rng = np.random.default_rng(0)
    fast = rng.lognormal(np.log(10.0), 0.1, size=40).tolist()
    ratio = paired_ratio(fast, [1.0] * 40)
    assert ratio.spread == "95% bootstrap"
    assert min(fast) < ratio.low < ratio.median < ratio.high < max(fast)
    assert ratio == paired_ratio(fast, [1.0] * 40)


@pytest.mark.parametrize(("fast", "naive"), [([], []), ([1.0], [1.0, 2.0])])
def test_a_ratio_needs_pairs(fast: list[float], naive: list[float]) -> None:
    with pytest.raises(ValueError, match="give pairs"):
        paired_ratio(fast, naive)


def test_every_text_names_an_action() -> None:
    parse = EveryTextParser()
    assert parse("go RIGHT now", ACTIONS).action == 2
    texts = ["".join(letters) for letters in itertools.product("xyz ", repeat=3)]
    actions = [parse(text, ACTIONS).action for text in ["", *texts]]
    assert set(actions) == {0, 1, 2, 3}
    assert actions[1:] == [parse(text, ACTIONS).action for text in texts]
