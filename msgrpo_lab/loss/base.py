"""What a policy-gradient loss is, and the one way in which all of them become a number.

A loss is a frozen dataclass that says what a sampled token contributes to the objective (`surrogate`). Everything else
is the same for all: the reduction over tokens, turns and episodes, the sampler's weights, the KL to the reference
policy, the entropy bonus, and the statistics that are logged. The loss over the drawn episodes is −J with

    J = reduce_s,k [ surrogate_{s,k} − β k3(π_θ ‖ π_ref)_{s,k} + c H_{s,k} ]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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


LARGEST = 1e6
"""Coefficients are at most this: far beyond any use, and small enough that no sum of them overflows."""


class LossStats(NamedTuple):
    """Scalars of one micro-batch. Each *adds up* over the micro-batches of a batch (`sum_stats`), none is averaged."""

    loss: Float[Tensor, ""]
    """−J, minus the entropy bonus where there is one; the only field that carries a gradient."""
    policy_loss: Float[Tensor, ""]
    """The surrogate's part of the loss, in the loss's reduction."""
    kl: Float[Tensor, ""]
    """k3(π_θ ‖ π_ref) in nats, in the loss's reduction and weights, before β; 0 without reference log-probabilities."""
    entropy: Float[Tensor, ""]
    """Token entropy in nats, in the loss's reduction and weights, before its coefficient; 0 where none is given."""
    clip_frac: Float[Tensor, ""]
    """Share of tokens that a clip acts on (`Surrogate.clipped`); unweighted `sequence` mean whatever the reduction."""
    ratio_mean: Float[Tensor, ""]
    """Mean ρ = π_θ/π_old, unweighted `sequence` mean; 1 by construction before the parameters have moved."""
    approx_kl: Float[Tensor, ""]
    """k3(π_old ‖ π_θ) = ρ − 1 − log ρ in nats, how far this batch has moved the policy; unweighted `sequence` mean."""


class Tokens(NamedTuple):
    """The sampled tokens as a surrogate sees them: finite everywhere, and 0 without gradient (ρ: 1) off the mask."""

    logp: Float[Tensor, "S L"]
    """log π_θ, nats; carries the gradient."""
    log_ratio: Float[Tensor, "S L"]
    """log ρ = log π_θ − log π_old, nats."""
    ratio: Float[Tensor, "S L"]
    """ρ, continued by its tangent above e^20."""
    adv: Float[Tensor, "S 1"]
    """A of the turn the sample is."""
    mask: Bool[Tensor, "S L"]
    """True on the sampled tokens."""


class Surrogate(NamedTuple):
    """What each token contributes to the objective, before reduction."""

    term: Float[Tensor, "S L"]
    """The term to maximise; differentiated."""
    clipped: Bool[Tensor, "S L"]
    """Tokens that a clip acts on: whose gradient it kills (MS-GRPO, GSPO) or whose weight it bounds (CISPO)."""


def loss_stats(
    surrogate: Callable[[Tokens], Surrogate],
    logprobs: Float[Tensor, "S L"],
    old_logprobs: Float[Tensor, "S L"],
    ref_logprobs: Float[Tensor, "S L"] | None,
    advantage: Float[Tensor, " S"],
    weight: Float[Tensor, " S"],
    completion_mask: Bool[Tensor, "S L"],
    *,
    num_turns: Int[Tensor, " S"],
    num_episodes: int,
    beta: float,
    reduction: Reduction,
    num_tokens: int | None,
    constant: float | None,
) -> LossStats:
    """−J of a surrogate over the turn samples of a batch or of any part of one, without an entropy bonus.

    Arguments as in `ms_grpo_loss`.

    Raises:
        ValueError: shapes disagree, β needs a reference that is missing, or a reduction lacks its normaliser.
    """
    check_shapes(logprobs, old_logprobs, ref_logprobs, completion_mask, advantage, weight, num_turns)
    if beta != 0.0 and ref_logprobs is None:
        raise ValueError(f"loss.beta={beta} needs ref_logprobs: compute them, or set loss.beta=0")
    logp_SL = on_mask(logprobs, completion_mask)
    log_ratio_SL = logp_SL - on_mask(old_logprobs, completion_mask)
    ratio_SL = exp_tangent(log_ratio_SL)
    adv_S1 = advantage.to(logp_SL.dtype)[:, None]
    term_SL, clipped_SL = surrogate(Tokens(logp_SL, log_ratio_SL, ratio_SL, adv_S1, completion_mask))

    turns = partial(reduce_terms, completion_mask=completion_mask, num_turns=num_turns, num_episodes=num_episodes)
    reduce = partial(turns, weight=weight, reduction=reduction, num_tokens=num_tokens, constant=constant)
    mean = partial(turns, weight=torch.ones_like(adv_S1[:, 0]))

    policy_loss = -reduce(term_SL)
    loss, kl = policy_loss, policy_loss.new_zeros(())
    if ref_logprobs is not None:
        kl = reduce(k3(logp_SL, on_mask(ref_logprobs, completion_mask)))
        loss = policy_loss + beta * kl if beta != 0.0 else policy_loss
    ratio_SL, log_ratio_SL = ratio_SL.detach(), log_ratio_SL.detach()
    return LossStats(
        loss=loss,
        policy_loss=policy_loss.detach(),
        kl=kl.detach(),
        entropy=policy_loss.new_zeros(()),
        clip_frac=mean(clipped_SL.to(logp_SL.dtype)),
        ratio_mean=mean(ratio_SL),
        approx_kl=mean(ratio_SL - 1.0 - log_ratio_SL),
    )


