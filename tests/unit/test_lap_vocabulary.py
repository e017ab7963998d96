"""Summing up a vocabulary tile by tile gives what the whole matrix of log-probabilities gives."""

from __future__ import annotations

import pytest
import torch

from msgrpo_lab.decoder import decoding as vocabulary
from msgrpo_lab.decoder.decoding import (
    decoding_logprobs,
    entropy,
    sampled_logprobs,
    top_logits,
    top_stats,
    vocabulary_stats,
)
from msgrpo_lab.types import Sampling

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def whole(hidden, weight, temperature, node, token):
    logits = torch.nn.functional.linear(hidden, weight)
    logprobs = decoding_logprobs(logits, Sampling(temperature=temperature))
    return logprobs[node, token], entropy(logprobs)


def case(dtype, nodes=37, width=24, tokens=211, pairs=80, spread=1.0):
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(nodes, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (spread * torch.randn(tokens, width, generator=generator, dtype=torch.float64)).to(dtype)
    node = torch.randint(nodes, (pairs,), generator=generator).sort().values
    return hidden, weight, node, torch.randint(tokens, (pairs,), generator=generator)


@pytest.fixture(params=[(512, 4096), (10, 64), (1, 1), (37, 211)], ids=str)
def tile(request, monkeypatch):
    monkeypatch.setitem(vocabulary.TILE, "cpu", request.param)


@pytest.mark.usefixtures("tile")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradient_are_those_of_the_whole_matrix(dtype, temperature):
    hidden, weight, node, token = case(dtype)
    along_pairs, along_nodes = torch.linspace(-1, 2, len(node)), torch.linspace(-2, 1, len(hidden))
    results = []
    for stats in (vocabulary_stats, whole):
        picked, spread = stats(hidden, weight, temperature, node, token)
        (grad,) = torch.autograd.grad((picked * along_pairs).sum() + (spread * along_nodes).sum(), hidden)
        results.append((picked, spread, grad))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_bfloat16_rounds_logits_as_the_whole_matrix_does():
    hidden, weight, node, token = case(torch.bfloat16)
    picked, spread = vocabulary_stats(hidden, weight, 1.0, node, token)
    expected = whole(hidden, weight, 1.0, node, token)
    assert picked.dtype == torch.float32
    torch.testing.assert_close(picked, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("tile")
def test_huge_logits_stay_finite():
    hidden, weight, node, token = case(torch.float32, spread=300.0)
    picked, spread = vocabulary_stats(hidden, weight, 1.0, node, token)
    expected = whole(hidden, weight, 1.0, node, token)
    assert torch.isfinite(picked).all()
    torch.testing.assert_close(picked, expected[0], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(spread, expected[1], rtol=1e-5, atol=1e-4)
    (grad,) = torch.autograd.grad(picked.sum() + spread.sum(), hidden)
    assert torch.isfinite(grad).all()


def test_nodes_without_a_pair_have_an_entropy_and_its_gradient():
    hidden, weight, _, _ = case(torch.float64)
    none = torch.zeros(0, dtype=torch.int64)
    picked, spread = vocabulary_stats(hidden, weight, 1.0, none, none)
    _, expected = whole(hidden, weight, 1.0, none, none)
    assert picked.shape == (0,)
    found, wanted = (torch.autograd.grad(total.sum(), hidden)[0] for total in (spread, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_trained_projection_is_refused():
    hidden, weight, node, token = case(torch.float32)
    with pytest.raises(ValueError, match="weight: a trained output projection"):
        vocabulary_stats(hidden, weight.requires_grad_(), 1.0, node, token)


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (3, None), (3, 0.6), (64, None)])
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_a_few_candidates_give_what_the_whole_matrix_gives(monkeypatch, top_k, top_p, temperature, block):
    """Values and gradients, for tokens that top-k keeps and for those that it has come to cut off."""
    monkeypatch.setattr(vocabulary, "CANDIDATE_BLOCK", block)
    monkeypatch.setattr(vocabulary, "CANDIDATE_NODES", 10)
    rule = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    hidden, weight, node, token = case(torch.float64, spread=0.4)
    weight.requires_grad_()
    best = torch.nn.functional.linear(hidden, weight).argmax(dim=1)
    token = torch.where(torch.arange(len(token)) % 2 == 0, best[node], token)

    def whole_rule():
        logits = torch.nn.functional.linear(hidden, weight)
        logprobs = decoding_logprobs(logits, rule)
        return sampled_logprobs(logits, logprobs, rule, node, token), entropy(logprobs)

    results = []
    for picked, spread in (top_stats(hidden, weight, rule, node, token), whole_rule()):
        total = (picked * torch.linspace(-1, 2, len(node))).sum() + (spread * torch.linspace(-2, 1, len(hidden))).sum()
        results.append((picked, spread, *torch.autograd.grad(total, (hidden, weight))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_candidates_that_bfloat16_takes_for_equal_are_told_apart():
    """Logits are made again in float32, so the k kept are those of the float32 product."""
    hidden, weight, _, _ = case(torch.bfloat16, nodes=200, tokens=4000)
    tokens, logits = top_logits(hidden, weight, 3)
    exact = hidden.float() @ weight.float().t()
    assert tokens.shape == (200, 3 + vocabulary.SPARE_CANDIDATES)
    assert (tokens.diff(dim=1) > 0).all()
    torch.testing.assert_close(logits, exact.gather(1, tokens), rtol=1e-5, atol=1e-5)
    kept = tokens.gather(1, logits.topk(3, dim=1).indices).sort(dim=1).values
    assert (kept == exact.topk(3, dim=1).indices.sort(dim=1).values).all(dim=1).float().mean() > 0.98
