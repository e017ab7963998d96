"""Every loss under conf/loss keeps the contract: one interface, whole-batch normalisers, policy gradient at ρ = 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from loss_made import evaluate, random_batch
from omegaconf import OmegaConf

from msgrpo_lab.loss import LossStats, PolicyGradientLoss, sum_stats
from msgrpo_lab.loss.base import reduce_terms

CONF = Path(__file__).resolve().parents[2] / "conf" / "loss"
PATHS = sorted(CONF.glob("*.yaml"))
LOSSES = {
    f"{path.stem}{suffix}": instantiate(OmegaConf.load(path), entropy=0.03, **changes)
    for path in PATHS
    for suffix, changes in (("", {}), ("-kl", {"beta": 0.1}))
}
EVERY_LOSS = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
SEEDS = pytest.mark.parametrize("seed", range(5))


def test_there_are_configured_losses():
    assert {path.stem for path in PATHS} >= {"ms_grpo", "grpo", "dr_grpo", "gspo", "cispo", "reinforce"}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_config_names_every_argument_and_what_all_losses_take(path):
    config = OmegaConf.load(path)
    loss = instantiate(config)
    assert isinstance(loss, PolicyGradientLoss)
    assert set(config) - {"_target_"} == set(type(loss).__dataclass_fields__)
    assert set(config) >= {"beta", "entropy", "reduction", "constant"}
    assert (config.beta, config.entropy) == (0.0, 0.0)  # a comparison of losses compares them alone


@EVERY_LOSS
@SEEDS
def test_only_the_loss_carries_a_gradient_and_all_is_finite(loss, seed):
    logp, entropy, batch = random_batch(seed)
    stats = loss(logp.requires_grad_(), entropy, batch)
    assert [value.requires_grad for value in stats] == [name == "loss" for name in LossStats._fields]
    assert all(value.shape == () and torch.isfinite(value) for value in stats)
    assert 0.0 <= stats.clip_frac.item() <= 1.0


@EVERY_LOSS
@SEEDS
def test_micro_batches_add_up(loss, seed):
    logp, entropy, batch = random_batch(seed)
    whole, grad, _ = evaluate(loss, logp, entropy, batch)
    leaf, stats = logp.clone().requires_grad_(), []
    for rows in torch.tensor_split(torch.tensor(np.random.default_rng(seed).permutation(logp.shape[0])), 3):
        stats.append(loss(leaf[rows], entropy[rows], batch.select(rows)))
        stats[-1].loss.backward()
    torch.testing.assert_close(torch.stack(sum_stats(stats)).detach(), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(leaf.grad, grad, rtol=0, atol=1e-12)


@EVERY_LOSS
@SEEDS
def test_gradient_before_the_policy_has_moved_is_the_policy_gradient(loss, seed):
    # −∂/∂log π of Σ A log π, in the loss's own reduction; the KL's gradient 1 − π_ref/π_θ on top.
    _, entropy, batch = random_batch(seed)
    stats, grad, _ = evaluate(loss, batch.old_logprobs, entropy, batch)
    logp = batch.old_logprobs.clone().requires_grad_()
    kl_slope = 1.0 - (batch.ref_logprobs - batch.old_logprobs).exp()
    reduce_terms(
        logp * (batch.advantage[:, None] - loss.beta * kl_slope),
        batch.weight,
        batch.completion_mask,
        num_turns=batch.num_turns,
        num_episodes=batch.num_episodes,
        reduction=loss.reduction,
        num_tokens=batch.num_tokens,
        constant=loss.constant,
    ).backward()
    torch.testing.assert_close(grad, -logp.grad, rtol=0, atol=1e-12)
    assert stats[LossStats._fields.index("clip_frac")] == 0.0


@EVERY_LOSS
@SEEDS
def test_no_advantage_no_policy_gradient(loss, seed):
    logp, entropy, batch = random_batch(seed)
    nothing = replace(batch, advantage=torch.zeros_like(batch.advantage), ref_logprobs=logp)
    stats, grad, _ = evaluate(loss, logp, entropy, nothing)
    assert (grad == 0.0).all()
    assert stats[LossStats._fields.index("policy_loss")] == 0.0
    assert stats[LossStats._fields.index("clip_frac")] == 0.0


@EVERY_LOSS
@SEEDS
def test_nothing_flows_off_the_completions(loss, seed):
    logp, entropy, batch = random_batch(seed)
    dirty = logp.masked_fill(~batch.completion_mask, float("nan"))
    value, grad, entropy_grad = evaluate(loss, logp, entropy, batch)
    moved, moved_grad, moved_entropy_grad = evaluate(loss, dirty, entropy, batch)
    assert torch.equal(moved, value)
    assert torch.equal(moved_grad, grad)
    assert torch.equal(moved_entropy_grad, entropy_grad)
    assert (moved_grad[~batch.completion_mask] == 0.0).all()


@EVERY_LOSS
def test_an_entropy_bonus_without_the_entropy_is_refused(loss):
    logp, _, batch = random_batch(0)
    with pytest.raises(ValueError, match=r"loss\.entropy=0\.03 needs entropy_SL"):
        loss(logp, None, batch)
