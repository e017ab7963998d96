"""REINFORCE: score function times advantage, without a ratio (Williams 1992)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from msgrpo_lab.loss.base import PolicyGradientLoss, Surrogate, Tokens


@dataclass(frozen=True, kw_only=True)
class ReinforceLoss(PolicyGradientLoss):
    """A log π_θ per token: the plain policy gradient, right where the policy is still the one that sampled.

    After the first optimiser step of a rollout (`update.passes` or `update.minibatches` above 1) it is off-policy, and
    neither corrects for that nor bounds it.
    """

    def surrogate(self, tokens: Tokens) -> Surrogate:
        """A log π on every token; there is no clip."""
        return Surrogate(tokens.adv * tokens.logp, torch.zeros_like(tokens.mask))
