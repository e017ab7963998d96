"""A decoder over blocks of tokens that read one another: every token of a forward pass in one matrix, computed once.

All blocks of a pass (see `Block`) go through each layer's projections together; only attention looks at blocks
one by one. So a tree of prompts and completions costs one pass over its distinct tokens, with gradients.

Source of the architecture: the Llama and Qwen2 models of transformers, with which tests compare every number.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from msgrpo_lab.decoder.kernels import Linear, Packed, Prepared, attend, packs, project, rms_norm, rotate, swiglu_mlp
from msgrpo_lab.decoder.plan import ForwardPlan


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Keys and values of a block's tokens in every layer, for later passes under the same weights."""

    keys: tuple[Float[Tensor, "R G W D"], ...]
    values: tuple[Float[Tensor, "R G W D"], ...]

    @property
    def num_tokens(self) -> int:
        """Token places held, padding included."""
        return self.keys[0].shape[0] * self.keys[0].shape[2]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendsTo:
    """What a block's rows see beside themselves; all of it lies before them."""

    source: int | KeyValues
    """An earlier block of the pass, by number, or what was kept of an earlier pass."""
    rows: Int[Tensor, " R"] | None = None
    """The source's row that each row reads; None: its only row, or row by row."""
    mask: Bool[Tensor, "R W'"] | Bool[Tensor, "R W W'"] | None = None
    """The tokens of the source's row that are seen, by a whole row or by each token of it; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Rows of tokens, padded on the right."""

    token_ids: Int[Tensor, "R W"]
    positions: Int[Tensor, "R W"]
    own_mask: Bool[Tensor, "R W W"] | None = None
    """Which tokens of its own row each token sees (itself among them); None: those before it."""
    reads: tuple[AttendsTo, ...] = ()


def width_of(source: int | KeyValues, shapes: Sequence[torch.Size]) -> int:
    """Tokens in a row of what is read."""
    return shapes[source][1] if isinstance(source, int) else source.keys[0].shape[2]


def bias_of(block: Block, read_widths: Sequence[int], dtype: torch.dtype) -> Float[Tensor, "R|1 W M"]:
    """0 where a token is seen and −inf where it is not: what is read, then the row's own tokens."""
    width = block.token_ids.shape[1]
    device = block.token_ids.device
    own = block.own_mask
    if own is None:
        own = torch.ones(1, width, width, dtype=torch.bool, device=device).tril()
    masks = [
        torch.ones(1, 1, read_width, dtype=torch.bool, device=device)
        if read.mask is None
        else (read.mask[:, None] if read.mask.ndim == 2 else read.mask)
        for read, read_width in zip(block.reads, read_widths, strict=True)
    ]
    leading = max(len(mask) for mask in (*masks, own))
    seen = torch.cat([mask.expand(leading, width, -1) for mask in (*masks, own)], dim=2)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


FAMILIES = ("llama", "qwen2")
"""`model_type` of the models that this decoder computes."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights."""

    norm: tuple[Tensor, float]
    qkv: Sequence[Linear] | Prepared | Packed
    out: Sequence[Linear] | Prepared | Packed
    mlp_norm: tuple[Tensor, float]
    gate_up: Sequence[Linear] | Prepared | Packed
    down: Sequence[Linear] | Prepared | Packed


