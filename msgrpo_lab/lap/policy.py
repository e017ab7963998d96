"""The policy π_θ: a causal language model, with a LoRA adapter or all of its weights trained.

Only the decoder stack and the rows of the output projection that are needed are run: hidden states at the positions
where a token is predicted (*nodes*, see `rows.py`), projected onto the tokens that decoding may choose from.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from msgrpo_lab.lap import rows as planning
from msgrpo_lab.lap.decoder import Block, BlockDecoder, Read
from msgrpo_lab.lap.decoding import ChoiceTrie, decoding_logprobs, entropy, sampled_logprobs
from msgrpo_lab.lap.plan import ForwardPlan
from msgrpo_lab.lap.rows import Rows, Sharing
from msgrpo_lab.lap.sources import quiet_transformers
from msgrpo_lab.lap.tree import Branches
from msgrpo_lab.types import Sampling, TrainBatch

log = logging.getLogger(__name__)

MIN_SHARED_PREFIX = planning.MIN_SHARED_PREFIX
"""Shorter common prefixes are not worth a call of their own."""
NODES_PER_CHUNK = 1024
"""Nodes projected onto the whole vocabulary at a time; the projection is recomputed in the backward pass."""
FLOAT32_PROJECTION = 1024
"""Up to so many columns the output projection is done in float32, where it costs nothing."""
UNSUPPORTED = ("final_logit_softcapping", "logits_scaling", "logit_scale")
"""Config fields of models that change logits after the output projection, which `LanguagePolicy` does not repeat."""


class TokenStats(NamedTuple):
    """Per token of the samples a plan serves; 0 off the completion."""

    logprobs: Float[torch.Tensor, "M L"]
    """log π_θ of the token, nats, under the decoding rule."""
    entropy: Float[torch.Tensor, "M L"]
    """Entropy of the distribution the token was drawn from, nats."""


class LanguagePolicy(nn.Module):
    """A causal language model whose trainable parameters are the policy's.

    Args:
        model: a Hugging Face causal LM, or PEFT's wrapper around one.
        tokenizer: its tokenizer.
        compute_dtype: autocast type of the forward pass; float32 means no autocast.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.compute_dtype = compute_dtype
        self.has_adapter = hasattr(model, "peft_config")
        self._reference: list[nn.Module] = []  # in a list, so that it is no submodule and in no checkpoint
        self._recomputing = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
        self.blocks: BlockDecoder | None = None
        """Computes the decoder where it knows the model; elsewhere the model library's modules do."""
        if BlockDecoder.supports(self._causal_lm, compute_dtype):
            self.blocks = BlockDecoder(self._causal_lm, recompute=bool(self._recomputing))
        self._told = False
        self.train(False)
        config = self._causal_lm.config
        for field in UNSUPPORTED:
            if getattr(config, field, None) not in (None, 1, 1.0):
                raise ValueError(f"model: {config.model_type} changes its logits by {field}, which is not supported")

    @property
    def _causal_lm(self) -> Any:
        model: Any = self.model
        return model.get_base_model() if self.has_adapter else model

    def train(self, mode: bool = True) -> LanguagePolicy:
        """Without effect on the model: under dropout, log-probabilities would not be those that were sampled under."""
        super().train(mode)
        self.model.eval()
        return self

    @contextlib.contextmanager
    def _recompute_activations(self) -> Iterator[None]:
        """Layers recompute activations in the backward pass, which they do in training mode only."""
        for part in self._recomputing:
            part.training = True
        try:
            yield
        finally:
            for part in self._recomputing:
                part.training = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters the optimiser moves."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    @functools.cached_property
    def matmul_flops_per_token(self) -> int:
        """Forward and backward operations of the decoder's matrices a token; see `work.update_work`."""
        decoder = self._causal_lm.get_decoder()
        looked_up = {id(part.weight) for part in decoder.modules() if isinstance(part, nn.Embedding)}
        matrices = [p for p in decoder.parameters() if p.ndim == 2 and id(p) not in looked_up]
        return sum((6 if matrix.requires_grad else 4) * matrix.numel() for matrix in matrices)

    @property
    def attention_width(self) -> int:
        """Layers times heads times the width of a head."""
        config = self._causal_lm.config
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(config.num_hidden_layers * config.num_attention_heads * head)

    @property
    def end_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion."""
        configured = self._causal_lm.generation_config.eos_token_id
        ids = [] if configured is None else configured if isinstance(configured, list) else [configured]
        return frozenset(int(token) for token in (*ids, self.tokenizer.eos_token_id) if token is not None)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of forward passes."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[LanguagePolicy]:
        """π_ref: the model before training. Without gradients; adapters off, or the copy `keep_reference` took."""
        with torch.no_grad():
            if self.has_adapter:
                with self.model.disable_adapter():  # type: ignore[operator]
                    yield self
            elif self._reference:
                yield LanguagePolicy(self._reference[0].to(self.device), self.tokenizer, self.compute_dtype)
            else:
                raise RuntimeError("no reference policy: call keep_reference() before training all weights with KL")

    def keep_reference(self) -> None:
        """Keeps a frozen copy of the weights as π_ref where there is no adapter to switch off."""
        if not self.has_adapter and not self._reference:
            self._reference.append(copy.deepcopy(self.model).requires_grad_(False))

    def prefix_cache(self, prefix_ids: Int[torch.Tensor, " F"]) -> DynamicCache:
        """Keys and values of a prefix, for one row; differentiable where gradients are on."""
        cache = self.empty_cache()
        positions = torch.arange(len(prefix_ids), device=prefix_ids.device)[None]
        self.decode_step(prefix_ids[None], cache, torch.ones_like(positions, dtype=torch.bool), positions)
        return cache

    def empty_cache(self) -> DynamicCache:
        """A key-value cache for any number of rows."""
        return DynamicCache(config=self._causal_lm.config)

    def decode_step(
        self,
        token_ids: Int[torch.Tensor, "D N"],
        cache: DynamicCache,
        mask: Bool[torch.Tensor, "D M"] | Bool[torch.Tensor, "D 1 N M"],
        positions: Int[torch.Tensor, "D N"],
    ) -> Float[torch.Tensor, "D N H"]:
        """Hidden states of N further tokens of each row, padded on the right; the cache grows by them.

        Args:
            token_ids: the tokens.
            cache: keys and values of the M − N tokens before.
            mask: the real ones among the M tokens so far, or which of them each of the N tokens may look at.
            positions: of the N tokens.
        """
        if self.blocks is not None:
            return self.blocks.extend(token_ids, cache, mask, positions)
        if mask.ndim == 4 and self._causal_lm.config._attn_implementation == "eager":
            lowest = torch.finfo(self.compute_dtype).min
            mask = torch.zeros(mask.shape, dtype=self.compute_dtype, device=mask.device).masked_fill(~mask, lowest)
        with self.autocast():
            output = self._causal_lm.get_decoder()(
                input_ids=token_ids,
                past_key_values=cache,
                attention_mask=mask.long() if mask.ndim == 2 else mask,
                position_ids=positions,
                use_cache=True,
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    @property
    def branches(self) -> bool:
        """Whether the model can read many continuations of a cached prompt in one row, each blind to the others.

        That takes keys and values of all positions in every layer (no sliding windows, no recurrent states) and an
        attention that takes a mask of any form.
        """
        attention = str(getattr(self._causal_lm.config, "_attn_implementation", ""))
        plain = all(type(layer) is DynamicLayer for layer in self.empty_cache().layers)
        return plain and not attention.startswith(("flash", "flex", "paged"))

    def plan(
        self, batch: TrainBatch, trie: ChoiceTrie | None, token_budget: int, sharing: Sharing = "tree"
    ) -> list[ForwardPlan]:
        """Forward passes over a batch (`plan_forward`), as this model can run them now.

        Without the block decoder, layers that recompute their activations keep no keys and values where gradients are
        on; and not every model can branch. A tree is then read as distinct whole rows.
        """
        if sharing == "tree" and self.blocks is None:
            if not self.branches and not self._told:
                self._told = True
                kind = self._causal_lm.config.model_type
                log.warning("model: %s cannot branch behind a cache; updates read each distinct row as a whole", kind)
            if not self.branches or (self._recomputing and torch.is_grad_enabled()):
                sharing = "rows"
        plans = planning.plan_forward(batch, trie, token_budget, sharing)
        return [replace(plan, plain=True) for plan in plans] if sharing == "none" else plans

    def read_rows(
        self, rows: Rows, shared: int, *, keep: bool
    ) -> tuple[Float[torch.Tensor, "U L H"], DynamicCache | None]:
        """Last hidden states of the rows from position `shared` on, and, to `keep`, their keys and values.

        The first `shared` positions, the same in all rows, are run once and their keys and values are broadcast, with
        gradients. Rows are padded on the right, where causal attention never looks, so no padding mask is needed.

        Raises:
            ValueError: keys and values would be needed where activations are recomputed.
        """
        ids = torch.from_numpy(rows.input_ids).to(self.device)
        decoder = self._causal_lm.get_decoder()
        recompute = bool(self._recomputing) and torch.is_grad_enabled()
        if not shared and not keep:
            with self.autocast(), self._recompute_activations() if recompute else contextlib.nullcontext():
                return decoder(input_ids=ids, use_cache=False).last_hidden_state, None
        if recompute:
            raise ValueError("model.gradient_checkpointing=true: recomputed layers keep no cache; plan whole rows")
        cache = self.prefix_cache(ids[0, :shared]) if shared else self.empty_cache()
        if shared:
            cache.batch_repeat_interleave(len(ids))
        with self.autocast():
            hidden = decoder(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
        return hidden, cache if keep else None

    def read_branches(
        self, group: Branches, cache: DynamicCache, prompt_lengths: Int[np.ndarray, " U"]
    ) -> Float[torch.Tensor, "B W H"]:
        """Last hidden states of branches behind the prompts whose keys and values, padded on the right, are cached.

        A token sees the real positions of its prompt, its ancestors and itself; its position is its depth behind the
        prompt. What stands at padding is never read.
        """
        length_B = prompt_lengths[group.prompt]
        padded = cache.get_seq_length()
        prompt_B1P = np.arange(padded) < length_B[:, None, None]
        seen_BWW = group.ancestors()
        rows, width = group.token_ids.shape
        seen = np.concatenate([np.broadcast_to(prompt_B1P, (rows, width, padded)), seen_BWW], axis=-1)
        return self.decode_step(
            torch.from_numpy(group.token_ids).to(self.device),
            self._selected(cache, torch.from_numpy(group.prompt).to(self.device)),
            torch.from_numpy(seen[:, None]).to(self.device),
            torch.from_numpy(length_B[:, None] + group.depth).to(self.device),
        )

    @staticmethod
    def _selected(cache: DynamicCache, rows: Int[torch.Tensor, " B"]) -> DynamicCache:
        """A cache of some rows of another, which stays as it is."""
        selected = copy.copy(cache)
        selected.layers = [copy.copy(layer) for layer in cache.layers]
        selected.batch_select_indices(rows)
        return selected

    def plan_hidden(self, plan: ForwardPlan) -> Float[torch.Tensor, "N H"]:
        """Hidden states at the nodes of a plan."""
        if self.blocks is not None and not plan.plain:
            return self._block_hidden(self.blocks, plan)
        hidden, cache = self.read_rows(plan.rows, plan.shared, keep=bool(plan.branches))
        row, col = (torch.from_numpy(index).to(hidden.device) for index in (plan.node_row, plan.node_col))
        found = [hidden[row, col - plan.shared]]
        for group in plan.branches:
            assert cache is not None
            real = torch.from_numpy(np.flatnonzero(group.real)).to(hidden.device)
            found.append(self.read_branches(group, cache, plan.rows.lengths).flatten(0, 1)[real])
        return torch.cat(found)

    def _block_hidden(self, decoder: BlockDecoder, plan: ForwardPlan) -> Float[torch.Tensor, "N H"]:
        """All levels of a plan in one pass."""
        rows, shared, device = plan.rows, plan.shared, self.device
        ids = torch.from_numpy(rows.input_ids).to(device)
        positions = torch.arange(ids.shape[1], device=device)[None]
        prefix: tuple[Read, ...] = ()
        blocks: list[Block] = []
        if shared:
            blocks.append(Block(token_ids=ids[:1, :shared], positions=positions[:, :shared]))
            prefix = (Read(source=0),)
        prompts = len(blocks)
        places = positions[:, shared:].expand(len(ids), -1)
        blocks.append(Block(token_ids=ids[:, shared:], positions=places, reads=prefix))
        lengths = torch.from_numpy(rows.lengths).to(device)
        real = torch.arange(ids.shape[1] - shared, device=device) < (lengths - shared)[:, None]
        for group in plan.branches:
            prompt = torch.from_numpy(group.prompt).to(device)
            behind = lengths[prompt, None] + torch.from_numpy(group.depth).to(device)
            reads = (*prefix, Read(source=prompts, rows=prompt, mask=real[prompt]))
            own = torch.from_numpy(group.ancestors()).to(device)
            token_ids = torch.from_numpy(group.token_ids).to(device)
            blocks.append(Block(token_ids=token_ids, positions=behind, own_mask=own, reads=reads))
        hidden, _ = decoder(blocks)
        row, col = (torch.from_numpy(index).to(device) for index in (plan.node_row, plan.node_col))
        found = [hidden[prompts][row, col - shared]]
        for group, states in zip(plan.branches, hidden[prompts + 1 :], strict=True):
            found.append(states.flatten(0, 1)[torch.from_numpy(np.flatnonzero(group.real)).to(device)])
        return torch.cat(found)

    def output_weight(self, columns: Int[torch.Tensor, " A"] | None) -> Float[torch.Tensor, "A H"]:
        """Rows of the output projection: those of the tokens `columns`, or all."""
        head = self._causal_lm.get_output_embeddings()
        if head.bias is not None:
            raise ValueError("model: an output projection with a bias is not supported")
        weight: torch.Tensor = head.weight
        return weight if columns is None else weight[columns]

    def project(
        self, hidden: Float[torch.Tensor, "N H"], weight: Float[torch.Tensor, "A H"]
    ) -> Float[torch.Tensor, "N A"]:
        """Logits in float32.

        A few rows of the projection are applied in float32: rounding logits to bfloat16 moves log-probabilities by
        hundredths of a nat, which the ratio π_θ/π_old would take for a change of policy.
        """
        if len(weight) <= FLOAT32_PROJECTION:
            with torch.autocast(self.device.type, enabled=False):
                return nn.functional.linear(hidden.float(), weight.float())
        with self.autocast():
            return nn.functional.linear(hidden.to(weight.dtype), weight).float()

    def node_hidden(self, rows: Rows, node_row: Any, node_col: Any) -> Float[torch.Tensor, "N H"]:
        """Hidden states at nodes, (row, column) positions of the padded rows; what all rows share is run once."""
        shared = min(rows.shared_prefix(), int(min(node_col))) if len(rows.lengths) > 1 else 0
        recompute = bool(self._recomputing) and torch.is_grad_enabled()
        shared = 0 if recompute or shared < MIN_SHARED_PREFIX else shared
        hidden, _ = self.read_rows(rows, shared, keep=False)
        row = torch.as_tensor(node_row, device=hidden.device)
        col = torch.as_tensor(node_col, device=hidden.device) - shared
        return hidden[row, col]

    def token_stats(
        self, plan: ForwardPlan, trie: ChoiceTrie | None, rule: Sampling, columns: slice = slice(None)
    ) -> TokenStats:
        """Log-probability and entropy of every completion token that the plan serves, under the decoding rule.

        `columns` of the batch only, if given: off `plan.columns` there is nothing but zeros.
        """
        hidden = self.plan_hidden(plan)
        device = hidden.device
        weight = self.output_weight(None if trie is None else torch.from_numpy(trie.columns).to(device))
        pair_node = torch.from_numpy(plan.pair_node).to(device)
        pair_column = torch.from_numpy(plan.pair_column).to(device)
        pair_logprobs, node_entropy = [], []
        for start in range(0, len(hidden), NODES_PER_CHUNK):
            stop = min(start + NODES_PER_CHUNK, len(hidden))
            first, last = plan.pair_node.searchsorted((start, stop))
            allowed = None if plan.node_allowed is None else torch.from_numpy(plan.node_allowed[start:stop]).to(device)
            arguments = (hidden[start:stop], weight, pair_node[first:last] - start, pair_column[first:last])
            if torch.is_grad_enabled() and len(hidden) > NODES_PER_CHUNK:
                picked, spread = checkpoint(self._pick, *arguments, allowed, rule, use_reentrant=False)
            else:
                picked, spread = self._pick(*arguments, allowed, rule)
            pair_logprobs.append(picked)
            node_entropy.append(spread)
        pair_of = torch.from_numpy(plan.pair_of[:, columns]).to(device)
        # Off the completion `pair_of` points one past the last pair, at a constant 0.
        nothing = torch.zeros(1, device=device)
        pair_entropy = torch.cat(node_entropy)[pair_node]
        return TokenStats(torch.cat([*pair_logprobs, nothing])[pair_of], torch.cat([pair_entropy, nothing])[pair_of])

    def _pick(
        self,
        hidden: Float[torch.Tensor, "N H"],
        weight: Float[torch.Tensor, "A H"],
        pair_node: Int[torch.Tensor, " Q"],
        pair_column: Int[torch.Tensor, " Q"],
        allowed: Bool[torch.Tensor, "N A"] | None,
        rule: Sampling,
    ) -> tuple[Float[torch.Tensor, " Q"], Float[torch.Tensor, " N"]]:
        """Log-probabilities of the pairs and entropies of the nodes of one chunk."""
        logits = self.project(hidden, weight)
        logprobs = decoding_logprobs(logits, rule, allowed)
        return sampled_logprobs(logits, logprobs, rule, pair_node, pair_column), entropy(logprobs)

    def save(self, folder: Path) -> None:
        """Writes what was trained: the adapter in PEFT's format, or all weights, as safetensors."""
        with quiet_transformers():
            self.model.save_pretrained(folder)  # type: ignore[operator]
            if not self.has_adapter:
                self.tokenizer.save_pretrained(folder)
