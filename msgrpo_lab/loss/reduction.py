"""What every policy-gradient loss shares: how per-token terms become one number, and arithmetic that stays finite.

- Every normaliser is of the whole batch: losses, gradients and statistics of micro-batches *add up* to the batch's.
- The two inner means are options (`Reduction`).
- exp is continued by its tangent above e^20, so that a token whose probability has collapsed (or that top-k has
  dropped) cannot turn the gradient into NaN; a ratio that large is beyond every clip.
- A sample with an empty completion contributes 0, and counts in its episode's T_i.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduction = Literal["sequence", "token", "dr_grpo"]
"""`sequence`: mean over episodes of the mean over turns of the mean over tokens (the paper's); `token`: one mean over
all tokens; `dr_grpo`: sum over tokens, divided by the number of episodes and a constant (arXiv 2503.20783)."""

LOGPROB_MIN = -1e4
"""Log-probabilities below this, −inf included, count as this; nats."""
LOG_RATIO_LINEAR = 20.0
"""Above this log-ratio exp is continued by its tangent; nats."""


def reduce_terms(
    term_SL: Float[Tensor, "S L"],
    weight: Float[Tensor, " S"],
    completion_mask: Bool[Tensor, "S L"],
    *,
    num_turns: Int[Tensor, " S"],
    num_episodes: int,
    reduction: Reduction = "sequence",
    num_tokens: int | None = None,
    constant: float | None = None,
) -> Float[Tensor, ""]:
    """Weighted sum of per-token terms, divided by the normalisers of the whole batch.

    `sequence`: Σ_s weight_s · mean_k(term) / (num_turns_s · num_episodes);
    `token`: Σ_s weight_s · Σ_k(term) / num_tokens;
    `dr_grpo`: Σ_s weight_s · Σ_k(term) / (num_episodes · constant). What stands off the mask is never read.

    Raises:
        ValueError: shapes disagree, the reduction is unknown, or its normaliser is missing or not positive.
    """
    check_shapes(term_SL, completion_mask, None, completion_mask, weight, weight, num_turns)
    if num_episodes < 1:
        raise ValueError(f"num_episodes={num_episodes} must be at least 1: the K of the whole batch")
    dtype = torch.promote_types(term_SL.dtype, torch.float32)
    sum_S = term_SL.to(dtype).masked_fill(~completion_mask, 0.0).sum(dim=1)
    weight_S = weight.to(dtype)
    match reduction:
        case "sequence":
            length_S = completion_mask.sum(dim=1).clamp(min=1)
            return (weight_S * sum_S / (length_S * num_turns)).sum() / num_episodes
        case "token":
            if num_tokens is None or num_tokens < 1:
                raise ValueError(f"num_tokens={num_tokens}: loss.reduction=token needs the batch's completion tokens")
            return (weight_S * sum_S).sum() / num_tokens
        case "dr_grpo":
            if constant is None or not constant > 0:
                raise ValueError(f"loss.constant={constant}: loss.reduction=dr_grpo needs a positive number of tokens")
            return (weight_S * sum_S).sum() / (num_episodes * constant)
    raise ValueError(f"loss.reduction={reduction!r} is unknown: use one of {', '.join(get_args(Reduction))}")


def k3(logp: Float[Tensor, "*N"], ref_logp: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """Per-token estimate of KL(π_θ ‖ π_ref), nats, ≥ 0: π_ref/π_θ − log(π_ref/π_θ) − 1 (paper section 3)."""
    log_ratio = ref_logp - logp
    return exp_tangent(log_ratio) - log_ratio - 1.0


def exp_tangent(x: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """exp(x) up to `LOG_RATIO_LINEAR`, and its tangent there beyond: finite, with a gradient that does not die."""
    below = x.clamp(max=LOG_RATIO_LINEAR).exp()
    return below + math.exp(LOG_RATIO_LINEAR) * (x - LOG_RATIO_LINEAR).clamp(min=0.0)


def on_mask(logp_SL: Float[Tensor, "S L"], mask_SL: Bool[Tensor, "S L"]) -> Float[Tensor, "S L"]:
    """Log-probabilities on the mask, at least `LOGPROB_MIN`; 0 with gradient 0 off it, whatever stands there.

    Filled before any arithmetic, so that no ∞ − ∞ off the mask has to be undone by the gradient of a later clamp.
    """
    dtype = torch.promote_types(logp_SL.dtype, torch.float32)
    return logp_SL.to(dtype).masked_fill(~mask_SL, 0.0).clamp(min=LOGPROB_MIN)


def check_shapes(
    term_SL: Tensor, other_SL: Tensor, ref_SL: Tensor | None, mask_SL: Tensor, *per_sample_S: Tensor
) -> None:
    """Raises ValueError unless the first four are [S, L], the mask is boolean and the others are [S]."""
    per_token = [tuple(x.shape) for x in (term_SL, other_SL, mask_SL, *([] if ref_SL is None else [ref_SL]))]
    if term_SL.ndim != 2 or len(set(per_token)) > 1:
        raise ValueError(f"per-token tensors have shapes {per_token}: all must be the same [S, L]")
    if mask_SL.dtype != torch.bool:
        raise ValueError(f"completion_mask has dtype {mask_SL.dtype}: must be torch.bool")
    per_sample = [tuple(x.shape) for x in per_sample_S]
    if any(shape != term_SL.shape[:1] for shape in per_sample):
        raise ValueError(f"advantage, weight, num_turns have shapes {per_sample}: all must be [{term_SL.shape[0]}]")
