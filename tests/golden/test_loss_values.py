"""The MS-GRPO loss on one small batch, worked out by hand.

    sample  episode  turns T  A   ρ                r = π_ref/π        H
    0       0        2        1   1.1  1.5         2    1             0.4  0.2
    1       0        2        1   0.5              0.5                0.6
    2       1        1        −2  0.9  0.7  1.3    1    1    4        0.3  0.9  0.6

With ε = 0.2, min(ρA, clip(ρ)A) is
    0: 1.1, 1.2 (clipped)                       sum 2.3, mean 1.15
    1: 0.5 (below 0.8, but the minimum keeps it) sum 0.5, mean 0.5
    2: −1.8, −1.6 (clipped: −1.6 < −1.4), −2.6   sum −6,  mean −2
"""

from __future__ import annotations

import math

import pytest
import torch

from msgrpo_lab.loss import (
    LossStats,
    MSGRPOLoss,
    exp_tangent,
    k3,
    ms_grpo_loss,
    reduce_terms,
    sum_stats,
)
from msgrpo_lab.types import TrainBatch

MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
RATIO = torch.tensor([[1.1, 1.5, 1.0], [0.5, 1.0, 1.0], [0.9, 0.7, 1.3]], dtype=torch.float64)
REF_RATIO = torch.tensor([[2.0, 1.0, 1.0], [0.5, 1.0, 1.0], [1.0, 1.0, 4.0]], dtype=torch.float64)
ENTROPY = torch.tensor([[0.4, 0.2, 9.0], [0.6, 9.0, 9.0], [0.3, 0.9, 0.6]], dtype=torch.float64)
OLD = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, 0.0, 0.0], [-3.0, -0.25, -1.5]], dtype=torch.float64)
ADVANTAGE = torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64)
ONES = torch.ones(3, dtype=torch.float64)
NUM_TURNS = torch.tensor([2, 2, 1])
NORMALISERS = {"num_turns": NUM_TURNS, "num_episodes": 2, "num_tokens": 6, "constant": 4.0}


def logprobs():
    return (OLD + RATIO.log()).requires_grad_()


def loss_of(logp, weight=ONES, **arguments):
    ref = (logp + REF_RATIO.log()).detach()
    return ms_grpo_loss(logp, OLD, ref, ADVANTAGE, weight, MASK, **(NORMALISERS | arguments))


def train_batch(dtype=torch.float64, **changes):
    shape = MASK.shape
    fields = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": MASK,
        "completion_mask": MASK,
        "old_logprobs": OLD.to(dtype),
        "ref_logprobs": None,
        "advantage": ADVANTAGE.to(dtype),
        "weight": ONES.to(dtype),
        "num_turns": NUM_TURNS,
        "episode": torch.tensor([0, 0, 1]),
        "turn": torch.tensor([0, 1, 0]),
        "num_episodes": 2,
        "num_tokens": 6,
    }
    return TrainBatch(**(fields | changes))


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # J = ½ [½ (1.15 + 0.5) + (−2)] = ½ (0.825 − 2)
        ("sequence", 0.5875),
        # J = (2.3 + 0.5 − 6)/6 = −3.2/6
        ("token", 3.2 / 6),
        # J = −3.2/(2 · 4)
        ("dr_grpo", 0.4),
    ],
)
def test_loss(reduction, expected):
    stats = loss_of(logprobs(), reduction=reduction)
    assert stats.loss.item() == pytest.approx(expected, abs=1e-12)
    assert stats.policy_loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # Weights 2, 2, ½: J = ½ [½ (2.3 + 1) + ½ · (−2)] = ½ (1.65 − 1)
        ("sequence", -0.325),
        # J = (4.6 + 1 − 3)/6
        ("token", -2.6 / 6),
        ("dr_grpo", -2.6 / 8),
    ],
)
def test_weighted_loss(reduction, expected):
    weight = torch.tensor([2.0, 2.0, 0.5], dtype=torch.float64)
    assert loss_of(logprobs(), weight, reduction=reduction).loss.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # k3(2) = 2 − ln 2 − 1 = 0.30685281944, k3(½) = ½ + ln 2 − 1 = 0.19314718056,
        # k3(4) = 4 − ln 4 − 1 = 1.61370563888
        # ½ [½ (0.15342640972 + 0.19314718056) + 0.53790187963]
        ("sequence", 0.355594337385),
        # (0.30685281944 + 0.19314718056 + 1.61370563888)/6 = 2.11370563888/6
        ("token", 0.352284273147),
        ("dr_grpo", 0.26421320486),
    ],
)
def test_kl_and_its_coefficient(reduction, expected):
    stats = loss_of(logprobs(), reduction=reduction, beta=0.1)
    assert stats.kl.item() == pytest.approx(expected, abs=1e-11)
    assert (stats.loss - stats.policy_loss).item() == pytest.approx(0.1 * expected, abs=1e-11)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        # ½ [½ (0.3 + 0.6) + 0.6]
        ("sequence", 0.525),
        # (0.6 + 0.6 + 1.8)/6
        ("token", 0.5),
        ("dr_grpo", 0.375),
    ],
)
def test_reduce_terms(reduction, expected):
    bonus = reduce_terms(ENTROPY, ONES, MASK, reduction=reduction, **NORMALISERS)
    assert bonus.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("reduction", ["sequence", "token", "dr_grpo"])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_means_are_over_drawn_episodes_whatever_reduction_and_weight(reduction, weight):
    stats = loss_of(logprobs(), weight * ONES, reduction=reduction)
    # Clipped: one of two, none, one of three: ½ [½ (½ + 0) + ⅓]
    assert stats.clip_frac.item() == pytest.approx(7 / 24, abs=1e-12)
    # ½ [½ (1.3 + 0.5) + 2.9/3]
    assert stats.ratio_mean.item() == pytest.approx(0.9333333333333, abs=1e-12)
    # ρ − 1 − ln ρ: 0.00468982, 0.09453489; 0.19314718; 0.00536052, 0.05667494, 0.03763574
    # ½ [½ (0.04961235554 + 0.19314718056) + 0.09967119971/3]
    assert stats.approx_kl.item() == pytest.approx(0.077301750661, abs=1e-9)


