"""The MS-GRPO loss: GRPO's clipped surrogate over the turns of episodes (paper section 3).

    J = 1/|B| Σ_{i∈B} 1/T_i Σ_t 1/|y_{i,t}| Σ_k [ min(ρ A, clip(ρ, 1−ε_low, 1+ε_high) A) − β k3(π_θ ‖ π_ref) ]

`reduction=token` is GRPO with one mean over all tokens, as DAPO averages (arXiv 2503.14476); `reduction=dr_grpo` is
Dr. GRPO's sum over a constant (arXiv 2503.20783); ε_high > ε_low is DAPO's clip-higher.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from msgrpo_lab.loss.base import LossStats, PolicyGradientLoss, Reduction, Surrogate, Tokens, check_clip, loss_stats


def clipped_surrogate(
    ratio_SL: Float[Tensor, "S L"], adv_S1: Float[Tensor, "S 1"], *, eps_low: float, eps_high: float
) -> Surrogate:
    """min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A); clipped where that is constant in ρ (PPO, arXiv 1707.06347)."""
    low, high = 1.0 - eps_low, 1.0 + eps_high
    term_SL = torch.minimum(ratio_SL * adv_S1, ratio_SL.clamp(low, high) * adv_S1)
    return Surrogate(term_SL, torch.where(adv_S1 > 0, ratio_SL > high, (ratio_SL < low) & (adv_S1 < 0)))


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

    def surrogate(tokens: Tokens) -> Surrogate:
        return clipped_surrogate(tokens.ratio, tokens.adv, eps_low=eps_low, eps_high=eps_high)

    return loss_stats(
        surrogate,
        logprobs,
        old_logprobs,
        ref_logprobs,
        advantage,
        weight,
        completion_mask,
        num_turns=num_turns,
        num_episodes=num_episodes,
        beta=beta,
        reduction=reduction,
        num_tokens=num_tokens,
        constant=constant,
    )


@dataclass(frozen=True, kw_only=True)
class MSGRPOLoss(PolicyGradientLoss):
    """MS-GRPO's clipped objective: min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A) per token (paper section 3)."""

    eps_low: float = 0.2
    """The ratio is clipped below at 1 − ε_low, in [0, 1] [D]."""
    eps_high: float = 0.2
    """The ratio is clipped above at 1 + ε_high, ≥ 0 [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_clip(self.eps_low, self.eps_high)
        PolicyGradientLoss.__post_init__(self)

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """See `clipped_surrogate`."""
        return clipped_surrogate(tokens.ratio, tokens.adv, eps_low=self.eps_low, eps_high=self.eps_high)
