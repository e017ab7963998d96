"""The optimiser and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.optim.lr_scheduler import LambdaLR

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """AdamW with linear warm-up, then a decay to a share of the peak rate at the last update."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_updates: int = 3
    """Updates over which the rate rises linearly to its peak."""
    schedule: Schedule = "linear"
    final_fraction: float = 0.1
    """Rate at the last update, as a share of the peak."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for values out of range."""
        if not 0 < self.lr <= 1:
            raise ValueError(f"optim.lr={self.lr}: must be above 0 and at most 1; 3e-4 is usual with an adapter")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)}: each must lie in [0, 1); [0.9,0.95] is usual")
        if not 0 <= self.eps < math.inf:
            raise ValueError(f"optim.eps={self.eps}: must be at least 0 and finite; 1e-8 is usual")
        if not 0 <= self.weight_decay <= 1:
            raise ValueError(f"optim.weight_decay={self.weight_decay}: must lie in [0, 1]; 0 turns it off")
        if self.warmup_updates < 0:
            raise ValueError(f"optim.warmup_updates={self.warmup_updates}: must be at least 0; 3 is usual")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"optim.final_fraction={self.final_fraction}: must lie in [0, 1]; 0.1 is usual")

    def factor(self, update: int, total_updates: int) -> float:
        """The rate of update number `update` (from 0) as a share of the peak."""
        if update < self.warmup_updates:
            return (update + 1) / (self.warmup_updates + 1)
        span = max(1, total_updates - 1 - self.warmup_updates)
        progress = min(1.0, (update - self.warmup_updates) / span)
        match self.schedule:
            case "constant":
                return 1.0
            case "linear":
                return 1.0 + (self.final_fraction - 1.0) * progress
            case "cosine":
                return self.final_fraction + (1.0 - self.final_fraction) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def build(
        self, parameters: Sequence[torch.nn.Parameter], total_updates: int
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """The optimiser and its scheduler, to be stepped once an update."""
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, betas=(self.betas[0], self.betas[1]), eps=self.eps, weight_decay=self.weight_decay
        )
        return optimizer, LambdaLR(optimizer, lambda update: self.factor(update, total_updates))