def sum_stats(stats: Sequence[LossStats]) -> LossStats:
    """Statistics of a batch from those of its micro-batches: field by field, their sum.

    Raises:
        ValueError: the sequence is empty.
    """
    if not stats:
        raise ValueError("sum_stats got no LossStats: a batch has at least one micro-batch")
    return LossStats(*(torch.stack(values).sum() for values in zip(*stats, strict=True)))


@dataclass(frozen=True, kw_only=True)
class PolicyGradientLoss(ABC):
    """A surrogate with its reduction, KL and entropy bonus, applied to a `TrainBatch`."""

    beta: float = 0.0
    """KL coefficient β ≥ 0; 0 needs no reference pass [D], the author's later runs use 0.1 [A]."""
    reduction: Reduction = "sequence"
    """How tokens, turns and episodes are averaged."""
    constant: float | None = None
    """Tokens that `dr_grpo` divides by; None with other reductions."""
    entropy: float = 0.0
    """Coefficient of the token-entropy bonus, ≥ 0 [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_not_negative(beta=self.beta, entropy=self.entropy)
        if self.reduction not in get_args(Reduction):
            raise ValueError(
                f"loss.reduction={self.reduction!r}: is unknown; use one of {', '.join(get_args(Reduction))}"
            )
        if self.reduction == "dr_grpo" and (self.constant is None or not 0.0 < self.constant < math.inf):
            problem = "loss.reduction=dr_grpo needs a positive number of tokens"
            raise ValueError(f"loss.constant={self.constant}: {problem}; give those an episode may have, such as 64")

    @abstractmethod
    def surrogate(self, tokens: Tokens) -> Surrogate:
        """What each token contributes to the objective, before reduction."""

    def __call__(
        self, logprobs_SL: Float[Tensor, "S L"], entropy_SL: Float[Tensor, "S L"] | None, batch: TrainBatch
    ) -> LossStats:
        """−J − entropy · H over the samples of `batch`, with H the reduced mean token entropy (stats field `entropy`).

        Args:
            logprobs_SL: log π_θ of the sampled tokens, nats; column l speaks of the token at column l of `input_ids`.
            entropy_SL: entropy of the distribution each token was drawn from, nats; None where the coefficient is 0.
            batch: the samples, with the normalisers of the whole optimiser step.

        Raises:
            ValueError: as `loss_stats`, or `entropy_SL` is missing where the coefficient is not 0.
        """
        if entropy_SL is None and self.entropy != 0.0:
            raise ValueError(f"loss.entropy={self.entropy} needs entropy_SL: compute it, or set loss.entropy=0")
        stats = loss_stats(
            self.surrogate,
            logprobs_SL,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.advantage,
            batch.weight,
            batch.completion_mask,
            num_turns=batch.num_turns,
            num_episodes=batch.num_episodes,
            beta=self.beta,
            reduction=self.reduction,
            num_tokens=batch.num_tokens,
            constant=self.constant,
        )
        if entropy_SL is None:
            return stats
        bonus = reduce_terms(
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


def check_not_negative(**values: float) -> None:
    """Raises ValueError on the first coefficient that is negative or not finite, with its key."""
    for key, value in values.items():
        if not 0.0 <= value <= LARGEST:
            raise ValueError(f"loss.{key}={value}: must lie in [0, {LARGEST:g}]; 0 turns it off")


def check_clip(eps_low: float, eps_high: float) -> None:
    """Raises ValueError on a clip range that no ratio can be held to."""
    if not 0.0 <= eps_low <= 1.0:
        raise ValueError(f"loss.eps_low={eps_low}: must lie in [0, 1]; 0.2 is usual")
    check_not_negative(eps_high=eps_high)
