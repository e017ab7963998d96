"""Floating-point operations: what an update must do at least, and what this machine's matrix products reach."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import nn

from msgrpo_lab.lap.policy import LanguagePolicy

Row = tuple[Int[np.ndarray, " P"], Int[np.ndarray, " C"]]
"""A prompt and a completion of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The least work of an update, every distinct token once.

    A token is distinct by all that stands before it: of rows that begin alike the common beginning counts once. The
    last token of a completion is predicted and never read, so it does not count.
    """

    distinct_tokens: int
    distinct_nodes: int
    """Of these, the ones after which a token is predicted: only they need the output projection."""
    flops: float
    """Forward and backward through the decoder's linear layers and the output projection. See `update_flops`."""


def work_of(policy: LanguagePolicy, rows: Sequence[Row], *, constrained: bool) -> Work:
    """The least work of an update over these distinct rows."""
    tokens, nodes = distinct_counts(rows)
    return Work(
        distinct_tokens=tokens, distinct_nodes=nodes, flops=update_flops(policy, tokens, 0 if constrained else nodes)
    )


def distinct_counts(rows: Sequence[Row]) -> tuple[int, int]:
    """Distinct tokens that are read, and distinct nodes among them."""
    read: set[tuple[int, ...]] = set()
    nodes: set[tuple[int, ...]] = set()
    for prompt, completion in rows:
        if len(completion) == 0:
            continue  # nothing is predicted
        row = (*prompt.tolist(), *completion[:-1].tolist())
        read.add(row)
        nodes.update(row[:end] for end in range(len(prompt), len(row) + 1))
    # In sorted order the part of a row that is not new is what it has in common with the row before it.
    tokens = 0
    before: tuple[int, ...] = ()
    for row in sorted(read):
        shorter = min(len(row), len(before))
        tokens += len(row) - next((i for i in range(shorter) if row[i] != before[i]), shorter)
        before = row
    return tokens, len(nodes)


def linear_layers(policy: LanguagePolicy) -> list[tuple[int, int, bool]]:
    """(outputs, inputs, trained) of every matrix of the decoder that tokens are multiplied by; no embeddings."""
    causal: nn.Module = policy._causal_lm
    head = causal.get_output_embeddings()  # type: ignore[operator]
    return [
        (module.weight.shape[0], module.weight.shape[1], module.weight.requires_grad)
        for module in policy.model.modules()
        if isinstance(module, nn.Linear) and module is not head
    ]


def update_flops(policy: LanguagePolicy, tokens: int, projected: int) -> float:
    """Operations of a forward and backward pass.

    Per token 2 a parameter forward, 2 backward to the input, and 2 more where the parameter is trained; the decoder's
    linear layers (with the adapter's) for every token, and the output projection for the `projected` ones. Not counted:
    attention scores, norms, and what is recomputed in the backward pass.
    """
    layers = sum((6 if trained else 4) * out * inp for out, inp, trained in linear_layers(policy))
    weight = policy.output_weight(None)
    return float(layers * tokens + (6 if weight.requires_grad else 4) * weight.numel() * projected)


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """What matrix products reach on this machine, operations a second."""

    dtype: str
    square: float
    """At 2048 × 2048 × 2048, the best of some repetitions."""
    model_shapes: float
    """Over the model's own linear layers at the update's number of tokens: all their operations over all their time."""
    tokens: int
    """That number of tokens."""


def measure_peak(policy: LanguagePolicy, tokens: int, *, side: int = 2048, repetitions: int = 5) -> Peak:
    """Times matrix products alone, in the model's compute type.

    Args:
        policy: the model whose shapes are taken.
        tokens: rows of the left factor at the model's shapes.
        side: side of the large square product.
        repetitions: products of each shape; the fastest counts.
    """
    dtype, device = policy.compute_dtype, policy.device
    square = 2.0 * side**3 / _fastest(side, side, side, dtype, device, repetitions)
    seconds, operations = 0.0, 0.0
    time_of: dict[tuple[int, int], float] = {}
    for out, inp, _ in linear_layers(policy):
        if (out, inp) not in time_of:
            time_of[out, inp] = _fastest(tokens, inp, out, dtype, device, repetitions)
        seconds += time_of[out, inp]
        operations += 2.0 * tokens * out * inp
    name = str(dtype).removeprefix("torch.")
    return Peak(dtype=name, square=square, model_shapes=operations / seconds, tokens=tokens)


def _fastest(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device, repetitions: int) -> float:
    """Seconds of x·Wᵀ for x [rows, inner] and W [columns, inner]: as `nn.Linear` computes it."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, inner, generator=generator).to(device, dtype)
    right = torch.randn(columns, inner, generator=generator).to(device, dtype)
    best = float("inf")
    for _ in range(repetitions + 1):  # the first is a warm-up, and as good as any other for a minimum
        _wait(device)
        started = time.perf_counter()
        nn.functional.linear(left, right)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
