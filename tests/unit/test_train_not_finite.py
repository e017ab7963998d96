"""What is not finite never reaches the optimiser: the update is not taken, and training goes on."""

from __future__ import annotations

import math

import pytest
import torch
from lab_made import fit, small_lab
from poison_made import At, Poison, infinite_logprob, infinite_loss, nan_gradient

SMALLEST = ("rollout.num_groups=2", "rollout.group_size=2", "sampler.num_episodes=4", "env.horizon=3")


@pytest.mark.parametrize("poison", [infinite_loss, nan_gradient, infinite_logprob])
def test_an_update_that_is_not_finite_is_not_taken(poison: Poison) -> None:
    lab, spoilt = small_lab(*SMALLEST, "update.minibatches=2", "trainer.max_epochs=3"), At(2, poison)
    memory = fit(lab, epochs=3, callbacks=[spoilt])
    assert spoilt.before
    assert all(torch.equal(after, before) for before, after in zip(spoilt.before, spoilt.after, strict=True))
    assert memory.series("train/skipped_update") == [0, 0, 1, 0, 0, 0]
    assert [step for step, metrics in memory.rows if "train/loss" in metrics] == [0, 1, 2, 3, 4, 5], "it counts"
    plain = fit(small_lab(*SMALLEST, "update.minibatches=2", "trainer.max_epochs=3"), epochs=3)
    assert memory.series("train/lr") == plain.series("train/lr"), "the schedule goes on"
    assert memory.series("train/loss")[:2] == plain.series("train/loss")[:2]
    assert all(map(math.isfinite, memory.series("train/loss")[3:]))
    assert not torch.equal(lab.policy.trainable_parameters()[0], spoilt.after[0]), "later updates are taken"
