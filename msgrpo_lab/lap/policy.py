"""The policy π_θ: a causal language model, with a LoRA adapter or all of its weights trained.

Only the decoder stack and the rows of the output projection that are needed are run: hidden states at the positions
where a token is predicted (*nodes*, see `decoder.plan`), projected onto the tokens that decoding may choose from.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

from msgrpo_lab.decoder.block_decoder import BlockDecoder
from msgrpo_lab.decoder.decoding import (
    LARGEST_TOP_K,
    ChoiceTrie,
    decoding_logprobs,
    entropy,
    num_candidates,
    sampled_logprobs,
    top_stats,
    vocabulary_stats,
)
from msgrpo_lab.decoder.library_decoder import LibraryDecoder, autocast
from msgrpo_lab.decoder.plan import ForwardPlan, Sharing, plan_forward
from msgrpo_lab.files import write_manifest
from msgrpo_lab.lap.precision import ProductSpeed
from msgrpo_lab.lap.sources import quiet_transformers
from msgrpo_lab.types import Sampling, TrainBatch

log = logging.getLogger(__name__)

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


class Decoder(Protocol):
    """A way of running the decoder stack."""

    def plan_hidden(self, plan: ForwardPlan) -> Float[torch.Tensor, "N H"]:
        """Last hidden states at the nodes of a plan."""
        ...

    def extend(
        self,
        token_ids: Int[torch.Tensor, "B N"],
        cache: DynamicCache,
        mask: Bool[torch.Tensor, "B M"] | Bool[torch.Tensor, "B 1 N M"],
        positions: Int[torch.Tensor, "B N"],
    ) -> Float[torch.Tensor, "B N H"]:
        """Last hidden states of N further tokens a row behind those of a cache, which grows by them.

        Args:
            token_ids: padded on the right at most.
            cache: keys and values of M − N tokens a row.
            mask: the real ones among the M tokens so far, or which of them each of the N tokens sees.
            positions: of the N tokens.
        """
        ...


class LanguagePolicy(nn.Module):
    """A causal language model whose trainable parameters are the policy's.

    Args:
        model: a Hugging Face causal LM, or PEFT's wrapper around one.
        tokenizer: its tokenizer.
        compute_dtype: autocast type of the forward pass; float32 means no autocast.
        product_speed: what the type was chosen by; None where it was given.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        compute_dtype: torch.dtype,
        product_speed: ProductSpeed | None = None,
    ) -> None:
        super().__init__()
        self.product_speed = product_speed
        self.model = model
        self.tokenizer = tokenizer
        self.compute_dtype = compute_dtype
        self.has_adapter = hasattr(model, "peft_config")
        self._reference: list[nn.Module] = []  # in a list, so that it is no submodule and in no checkpoint
        self.library = LibraryDecoder(self._causal_lm, compute_dtype)
        """Computes any model, and is the reference where it need not."""
        self.blocks: BlockDecoder | None = None
        """Computes the models it knows, faster."""
        if BlockDecoder.supports(self._causal_lm, compute_dtype):
            self.blocks = BlockDecoder(self._causal_lm, recompute=self.library.recomputing)
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

    @contextlib.contextmanager
    def as_reference(self) -> Iterator[LanguagePolicy]:
        """π_ref: the model before training. Without gradients; adapters off, or the copy `keep_reference` took."""
        with torch.no_grad():
            if self.has_adapter:
                with self.model.disable_adapter():  # type: ignore[operator]
                    yield self
            elif self._reference:
                reference = LanguagePolicy(self._reference[0].to(self.device), self.tokenizer, self.compute_dtype)
                if self.blocks is None:
                    reference.blocks = None
                yield reference
            else:
                raise RuntimeError("no reference policy: call keep_reference() before training all weights with KL")

    def keep_reference(self) -> None:
        """Keeps a frozen copy of the weights as π_ref where there is no adapter to switch off."""
        if not self.has_adapter and not self._reference:
            self._reference.append(copy.deepcopy(self.model).requires_grad_(False))

    def plan(
        self, batch: TrainBatch, trie: ChoiceTrie | None, token_budget: int, sharing: Sharing = "tree"
    ) -> list[ForwardPlan]:
        """Forward passes over a batch (`plan_forward`), as this model can run them now.

        Without the block decoder, layers that recompute their activations keep no keys and values where gradients are
        on; and not every model can branch. A tree is then read as distinct whole rows.
        """
        if sharing == "tree" and self.blocks is None:
            if not self.library.branches and not self._told:
                self._told = True
                kind = self._causal_lm.config.model_type
                log.warning("model: %s cannot branch behind a cache; updates read each distinct row as a whole", kind)
            if not self.library.branches or self.library.recomputes:
                sharing = "rows"
        plans = plan_forward(batch, trie, token_budget, sharing)
        return [replace(plan, use_library=True) for plan in plans] if sharing == "none" else plans

    def decoder(self, use_library: bool = False) -> Decoder:
        """What computes hidden states: `plain` asks for the model library, without any shortcut."""
        return self.library if use_library or self.blocks is None else self.blocks

    def empty_cache(self) -> DynamicCache:
        """A key-value cache for any number of rows."""
        return self.library.empty_cache()

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
        with autocast(self.device, self.compute_dtype):
            return nn.functional.linear(hidden.to(weight.dtype), weight).float()

    @property
    def product_dtype(self) -> torch.dtype:
        """Type in which hidden states are multiplied with the whole output projection."""
        weight_dtype: torch.dtype = self.output_weight(None).dtype
        return weight_dtype if self.compute_dtype == torch.float32 else self.compute_dtype

    @staticmethod
    def keeps_few(rule: Sampling) -> bool:
        """Whether free decoding by `rule` draws from so few tokens that only their logits are made (`top_logits`)."""
        return rule.top_k is not None and rule.top_k <= LARGEST_TOP_K

    def token_stats(
        self, plan: ForwardPlan, trie: ChoiceTrie | None, rule: Sampling, columns: slice = slice(None)
    ) -> TokenStats:
        """Log-probability and entropy of every completion token that the plan serves, under the decoding rule.

        `columns` of the batch only, if given: off `plan.columns` there is nothing but zeros.
        """
        hidden = self.decoder(plan.use_library).plan_hidden(plan)
        device = hidden.device
        weight = self.output_weight(None if trie is None else torch.from_numpy(trie.columns).to(device))
        pair_node = torch.from_numpy(plan.pair_node).to(device)
        pair_column = torch.from_numpy(plan.pair_column).to(device)
        pair_logprobs, node_entropy = list[torch.Tensor](), list[torch.Tensor]()
        summed_up = not plan.use_library and trie is None and rule.top_k is None and rule.top_p is None
        if summed_up and not weight.requires_grad:
            hidden = hidden.to(self.product_dtype)
            picked, spread = vocabulary_stats(hidden, weight, rule.temperature, pair_node, pair_column)
            return self._spread_out(plan, columns, picked, spread[pair_node])
        if not plan.use_library and trie is None and self.keeps_few(rule):
            picked, spread = top_stats(hidden.to(self.product_dtype), weight, rule, pair_node, pair_column)
            return self._spread_out(plan, columns, picked, spread[pair_node])
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
        return self._spread_out(plan, columns, torch.cat(pair_logprobs), torch.cat(node_entropy)[pair_node])

    @staticmethod
    def _spread_out(
        plan: ForwardPlan, columns: slice, logprobs: Float[torch.Tensor, " Q"], spread: Float[torch.Tensor, " Q"]
    ) -> TokenStats:
        """From pairs to the samples that hold them."""
        pair_of = torch.from_numpy(plan.pair_of[:, columns]).to(logprobs.device)
        # Off the completion `pair_of` points one past the last pair, at a constant 0.
        nothing = torch.zeros(1, device=logprobs.device)
        return TokenStats(torch.cat([logprobs, nothing])[pair_of], torch.cat([spread, nothing])[pair_of])

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
        """Writes what was trained: the adapter in PEFT's format, or all weights, as safetensors, with checksums."""
        with quiet_transformers():
            self.model.save_pretrained(folder)  # type: ignore[operator]
            if not self.has_adapter:
                self.tokenizer.save_pretrained(folder)
        write_manifest(folder)


