"""Peak memory of a training process, part by part.

What autograd keeps of a layer follows from `lap.projections` and `lap.kernels` and is counted; a test holds it against
what is really saved. What allocators add to it was measured; `HEAP_GROWTH` and the others say where.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from msgrpo_lab.decoder.decoding import CANDIDATE_NODES
from msgrpo_lab.planner.model_size import ModelSize
from msgrpo_lab.planner.workload import Pass, Workload

Place = Literal["cpu", "gpu"]

PROCESS = 500 * 2**20
"""Python with torch, Lightning and transformers, before any model. Measured, Linux x86-64: 492 MiB."""
TRACKING = 145 * 2**20
"""What MLflow adds to it. Measured: 143 MiB."""
TURN = 2000
"""Bytes of a turn's Python objects: text, token numbers, records. Measured on 10,000 turns: 1.9 kB."""
HEAP_GROWTH = {2: 0.45, 4: 0.10}
"""The C library's heap keeps what is freed (`heap.py`), and the pieces fit less and less: what comes and goes takes
1 + growth · log2(1 + passes) times its size. By the bytes of a number: bfloat16 products keep buffers of their own for
every shape they have met. Measured on SmolLM2 over 64 updates in either type, docs/planning.md."""
HEAP_PASSES = 150
"""Passes over which that was measured; beyond them it is taken to grow no further."""
CUDA_SLACK = 0.10
"""What CUDA's caching allocator holds beyond what is used; assumed, not measured."""
LOGIT_COPIES = 7
"""Float32 matrices of nodes times vocabulary that are alive at a time where whole distributions are projected."""
NODES_PER_CHUNK = 1024
"""As `lap.policy` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes, by what they are for; `peak` is their sum."""

    process: int
    """Python and its libraries; 0 on a GPU."""
    weights: int
    """The base model's, and π_ref's copy where all weights are trained against one."""
    adapter: int
    gradients: int
    optimizer: int
    """Two moments a trained parameter."""
    activations: int
    """What the largest pass of the update keeps for its backward pass, and works with."""
    logits: int
    kv_cache: int
    """Keys and values of prompts and answers in the rollout; the engine holds them until the next one."""
    episodes: int
    """Turns and the training batch, on the host; 0 on a GPU."""
    allocator: int
    """What the allocator holds beyond all that."""

    @property
    def peak(self) -> int:
        """Highest total, bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(
    size: ModelSize, work: Workload, *, place: Place, tracked: bool, token_budget: int, memory_tokens: int
) -> Memory:
    """Peak memory of one job in a process of its own.

    Args:
        size: the model's sizes, in the types that `place` would use.
        work: what the job does.
        place: where the model is; on a GPU only the GPU's memory is counted.
        tracked: whether the process loads MLflow.
        token_budget: prompt tokens of one pass of the rollout at most.
        memory_tokens: tokens whose keys and values free decoding keeps from one turn to the next at most.
    """
    host = place == "cpu"
    weights = size.weight_bytes * (2 if work.reference and not size.has_adapter else 1)
    static = {
        "process": (PROCESS + (TRACKING if tracked else 0)) if host else 0,
        "weights": weights,
        "adapter": size.adapter_bytes,
        "gradients": 4 * size.trained,
        "optimizer": 8 * size.trained,
    }
    update = max((activation_bytes(size, part, place) for part in work.passes), default=0)
    logits = max(
        max((_update_logits(size, work, part.nodes) for part in work.passes), default=0),
        _rollout_logits(size, work),
    )
    read = min(token_budget, max(work.rollout.turn_tokens, work.evaluation.turn_tokens))
    moving = {
        # The passes of rollouts keep nothing but keys and values, and are over before the update begins.
        "activations": max(update, _forward_bytes(size, read)),
        "logits": logits,
        "kv_cache": _cache_bytes(size, work, memory_tokens),
        "episodes": (TURN * work.rollout.turns + 26 * work.samples * work.batch_width) if host else 0,
    }
    total = sum(moving.values())
    passes = min(HEAP_PASSES, max(1, len(work.passes) * work.rollouts))
    growth = HEAP_GROWTH[size.item] * math.log2(1 + passes)
    spare = growth * total if host else CUDA_SLACK * (total + sum(static.values()))
    return Memory(**static, **moving, allocator=int(spare))


def saved_per_token(size: ModelSize, part: Pass) -> float:
    """Numbers that autograd keeps of one layer for one token of a pass, the repetition of read keys included."""
    keys = 2 * size.key_width * part.cells / max(1, part.padded_tokens)
    if part.roots == 1:
        # Of a single root they are views, which keep the matrices of all tokens alive.
        keys += 2 * size.key_width + (size.query_width if size.key_width == size.query_width else 0)
    if size.has_adapter:
        # Each norm's normalised input and output; q, k, v and what attention gave; gate and up.
        return 4 * size.hidden + 2 * size.query_width + keys + 2 * size.intermediate
    # Each norm's input, normalised input and output; the same of attention; gate, its activation, up, their product.
    return 6 * size.hidden + 2 * size.query_width + keys + 4 * size.intermediate


def activation_bytes(size: ModelSize, part: Pass, place: Place) -> int:
    """Of a forward and backward pass: what is kept in all layers, and what one layer's backward pass works with."""
    kept = saved_per_token(size, part) * part.padded_tokens * size.item
    working = (3 * size.intermediate + 3 * size.hidden) * part.padded_tokens * size.item
    if place == "gpu":
        heads = size.query_width // max(1, _head(size))
        working += 3 * heads * part.scores * size.item  # on a CPU a cache's worth at a time
    if size.recompute:
        return int(size.layers * size.hidden * part.padded_tokens * size.item + kept + working)
    return int(size.layers * kept + working)


