"""The decoding rule as pure functions: from logits to the distribution that tokens are drawn from.

The engine samples with these functions and the loss recomputes log-probabilities with them, so both speak of one
distribution. Order of the operations: constraint, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from msgrpo_lab.types import Sampling


class ChoiceTrie:
    """The legal answers as a tree of tokens: which tokens may follow, and where an answer ends.

    State 0 is the start; `END` follows the last token of an answer. Columns are the tokens that occur in any answer, in
    ascending order; logits restricted to them are all that constrained decoding needs.
    """

    END = -1

    def __init__(self, choices: tuple[tuple[int, ...], ...]) -> None:
        if not choices or any(not choice for choice in choices):
            raise ValueError("prompt: constrained decoding needs legal words of at least one token each")
        columns = sorted({token for choice in choices for token in choice})
        column_of = {token: column for column, token in enumerate(columns)}
        children: list[dict[int, int]] = [{}]
        ends: list[tuple[int, ...]] = []
        for choice in choices:
            state = 0
            for token in choice[:-1]:
                if children[state].setdefault(column_of[token], len(children)) == len(children):
                    children.append({})
                state = children[state][column_of[token]]
                if state == self.END:
                    raise ValueError(f"prompt: one legal word's tokens {choice} begin with another whole word's")
            if column_of[choice[-1]] in children[state]:
                raise ValueError(f"prompt: the tokens {choice} of a legal word repeat or begin another one's")
            children[state][column_of[choice[-1]]] = self.END
            ends.append(choice)
        self.columns: Int[np.ndarray, " A"] = np.array(columns, dtype=np.int64)
        self.next_state: Int[np.ndarray, "Q A"] = np.full((len(children), len(columns)), self.END, dtype=np.int64)
        self.allowed: Bool[np.ndarray, "Q A"] = np.zeros((len(children), len(columns)), dtype=bool)
        for state, child in enumerate(children):
            for column, following in child.items():
                self.next_state[state, column] = following
                self.allowed[state, column] = True
        self.prefixes: tuple[tuple[int, ...], ...] = self._prefixes()
        self._column_of = column_of

    def _prefixes(self) -> tuple[tuple[int, ...], ...]:
        """Tokens that lead to each state."""
        prefixes: dict[int, tuple[int, ...]] = {0: ()}
        for state in range(len(self.next_state)):
            for column in np.flatnonzero(self.allowed[state]):
                if (following := int(self.next_state[state, column])) != self.END:
                    prefixes[following] = (*prefixes[state], int(self.columns[column]))
        return tuple(prefixes[state] for state in range(len(self.next_state)))

    def column(self, token: int) -> int:
        """Column of a token. Raises `KeyError` for a token that is in no answer."""
        return self._column_of[token]

    def states(self, token_ids: Int[np.ndarray, " C"]) -> list[int]:
        """The state before each token of a completion. Raises `ValueError` if the completion leaves the tree."""
        states, state = [], 0
        for token in token_ids.tolist():
            column = self._column_of.get(token)
            if state == self.END or column is None or not self.allowed[state, column]:
                raise ValueError(f"completion {token_ids.tolist()} is none of the legal answers")
            states.append(state)
            state = int(self.next_state[state, column])
        return states


def decoding_logprobs(
    logits: Float[torch.Tensor, "N V"],
    rule: Sampling,
    allowed: Bool[torch.Tensor, "N V"] | None = None,
) -> Float[torch.Tensor, "N V"]:
    """Log-probabilities (nats, float32) of the distribution that `rule` draws from; −inf where it never draws.

    Args:
        logits: raw logits of the language model, any float type.
        rule: temperature, top-k and top-p; its `greedy` flag plays no part here.
        allowed: tokens that the constraint admits; None admits all. At least one a row.
    """
    assert logits.ndim == 2
    scaled = logits.float() / rule.temperature
    if allowed is not None:
        assert allowed.shape == logits.shape
        scaled = scaled.masked_fill(~allowed, -torch.inf)
    if rule.top_k is not None and rule.top_k < scaled.shape[-1]:
        threshold = scaled.topk(rule.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < threshold, -torch.inf)
    if rule.top_p is not None and rule.top_p < 1.0:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        cut = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, order, before >= rule.top_p)
        scaled = scaled.masked_fill(cut, -torch.inf)
    return scaled.log_softmax(dim=-1)


def sampled_logprobs(
    logits: Float[torch.Tensor, "N V"],
    logprobs: Float[torch.Tensor, "N V"],
    rule: Sampling,
    row: Int[torch.Tensor, " Q"],
    column: Int[torch.Tensor, " Q"],
) -> Float[torch.Tensor, " Q"]:
    """Log-probabilities (nats) of tokens that were sampled by an earlier policy; always finite.

    A token that top-k or top-p has come to cut off is let in again, beside those that are kept: a ratio with
    probability 0 has no gradient. Each token is let in alone, so that its log-probability does not depend on what other
    samples of the batch happened to draw from the same distribution.

    Args:
        logits: raw logits.
        logprobs: `decoding_logprobs` of them.
        rule: the decoding rule.
        row: which distribution each token was sampled from.
        column: the token; one that the constraint admits.
    """
    picked = logprobs[row, column]
    if rule.top_k is None and rule.top_p is None:
        return picked
    mode = logprobs.argmax(dim=-1, keepdim=True)
    log_mass = (logits.gather(-1, mode).float() / rule.temperature - logprobs.gather(-1, mode)).squeeze(-1)
    own = logits[row, column].float() / rule.temperature
    return torch.where(picked == -torch.inf, own - torch.logaddexp(log_mass[row], own), picked)


def entropy(logprobs: Float[torch.Tensor, "N V"]) -> Float[torch.Tensor, " N"]:
    """Entropy (nats) of each row; differentiable, with tokens of probability 0 adding nothing."""
    finite = logprobs.masked_fill(logprobs == -torch.inf, 0.0)
    return -(finite.exp() * finite).masked_fill(logprobs == -torch.inf, 0.0).sum(dim=-1)


def draw(logprobs: Float[np.ndarray, "N V"], uniforms: Float[np.ndarray, " N"], greedy: bool) -> Int[np.ndarray, " N"]:
    """One token column a row, by inverting the cumulative distribution at `uniforms` in [0, 1); the mode if greedy."""
    if greedy:
        mode: Int[np.ndarray, " N"] = logprobs.argmax(axis=-1)
        return mode
    cumulative = np.exp(logprobs.astype(np.float64)).cumsum(axis=-1)
    # The last entry may fall short of 1 by rounding: scale the draw, so that a token of probability 0 is never taken.
    drawn: Int[np.ndarray, " N"] = (cumulative > (uniforms * cumulative[:, -1])[:, None]).argmax(axis=-1)
    return drawn


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