class BlockDecoder:
    """The decoder stack of a Llama-like causal LM, with or without a LoRA adapter.

    Args:
        causal_lm: Hugging Face model whose own modules hold the weights; they are read at every call, never copied.
        recompute: layers compute their activations again in the backward pass.
    """

    def __init__(self, causal_lm: Any, recompute: bool = False) -> None:
        self.model = causal_lm.get_decoder()
        config = causal_lm.config
        self.kv_heads: int = config.num_key_value_heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.recompute = recompute
        self._frozen: list[_Layer] | None = None
        self._packed: dict[tuple[int, str], Tensor] = {}
        """Frozen weights in the layout of `Packed`, by layer and group of projections."""

    def frozen(self) -> BlockDecoder:
        """This decoder with the adapter as it is now, made ready once: for passes without gradients."""
        ready = copy.copy(self)
        dtype = self.model.embed_tokens.weight.dtype
        ready._frozen = []
        for number, module in enumerate(self.model.layers):
            layer = _layer_of(module)
            ready._frozen.append(
                replace(
                    layer,
                    qkv=self._prepare(layer.qkv, dtype, (number, "qkv")),
                    out=self._prepare(layer.out, dtype, (number, "out")),
                    gate_up=self._prepare(layer.gate_up, dtype, (number, "gate_up")),
                    down=self._prepare(layer.down, dtype, (number, "down")),
                )
            )
        return ready

    def _prepare(
        self, linears: Sequence[Linear] | Prepared | Packed, dtype: torch.dtype, place: tuple[int, str]
    ) -> Sequence[Linear] | Prepared | Packed:
        """Made ready where all have adapters; as they are where not. What is packed of frozen weights is kept."""
        if isinstance(linears, Prepared | Packed) or not all(linear.adapted for linear in linears):
            return linears
        with torch.no_grad():
            prepared = Prepared.of(linears, dtype)
            if not all(packs(linear.weight) for linear in linears):
                return prepared
            packed = Packed.of(prepared, self._packed.get(place))
            self._packed[place] = packed.weight
            return packed

    @staticmethod
    def supports(causal_lm: Any, compute_dtype: torch.dtype) -> bool:
        """Whether it computes this model: its family, plain attention, and weights of the type computed with."""
        config = causal_lm.config
        return (
            config.model_type in FAMILIES
            and config.hidden_act == "silu"
            and not getattr(config, "use_sliding_window", False)
            and next(causal_lm.get_decoder().layers.parameters()).dtype == compute_dtype
        )

    def __call__(
        self, blocks: Sequence[Block], keep: Sequence[int] = ()
    ) -> tuple[list[Float[Tensor, "R W H"]], list[KeyValues]]:
        """Last hidden states of every block, and the memories of the blocks numbered in `keep`."""
        shapes = [block.token_ids.shape for block in blocks]
        x = self.model.embed_tokens(torch.cat([block.token_ids.reshape(-1) for block in blocks]))
        positions = torch.cat([block.positions.reshape(-1) for block in blocks])
        cos, sin = (part[0, :, None, : self.head_size // 2] for part in self.model.rotary_emb(x, positions[None]))
        biases = [bias_of(block, [width_of(read.source, shapes) for read in block.reads], x.dtype) for block in blocks]
        kept: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in keep]
        layers = self._frozen or [_layer_of(module) for module in self.model.layers]
        for number, layer in enumerate(layers):
            arguments = (layer, number, x, cos, sin, blocks, biases)
            if self.recompute and torch.is_grad_enabled():
                x, pairs = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                x, pairs = self._layer(*arguments)
            for (keys, values), kept_block in zip(kept, keep, strict=True):
                keys.append(pairs[kept_block][0])
                values.append(pairs[kept_block][1])
        norm = self.model.norm
        x = rms_norm(x, norm.weight, norm.variance_epsilon)
        parts = torch.split(x, [rows * width for rows, width in shapes])
        hidden = [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]
        return hidden, [KeyValues(tuple(keys), tuple(values)) for keys, values in kept]

    def plan_hidden(self, plan: ForwardPlan) -> Float[Tensor, "N H"]:
        """Last hidden states at the nodes of a plan: rows and the trees behind them in one pass."""
        rows, device = plan.rows, self.model.embed_tokens.weight.device
        ids = torch.from_numpy(rows.input_ids).to(device)
        positions = torch.arange(ids.shape[1], device=device)[None]
        blocks = [Block(token_ids=ids, positions=positions.expand(len(ids), -1))]
        lengths = torch.from_numpy(rows.lengths).to(device)
        for group in plan.branches:
            prompt = torch.from_numpy(group.prompt).to(device)
            behind = lengths[prompt, None] + torch.from_numpy(group.depth).to(device)
            real = positions < lengths[prompt, None]
            reads = (AttendsTo(source=0) if len(ids) == 1 else AttendsTo(source=0, rows=prompt, mask=real),)
            own = torch.from_numpy(group.ancestors()).to(device)
            token_ids = torch.from_numpy(group.token_ids).to(device)
            blocks.append(Block(token_ids=token_ids, positions=behind, own_mask=own, reads=reads))
        hidden, _ = self(blocks)
        row, col = (torch.from_numpy(index).to(device) for index in (plan.node_row, plan.node_col))
        found = [hidden[0][row, col]]
        for group, states in zip(plan.branches, hidden[1:], strict=True):
            found.append(states.flatten(0, 1)[torch.from_numpy(group.nodes).to(device)])
        return torch.cat(found)

    def extend(
        self,
        token_ids: Int[Tensor, "B N"],
        cache: DynamicCache,
        mask: Bool[Tensor, "B M"] | Bool[Tensor, "B 1 N M"],
        positions: Int[Tensor, "B N"],
    ) -> Float[Tensor, "B N H"]:
        """Last hidden states of N further tokens a row behind those of a cache, which grows by them.

        Args:
            token_ids: padded on the right at most.
            cache: keys and values of M − N tokens a row.
            mask: the real ones among the M tokens so far, or which of them each of the N tokens sees.
            positions: of the N tokens.
        """
        before = cache.get_seq_length()
        reads: tuple[AttendsTo, ...] = ()
        own_mask = mask[:, 0, :, before:] if mask.ndim == 4 else None
        if before:
            layers: list[Any] = cache.layers
            memory = KeyValues(tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers))
            seen = mask[:, 0, :, :before] if mask.ndim == 4 else mask[:, :before]
            reads = (AttendsTo(source=memory, mask=seen),)
        block = Block(token_ids=token_ids, positions=positions, own_mask=own_mask, reads=reads)
        (hidden,), (added,) = self([block], keep=[0])
        for number, (keys, values) in enumerate(zip(added.keys, added.values, strict=True)):
            cache.update(keys, values, number)
        return hidden

    def _layer(
        self,
        layer: _Layer,
        number: int,
        x: Float[Tensor, "T H"],
        cos: Float[Tensor, "T 1 D/2"],
        sin: Float[Tensor, "T 1 D/2"],
        blocks: Sequence[Block],
        biases: Sequence[Float[Tensor, "R|1 W M"]],
    ) -> tuple[Float[Tensor, "T H"], list[tuple[Tensor, Tensor]]]:
        """One layer over all tokens; also every block's keys and values, [R, G, W, D]."""
        flat = project(rms_norm(x, *layer.norm), layer.qkv)
        q, k, v = (part.view(len(x), -1, self.head_size) for part in flat)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        pairs: list[tuple[Tensor, Tensor]] = []
        outputs, start = [], 0
        for block, bias in zip(blocks, biases, strict=True):
            rows, width = block.token_ids.shape
            stop = start + rows * width
            own_q, own_k, own_v = (
                part[start:stop].view(rows, width, -1, self.head_size).transpose(1, 2) for part in (q, k, v)
            )
            pairs.append((own_k, own_v))
            seen = [_seen(read, rows, number, pairs) for read in block.reads]
            keys = torch.cat([*(key for key, _ in seen), own_k], dim=2) if seen else own_k
            values = torch.cat([*(value for _, value in seen), own_v], dim=2) if seen else own_v
            out = attend(own_q, keys, values, bias, self.head_size**-0.5)
            outputs.append(out.transpose(1, 2).reshape(rows * width, -1))
            start = stop
        (attended,) = project(torch.cat(outputs) if len(outputs) > 1 else outputs[0], layer.out)
        x = x + attended
        return x + swiglu_mlp(rms_norm(x, *layer.mlp_norm), layer.gate_up, layer.down), pairs


