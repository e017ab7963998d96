"""GSPO, CISPO and REINFORCE on one small batch, values and gradients worked out by hand.

    sample  episode  turns T  A   π_old          ρ              log π_θ
    0       0        2        1   e⁻¹, e⁻²       4, 1/4         −1 + ln 4, −2 − ln 4
    1       0        2        1   e⁻¹            3/2            −1 + ln 3/2
    2       1        1        −2  e⁻³, e⁻¹       1/2, 1/8       −3 − ln 2, −1 − 3 ln 2

|B| = 2, so in `sequence` reduction a token of sample s counts 1/(|y| T |B|): 1/8, 1/4, 1/4; in `token` 1/5.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from msgrpo_lab.loss import CISPOLoss, GSPOLoss, MSGRPOLoss, ReinforceLoss
from msgrpo_lab.loss.gspo import sequence_ratio
from msgrpo_lab.types import TrainBatch

MASK = torch.tensor([[True, True], [True, False], [True, True]])
OLD = torch.tensor([[-1.0, -2.0], [-1.0, 0.0], [-3.0, -1.0]], dtype=torch.float64)
RATIO = torch.tensor([[4.0, 0.25], [1.5, 1.0], [0.5, 0.125]], dtype=torch.float64)
LN2, LN3 = math.log(2.0), math.log(3.0)
BATCH = TrainBatch(
    input_ids=torch.zeros(3, 2, dtype=torch.long),
    attention_mask=MASK,
    completion_mask=MASK,
    old_logprobs=OLD,
    ref_logprobs=None,
    advantage=torch.tensor([1.0, 1.0, -2.0], dtype=torch.float64),
    weight=torch.ones(3, dtype=torch.float64),
    num_turns=torch.tensor([2, 2, 1]),
    episode=torch.tensor([0, 0, 1]),
    turn=torch.tensor([0, 1, 0]),
    num_episodes=2,
    num_tokens=5,
)


def evaluated(loss, batch=BATCH, ratio=RATIO):
    logp = (OLD + ratio.log()).requires_grad_()
    stats = loss(logp, None, batch)
    stats.loss.backward()
    return stats, logp.grad


def expect(grad, expected):
    torch.testing.assert_close(grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


# --- REINFORCE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reduction", "token_shares"),
    [("sequence", (1 / 8, 1 / 4, 1 / 4)), ("token", (1 / 5, 1 / 5, 1 / 5)), ("dr_grpo", (1 / 20, 1 / 20, 1 / 20))],
)
def test_reinforce_by_hand(reduction, token_shares):
    # Σ log π: −3, −1 + ln 3 − ln 2, −4 − 4 ln 2. dr_grpo: 1/(|B| · 10).
    stats, grad = evaluated(ReinforceLoss(reduction=reduction, constant=10.0, entropy=0.0))
    a, b, c = token_shares
    value = a * -3 + b * (-1 + LN3 - LN2) - 2 * c * (-4 - 4 * LN2)
    assert stats.loss.item() == pytest.approx(-value, abs=1e-12)
    expect(grad, [[-a, -a], [-b, 0.0], [2 * c, 2 * c]])
    assert stats.clip_frac.item() == 0.0


def test_reinforce_does_not_know_the_old_policy():
    other = replace(BATCH, old_logprobs=OLD - 1.0)
    logp = (OLD + RATIO.log()).requires_grad_()
    ReinforceLoss(entropy=0.0)(logp, None, other).loss.backward()
    expect(logp.grad, [[-1 / 8, -1 / 8], [-1 / 4, 0.0], [1 / 2, 1 / 2]])


# --- CISPO ---------------------------------------------------------------------------------------------------------


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    # ceiling 1 + 1 = 2, no floor: weights 2, 1/4 | 3/2 | 1/2, 1/8; the first is bounded.
    # J = 1/8 (2 (−1 + 2 ln 2) + ¼ (−2 − 2 ln 2)) + 1/4 · 3/2 (−1 + ln 3 − ln 2) − 2/4 (½ (−3 − ln 2) + ⅛ (−1 − 3 ln 2))
    stats, grad = evaluated(CISPOLoss(eps_high=1.0, entropy=0.0))
    value = (-2.5 + 3.5 * LN2) / 8 + 0.375 * (-1 + LN3 - LN2) - 0.5 * (-1.625 - 0.875 * LN2)
    assert stats.loss.item() == pytest.approx(-value, abs=1e-12)
    expect(grad, [[-2 / 8, -0.25 / 8], [-1.5 / 4, 0.0], [2 * 0.5 / 4, 2 * 0.125 / 4]])
    # One of two tokens of a turn of two, of an episode of two: ½ · ½ · ½.
    assert stats.clip_frac.item() == pytest.approx(1 / 8, abs=1e-12)


def test_cispo_with_a_floor():
    # weights in [0.3, 2]: 2, 0.3 | 1.5 | 0.5, 0.3; bounded: both of sample 0, the second of sample 2.
    stats, grad = evaluated(CISPOLoss(eps_low=0.7, eps_high=1.0, entropy=0.0))
    expect(grad, [[-2 / 8, -0.3 / 8], [-1.5 / 4, 0.0], [2 * 0.5 / 4, 2 * 0.3 / 4]])
    assert stats.clip_frac.item() == pytest.approx(1 / 4 + 1 / 4, abs=1e-12)


def test_cispo_keeps_the_gradient_that_ms_grpo_clips():
    # ρ = 4 with A = 1 is past MS-GRPO's clip and ρ = 1/8 with A = −2 as well: their gradients die there only.
    _, clipped = evaluated(MSGRPOLoss(entropy=0.0))
    _, kept = evaluated(CISPOLoss(entropy=0.0))
    assert clipped[0, 0] == 0.0
    assert clipped[2, 1] == 0.0
    assert kept[0, 0].item() == pytest.approx(-4 / 8)
    assert kept[2, 1].item() == pytest.approx(2 * 0.125 / 4)


def test_cispos_default_ceiling_is_five_and_it_has_no_floor():
    ratio = torch.tensor([[8.0, 1e-6], [5.0, 1.0], [4.9, 6.0]], dtype=torch.float64)
    _, grad = evaluated(CISPOLoss(entropy=0.0), ratio=ratio)
    expect(grad, [[-5 / 8, -1e-6 / 8], [-5 / 4, 0.0], [2 * 4.9 / 4, 2 * 5 / 4]])


# --- GSPO ----------------------------------------------------------------------------------------------------------


def test_sequence_ratio_is_the_geometric_mean():
    # √(4 · 1/4) = 1, 3/2, √(1/16) = 1/4; an empty sequence has 1.
    log_ratio = RATIO.log().masked_fill(~MASK, 0.0)
    torch.testing.assert_close(
        sequence_ratio(log_ratio, MASK), torch.tensor([[1.0], [1.5], [0.25]], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert sequence_ratio(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.bool)).item() == 1.0


def test_gspo_by_hand():
    # Range [0.2, 1.6]: terms s A = 1, 3/2, −½; J = ½ [½ (1 + 3/2) − ½] = 3/8.
    # ∂J/∂log π_k = A s/|y| /(T |B|): 1/8 each, 3/8, −2 · ¼/2/2 = −1/8 each.
    stats, grad = evaluated(GSPOLoss(eps_low=0.8, eps_high=0.6, entropy=0.0))
    assert stats.loss.item() == pytest.approx(-3 / 8, abs=1e-12)
    expect(grad, [[-1 / 8, -1 / 8], [-3 / 8, 0.0], [1 / 8, 1 / 8]])
    assert stats.clip_frac.item() == 0.0


def test_gspo_clips_a_sequence_as_a_whole():
    # Range [0.5, 1.2]: sample 1 (3/2, A = 1) and sample 2 (1/4, A = −2) are clipped: J = ½ [½ (1 + 1.2) − 2 · ½].
    # Sample 0 keeps its gradient, though both of its tokens are far outside.
    stats, grad = evaluated(GSPOLoss(eps_low=0.5, eps_high=0.2, entropy=0.0))
    assert stats.loss.item() == pytest.approx(-0.05, abs=1e-12)
    expect(grad, [[-1 / 8, -1 / 8], [0.0, 0.0], [0.0, 0.0]])
    assert stats.clip_frac.item() == pytest.approx(0.5 * (0.5 * 1.0) + 0.5 * 1.0, abs=1e-12)
    # ρ is still the token's: ½ [½ (17/8 + 3/2) + 5/16]
    assert stats.ratio_mean.item() == pytest.approx(0.5 * (0.5 * (2.125 + 1.5) + 0.3125), abs=1e-12)


def test_gspo_keeps_a_bad_sequence_that_got_likelier():
    # A < 0 and s above the range: the minimum keeps the ratio, as the policy must come back down.
    ratio = torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 1.0]], dtype=torch.float64)  # s = 1, 1, 2
    stats, grad = evaluated(GSPOLoss(entropy=0.0), ratio=ratio)
    assert stats.loss.item() == pytest.approx(-(0.5 * 1.0 + 0.5 * -4.0), abs=1e-12)
    expect(grad, [[-1 / 8, -1 / 8], [-1 / 4, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize(("ratio", "clipped"), [(1.00035, False), (1.00045, True)])
def test_gspos_range_is_the_papers(ratio, clipped):
    ratios = torch.ones(3, 2, dtype=torch.float64)
    ratios[1, 0] = ratio
    assert (evaluated(GSPOLoss(entropy=0.0), ratio=ratios)[1][1, 0] == 0.0) == clipped
    ratios[1, 0], ratios[2] = 1.0, 2.0 - (ratio - 1.0) * 0.75 - 1.0  # 3/4 of 4e-4 is 3e-4
    assert (evaluated(GSPOLoss(entropy=0.0), ratio=ratios)[1][2, 0] == 0.0) == clipped


# --- what all share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GSPOLoss, CISPOLoss, ReinforceLoss])
def test_kl_and_entropy_bonus_are_added_to_all(method):
    # r = π_ref/π_θ = 2 on the first token of sample 1, 1 elsewhere: k3 = 2 − ln 2 − 1; H = 0.4 there: share 1/4 each.
    logp = (OLD + RATIO.log()).detach()
    ref = logp.clone()
    ref[1, 0] += LN2
    entropy = torch.zeros(3, 2, dtype=torch.float64)
    entropy[1, 0] = 0.4
    batch = replace(BATCH, ref_logprobs=ref)
    stats = method(beta=0.5, entropy=0.2)(logp, entropy, batch)
    assert stats.kl.item() == pytest.approx((1 - LN2) / 4, abs=1e-12)
    assert stats.entropy.item() == pytest.approx(0.1, abs=1e-12)
    added = 0.5 * (1 - LN2) / 4 - 0.2 * 0.1
    assert stats.loss.item() - stats.policy_loss.item() == pytest.approx(added, abs=1e-12)


@pytest.mark.parametrize("method", [GSPOLoss, CISPOLoss, ReinforceLoss])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_tokens_keep_loss_and_gradient_finite(method, dtype):
    for logp in (-math.inf, -1e6, -200.0, 0.0):
        for old in (-1e4, -30.0, 0.0):
            for advantage in (-2.0, 0.0, 2.0):
                point = torch.tensor([[logp, -0.5]], dtype=dtype, requires_grad=True)
                batch = replace(
                    BATCH.select(torch.tensor([0])),
                    old_logprobs=torch.tensor([[old, -0.5]], dtype=dtype),
                    advantage=torch.tensor([advantage], dtype=dtype),
                )
                stats = method(entropy=0.0)(point, None, batch)
                stats.loss.backward()
                assert all(torch.isfinite(value) for value in stats)
                assert torch.isfinite(point.grad).all()


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (GSPOLoss, {"eps_low": 1.5}, r"loss\.eps_low=1\.5.*\[0, 1\]"),
        (GSPOLoss, {"eps_high": -1e-4}, r"loss\.eps_high=-0\.0001"),
        (CISPOLoss, {"eps_low": -0.1}, r"loss\.eps_low=-0\.1"),
        (CISPOLoss, {"eps_high": math.inf}, r"loss\.eps_high=inf"),
        (CISPOLoss, {"entropy": -1.0}, r"loss\.entropy=-1\.0"),
        (ReinforceLoss, {"beta": math.nan}, r"loss\.beta=nan"),
        (GSPOLoss, {"reduction": "mean"}, r"loss\.reduction='mean'"),
        (ReinforceLoss, {"reduction": "dr_grpo"}, r"loss\.constant=None"),
    ],
)
def test_bad_configuration_is_named_in_one_line(method, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        method(**arguments)
    assert "\n" not in str(error.value)