def test_without_reference_kl_is_zero():
    stats = ms_grpo_loss(logprobs(), OLD, None, ADVANTAGE, ONES, MASK, **NORMALISERS)
    assert stats.kl.item() == 0.0
    assert stats.entropy.item() == 0.0


def test_only_the_loss_carries_a_gradient():
    stats = loss_of(logprobs(), beta=0.1)
    assert [value.requires_grad for value in stats] == [name == "loss" for name in LossStats._fields]
    assert all(value.shape == () for value in stats)


# --- gradients -----------------------------------------------------------------------------------------------------


def test_gradient_by_hand():
    # ∂loss/∂log π = −ρA/(|y| T K) where the minimum keeps the ratio, 0 where it takes the clipped one:
    # −1.1/8, 0 | −0.5/4 | 1.8/6, 0, 2.6/6
    logp = logprobs()
    loss_of(logp).loss.backward()
    expected = [[-0.1375, 0.0, 0.0], [-0.125, 0.0, 0.0], [0.3, 0.0, 2.6 / 6]]
    torch.testing.assert_close(logp.grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_kl_gradient_by_hand():
    # ∂k3/∂log π = 1 − r, times β = 0.1 over the same normalisers: r − 1 = 1, 0 | −½ | 0, 0, 3
    logp, without = logprobs(), logprobs()
    loss_of(logp, beta=0.1).loss.backward()
    loss_of(without).loss.backward()
    expected = [[-0.1 / 8, 0.0, 0.0], [0.05 / 4, 0.0, 0.0], [0.0, 0.0, -0.3 / 6]]
    torch.testing.assert_close(
        logp.grad - without.grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient"),
    [
        # ε_low = 0.1, ε_high = 0.3; `value` is the term, `gradient` its derivative in log π.
        (1.0, 2.0, 2.0, 2.0),
        (1.29, 2.0, 2.58, 2.58),
        (1.31, 2.0, 2.6, 0.0),  # above, good: clipped
        (0.5, 2.0, 1.0, 1.0),  # below, good: kept, the policy may come back up
        (0.91, -2.0, -1.82, -1.82),
        (0.89, -2.0, -1.8, 0.0),  # below, bad: clipped
        (1.5, -2.0, -3.0, -3.0),  # above, bad: kept, the policy must come back down
        (1.5, 0.0, 0.0, 0.0),
        (0.5, 0.0, 0.0, 0.0),
    ],
)
def test_clip_on_both_sides_for_both_signs(ratio, advantage, value, gradient):
    logp = torch.tensor([[math.log(ratio) - 1.0]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    stats = ms_grpo_loss(
        logp,
        torch.tensor([[-1.0]], dtype=torch.float64),
        None,
        advantage * one,
        one,
        torch.ones(1, 1, dtype=torch.bool),
        num_turns=torch.ones(1, dtype=torch.long),
        num_episodes=1,
        eps_low=0.1,
        eps_high=0.3,
    )
    stats.loss.backward()
    assert -stats.loss.item() == pytest.approx(value, abs=1e-12)
    assert -logp.grad.item() == pytest.approx(gradient, abs=1e-12)
    assert stats.clip_frac.item() == float(gradient == 0.0 and advantage != 0.0)


@pytest.mark.parametrize("advantage", [3.0, -3.0])
def test_on_policy_gradient_is_the_advantage(advantage):
    # ρ = 1 is inside the clip: the first pass is plain policy gradient, −A per token here.
    logp = torch.full((1, 1), -0.7, requires_grad=True)
    one = torch.ones(1)
    ms_grpo_loss(
        logp,
        logp.detach().clone(),
        None,
        advantage * one,
        one,
        torch.ones(1, 1, dtype=torch.bool),
        num_turns=torch.ones(1, dtype=torch.long),
        num_episodes=1,
    ).loss.backward()
    assert logp.grad.item() == pytest.approx(-advantage, abs=1e-6)


# --- k3, exp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logp", "ref_logp", "expected"),
    [
        (-1.0, -1.0, 0.0),
        (-2.0, -1.0, math.e - 2.0),  # r = e: e − 1 − 1
        (-1.0, -2.0, 1.0 / math.e),  # r = 1/e: 1/e + 1 − 1
        (-3.0, -1.0, 4.38905609893065),  # r = e²: e² − 2 − 1
    ],
)
def test_k3(logp, ref_logp, expected):
    value = k3(torch.tensor(logp, dtype=torch.float64), torch.tensor(ref_logp, dtype=torch.float64))
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("x", "value", "slope"),
    [
        (0.0, 1.0, 1.0),
        (1.0, math.e, math.e),
        (19.0, math.exp(19), math.exp(19)),
        (21.0, 2 * math.exp(20), math.exp(20)),  # e²⁰ (1 + 1)
        (1020.0, 1001 * math.exp(20), math.exp(20)),
        (-1e4, 0.0, 0.0),
    ],
)
def test_exp_is_continued_by_its_tangent(x, value, slope):
    point = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    result = exp_tangent(point)
    result.backward()
    assert result.item() == pytest.approx(value, rel=1e-12)
    assert point.grad.item() == pytest.approx(slope, rel=1e-12)


# --- extremes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [-math.inf, math.inf, math.nan, 1e30])
@pytest.mark.parametrize("reduction", ["sequence", "token", "dr_grpo"])
def test_what_stands_off_the_mask_is_never_read(off, reduction):
    clean = logprobs()
    dirty = clean.detach().masked_fill(~MASK, off).requires_grad_()
    old, ref = (x.masked_fill(~MASK, off) for x in (OLD, (clean + REF_RATIO.log()).detach()))
    expected = loss_of(clean, reduction=reduction, beta=0.1)
    stats = ms_grpo_loss(dirty, old, ref, ADVANTAGE, ONES, MASK, beta=0.1, reduction=reduction, **NORMALISERS)
    for value, wanted in zip(stats, expected, strict=True):
        assert value.item() == wanted.item()
    stats.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(dirty.grad, clean.grad, rtol=0, atol=0)
    assert (dirty.grad[~MASK] == 0.0).all()


@pytest.mark.parametrize("off", [-math.inf, math.inf, math.nan])
def test_old_and_reference_off_the_mask_are_never_read(off):
    # The policy's own log-probabilities are finite there: a NaN would reach their gradient through the ratio.
    clean, logp = logprobs(), logprobs()
    old, ref = (x.masked_fill(~MASK, off) for x in (OLD, (clean + REF_RATIO.log()).detach()))
    ms_grpo_loss(logp, old, ref, ADVANTAGE, ONES, MASK, beta=0.1, **NORMALISERS).loss.backward()
    loss_of(clean, beta=0.1).loss.backward()
    torch.testing.assert_close(logp.grad, clean.grad, rtol=0, atol=0)


@pytest.mark.parametrize("off", [-math.inf, math.nan])
def test_entropy_off_the_mask_is_never_read(off):
    entropy = ENTROPY.masked_fill(~MASK, off).requires_grad_()
    bonus = reduce_terms(entropy, ONES, MASK, **NORMALISERS)
    bonus.backward()
    assert bonus.item() == pytest.approx(0.525, abs=1e-12)
    assert (entropy.grad[~MASK] == 0.0).all()


@pytest.mark.parametrize("logp", [-math.inf, -1e6, -200.0, -1e-30, 0.0])
@pytest.mark.parametrize("old_logp", [-1e4, -30.0, 0.0])
@pytest.mark.parametrize("advantage", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_tokens_keep_loss_and_gradient_finite(logp, old_logp, advantage, dtype):
    point = torch.tensor([[logp, -0.5]], dtype=dtype, requires_grad=True)
    stats = ms_grpo_loss(
        point,
        torch.tensor([[old_logp, -0.5]], dtype=dtype),
        torch.tensor([[-0.1, -math.inf]], dtype=dtype),
        torch.tensor([advantage], dtype=dtype),
        torch.ones(1, dtype=dtype),
        torch.ones(1, 2, dtype=torch.bool),
        num_turns=torch.ones(1, dtype=torch.long),
        num_episodes=1,
        beta=0.1,
    )
    stats.loss.backward()
    assert all(torch.isfinite(value) for value in stats)
    assert torch.isfinite(point.grad).all()


def test_a_collapsed_token_is_still_pulled_back_by_the_kl():
    logp = torch.tensor([[-500.0]], requires_grad=True)
    one = torch.ones(1)
    ms_grpo_loss(
        logp,
        torch.tensor([[-500.0]]),
        torch.tensor([[-1.0]]),
        0 * one,
        one,
        torch.ones(1, 1, dtype=torch.bool),
        num_turns=torch.ones(1, dtype=torch.long),
        num_episodes=1,
        beta=0.1,
    ).loss.backward()
    assert logp.grad.item() == pytest.approx(-0.1 * math.exp(20), rel=1e-5)


def test_an_empty_completion_contributes_nothing():
    mask = MASK.clone()
    mask[1] = False
    logp = logprobs()
    stats = ms_grpo_loss(logp, OLD, None, ADVANTAGE, ONES, mask, **NORMALISERS)
    stats.loss.backward()
    # J = ½ [½ (1.15 + 0) − 2]: the empty turn still counts in T.
    assert stats.loss.item() == pytest.approx(0.7125, abs=1e-12)
    assert (logp.grad[1] == 0.0).all()


def test_no_samples_is_zero():
    nothing = torch.zeros(0, 3)
    stats = ms_grpo_loss(
        nothing,
        nothing,
        None,
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(0, 3, dtype=torch.bool),
        num_turns=torch.zeros(0, dtype=torch.long),
        num_episodes=2,
    )
    assert [value.item() for value in stats] == [0.0] * len(stats)


def test_bfloat16_is_computed_in_float32():
    logp = logprobs().detach().to(torch.bfloat16)
    stats = ms_grpo_loss(logp, logp, None, ADVANTAGE.float(), ONES.float(), MASK, **NORMALISERS)
    assert stats.loss.dtype == torch.float32
    # ρ = 1 throughout: J = ½ [½ (1 + 1) − 2] = −½
    assert stats.loss.item() == pytest.approx(0.5, abs=1e-7)


def test_bfloat16_entropy_is_averaged_in_float32():
    # 256 + 1 is 256 in bfloat16: the mean is 128.5 only where the sum is taken in float32.
    entropy = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    ones = torch.ones(1)
    bonus = reduce_terms(entropy, ones, torch.ones(1, 2, dtype=torch.bool), num_turns=torch.tensor([1]), num_episodes=1)
    assert bonus.dtype == torch.float32
    assert bonus.item() == 128.5


# --- statistics ----------------------------------------------------------------------------------------------------


def test_stats_add_up_field_by_field():
    one = LossStats(*(torch.tensor(float(i)) for i in range(7)))
    two = LossStats(*(torch.tensor(10.0 * i) for i in range(7)))
    assert [value.item() for value in sum_stats([one, two])] == [11.0 * i for i in range(7)]


def test_no_stats_cannot_be_added():
    with pytest.raises(ValueError, match="at least one micro-batch"):
        sum_stats([])


# --- the configured loss -------------------------------------------------------------------------------------------


def test_configured_loss_subtracts_the_reduce_terms():
    # 0.5875 − 0.03 · 0.525
    stats = MSGRPOLoss(entropy=0.03)(logprobs(), ENTROPY.clone().requires_grad_(), train_batch())
    assert stats.loss.item() == pytest.approx(0.57175, abs=1e-12)
    assert stats.policy_loss.item() == pytest.approx(0.5875, abs=1e-12)
    assert stats.entropy.item() == pytest.approx(0.525, abs=1e-12)
    assert not stats.entropy.requires_grad


def test_configured_loss_differentiates_the_entropy():
    # −0.03/(|y| T K): 1/8, 1/8 | 1/4 | 1/6 each
    entropy = ENTROPY.clone().requires_grad_()
    MSGRPOLoss(entropy=0.03)(logprobs(), entropy, train_batch()).loss.backward()
    expected = -0.03 * torch.tensor([[1 / 8, 1 / 8, 0], [1 / 4, 0, 0], [1 / 6] * 3], dtype=torch.float64)
    torch.testing.assert_close(entropy.grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("reduction", "expected"), [("sequence", 0.5875), ("token", 3.2 / 6), ("dr_grpo", 0.4)])
def test_configured_loss_passes_every_normaliser_on(reduction, expected):
    loss = MSGRPOLoss(reduction=reduction, constant=4.0, entropy=0.0)
    assert loss(logprobs(), None, train_batch()).loss.item() == pytest.approx(expected, abs=1e-12)


def test_configured_loss_passes_clip_and_kl_on():
    # ε_low = 0.4, ε_high = 0.05: terms 1.05, 1.05 | 0.5 | −1.8, −1.4, −2.6 → ½ [½ (1.05 + 0.5) − 5.8/3]
    logp = logprobs()
    batch = train_batch(ref_logprobs=(logp + REF_RATIO.log()).detach())
    stats = MSGRPOLoss(eps_low=0.4, eps_high=0.05, beta=0.1, entropy=0.0)(logp, None, batch)
    assert stats.policy_loss.item() == pytest.approx(-(0.775 - 5.8 / 3) / 2, abs=1e-12)
    assert stats.loss.item() == pytest.approx(-(0.775 - 5.8 / 3) / 2 + 0.0355594337385, abs=1e-11)


def test_entropy_is_reported_where_it_is_not_rewarded():
    entropy = ENTROPY.clone().requires_grad_()
    stats = MSGRPOLoss(entropy=0.0)(logprobs(), entropy, train_batch())
    assert stats.entropy.item() == pytest.approx(0.525, abs=1e-12)
    stats.loss.backward()
    assert entropy.grad is None


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps_low": 1.5}, r"loss\.eps_low=1\.5.*\[0, 1\]"),
        ({"eps_high": -0.1}, r"loss\.eps_high=-0\.1"),
        ({"beta": -1.0}, r"loss\.beta=-1\.0"),
        ({"entropy": math.inf}, r"loss\.entropy=inf"),
        ({"reduction": "mean"}, r"loss\.reduction='mean'.*sequence, token, dr_grpo"),
        ({"reduction": "dr_grpo"}, r"loss\.constant=None.*dr_grpo"),
        ({"reduction": "dr_grpo", "constant": 0.0}, r"loss\.constant=0\.0"),
    ],
)
def test_bad_configuration_is_named(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        MSGRPOLoss(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "token", "num_tokens": None}, r"num_tokens=None.*reduction=token"),
        ({"reduction": "token", "num_tokens": 0}, r"num_tokens=0"),
        ({"reduction": "dr_grpo", "constant": None}, r"loss\.constant=None.*reduction=dr_grpo"),
        ({"reduction": "mean"}, r"loss\.reduction='mean'"),
        ({"num_episodes": 0}, r"num_episodes=0 must be at least 1"),
    ],
)
def test_missing_normalisers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        loss_of(logprobs(), **arguments)


