"""How much an update computed: tokens, model floating-point operations, memory."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from msgrpo_lab.decoder.decoding import ChoiceTrie, num_candidates
from msgrpo_lab.decoder.plan import ForwardPlan
from msgrpo_lab.lap.policy import LanguagePolicy
from msgrpo_lab.types import Sampling


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
    if trie is None and rule.top_k is not None and policy.keeps_few(rule) and not plan.plain:
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
