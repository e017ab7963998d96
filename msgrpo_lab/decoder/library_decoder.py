"""The decoder as the model library computes it: for models that `block_decoder.py` does not know, and as its reference.

Levels of a plan are read one after the other, each behind a key-value cache of those before it, with gradients.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from msgrpo_lab.decoder.plan import ForwardPlan, Rows
from msgrpo_lab.decoder.tree import Branches

MASKABLE = ("sdpa", "eager")
"""Implementations of attention that take a mask of any form."""


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """The precision of forward passes; float32 means no autocast."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


class LibraryDecoder:
    """The decoder stack of any causal LM, run by its own modules.

    Args:
        causal_lm: Hugging Face model; PEFT's adapter, where there is one, has been put into its modules.
        compute_dtype: autocast type of the forward pass; float32 means no autocast.
    """

    def __init__(self, causal_lm: Any, compute_dtype: torch.dtype) -> None:
        self.model = causal_lm.get_decoder()
        self.config = causal_lm.config
        self.compute_dtype = compute_dtype
        self._recomputing = [part for part in causal_lm.modules() if getattr(part, "gradient_checkpointing", False)]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def recomputing(self) -> bool:
        """Whether layers were asked to compute activations again in the backward pass."""
        return bool(self._recomputing)

    @property
    def recomputes(self) -> bool:
        """Whether a forward pass now would do so, and have no keys and values to keep."""
        return self.recomputing and torch.is_grad_enabled()

    @property
    def branches(self) -> bool:
        """Whether the model can read many continuations of a cached prompt in one row, each blind to the others.

        That takes keys and values of all positions in every layer (no sliding windows, no recurrent states) and an
        attention that takes a mask of any form.
        """
        complete = all(type(layer) is DynamicLayer for layer in self.empty_cache().layers)
        return complete and self.config._attn_implementation in MASKABLE

    def empty_cache(self) -> DynamicCache:
        """A key-value cache for any number of rows."""
        return DynamicCache(config=self.config)

    def plan_hidden(self, plan: ForwardPlan) -> Float[torch.Tensor, "N H"]:
        """Hidden states at the nodes of a plan.

        Raises:
            ValueError: keys and values would be needed where activations are recomputed.
        """
        hidden, cache = self._read_rows(plan.rows, keep=bool(plan.branches))
        row, col = (torch.from_numpy(index).to(hidden.device) for index in (plan.node_row, plan.node_col))
        found = [hidden[row, col]]
        for group in plan.branches:
            nodes = torch.from_numpy(group.nodes).to(hidden.device)
            found.append(self._read_branches(group, cache, plan.rows.lengths).flatten(0, 1)[nodes])
        return torch.cat(found)

    def extend(
        self,
        token_ids: Int[torch.Tensor, "B N"],
        cache: DynamicCache,
        mask: Bool[torch.Tensor, "B M"] | Bool[torch.Tensor, "B 1 N M"],
        positions: Int[torch.Tensor, "B N"],
    ) -> Float[torch.Tensor, "B N H"]:
        """Last hidden states of N further tokens a row behind those of a cache, which grows by them.

        Args:
            token_ids: padded on either side.
            cache: keys and values of M − N tokens a row.
            mask: the real ones among the M tokens so far, or which of them each of the N tokens sees.
            positions: of the N tokens.

        Raises:
            ValueError: a mask a token, which this model's attention cannot take.
        """
        if mask.ndim == 4:
            attention = self.config._attn_implementation
            if attention not in MASKABLE:
                raise ValueError(f"engine=hf: attention by {attention} cannot read a tree of texts; use engine=naive")
            if attention == "eager":
                lowest = torch.finfo(self.compute_dtype).min
                seen = mask
                mask = torch.zeros(seen.shape, dtype=self.compute_dtype, device=seen.device)
                mask.masked_fill_(~seen, lowest)
        with autocast(self.device, self.compute_dtype):
            output = self.model(
                input_ids=token_ids, past_key_values=cache, attention_mask=mask, position_ids=positions, use_cache=True
            )
        hidden: Float[torch.Tensor, "B N H"] = output.last_hidden_state
        return hidden

    def _read_rows(self, rows: Rows, *, keep: bool) -> tuple[Float[torch.Tensor, "U L H"], DynamicCache]:
        """Last hidden states of the rows, and, with `keep`, their keys and values.

        Rows are padded on the right, where causal attention never looks, so no padding mask is needed.
        """
        ids = torch.from_numpy(rows.input_ids).to(self.device)
        cache = self.empty_cache()
        if not keep:
            with autocast(self.device, self.compute_dtype), self._recompute_activations():
                return self.model(input_ids=ids, use_cache=False).last_hidden_state, cache
        if self.recomputes:
            raise ValueError("model.gradient_checkpointing=true: recomputed layers keep no cache; plan whole rows")
        with autocast(self.device, self.compute_dtype):
            hidden = self.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        return hidden, cache

    def _read_branches(
        self, group: Branches, cache: DynamicCache, prompt_lengths: Int[np.ndarray, " U"]
    ) -> Float[torch.Tensor, "B W H"]:
        """Last hidden states of branches behind the prompts whose keys and values, padded on the right, are cached.

        A token sees the real positions of its prompt, its ancestors and itself; its position is its depth behind the
        prompt. What stands at padding is never read.
        """
        length_B = prompt_lengths[group.prompt]
        padded = cache.get_seq_length()
        prompt_B1P = np.arange(padded) < length_B[:, None, None]
        rows, width = group.token_ids.shape
        seen = np.concatenate([np.broadcast_to(prompt_B1P, (rows, width, padded)), group.ancestors()], axis=-1)
        return self.extend(
            torch.from_numpy(group.token_ids).to(self.device),
            _selected(cache, torch.from_numpy(group.prompt).to(self.device)),
            torch.from_numpy(seen[:, None]).to(self.device),
            torch.from_numpy(length_B[:, None] + group.depth).to(self.device),
        )

    @contextlib.contextmanager
    def _recompute_activations(self) -> Iterator[None]:
        """Where gradients are on, layers recompute activations as asked, which they do in training mode only."""
        parts = self._recomputing if self.recomputes else []
        for part in parts:
            part.training = True
        try:
            yield
        finally:
            for part in parts:
                part.training = False


def _selected(cache: DynamicCache, rows: Int[torch.Tensor, " B"]) -> DynamicCache:
    """A cache of some rows of another, which stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected
