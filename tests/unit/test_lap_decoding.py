"""The decoding rule: distributions, entropies and draws worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_made import ids, plain_distribution

from msgrpo_lab.decoder.decoding import ChoiceTrie, decoding_logprobs, draw, entropy, sampled_logprobs
from msgrpo_lab.types import Sampling

LN = math.log


def probabilities(weights: list[float], rule: Sampling, allowed: list[bool] | None = None) -> list[float]:
    """Probabilities under `rule` of tokens whose unscaled probabilities are proportional to `weights`."""
    admitted = None if allowed is None else torch.tensor([allowed])
    logits = torch.tensor([[LN(weight) for weight in weights]])
    return [round(value, 6) for value in decoding_logprobs(logits, rule, admitted).exp()[0].tolist()]


def sampled(weights: list[float], rule: Sampling, *tokens: int) -> list[float]:
    """Probabilities of sampled tokens, one distribution for all of them."""
    logits = torch.tensor([[LN(weight) for weight in weights]])
    row = torch.zeros(len(tokens), dtype=torch.long)
    logprobs = sampled_logprobs(logits, decoding_logprobs(logits, rule), rule, row, torch.tensor(tokens))
    return [round(value, 6) for value in logprobs.exp().tolist()]


@pytest.mark.parametrize(
    ("weights", "rule", "expected"),
    [
        ([1, 1, 2, 4], Sampling(), [0.125, 0.125, 0.25, 0.5]),
        ([1, 1, 2, 4], Sampling(temperature=0.5), [1 / 22, 1 / 22, 4 / 22, 16 / 22]),  # squared
        ([1, 4, 9, 16], Sampling(temperature=2.0), [0.1, 0.2, 0.3, 0.4]),  # square roots
        ([1, 1, 2, 4], Sampling(top_k=2), [0, 0, 1 / 3, 2 / 3]),
        ([1, 1, 2, 4], Sampling(top_k=1), [0, 0, 0, 1]),
        ([1, 1, 2, 4], Sampling(top_k=4), [0.125, 0.125, 0.25, 0.5]),
        ([1, 1, 2, 4], Sampling(top_k=99), [0.125, 0.125, 0.25, 0.5]),
        ([1, 1, 2, 4], Sampling(top_p=0.5), [0, 0, 0, 1]),  # 0.5 is reached by the first
        ([1, 1, 2, 4], Sampling(top_p=0.51), [0, 0, 1 / 3, 2 / 3]),
        ([1, 2, 1, 4], Sampling(top_p=0.76), [0.142857, 0.285714, 0, 0.571429]),  # of equals, the first
        ([1, 1, 2, 4], Sampling(top_p=1.0), [0.125, 0.125, 0.25, 0.5]),
        ([1, 1, 2, 4], Sampling(top_p=1e-9), [0, 0, 0, 1]),  # never nothing
        # Temperature before top-p: 0.75 takes three of 1, 2, 3, 4, but would take two of 1, 4, 9, 16.
        ([1, 4, 9, 16], Sampling(temperature=2.0, top_p=0.75), [0, 0.222222, 0.333333, 0.444444]),
        # Top-k before top-p: of 2 and 4, the 4 alone has 2/3.
        ([1, 1, 2, 4], Sampling(top_k=2, top_p=0.6), [0, 0, 0, 1]),
        ([1, 1, 2, 4], Sampling(greedy=True), [0.125, 0.125, 0.25, 0.5]),  # greedy picks, it does not change
    ],
)
def test_distribution(weights: list[float], rule: Sampling, expected: list[float]) -> None:
    assert probabilities(weights, rule) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("rule", "allowed", "expected"),
    [
        (Sampling(), [True, False, True, False], [1 / 3, 0, 2 / 3, 0]),
        # The constraint stands first: top-k and top-p choose among legal tokens only.
        (Sampling(top_k=1), [True, False, True, False], [0, 0, 1, 0]),
        (Sampling(top_k=2), [True, False, True, False], [1 / 3, 0, 2 / 3, 0]),
        (Sampling(top_k=3), [True, False, True, False], [1 / 3, 0, 2 / 3, 0]),  # no illegal token comes back
        (Sampling(top_p=0.66), [True, False, True, False], [0, 0, 1, 0]),
        (Sampling(top_p=0.67), [True, False, True, False], [1 / 3, 0, 2 / 3, 0]),
        (Sampling(), [False, True, False, False], [0, 1, 0, 0]),
    ],
)
def test_constraint_comes_first(rule: Sampling, allowed: list[bool], expected: list[float]) -> None:
    assert probabilities([1, 1, 2, 4], rule, allowed) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("rule", [Sampling(top_k=1), Sampling(top_p=0.5), Sampling(top_k=2, top_p=0.5)])
def test_sampled_token_that_was_cut_off_is_let_in_beside_those_that_are_kept(rule: Sampling) -> None:
    assert sampled([1, 1, 2, 4], rule, 0) == pytest.approx([1 / 5])
    assert sampled([1, 1, 2, 4], rule, 3) == [1.0], "one that is kept has the probability it is drawn with"


def test_temperature_comes_before_letting_in() -> None:
    assert sampled([1, 1, 2, 4], Sampling(top_k=1, temperature=0.5), 2) == pytest.approx([4 / 20])


def test_sampled_tokens_do_not_see_each_other() -> None:
    """All tokens of the vocabulary drawn from one prompt, and each by itself: the same numbers."""
    weights, rule = [1.0, 2.0, 3.0, 5.0, 8.0], Sampling(top_k=2)
    together = sampled(weights, rule, 0, 1, 2, 3, 4)
    assert together == [sampled(weights, rule, token)[0] for token in range(5)]
    assert together == pytest.approx([1 / 14, 2 / 15, 3 / 16, 5 / 13, 8 / 13], abs=1e-6)


@pytest.mark.parametrize("token", range(4))
def test_sampled_tokens_have_the_gradient_of_their_log_probability(token: int) -> None:
    logits = torch.tensor([[0.0, 0.3, -0.2, 1.0]], dtype=torch.double, requires_grad=True)
    rule = Sampling(top_k=2, temperature=0.7)

    def logprob(x: torch.Tensor) -> torch.Tensor:
        return sampled_logprobs(x, decoding_logprobs(x, rule), rule, torch.tensor([0]), torch.tensor([token]))

    (gradient,) = torch.autograd.grad(logprob(logits).sum(), logits)
    kept = sorted({1, 3, token})
    expected = torch.zeros(4, dtype=torch.double)
    expected[kept] = -(logits[0, kept] / 0.7).softmax(0) / 0.7
    expected[token] += 1 / 0.7
    assert torch.allclose(gradient[0], expected.detach(), atol=1e-5)


def test_rows_do_not_mix() -> None:
    logits = torch.tensor([[LN(1), LN(3)], [LN(3), LN(1)]])
    assert decoding_logprobs(logits, Sampling()).exp().flatten().tolist() == pytest.approx([0.25, 0.75, 0.75, 0.25])


def test_the_result_is_float32_whatever_the_logits() -> None:
    assert decoding_logprobs(torch.zeros(1, 2, dtype=torch.bfloat16), Sampling()).dtype == torch.float32


@settings(max_examples=80, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8), min_size=2, max_size=9, unique_by=lambda x: round(x, 3)),
    temperature=st.sampled_from([0.5, 1.0, 1.5]),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(0.05, 0.999),
)
def test_equals_the_plain_reference_and_sums_to_one(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    rule = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    row = torch.tensor(logits)
    found = decoding_logprobs(row[None], rule)[0]
    assert float(found.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    if top_p is None or nucleus_is_clear(row, rule):
        torch.testing.assert_close(found.double(), plain_distribution(row, rule), atol=1e-5, rtol=1e-5)


def nucleus_is_clear(row: torch.Tensor, rule: Sampling) -> bool:
    """Whether no partial sum of probabilities lies within rounding of top-p."""
    head = (row.double() / rule.temperature).sort(descending=True).values[: rule.top_k].softmax(0).cumsum(0)
    return bool(((head - (rule.top_p or 2.0)).abs() > 1e-5).all())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1, 1, 1], LN(4)), ([1, 3], LN(4) - 0.75 * LN(3)), ([1], 0.0), ([1, 1, 2, 4], 1.75 * LN(2))],
)
def test_entropy_in_nats(weights: list[float], expected: float) -> None:
    logprobs = torch.tensor([weights]).float().log().log_softmax(dim=-1)
    assert float(entropy(logprobs)) == pytest.approx(expected, abs=1e-6)


def test_entropy_ignores_what_is_never_drawn_and_its_gradient_is_finite() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0]], requires_grad=True)
    spread = entropy(decoding_logprobs(logits, Sampling(top_k=2)))
    spread.sum().backward()
    chance = 1 / (1 + math.exp(4))
    assert float(spread.detach()) == pytest.approx(-chance * LN(chance) - (1 - chance) * LN(1 - chance), abs=1e-6)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    # dH/dz of a two-way choice with odds e^d is −d p (1 − p), d = z_b − z_a
    assert logits.grad[0].tolist() == pytest.approx(
        [0, 4 * chance * (1 - chance), -4 * chance * (1 - chance)], abs=1e-6
    )


def logs(*chances: float) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array([chances], dtype=np.float64))


@pytest.mark.parametrize(
    ("uniform", "token"), [(0.0, 0), (0.249, 0), (0.25, 1), (0.74, 1), (0.75, 3), (0.999999, 3), (1 - 2**-53, 3)]
)
def test_draw_inverts_the_cumulative_distribution(uniform: float, token: int) -> None:
    assert draw(logs(0.25, 0.5, 0.0, 0.25), np.array([uniform]), False).tolist() == [token]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("chances", [(0.0, 1.0, 0.0), (0.0, 0.3, 0.7, 0.0, 0.0)])
def test_draw_never_takes_a_token_of_probability_0(uniform: float, chances: tuple[float, ...]) -> None:
    (token,) = draw(logs(*chances), np.array([uniform]), False).tolist()
    assert chances[token] > 0


def test_draw_never_takes_probability_0_where_rounding_leaves_the_sum_below_1() -> None:
    logprobs = np.concatenate([np.full((1, 7), np.log(np.float32(1 / 7)) - 1e-4), [[-np.inf]]], axis=1)
    assert draw(logprobs, np.array([1 - 2**-53]), False).tolist() == [6]


def test_greedy_takes_the_mode_whatever_the_uniform() -> None:
    assert draw(logs(0.2, 0.5, 0.3), np.array([0.999]), True).tolist() == [1]


def test_frequencies_are_the_probabilities() -> None:
    count = 40_000
    chances = np.array([0.05, 0.15, 0.0, 0.3, 0.5])
    drawn = draw(np.repeat(logs(*chances), count, axis=0), np.random.default_rng(5).random(count), False)
    seen = np.bincount(drawn, minlength=5)
    wanted = chances[chances > 0] * count
    chi_square = float(((seen[chances > 0] - wanted) ** 2 / wanted).sum())
    assert seen[2] == 0
    assert chi_square < 16.27, "0.999 quantile with 3 degrees of freedom"


WORDS = ((11,), (12, 13), (12, 14), (15, 12, 11))


def test_trie_of_multi_token_words() -> None:
    trie = ChoiceTrie(WORDS)
    assert trie.columns.tolist() == [11, 12, 13, 14, 15]
    assert trie.prefixes == ((), (12,), (15,), (15, 12))
    assert trie.allowed.tolist() == [
        [True, True, False, False, True],
        [False, False, True, True, False],
        [False, True, False, False, False],
        [True, False, False, False, False],
    ]
    end = ChoiceTrie.END
    assert trie.next_state.tolist() == [
        [end, 1, end, end, 2],
        [end, end, end, end, end],
        [end, 3, end, end, end],
        [end, end, end, end, end],
    ]


@pytest.mark.parametrize(
    ("word", "states"), [((11,), [0]), ((12, 13), [0, 1]), ((15, 12, 11), [0, 2, 3]), ((12,), [0])]
)
def test_trie_states_before_each_token(word: tuple[int, ...], states: list[int]) -> None:
    assert ChoiceTrie(WORDS).states(ids(*word)) == states


@pytest.mark.parametrize("word", [(13,), (99,), (12, 11), (11, 11), (12, 13, 11), (15, 12, 11, 12)])
def test_trie_refuses_what_is_not_legal(word: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="none of the legal answers"):
        ChoiceTrie(WORDS).states(ids(*word))


def test_trie_column_of_a_token() -> None:
    assert [ChoiceTrie(WORDS).column(token) for token in (11, 14, 15)] == [0, 3, 4]
    with pytest.raises(KeyError):
        ChoiceTrie(WORDS).column(16)


@pytest.mark.parametrize("order", list(itertools.permutations([(1, 2), (1,), (3,)])))
def test_a_word_that_begins_another_is_refused_in_any_order(order: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"^prompt: ") as caught:
        ChoiceTrie(order)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("choices", [(), ((),), ((1,), ()), ((1,), (1,)), ((1, 2), (1, 2))])
def test_empty_and_repeated_words_are_refused(choices: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"^prompt: "):
        ChoiceTrie(choices)


@settings(max_examples=60, deadline=None)
@given(
    words=st.sets(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
    data=st.data(),
)
def test_trie_walks_end_in_every_word_and_in_nothing_else(words: set[tuple[int, ...]], data: st.DataObject) -> None:
    clash = any(a != b and b[: len(a)] == a for a in words for b in words)
    ordered = tuple(data.draw(st.permutations(sorted(words))))
    if clash:
        with pytest.raises(ValueError, match=r"^prompt: "):
            ChoiceTrie(ordered)
        return
    trie = ChoiceTrie(ordered)
    reached, open_walks = set(), [(0, ())]
    while open_walks:
        state, walk = open_walks.pop()
        for column in np.flatnonzero(trie.allowed[state]):
            longer = (*walk, int(trie.columns[column]))
            following = int(trie.next_state[state, column])
            if following == ChoiceTrie.END:
                reached.add(longer)
            else:
                open_walks.append((following, longer))
    assert reached == words
