"""Credits for the tests of samplers."""

from __future__ import annotations

import numpy as np

from msgrpo_lab.types import Credit


def credit_of(adv, *, returns=None, success=None):
    """One-turn episodes. Unless given, returns are the advantages, and success is a return above 0."""
    adv = np.array(adv, dtype=float)
    returns = adv if returns is None else np.array(returns, dtype=float)
    return Credit(
        turn_adv=adv[:, None],
        turn_mask=np.ones((adv.size, 1), dtype=bool),
        episode_adv=adv,
        episode_return=returns,
        episode_success=returns > 0.0 if success is None else np.array(success, dtype=bool),
    )


def frequency(sampler, credit, group_index, count, *, draws=4000, seed=0):
    """How often each episode is drawn, on average; the standard error is at most 0.5/√draws without replacement."""
    rng, drawn = np.random.default_rng(seed), np.zeros(credit.episode_adv.size)
    for _ in range(draws):
        np.add.at(drawn, sampler(credit, group_index, count, rng).index, 1)
    return drawn / draws
