"""Log-probabilities and entropies over a vocabulary, without the matrix of them.

The distribution of N nodes over V tokens is N · V numbers: for a small model, reading and writing them costs more than
the product they come from. Two ways around it:

- `vocabulary_stats`, where every token may be drawn: the matrix is made tile by tile (some nodes times some tokens),
  summed up at once and forgotten, and made again in the backward pass. Source of the running sum: Milakov and
  Gimelshein, arXiv 1805.02867.
- `top_logits`, where top-k leaves a few: one product finds a few more candidates than k for each node, and only their
  logits are made again, in float32 and with a gradient. The backward pass reads k rows of the projection, not V.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from msgrpo_lab.lap.decoding import decoding_logprobs, entropy
from msgrpo_lab.types import Sampling

TILE = {"cpu": (512, 4096)}
"""Nodes and tokens of a tile, small enough for a core's cache."""
TILE_ELSEWHERE = (2048, 16384)
"""The same on accelerators, where the number of calls counts more."""
SPARE_CANDIDATES = 5
"""Candidates beyond k: bfloat16 takes some neighbours for equal, float32 then tells them apart."""
LARGEST_TOP_K = 64
"""Beyond it the whole matrix is no dearer."""
CANDIDATE_BLOCK = 64
"""Tokens whose largest logit is looked at before any single one."""
CANDIDATE_NODES = 256
"""Nodes whose logits are held at a time while candidates are looked for."""


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


def top_logits(
    hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], top_k: int
) -> tuple[Int[Tensor, "N M"], Float[Tensor, "N M"]]:
    """The M = min(V, k + `SPARE_CANDIDATES`) most likely tokens of each node, ascending, and their logits in float32.

    Candidates are found by a product in the type of `hidden`; which k of them are kept is decided by the float32
    logits. Differentiable in `hidden` and `weight`, through these M tokens only.

    Args:
        hidden: of the type the product is computed in.
        weight: output projection.
        top_k: tokens that are to be kept, at most `LARGEST_TOP_K`.
    """
    count = num_candidates(len(weight), top_k)
    with torch.no_grad():
        narrow = weight.to(hidden.dtype)
        parts = torch.split(hidden, CANDIDATE_NODES)
        tokens = torch.cat([_largest(part @ narrow.t(), count) for part in parts])
    return tokens, logits_at(hidden, weight, tokens)


def num_candidates(vocabulary: int, top_k: int) -> int:
    """Tokens that top-k is decided among."""
    return min(vocabulary, top_k + SPARE_CANDIDATES)


def logits_at(
    hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], tokens: Int[Tensor, "N M"]
) -> Float[Tensor, "N M"]:
    """Logits of some tokens a node, at least in float32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return torch.matmul(weight[tokens].to(wide), hidden.to(wide)[:, :, None]).squeeze(2)


def top_stats(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    rule: Sampling,
    pair_node: Int[Tensor, " Q"],
    pair_token: Int[Tensor, " Q"],
) -> tuple[Float[Tensor, " Q"], Float[Tensor, " N"]]:
    """What `vocabulary_stats` gives, under a rule with top-k; a token that it has come to cut off counts as in
    `sampled_logprobs`.
    """
    assert rule.top_k is not None
    tokens, logits = top_logits(hidden, weight, rule.top_k)
    logprobs = decoding_logprobs(logits, rule)
    kept = logprobs > -torch.inf
    log_mass = (logits / rule.temperature).masked_fill(~kept, -torch.inf).logsumexp(dim=1)[pair_node]
    own = logits_at(hidden[pair_node], weight, pair_token[:, None]).squeeze(1) / rule.temperature
    among = ((tokens[pair_node] == pair_token[:, None]) & kept[pair_node]).any(dim=1)
    return own - torch.where(among, log_mass, torch.logaddexp(log_mass, own)), entropy(logprobs)


def _largest(logits: Float[Tensor, "N V"], count: int) -> Int[Tensor, "N M"]:
    """The columns of the largest logits of each row, ascending.

    The M largest lie in the M blocks of columns with the largest maxima: few enough to sort.
    """
    rows, width = logits.shape
    blocks = width // CANDIDATE_BLOCK
    if blocks <= count:
        return logits.topk(count, dim=1).indices.sort(dim=1).values
    logits_RBK = logits[:, : blocks * CANDIDATE_BLOCK].view(rows, blocks, CANDIDATE_BLOCK)
    block = logits_RBK.amax(dim=2).topk(count, dim=1, sorted=False).indices
    first = blocks * CANDIDATE_BLOCK
    found = logits_RBK.gather(1, block[:, :, None].expand(-1, -1, CANDIDATE_BLOCK)).flatten(1)
    columns = (block[:, :, None] * CANDIDATE_BLOCK + torch.arange(CANDIDATE_BLOCK, device=logits.device)).flatten(1)
    if first < width:  # what is left of the last block
        found = torch.cat([found, logits[:, first:]], dim=1)
        rest = torch.arange(first, width, device=logits.device).expand(rows, -1)
        columns = torch.cat([columns, rest], dim=1)
    return columns.gather(1, found.topk(count, dim=1, sorted=False).indices).sort(dim=1).values


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
