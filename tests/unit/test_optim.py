"""The learning-rate schedule by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from msgrpo_lab.training.optim import AdamW


def factors(optim: AdamW, total: int, count: int | None = None) -> list[float]:
    return [optim.factor(update, total) for update in range(total if count is None else count)]


@pytest.mark.parametrize(
    ("settings", "total", "expected"),
    [
        ({"schedule": "constant", "warmup_updates": 0}, 3, [1, 1, 1]),
        ({"schedule": "constant", "warmup_updates": 3}, 6, [0.25, 0.5, 0.75, 1, 1, 1]),
        ({"schedule": "linear", "warmup_updates": 0, "final_fraction": 0.0}, 5, [1, 0.75, 0.5, 0.25, 0]),
        ({"schedule": "linear", "warmup_updates": 0, "final_fraction": 0.1}, 4, [1, 0.7, 0.4, 0.1]),
        ({"schedule": "linear", "warmup_updates": 1, "final_fraction": 0.5}, 4, [0.5, 1, 0.75, 0.5]),
        ({"schedule": "cosine", "warmup_updates": 0, "final_fraction": 0.0}, 3, [1, 0.5, 0]),
        (
            {"schedule": "cosine", "warmup_updates": 0, "final_fraction": 0.2},
            5,
            [1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2],
        ),
        ({"schedule": "linear", "warmup_updates": 0, "final_fraction": 0.1}, 1, [1]),
        ({"schedule": "linear", "warmup_updates": 3, "final_fraction": 0.1}, 2, [0.25, 0.5]),  # shorter than warm-up
        ({"schedule": "linear", "warmup_updates": 3, "final_fraction": 0.1}, 4, [0.25, 0.5, 0.75, 1]),
        ({"schedule": "linear", "warmup_updates": 3, "final_fraction": 1.0}, 6, [0.25, 0.5, 0.75, 1, 1, 1]),
    ],
)
def test_rate_of_each_update(settings: dict[str, Any], total: int, expected: list[float]) -> None:
    assert factors(AdamW(**settings), total) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_past_the_last_update_the_rate_stays(schedule: Any) -> None:
    optim = AdamW(schedule=schedule, warmup_updates=0, final_fraction=0.1)
    assert factors(optim, 3, 6)[2:] == pytest.approx([0.1] * 4)


def test_the_first_update_moves() -> None:
    assert AdamW(warmup_updates=10).factor(0, 100) == pytest.approx(1 / 11)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"lr": 0.0}, "optim.lr=0.0: must be above 0"),
        ({"lr": -1.0}, "optim.lr=-1.0: must be above 0"),
        ({"lr": math.nan}, "optim.lr=nan: must be above 0"),
        ({"lr": math.inf}, "optim.lr=inf: must be above 0 and at most 1"),
        ({"betas": (0.9, 1.0)}, "optim.betas=[0.9, 1.0]: each must lie in [0, 1)"),
        ({"betas": (math.nan, 0.9)}, "optim.betas=[nan, 0.9]: each must lie in [0, 1)"),
        ({"eps": -1.0}, "optim.eps=-1.0: must be at least 0"),
        ({"eps": math.nan}, "optim.eps=nan: must be at least 0"),
        ({"weight_decay": -3.0}, "optim.weight_decay=-3.0: must lie in [0, 1]"),
        ({"weight_decay": math.nan}, "optim.weight_decay=nan: must lie in [0, 1]"),
        ({"warmup_updates": -1}, "optim.warmup_updates=-1: must be at least 0"),
        ({"final_fraction": 1.5}, "optim.final_fraction=1.5: must lie in [0, 1]"),
        ({"final_fraction": -0.1}, "optim.final_fraction=-0.1: must lie in [0, 1]"),
    ],
)
def test_values_out_of_range_are_told(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match="optim") as caught:
        AdamW(**settings)
    assert str(caught.value).startswith(error)


def test_optimiser_and_scheduler_carry_the_settings() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optim = AdamW(
        lr=0.1, betas=(0.8, 0.7), eps=1e-4, weight_decay=0.5, warmup_updates=1, schedule="linear", final_fraction=0.0
    )
    optimizer, scheduler = optim.build([parameter], 3)
    (group,) = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.7), 1e-4, 0.5)
    rates = []
    for _ in range(3):
        rates.append(group["lr"])
        parameter.grad = torch.ones(2)
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.05, 0.1, 0.0])


def test_one_step_by_hand() -> None:
    """The first Adam step is lr · sign(gradient), whatever its size; decay is lr · weight_decay · parameter."""
    parameter = torch.nn.Parameter(torch.tensor([2.0, -3.0]))
    optimizer, _ = AdamW(lr=0.1, weight_decay=0.5, warmup_updates=0, schedule="constant").build([parameter], 1)
    parameter.grad = torch.tensor([1e-3, 5.0])
    optimizer.step()
    assert parameter.tolist() == pytest.approx([2 * 0.95 - 0.1, -3 * 0.95 - 0.1], abs=1e-5)
