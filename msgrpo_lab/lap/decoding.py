"""The decoding rule as pure functions: from logits to the distribution that tokens are drawn from.

The engine samples with these functions and the loss recomputes log-probabilities with them, so both speak of one
distribution. Order of the operations: constraint, temperature, top-k, top-p.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

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