class UpdateWork(NamedTuple):
    """The work of forward and backward passes; adds up over them."""

    tokens: int = 0
    """Tokens the model read, without padding."""
    padded_tokens: int = 0
    """The same with padding."""
    flops: float = 0.0
    """Model floating-point operations, see `update_work`."""

    def __add__(self, other: object) -> UpdateWork:
        """Field by field."""
        if not isinstance(other, UpdateWork):
            return NotImplemented
        return UpdateWork(
            tokens=self.tokens + other.tokens,
            padded_tokens=self.padded_tokens + other.padded_tokens,
            flops=self.flops + other.flops,
        )


def update_work(policy: LanguagePolicy, plan: ForwardPlan, trie: ChoiceTrie | None, rule: Sampling) -> UpdateWork:
    """Work of one forward and backward pass over a plan of sampled completions under their decoding rule.

    Counted as operations are two a multiply-add (one pass of a matrix of n entries: 2 n a token):

    - the decoder's matrices, forward 2 n a token and backward 2 n to its inputs; 2 n more for those that are trained.
      For a frozen base with an adapter that is 4 N a token of the base's N, and 6 of the adapter's entries; 6 N where
      all weights are trained. Embeddings are looked up and cost nothing;
    - the output projection at the nodes, onto the columns that the constraint leaves, likewise; under top-k one product
      onto all of them finds the candidates, and what is said above is of these;
    - attention, 4 · width of all heads · keys a token and layer forward, twice that backward, each token attending to
      its own position and those before it.

    Padding, recomputed activations, norms, rotations and the loss count nothing: this is what the result needs.
    """
    per_token, width_of_heads = policy.matmul_flops_per_token, policy.attention_width
    head = policy.output_weight(None)
    columns, finding = len(head) if trie is None else len(trie.columns), 0
    if trie is None and rule.top_k is not None and policy.keeps_few(rule) and not plan.use_library:
        columns, finding = num_candidates(columns, rule.top_k), 2 * columns
    projection = ((6 if head.requires_grad else 4) * columns + finding) * head.shape[1] * plan.num_nodes
    attention = 3 * 4 * width_of_heads * plan.num_attended
    return UpdateWork(
        tokens=plan.num_tokens,
        padded_tokens=plan.num_padded_tokens,
        flops=float(per_token * plan.num_tokens + projection + attention),
    )


def peak_memory_mb(device: torch.device) -> float:
    """Most memory this process has held so far, MiB: what CUDA allocated there, elsewhere what was resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its peak begins with that of the process which started this one.
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