def _head(size: ModelSize) -> int:
    """Width of a head: 64 or 128 in the families that are computed; the smaller gives the larger bound."""
    return 64 if size.query_width % 128 else 128


def _forward_bytes(size: ModelSize, tokens: int) -> int:
    """A pass without gradients: the residual, a layer's queries, keys and values, its MLP."""
    numbers = 4 * size.hidden + 2 * (size.query_width + 2 * size.key_width) + 3 * size.intermediate
    return tokens * numbers * size.item


def _update_logits(size: ModelSize, work: Workload, nodes: int) -> int:
    if work.candidates is not None:
        return _candidate_logits(size, work.candidates, nodes)
    if not work.whole_distribution and size.has_adapter:
        return 4 * LOGIT_COPIES * nodes * work.columns if work.constrained else 0  # else tile by tile
    return 4 * LOGIT_COPIES * min(nodes, NODES_PER_CHUNK) * work.columns


def _rollout_logits(size: ModelSize, work: Workload) -> int:
    """A row for every text that is written, in float32 and sorted out."""
    texts = max(work.rollout.turn_texts, work.evaluation.turn_texts)
    if work.candidates is not None:
        return _candidate_logits(size, work.candidates, texts)
    return 4 * 3 * texts * (work.columns if work.constrained else size.vocabulary)


def _candidate_logits(size: ModelSize, candidates: int, nodes: int) -> int:
    """The product that finds them, some nodes at a time; and their rows of the projection, float32, forth and back."""
    finding = 2 * size.item * min(nodes, CANDIDATE_NODES) * size.vocabulary
    return finding + 4 * 2 * nodes * candidates * size.hidden


def _cache_bytes(size: ModelSize, work: Workload, memory_tokens: int) -> int:
    """Free decoding: prompts and answers that are remembered, and those of a turn beside them, with room to grow.
    Constrained decoding: the prompts of a turn and the tree of words behind each."""
    plays = (work.rollout, work.evaluation)
    if work.constrained:
        tokens = max(2 * play.turn_tokens + play.turn_texts * work.longest_answer for play in plays)
    else:
        live = max(play.turn_tokens + play.turn_texts * work.longest_answer for play in plays)
        tokens = min(memory_tokens, max(play.read_tokens for play in plays)) + 2 * live
    return tokens * size.key_value_bytes
