"""The policy π_θ: a causal language model, with a LoRA adapter or all of its weights trained.

Only the decoder stack and the rows of the output projection that are needed are run: hidden states at the positions
where a token is predicted (*nodes*, see `rows.py`), projected onto the tokens that decoding may choose from.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from msgrpo_lab.lap.decoding import ChoiceTrie, decoding_logprobs, entropy, sampled_logprobs
from msgrpo_lab.lap.rows import ForwardPlan, Rows
from msgrpo_lab.lap.sources import quiet_transformers
from msgrpo_lab.types import Sampling

MIN_SHARED_PREFIX = 8
"""Shorter common prefixes are not worth a pass of their own."""
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
        with self.autocast():
            self._causal_lm.get_decoder()(input_ids=prefix_ids[None], past_key_values=cache, use_cache=True)
        return cache

    def empty_cache(self) -> DynamicCache:
        """A key-value cache for any number of rows."""
        return DynamicCache(config=self._causal_lm.config)

    def decode_step(
        self,
        token_ids: Int[torch.Tensor, "D N"],
        cache: DynamicCache,
        mask: Bool[torch.Tensor, "D M"],
        positions: Int[torch.Tensor, "D N"],
    ) -> Float[torch.Tensor, "D N H"]:
        """Hidden states of N further tokens of each row; `mask` marks the real ones among the M tokens so far."""
        with self.autocast():
            output = self._causal_lm.get_decoder()(
                input_ids=token_ids,
                past_key_values=cache,
                attention_mask=mask.long(),
                position_ids=positions,
                use_cache=True,
            )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def hidden_states(self, rows: Rows, needed_from: int) -> tuple[Float[torch.Tensor, "U L H"], int]:
        """Last hidden states of the rows, and how many leading positions they lack because all rows share them.

        Positions from `needed_from` on are never among the shared ones.

        The shared prefix is run once and its keys and values are broadcast, with gradients; layers that recompute their
        activations cannot keep keys and values, and read the rows as a whole. Rows are padded on the right, where
        causal attention never looks, so no padding mask is needed.
        """
        ids = torch.from_numpy(rows.input_ids).to(self.device)
        decoder = self._causal_lm.get_decoder()
        recompute = bool(self._recomputing) and torch.is_grad_enabled()
        shared = min(rows.shared_prefix(), needed_from) if len(ids) > 1 and not recompute else 0
        if shared < MIN_SHARED_PREFIX:
            with self.autocast(), self._recompute_activations() if recompute else contextlib.nullcontext():
                return decoder(input_ids=ids, use_cache=False).last_hidden_state, 0
        cache = self.prefix_cache(ids[0, :shared])
        cache.batch_repeat_interleave(len(ids))
        with self.autocast():
            hidden = decoder(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
        return hidden, shared

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
        """Hidden states at nodes, (row, column) positions of the padded rows."""
        hidden, shared = self.hidden_states(rows, int(min(node_col)))
        row = torch.as_tensor(node_row, device=hidden.device)
        col = torch.as_tensor(node_col, device=hidden.device) - shared
        return hidden[row, col]

    def token_stats(self, plan: ForwardPlan, trie: ChoiceTrie | None, rule: Sampling) -> TokenStats:
        """Log-probability and entropy of every completion token that the plan serves, under the decoding rule."""
        hidden = self.node_hidden(plan.rows, plan.node_row, plan.node_col)
        device = hidden.device
        columns = None if trie is None else torch.from_numpy(trie.columns).to(device)
        weight = self.output_weight(columns)
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
        pair_of = torch.from_numpy(plan.pair_of).to(device)
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
