"""The MS-GRPO loss: pure functions of tensors, and the frozen dataclass that holds their configuration.

    J = 1/|B| Σ_{i∈B} 1/T_i Σ_t 1/|y_{i,t}| Σ_k [ min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A) − β k3(π_θ ‖ π_ref) ]

(paper section 3). What differs from the textbook:

- Every normaliser is of the whole batch: losses, gradients and statistics of micro-batches *add up* to the batch's.
- The two inner means are options (`Reduction`).
- exp is continued by its tangent above e^20, so that a token whose probability has collapsed (or that top-k has
  dropped) cannot turn the gradient into NaN; a ratio that large is beyond every clip.
- A sample with an empty completion contributes 0, and counts in its episode's T_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msgrpo_lab.types import TrainBatch

Reduction = Literal["sequence", "token", "dr_grpo"]
"""`sequence`: mean over episodes of the mean over turns of the mean over tokens (the paper's); `token`: one mean over
all tokens; `dr_grpo`: sum over tokens, divided by the number of episodes and a constant (arXiv 2503.20783)."""

LOGPROB_MIN = -1e4
"""Log-probabilities below this, −inf included, count as this; nats."""
LOG_RATIO_LINEAR = 20.0
"""Above this log-ratio exp is continued by its tangent; nats."""


class LossStats(NamedTuple):
    """Scalars of one micro-batch. Each *adds up* over the micro-batches of a batch (`sum_stats`), none is averaged."""

    loss: Float[Tensor, ""]
    """−J, minus the entropy bonus where there is one; the only field that carries a gradient."""
    policy_loss: Float[Tensor, ""]
    """The clipped surrogate's part of the loss, in the loss's reduction."""
    kl: Float[Tensor, ""]
    """k3(π_θ ‖ π_ref) in nats, in the loss's reduction and weights, before β; 0 without reference log-probabilities."""
    entropy: Float[Tensor, ""]
    """Token entropy in nats, in the loss's reduction and weights, before its coefficient; 0 where none is given."""
    clip_frac: Float[Tensor, ""]
    """Share of tokens whose gradient the clip kills; unweighted `sequence` mean whatever the loss's reduction."""
    ratio_mean: Float[Tensor, ""]
    """Mean ρ = π_θ/π_old, unweighted `sequence` mean; 1 by construction before the parameters have moved."""
    approx_kl: Float[Tensor, ""]
    """k3(π_old ‖ π_θ) = ρ − 1 − log ρ in nats, how far this batch has moved the policy; unweighted `sequence` mean."""


def ms_grpo_loss(
    logprobs: Float[Tensor, "S L"],
    old_logprobs: Float[Tensor, "S L"],
    ref_logprobs: Float[Tensor, "S L"] | None,
    advantage: Float[Tensor, " S"],
    weight: Float[Tensor, " S"],
    completion_mask: Bool[Tensor, "S L"],
    *,
    num_turns: Int[Tensor, " S"],
    num_episodes: int,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    beta: float = 0.0,
    reduction: Reduction = "sequence",
    num_tokens: int | None = None,
    constant: float | None = None,
) -> LossStats:
    """−J of MS-GRPO over the turn samples of a batch or of any part of one (paper section 3).

    term = min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A) − β k3, reduced by `reduce_terms`.

    Args:
        logprobs: log π_θ of the sampled tokens, nats; differentiated. What stands off the mask is never read.
        old_logprobs: log π_old of the same tokens under the sampling policy.
        ref_logprobs: log π_ref, or None where β = 0.
        advantage: A of the turn the sample is.
        weight: sampler's loss weight of the sample's episode.
        completion_mask: True on the sampled tokens; where the padding stands does not matter.
        num_turns: T_i of the sample's episode.
        num_episodes: K, drawn episodes of the *whole* batch.
        eps_low: the ratio is clipped below at 1 − ε_low.
        eps_high: the ratio is clipped above at 1 + ε_high.
        beta: KL coefficient β.
        reduction: how tokens, turns and episodes are averaged.
        num_tokens: completion tokens of the *whole* batch; needed by `token`.
        constant: tokens a sum is divided by; needed by `dr_grpo`.

    Raises:
        ValueError: shapes disagree, β needs a reference that is missing, or a reduction lacks its normaliser.
    """
    _check_shapes(logprobs, old_logprobs, ref_logprobs, completion_mask, advantage, weight, num_turns)
    if beta != 0.0 and ref_logprobs is None:
        raise ValueError(f"loss.beta={beta} needs ref_logprobs: compute them, or set loss.beta=0")
    logp_SL = _on_mask(logprobs, completion_mask)
    log_ratio_SL = logp_SL - _on_mask(old_logprobs, completion_mask)
    ratio_SL = exp_tangent(log_ratio_SL)
    adv_S1 = advantage.to(logp_SL.dtype)[:, None]
    surrogate_SL = torch.minimum(ratio_SL * adv_S1, ratio_SL.clamp(1.0 - eps_low, 1.0 + eps_high) * adv_S1)

    turns = partial(reduce_terms, completion_mask=completion_mask, num_turns=num_turns, num_episodes=num_episodes)
    reduce = partial(turns, weight=weight, reduction=reduction, num_tokens=num_tokens, constant=constant)
    mean = partial(turns, weight=torch.ones_like(adv_S1[:, 0]))

    policy_loss = -reduce(surrogate_SL)
    loss, kl = policy_loss, policy_loss.new_zeros(())
    if ref_logprobs is not None:
        kl = reduce(k3(logp_SL, _on_mask(ref_logprobs, completion_mask)))
        loss = policy_loss + beta * kl if beta != 0.0 else policy_loss
    ratio_SL, log_ratio_SL = ratio_SL.detach(), log_ratio_SL.detach()
    clipped_SL = torch.where(adv_S1 > 0, ratio_SL > 1.0 + eps_high, (ratio_SL < 1.0 - eps_low) & (adv_S1 < 0))
    return LossStats(
        loss=loss,
        policy_loss=policy_loss.detach(),
        kl=kl.detach(),
        entropy=policy_loss.new_zeros(()),
        clip_frac=mean(clipped_SL.to(logp_SL.dtype)),
        ratio_mean=mean(ratio_SL),
        approx_kl=mean(ratio_SL - 1.0 - log_ratio_SL),
    )


def entropy_bonus(
    entropy_SL: Float[Tensor, "S L"],
    weight: Float[Tensor, " S"],
    completion_mask: Bool[Tensor, "S L"],
    *,
    num_turns: Int[Tensor, " S"],
    num_episodes: int,
    reduction: Reduction = "sequence",
    num_tokens: int | None = None,
    constant: float | None = None,
) -> Float[Tensor, ""]:
    """Mean token entropy, nats, reduced exactly as the loss is; differentiable in `entropy_SL`. Adds up likewise."""
    return reduce_terms(
        entropy_SL,
        weight,
        completion_mask,
        num_turns=num_turns,
        num_episodes=num_episodes,
        reduction=reduction,
        num_tokens=num_tokens,
        constant=constant,
    )


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
    _check_shapes(term_SL, completion_mask, None, completion_mask, weight, weight, num_turns)
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


def sum_stats(stats: Sequence[LossStats]) -> LossStats:
    """Statistics of a batch from those of its micro-batches: field by field, their sum.

    Raises:
        ValueError: the sequence is empty.
    """
    if not stats:
        raise ValueError("sum_stats got no LossStats: a batch has at least one micro-batch")
    return LossStats(*(torch.stack(values).sum() for values in zip(*stats, strict=True)))


@dataclass(frozen=True, kw_only=True)
class MSGRPOLoss:
    """The configuration of `ms_grpo_loss` and its entropy bonus, applied to a `TrainBatch`."""

    eps_low: float = 0.2
    """The ratio is clipped below at 1 − ε_low, in [0, 1] [D]."""
    eps_high: float = 0.2
    """The ratio is clipped above at 1 + ε_high, ≥ 0 [D]."""
    beta: float = 0.0
    """KL coefficient β ≥ 0; 0 needs no reference pass [D], the author's later runs use 0.1 [A]."""
    reduction: Reduction = "sequence"
    """How tokens, turns and episodes are averaged."""
    constant: float | None = None
    """Tokens that `dr_grpo` divides by; None with other reductions."""
    entropy: float = 0.03
    """Coefficient of the token-entropy bonus, ≥ 0 [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        if not 0.0 <= self.eps_low <= 1.0:
            raise ValueError(f"loss.eps_low={self.eps_low} must lie in [0, 1]: 0.2 is usual")
        for key in ("eps_high", "beta", "entropy"):
            if not 0.0 <= getattr(self, key) < math.inf:
                raise ValueError(f"loss.{key}={getattr(self, key)} must be finite and at least 0: 0 turns it off")
        if self.reduction not in get_args(Reduction):
            raise ValueError(
                f"loss.reduction={self.reduction!r} is unknown: use one of {', '.join(get_args(Reduction))}"
            )
        if self.reduction == "dr_grpo" and (self.constant is None or not 0.0 < self.constant < math.inf):
            raise ValueError(f"loss.constant={self.constant}: loss.reduction=dr_grpo needs a positive number of tokens")

    def __call__(
        self, logprobs_SL: Float[Tensor, "S L"], entropy_SL: Float[Tensor, "S L"] | None, batch: TrainBatch
    ) -> LossStats:
        """−J − entropy · H over the samples of `batch`, with H the reduced mean token entropy (stats field `entropy`).

        Args:
            logprobs_SL: log π_θ of the sampled tokens, nats; column l speaks of the token at column l of `input_ids`.
            entropy_SL: entropy of the distribution each token was drawn from, nats; None where the coefficient is 0.
            batch: the samples, with the normalisers of the whole optimiser step.

        Raises:
            ValueError: as `ms_grpo_loss`, or `entropy_SL` is missing where the coefficient is not 0.
        """
        if entropy_SL is None and self.entropy != 0.0:
            raise ValueError(f"loss.entropy={self.entropy} needs entropy_SL: compute it, or set loss.entropy=0")
        stats = ms_grpo_loss(
            logprobs_SL,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.advantage,
            batch.weight,
            batch.completion_mask,
            num_turns=batch.num_turns,
            num_episodes=batch.num_episodes,
            eps_low=self.eps_low,
            eps_high=self.eps_high,
            beta=self.beta,
            reduction=self.reduction,
            num_tokens=batch.num_tokens,
            constant=self.constant,
        )
        if entropy_SL is None:
            return stats
        bonus = entropy_bonus(
            entropy_SL,
            batch.weight,
            batch.completion_mask,
            num_turns=batch.num_turns,
            num_episodes=batch.num_episodes,
            reduction=self.reduction,
            num_tokens=batch.num_tokens,
            constant=self.constant,
        )
        loss = stats.loss - self.entropy * bonus if self.entropy != 0.0 else stats.loss
        return stats._replace(loss=loss, entropy=bonus.detach())


def _on_mask(logp_SL: Tensor, mask_SL: Tensor) -> Tensor:
    """Log-probabilities on the mask, at least `LOGPROB_MIN`; 0 with gradient 0 off it, whatever stands there.

    Filled before any arithmetic, so that no ∞ − ∞ off the mask has to be undone by the gradient of a later clamp.
    """
    dtype = torch.promote_types(logp_SL.dtype, torch.float32)
    return logp_SL.to(dtype).masked_fill(~mask_SL, 0.0).clamp(min=LOGPROB_MIN)


def _check_shapes(
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
