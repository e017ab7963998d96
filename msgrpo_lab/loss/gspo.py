"""GSPO: one importance ratio a sequence, clipped as a whole (Zheng et al. 2025, arXiv 2507.18071).

    s = (π_θ(y|x) / π_old(y|x))^{1/|y|} = exp(1/|y| Σ_k log ρ_k)        min(s A, clip(s, 1 − ε_low, 1 + ε_high) A)

(equations 5 and 7). What differs from the paper: a sequence is the completion of one *turn*, because prompts hold the
current state only and a turn is one (prompt, completion) sample [D].
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from msgrpo_lab.loss.base import PolicyGradientLoss, Surrogate, Tokens, check_clip, exp_tangent
from msgrpo_lab.loss.ms_grpo import clipped_surrogate


def sequence_ratio(log_ratio_SL: Float[Tensor, "S L"], mask_SL: Bool[Tensor, "S L"]) -> Float[Tensor, "S 1"]:
    """s, the geometric mean of a sequence's token ratios; 1 for an empty sequence. `log_ratio_SL` is 0 off the mask."""
    length_S1 = mask_SL.sum(dim=1, keepdim=True).clamp(min=1)
    return exp_tangent(log_ratio_SL.sum(dim=1, keepdim=True) / length_S1)


@dataclass(frozen=True, kw_only=True)
class GSPOLoss(PolicyGradientLoss):
    """GSPO's sequence-level clipped objective; every token of a sequence carries the sequence's term.

    A sequence is inside or outside the clip as a whole. Its ratio is a geometric mean and so moves far less than a
    token's: the clip range is three orders of magnitude narrower than GRPO's.
    """

    eps_low: float = 3e-4
    """The sequence ratio is clipped below at 1 − ε_low, in [0, 1]; 3e-4 is the paper's (arXiv 2507.18071, 5.1)."""
    eps_high: float = 4e-4
    """The sequence ratio is clipped above at 1 + ε_high, ≥ 0; 4e-4 is the paper's (arXiv 2507.18071, 5.1)."""

    def __post_init__(self) -> None:
        """Raises ValueError on arguments outside their range."""
        check_clip(self.eps_low, self.eps_high)
        PolicyGradientLoss.__post_init__(self)

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """min(s A, clip(s) A) on every token of the sequence; ∂s/∂log π_k = s/|y|."""
        ratio_S1 = sequence_ratio(tokens.log_ratio, tokens.mask)
        term_S1, clipped_S1 = clipped_surrogate(ratio_S1, tokens.adv, eps_low=self.eps_low, eps_high=self.eps_high)
        return Surrogate(term_S1.expand_as(tokens.logp), clipped_S1.expand_as(tokens.mask))