def _layer_of(module: Any) -> _Layer:
    attention, mlp = module.self_attn, module.mlp
    return _Layer(
        norm=(module.input_layernorm.weight, module.input_layernorm.variance_epsilon),
        qkv=[_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)],
        out=[_linear(attention.o_proj)],
        mlp_norm=(module.post_attention_layernorm.weight, module.post_attention_layernorm.variance_epsilon),
        gate_up=[_linear(mlp.gate_proj), _linear(mlp.up_proj)],
        down=[_linear(mlp.down_proj)],
    )


def _linear(module: Any) -> Linear:
    """A projection's weights, with those of PEFT's adapter unless it is switched off."""
    base = getattr(module, "base_layer", module)
    if base is module or module.disable_adapters:
        return Linear(base.weight, base.bias, None, None, 1.0)
    (name,) = module.active_adapters
    return Linear(
        base.weight, base.bias, module.lora_A[name].weight, module.lora_B[name].weight, float(module.scaling[name])
    )


def _seen(read: AttendsTo, rows: int, layer: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Keys and values, [R, G, W', D], of what each row reads in a layer."""
    source = read.source
    pair = pairs[source] if isinstance(source, int) else (source.keys[layer], source.values[layer])
    if read.rows is None:
        return pair[0].expand(rows, -1, -1, -1), pair[1].expand(rows, -1, -1, -1)
    return pair[0].index_select(0, read.rows), pair[1].index_select(0, read.rows)
