"""CISPO: the importance weight is clipped, not the token's update (MiniMax-M1, arXiv 2506.13585, section 3.1).

    sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π_θ

with sg the stop-gradient: every token keeps a gradient, of bounded weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgrpo_lab.loss.base import PolicyGradientLoss, Surrogate, Tokens, check_clip


@dataclass(frozen=True, kw_only=True)
class CISPOLoss(PolicyGradientLoss):
    """CISPO's clipped importance weight times the score function; ρ = 1 gives the gradient of MS-GRPO and REINFORCE.

    `policy_loss` is A times a log-probability and not centred at 0: its value says little, its gradient is what counts.
    """

    eps_low: float = 1.0
    """The weight is clipped below at 1 − ε_low, in [0, 1]; 1 is no lower bound, as in the paper."""
    eps_high: float = 4.0
    """The weight is clipped above at 1 + ε_high, ≥ 0. The paper tunes this side and does not publish it; a ceiling of 5
    is what public trainers take (TRL, ms-swift) [D]."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_clip(self.eps_low, self.eps_high)
        PolicyGradientLoss.__post_init__(self)

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """sg(clip(ρ)) A log π; `clipped` marks the tokens whose weight the clip bounds."""
        ratio_SL = tokens.ratio.detach()
        weight_SL = ratio_SL.clamp(1.0 - self.eps_low, 1.0 + self.eps_high)
        clipped_SL = (weight_SL != ratio_SL) & (tokens.adv != 0)
        return Surrogate(weight_SL * tokens.adv * tokens.logp, clipped_SL)
