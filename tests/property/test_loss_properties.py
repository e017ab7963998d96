"""The loss is one number, however the batch is laid out, ordered or cut; and it is the paper's formula."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_made import EVERY_LOSS, METHODS, REDUCTIONS, by_the_formula, evaluate, random_batch

from msgrpo_lab.loss import MSGRPOLoss, exp_tangent, k3, ms_grpo_loss, sum_stats

SEEDS = st.integers(0, 2**32 - 1)


@EVERY_LOSS
@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_it_is_the_papers_formula(loss, seed):
    logp, entropy, batch = random_batch(seed)
    value, gradient = by_the_formula(logp, entropy, batch, loss)
    stats, grad, _ = evaluate(loss, logp, entropy, batch)
    assert stats[0].item() == pytest.approx(value, abs=1e-10)
    torch.testing.assert_close(grad, gradient, rtol=0, atol=1e-10)


@EVERY_LOSS
@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_sample_order_does_not_matter(loss, seed):
    logp, entropy, batch = random_batch(seed)
    order = torch.tensor(np.random.default_rng(seed).permutation(logp.shape[0]))
    value, grad, entropy_grad = evaluate(loss, logp, entropy, batch)
    moved, moved_grad, moved_entropy_grad = evaluate(loss, logp[order], entropy[order], batch.select(order))
    torch.testing.assert_close(moved, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved_grad, grad[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(moved_entropy_grad, entropy_grad[order], rtol=0, atol=1e-12)


@EVERY_LOSS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(seed=SEEDS, parts=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_micro_batches_add_up(loss, dtype, seed, parts):
    logp, entropy, batch = random_batch(seed, dtype)
    whole, grad, entropy_grad = evaluate(loss, logp, entropy, batch)
    part_of = torch.tensor(np.random.default_rng(seed).integers(parts, size=logp.shape[0]))
    logp_leaf, entropy_leaf = logp.clone().requires_grad_(), entropy.clone().requires_grad_()
    stats = []
    for part in range(parts):  # parts cut through episodes, and may be empty
        rows = torch.nonzero(part_of == part).flatten()
        stats.append(loss(logp_leaf[rows], entropy_leaf[rows], batch.select(rows)))
        stats[-1].loss.backward()
    torch.testing.assert_close(torch.stack(sum_stats(stats)).detach(), whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(logp_leaf.grad, grad, rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy_leaf.grad, entropy_grad, rtol=0, atol=1e-6)


@EVERY_LOSS
@given(seed=SEEDS, before=st.integers(0, 4), after=st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_padding_on_either_side_does_not_matter(loss, seed, before, after):
    logp, entropy, batch = random_batch(seed)

    def pad(x_SL, fill):
        return torch.nn.functional.pad(x_SL, (before, after), value=fill)

    padded = replace(
        batch,
        input_ids=pad(batch.input_ids, 0),
        attention_mask=pad(batch.attention_mask, False),
        completion_mask=pad(batch.completion_mask, False),
        old_logprobs=pad(batch.old_logprobs, 0.0),
        ref_logprobs=pad(batch.ref_logprobs, 0.0),
    )
    value, grad, _ = evaluate(loss, logp, entropy, batch)
    moved, moved_grad, _ = evaluate(loss, pad(logp, -math.inf), pad(entropy, math.nan), padded)
    torch.testing.assert_close(moved, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved_grad[:, before : before + 8], grad, rtol=0, atol=1e-12)
    assert moved_grad.count_nonzero() == grad.count_nonzero()


@EVERY_LOSS
@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_rolling_a_row_does_not_matter(loss, seed):
    # Each row's completion stands somewhere else: the loss knows tokens by the mask, not by their column.
    logp, entropy, batch = random_batch(seed)
    shift = np.random.default_rng(seed).integers(8, size=logp.shape[0])

    def roll(x_SL):
        return torch.stack([row.roll(int(n)) for row, n in zip(x_SL, shift, strict=True)])

    rolled = replace(
        batch,
        completion_mask=roll(batch.completion_mask),
        old_logprobs=roll(batch.old_logprobs),
        ref_logprobs=roll(batch.ref_logprobs),
    )
    value, grad, _ = evaluate(loss, logp, entropy, batch)
    moved, moved_grad, _ = evaluate(loss, roll(logp), roll(entropy), rolled)
    torch.testing.assert_close(moved, value, rtol=0, atol=1e-12)
    torch.testing.assert_close(moved_grad, roll(grad), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("method", ["ms_grpo", "reinforce"])  # CISPO's stop-gradient is none, GSPO has far kinks
@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_gradient_is_the_finite_difference(method, reduction, seed):
    logp, entropy, batch = random_batch(seed)
    loss = METHODS[method](reduction=reduction, constant=5.0, beta=0.1)
    _, grad, _ = evaluate(loss, logp, entropy, batch)
    step = 1e-6
    ratio = (logp - batch.old_logprobs).exp()
    near_kink = ((ratio - 0.8).abs() < 1e-4) | ((ratio - 1.2).abs() < 1e-4)
    for s, k in torch.nonzero(batch.completion_mask & ~near_kink)[:10].tolist():
        up, down = logp.clone(), logp.clone()
        up[s, k] += step
        down[s, k] -= step
        difference = loss(up, entropy, batch).loss - loss(down, entropy, batch).loss
        assert grad[s, k].item() == pytest.approx(difference.item() / (2 * step), abs=1e-7)


@pytest.mark.parametrize("method", ["gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_before_the_policy_has_moved_all_losses_have_one_gradient(method, reduction, seed):
    _, entropy, batch = random_batch(seed)
    arguments = {"reduction": reduction, "constant": 5.0, "beta": 0.1}
    stats, grad, _ = evaluate(METHODS[method](**arguments), batch.old_logprobs, entropy, batch)
    _, expected, _ = evaluate(MSGRPOLoss(**arguments), batch.old_logprobs, entropy, batch)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert stats[4].item() == 0.0  # clip_frac


@pytest.mark.parametrize("method", METHODS)
@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_losses_differ_in_the_surrogate_alone(method, seed):
    logp, entropy, batch = random_batch(seed)
    one, other = (make(beta=0.1)(logp, entropy, batch) for make in (METHODS[method], METHODS["ms_grpo"]))
    for field in ("kl", "entropy", "ratio_mean", "approx_kl"):
        assert getattr(one, field).item() == getattr(other, field).item()
    assert (one.loss - one.policy_loss).item() == pytest.approx((other.loss - other.policy_loss).item(), abs=1e-12)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_one_token_sequences_make_gspo_ms_grpo(seed):
    logp, entropy, batch = random_batch(seed)
    batch = replace(
        batch, completion_mask=(torch.arange(8) == 3).expand_as(batch.completion_mask), num_tokens=logp.shape[0]
    )
    arguments = {"eps_low": 0.1, "eps_high": 0.2}
    for one, other in zip(
        evaluate(METHODS["gspo"](**arguments), logp, entropy, batch),
        evaluate(MSGRPOLoss(**arguments), logp, entropy, batch),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_cispo_without_bounds_has_the_gradient_of_the_unclipped_ratio(seed):
    logp, entropy, batch = random_batch(seed)
    _, grad, _ = evaluate(METHODS["cispo"](eps_low=1.0, eps_high=1e6), logp, entropy, batch)
    _, expected, _ = evaluate(MSGRPOLoss(eps_low=1.0, eps_high=1e6), logp, entropy, batch)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_on_policy_the_policy_loss_is_minus_the_weighted_mean_advantage(seed):
    _, entropy, batch = random_batch(seed)
    batch = replace(batch, completion_mask=batch.completion_mask | (torch.arange(8) == 7))  # no empty completion
    stats = MSGRPOLoss()(batch.old_logprobs, entropy, batch)
    # Each episode's advantage is the same on all its turns, so the mean over turns and tokens is the advantage.
    first = batch.turn == 0
    expected = -(batch.weight[first] * batch.advantage[first]).sum() / batch.num_episodes
    assert stats.policy_loss.item() == pytest.approx(expected.item(), abs=1e-12)
    assert stats.ratio_mean.item() == pytest.approx(1.0, abs=1e-12)
    assert stats.clip_frac.item() == 0.0
    assert stats.approx_kl.item() == pytest.approx(0.0, abs=1e-12)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_an_episodes_share_does_not_grow_with_its_length_in_sequence_reduction(seed):
    # The sum of |gradient| over an episode's tokens, on policy, is |A| weight/K however many turns and tokens it has.
    _, _, batch = random_batch(seed)
    batch = replace(batch, completion_mask=batch.completion_mask | (torch.arange(8) == 7))
    logp = batch.old_logprobs.clone().requires_grad_()
    MSGRPOLoss(entropy=0.0)(logp, None, batch).loss.backward()
    share = torch.zeros(batch.num_episodes, dtype=logp.dtype).index_add(0, batch.episode, logp.grad.abs().sum(dim=1))
    first = batch.turn == 0
    expected = (batch.advantage[first] * batch.weight[first]).abs() / batch.num_episodes
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reduction", ["token", "dr_grpo"])
def test_a_tokens_share_does_not_shrink_with_its_completion_in_the_other_reductions(reduction):
    # One token and three tokens, same advantage: every token has the same gradient, unlike in `sequence`.
    mask = torch.tensor([[True, False, False], [True, True, True]])
    old, ones = torch.zeros(2, 3), torch.ones(2)
    gradients = {}
    for name in (reduction, "sequence"):
        logp = old.clone().requires_grad_()
        ms_grpo_loss(
            logp,
            old,
            None,
            ones,
            ones,
            mask,
            num_turns=torch.ones(2, dtype=torch.long),
            num_episodes=2,
            num_tokens=4,
            constant=3.0,
            reduction=name,
        ).loss.backward()
        gradients[name] = logp.grad[mask].abs()
    assert gradients[reduction].unique().numel() == 1
    assert gradients["sequence"][0].item() == pytest.approx(3 * gradients["sequence"][1].item())


@given(seed=SEEDS, factor=st.floats(0.1, 10.0))
@settings(max_examples=30, deadline=None)
def test_loss_is_linear_in_the_weight(seed, factor):
    logp, entropy, batch = random_batch(seed)
    value = MSGRPOLoss()(logp, entropy, batch).loss
    scaled = MSGRPOLoss()(logp, entropy, replace(batch, weight=factor * batch.weight)).loss
    assert scaled.item() == pytest.approx(factor * value.item(), abs=1e-10)


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_clipping_never_lowers_the_loss(seed):
    logp, entropy, batch = random_batch(seed)
    clipped = MSGRPOLoss()(logp, entropy, batch).policy_loss
    free = MSGRPOLoss(eps_low=1.0, eps_high=1e6)(logp, entropy, batch).policy_loss
    assert clipped.item() >= free.item() - 1e-12


@given(st.floats(-50, 0), st.floats(-50, 0))
def test_k3_is_never_negative(logp, ref_logp):
    value = k3(torch.tensor(logp, dtype=torch.float64), torch.tensor(ref_logp, dtype=torch.float64)).item()
    assert value >= -1e-12
    assert (value < 1e-9) or logp != ref_logp


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_k3_is_an_unbiased_estimate_of_the_kl(seed):
    # Σ_y π(y) k3(y) = Σ_y π(y) (log π(y) − log π_ref(y)), exactly, over a whole distribution.
    rng = np.random.default_rng(seed)
    logp, ref = (torch.tensor(rng.normal(size=9)).log_softmax(dim=0) for _ in range(2))
    expected = (logp.exp() * (logp - ref)).sum()
    assert (logp.exp() * k3(logp, ref)).sum().item() == pytest.approx(expected.item(), abs=1e-12)


@given(st.floats(-30, 60), st.floats(-30, 60))
def test_exp_tangent_is_increasing_and_never_above_exp(x, y):
    low, high = sorted((x, y))
    a, b = (exp_tangent(torch.tensor(v, dtype=torch.float64)).item() for v in (low, high))
    assert a <= b
    assert b <= math.exp(high) * (1 + 1e-12)


def test_score_function_gradient_of_a_softmax_policy():
    # On policy, −∂loss/∂logits summed over all actions with probability weights is the true policy gradient
    # π_a (A_a − Σ_b π_b A_b), which is what a REINFORCE step must estimate.
    logits = torch.tensor([0.2, -0.4, 1.0], dtype=torch.float64, requires_grad=True)
    adv = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logp = logits.log_softmax(dim=0)
    prob = logp.exp().detach()
    ms_grpo_loss(
        logp[:, None],
        logp.detach()[:, None],
        None,
        adv,
        3 * prob,
        torch.ones(3, 1, dtype=torch.bool),
        num_turns=torch.ones(3, dtype=torch.long),
        num_episodes=3,
    ).loss.backward()
    torch.testing.assert_close(-logits.grad, prob * (adv - (prob * adv).sum()), rtol=0, atol=1e-12)
