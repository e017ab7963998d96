"""What a training process costs: model size, peak memory part by part, and hours on devices.

What autograd keeps of a layer follows from `decoder.kernels` and is counted; a test holds it against
what is really saved. What allocators add to it was measured; `HEAP_GROWTH` and the others say where.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import nn

from msgrpo_lab.decoder.block_decoder import BlockDecoder
from msgrpo_lab.decoder.decoding import CANDIDATE_NODES
from msgrpo_lab.lap.build import OutlinedModel
from msgrpo_lab.planner.workload import Pass, Play, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Of one policy, adapter included. Bytes are those of the types that are really used."""

    parameters: int
    """Of the base model, each shared matrix once."""
    trained: int
    """Parameters that the optimiser moves: the adapter's, or all."""
    weight_bytes: int
    """The base model's parameters."""
    adapter_bytes: int
    """The adapter's parameters; 0 where all weights are trained."""
    matrix_parameters: int
    """Entries of the decoder's frozen and trained matrices that a token is multiplied with; no embedding."""
    adapter_parameters: int
    layers: int
    hidden: int
    intermediate: int
    query_width: int
    """Heads times the width of a head."""
    key_width: int
    """Key heads times the width of a head."""
    vocabulary: int
    item: int
    """Bytes of a number of the forward pass."""
    has_adapter: bool
    recompute: bool
    block_decoder: bool
    """Whether the lab's own decoder computes it, whose activations are known."""

    @property
    def key_value_bytes(self) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.key_width * self.item

    @property
    def update_flops_per_token(self) -> int:
        """Forward and backward operations of the matrices a token, as `lap.policy` counts them."""
        base = 4 if self.has_adapter else 6
        return base * self.matrix_parameters + 6 * self.adapter_parameters

    @property
    def forward_flops_per_token(self) -> int:
        """Forward operations of the matrices a token."""
        return 2 * (self.matrix_parameters + self.adapter_parameters)


def size_of(outlined: OutlinedModel) -> ModelSize:
    """The sizes of an outlined model (`lap.build.outline_model`).

    Raises:
        ValueError: its configuration does not have the fields of a decoder with gated MLPs.
    """
    model: Any = outlined.model
    has_adapter = hasattr(model, "peft_config")
    causal_lm = model.get_base_model() if has_adapter else model
    config = causal_lm.config
    try:
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        widths = {"hidden": int(config.hidden_size), "intermediate": int(config.intermediate_size)}
        layers = int(config.num_hidden_layers)
    except AttributeError as error:
        raise ValueError(f"model: a plan needs a decoder with gated MLPs; {config.model_type} has {error}") from error
    parameters = list(model.named_parameters())
    adapter = [p for name, p in parameters if "lora_" in name]
    base = [p for name, p in parameters if "lora_" not in name]
    decoder = causal_lm.get_decoder()
    looked_up = {id(part.weight) for part in decoder.modules() if isinstance(part, nn.Embedding)}
    matrices = [
        p for name, p in decoder.named_parameters() if p.ndim == 2 and id(p) not in looked_up and "lora_" not in name
    ]
    return ModelSize(
        parameters=sum(p.numel() for p in base),
        trained=sum(p.numel() for _, p in parameters if p.requires_grad),
        weight_bytes=sum(p.numel() * p.element_size() for p in base),
        adapter_bytes=sum(p.numel() * p.element_size() for p in adapter),
        matrix_parameters=sum(p.numel() for p in matrices),
        adapter_parameters=sum(p.numel() for p in adapter),
        layers=layers,
        **widths,
        query_width=int(heads * head),
        key_width=int(key_heads * head),
        vocabulary=int(config.vocab_size),
        item=torch.empty(0, dtype=outlined.dtype).element_size(),
        has_adapter=has_adapter,
        recompute=outlined.recompute,
        block_decoder=BlockDecoder.supports(causal_lm, outlined.dtype),
    )


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
class MemoryEstimate:
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
) -> MemoryEstimate:
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
    return MemoryEstimate(**static, **moving, allocator=int(spare))


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


Range = tuple[float, float]
"""Lowest and highest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A machine that one job runs on."""

    name: str
    peak_tflops: float
    """Dense matrix products a second, in bfloat16 with float32 sums where it has them, TFLOP/s."""
    bandwidth_gbs: float
    """Of its memory, GB/s."""
    memory_gb: float | None
    """GB (10^9 bytes); None: that of the machine which plans."""
    utilisation: Range
    """Share of the peak that updates and the reading of prompts reach (model operations, nothing counted twice)."""
    bandwidth_share: Range
    """Share of the bandwidth that a step of decoding reaches while it reads the weights."""
    layer_call_ms: Range
    """Least time of one layer in one call, forward, however few its tokens; thrice that in an update."""
    measured: bool
    """Whether the utilisation was measured with this program on such a machine."""
    source: str


GPU_SHARE: Range = (0.05, 0.30)
GPU_BANDWIDTH: Range = (0.30, 0.80)
GPU_CALL_MS: Range = (0.3, 1.0)
UNMEASURED = "peaks of the data sheets; nothing of this program was measured on a GPU"


def _gpu(name: str, peak_tflops: float, bandwidth_gbs: float, memory_gb: float) -> Device:
    return Device(
        name=name,
        peak_tflops=peak_tflops,
        bandwidth_gbs=bandwidth_gbs,
        memory_gb=memory_gb,
        utilisation=GPU_SHARE,
        bandwidth_share=GPU_BANDWIDTH,
        layer_call_ms=GPU_CALL_MS,
        measured=False,
        source=UNMEASURED,
    )