def test_kl_needs_a_reference():
    with pytest.raises(ValueError, match=r"loss\.beta=0\.1 needs ref_logprobs.*loss\.beta=0"):
        ms_grpo_loss(logprobs(), OLD, None, ADVANTAGE, ONES, MASK, beta=0.1, **NORMALISERS)


def test_entropy_coefficient_needs_the_entropy():
    with pytest.raises(ValueError, match=r"loss\.entropy=0\.03 needs entropy_SL.*loss\.entropy=0"):
        MSGRPOLoss(entropy=0.03)(logprobs(), None, train_batch())


@pytest.mark.parametrize(
    ("position", "wrong"),
    [
        (0, torch.zeros(3)),
        (1, torch.zeros(3, 2)),
        (2, torch.zeros(2, 3)),
        (3, torch.zeros(3, 1)),
        (4, torch.zeros(2)),
        (5, torch.ones(3, 4, dtype=torch.bool)),
        (5, torch.ones(3, 3)),
    ],
)
def test_wrong_shapes_are_refused(position, wrong):
    arguments = [logprobs(), OLD, OLD, ADVANTAGE, ONES, MASK]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=r"must be"):
        ms_grpo_loss(*arguments, **NORMALISERS)


def test_wrong_turn_counts_are_refused():
    with pytest.raises(ValueError, match=r"all must be \[3\]"):
        reduce_terms(OLD, ONES, MASK, num_turns=torch.ones(2), num_episodes=2)
