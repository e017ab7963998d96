"""How many times faster: ratios of pairs measured in one run, with their spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
ENOUGH = 4
"""Fewer pairs than this are told by their ends; an interval of them would be no more than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Of paired rates: the median of the pairs' ratios, and how far they scatter."""

    median: float
    low: float
    high: float
    pairs: int
    spread: str
    """What `low` and `high` are: `min-max`, or `95% bootstrap` of the median."""

    def __str__(self) -> str:
        """As `12.3 [11.8, 12.9]`."""
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def paired_ratio(fast: Sequence[float], naive: Sequence[float], seed: int = 0) -> Ratio:
    """The ratio fast / naive of rates measured pair by pair.

    Args:
        fast: rates, one a pair.
        naive: rates of the same pairs.
        seed: of the bootstrap over pairs (percentile interval of the median, 10,000 resamples).

    Raises:
        ValueError: no pairs, or not as many on one side as on the other.
    """
    if len(fast) != len(naive) or not fast:
        raise ValueError(f"ratio: {len(fast)} fast and {len(naive)} naive measurements; give pairs, at least one")
    ratio_N = np.array(fast) / np.array(naive)
    low, high, spread = float(ratio_N.min()), float(ratio_N.max()), "min-max"
    if len(ratio_N) >= ENOUGH:
        drawn_RN = np.random.default_rng(seed).choice(ratio_N, size=(RESAMPLES, len(ratio_N)))
        low, high = (float(end) for end in np.quantile(np.median(drawn_RN, axis=1), (0.025, 0.975)))
        spread = "95% bootstrap"
    return Ratio(median=float(np.median(ratio_N)), low=low, high=high, pairs=len(ratio_N), spread=spread)
