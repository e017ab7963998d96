"""Log-probabilities and entropies over a whole vocabulary, without the matrix of them.

The distribution of N nodes over V tokens is N · V numbers: for a small model, reading and writing them costs more than
the product they come from. Here they are made tile by tile (some nodes times some tokens), summed up at once and
forgotten, and made again in the backward pass. Source of the running sum: Milakov and Gimelshein, arXiv 1805.02867.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = {"cpu": (512, 4096)}
"""Nodes and tokens of a tile, small enough for a core's cache."""
TILE_ELSEWHERE = (2048, 16384)
"""The same on accelerators, where the number of calls counts more."""


def vocabulary_stats(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    temperature: float,
    pair_node: Int[Tensor, " Q"],
    pair_token: Int[Tensor, " Q"],
) -> tuple[Float[Tensor, " Q"], Float[Tensor, " N"]]:
    """log softmax(hidden Wᵀ / temperature) at the pairs, and the entropy of each node's distribution (nats, float32).

    Differentiable in `hidden` only.

    Args:
        hidden: of the type the product is computed in.
        weight: frozen output projection.
        temperature: divides the logits.
        pair_node: node of each pair, never descending.
        pair_token: token of each pair.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: a trained output projection is not supported here; project it as a whole")
    found: tuple[Tensor, Tensor] = _VocabularyStats.apply(hidden, weight, temperature, pair_node, pair_token)  # type: ignore[no-untyped-call]
    return found


class _VocabularyStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, temperature: float, pair_node: Tensor, pair_token: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        log_mass = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        entropy = torch.empty_like(log_mass)
        picked = torch.empty(len(pair_node), dtype=wide, device=hidden.device)
        for nodes, pairs in _chunks(hidden, pair_node):
            part = hidden[nodes]
            highest = torch.full((len(part),), -torch.inf, dtype=wide, device=hidden.device)
            mass, weighted = torch.zeros_like(highest), torch.zeros_like(highest)
            for tokens in _tiles(weight):
                logits = _logits(part, weight[tokens], temperature, wide)
                held = _pairs_in(pair_token[pairs], tokens)
                row = pair_node[pairs][held] - nodes.start
                picked[pairs.start + held] = logits[row, pair_token[pairs][held] - tokens.start]
                peak = torch.maximum(highest, logits.amax(dim=1))
                rescale = (highest - peak).exp_()
                relative = logits.sub_(peak[:, None])
                probs = relative.exp()
                # Σ p z is kept relative to the peak, and moves with it.
                weighted = torch.where(mass > 0, (weighted + mass * (highest - peak)) * rescale, weighted)
                weighted += relative.mul_(probs).sum(dim=1)
                mass = mass * rescale + probs.sum(dim=1)
                highest = peak
            log_mass[nodes] = highest + mass.log()
            entropy[nodes] = mass.log() - weighted / mass
        picked -= log_mass[pair_node]
        ctx.save_for_backward(hidden, weight, log_mass, entropy, pair_node, pair_token)
        ctx.temperature = temperature
        return picked, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_picked: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, log_mass, entropy, pair_node, pair_token = ctx.saved_tensors
        total = torch.zeros_like(log_mass).index_add_(0, pair_node, grad_picked)
        grad = torch.zeros(hidden.shape, dtype=log_mass.dtype, device=hidden.device)
        for nodes, pairs in _chunks(hidden, pair_node):
            for tokens in _tiles(weight):
                logprobs = _logits(hidden[nodes], weight[tokens], ctx.temperature, log_mass.dtype)
                logprobs.sub_(log_mass[nodes, None])
                probs = logprobs.exp()
                # ∂ log p_w / ∂ z_v = 1[v = w] − p_v and ∂ H / ∂ z_v = −p_v (log p_v + H)
                flow = logprobs.add_(entropy[nodes, None]).mul_(-grad_entropy[nodes, None]).sub_(total[nodes, None])
                flow.mul_(probs)
                held = _pairs_in(pair_token[pairs], tokens)
                row = pair_node[pairs][held] - nodes.start
                at = (row, pair_token[pairs][held] - tokens.start)
                flow.index_put_(at, grad_picked[pairs.start + held], accumulate=True)
                grad[nodes] += flow.div_(ctx.temperature).to(hidden.dtype) @ weight[tokens].to(hidden.dtype)
        return grad.to(hidden.dtype), None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float, wide: torch.dtype) -> Tensor:
    logits: Tensor = (hidden @ weight.to(hidden.dtype).t()).to(wide)
    logits.div_(temperature)
    return logits


def _chunks(hidden: Tensor, pair_node: Tensor) -> Iterator[tuple[slice, slice]]:
    """Nodes in chunks, each with the pairs that belong to them."""
    step = TILE.get(hidden.device.type, TILE_ELSEWHERE)[0]
    starts = torch.arange(0, len(hidden) + step, step, device=pair_node.device)
    bounds = torch.searchsorted(pair_node, starts).tolist()
    for number, start in enumerate(range(0, len(hidden), step)):
        yield slice(start, min(start + step, len(hidden))), slice(bounds[number], bounds[number + 1])


def _tiles(weight: Tensor) -> Iterator[slice]:
    step = TILE.get(weight.device.type, TILE_ELSEWHERE)[1]
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def _pairs_in(pair_token: Tensor, tokens: slice) -> Tensor:
    """Pairs whose token is in a tile."""
    held: Tensor = (pair_token >= tokens.start) & (pair_token < tokens.stop)
    return held.nonzero().squeeze(1)
