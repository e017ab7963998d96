"""The sizes of a model that has no weights: parameters, bytes, and the widths that activations and caches depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from msgrpo_lab.decoder.block_decoder import BlockDecoder
from msgrpo_lab.lap.build import OutlinedModel


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
        """Forward and backward operations of the matrices a token, as `lap.work` counts them."""
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