GPUS = (
    _gpu("H200", 989.0, 4800.0, 141.0),
    _gpu("H100", 989.0, 3350.0, 80.0),
    _gpu("A100-80G", 312.0, 2039.0, 80.0),
    _gpu("L40S", 362.0, 864.0, 48.0),
    _gpu("RTX 4090", 165.0, 1008.0, 24.0),
)
"""SXM modules of H200, H100 and A100; peaks without sparsity, in bfloat16 with float32 sums."""

CPU_BFLOAT16 = Device(
    name="2-core CPU",
    peak_tflops=2.6,
    bandwidth_gbs=30.0,
    memory_gb=None,
    utilisation=(0.075, 0.10),
    bandwidth_share=(0.3, 0.8),
    layer_call_ms=(0.2, 0.6),
    measured=True,
    source="docs/results/speed.md: two Xeon cores with AMX, bfloat16, SmolLM2",
)
CPU_FLOAT32 = Device(
    name="2-core CPU",
    peak_tflops=0.33,
    bandwidth_gbs=30.0,
    memory_gb=None,
    utilisation=(0.26, 0.42),
    bandwidth_share=(0.3, 0.8),
    layer_call_ms=(0.2, 0.6),
    measured=True,
    source="rollouts and updates of SmolLM2 on two Xeon cores without AMX, float32: 90 to 140 GFLOP/s, where products "
    "of 2048³ reach 170; the peak is the cores' arithmetic",
)
CPU_FLOAT32_SMALL = replace(
    CPU_FLOAT32,
    utilisation=(0.10, 0.17),
    source="updates of `tiny` on two Xeon cores, float32: 34 to 55 GFLOP/s; the peak is the cores' arithmetic",
)
SMALL_HIDDEN = 256
"""Hidden width up to which a model is taken to be as `tiny`, whose matrices are too small for a product to be fast."""


def cpu(item: int, hidden: int) -> Device:
    """The CPU that was measured, for numbers of `item` bytes and a model's hidden width."""
    if item == 2:
        return CPU_BFLOAT16
    return CPU_FLOAT32 if hidden > SMALL_HIDDEN else CPU_FLOAT32_SMALL


TURN_MS = 0.015
"""Of the host a turn: game, prompt, parser. Measured: `tiny` plays 5,300 turns in 0.12 s, its model included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hours:
    """Of one job on one device."""

    rollout_s: float
    """Seconds of a rollout."""
    update_s: float
    """Seconds of a rollout's updates, π_ref included."""
    evaluation_s: float
    """Seconds of an evaluation, both of its passes over the seeds."""
    total_h: float
    """Hours of the whole job."""


def hours(size: ModelSize, work: Workload, device: Device, *, fast: bool) -> Hours:
    """Time at the favourable (`fast`) or the unfavourable end of what is assumed of the device."""
    rollout_s = _play_seconds(size, work, work.rollout, device, fast)
    update_s = sum(_pass_seconds(size, work, part, device, fast) for part in work.passes)
    evaluation_s = 2 * _play_seconds(size, work, work.evaluation, device, fast)
    seconds = work.rollouts * (rollout_s + update_s) + work.evaluations * evaluation_s
    return Hours(rollout_s=rollout_s, update_s=update_s, evaluation_s=evaluation_s, total_h=seconds / 3600)


def update_flops(size: ModelSize, work: Workload, part: Pass) -> float:
    """Model operations of one pass, as `lap.policy.update_work` counts them."""
    head = 4 if size.has_adapter else 6
    columns, finding = (work.columns, 0) if work.candidates is None else (work.candidates, 2 * work.columns)
    projection = (head * columns + finding) * size.hidden * part.nodes
    attention = 12 * size.layers * size.query_width * part.attended
    return float(size.update_flops_per_token * part.tokens + projection + attention)


def forward_flops(size: ModelSize, work: Workload, play: Play) -> float:
    """Model operations of playing: prompts read, what is written behind them, and a distribution for each token."""
    keys = (play.prompt_tokens / max(1, play.turns) + work.longest_answer) * (play.read_tokens + play.branch_tokens)
    attention = 4 * size.layers * size.query_width * keys
    drawn = play.branch_tokens + play.turn_texts * play.steps if work.constrained else play.branch_tokens
    projection = 2 * size.hidden * work.columns * drawn
    return float(size.forward_flops_per_token * (play.read_tokens + play.branch_tokens) + projection + attention)


def _pass_seconds(size: ModelSize, work: Workload, part: Pass, device: Device, fast: bool) -> float:
    flops = update_flops(size, work, part)
    if size.recompute:
        flops += size.forward_flops_per_token * part.tokens
    calls = 3.0
    if work.reference:
        flops += size.forward_flops_per_token * part.tokens
        calls += 1.0
    best = 1 if fast else 0
    return max(
        flops / (device.peak_tflops * 1e12 * device.utilisation[best]),
        calls * size.layers * device.layer_call_ms[1 - best] / 1e3,
    )


def _play_seconds(size: ModelSize, work: Workload, play: Play, device: Device, fast: bool) -> float:
    best = 1 if fast else 0
    computing = forward_flops(size, work, play) / (device.peak_tflops * 1e12 * device.utilisation[best])
    reading = size.weight_bytes / (device.bandwidth_gbs * 1e9 * device.bandwidth_share[best])
    calling = size.layers * device.layer_call_ms[1 - best] / 1e3
    return max(computing, play.steps * max(reading, calling)) + play.turns * TURN_MS / 1e3
