"""The number type is the one whose products were timed to be faster, and a resumed run keeps its own."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from msgrpo_lab.lap import precision as measured
from msgrpo_lab.lap.build import build_policy, outline_model
from msgrpo_lab.lap.precision import MARGIN, ProductSpeed, choose_precision, product_speed
from msgrpo_lab.lap.sources import RandomLlama


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_type_that_is_asked_for_is_not_measured(precision: Any, dtype: torch.dtype) -> None:
    assert choose_precision(precision, None) == (dtype, None)


@pytest.mark.parametrize(
    ("bfloat16", "dtype"),
    [(420.0, torch.bfloat16), (200.0, torch.float32), (118.0, torch.float32), (200 * MARGIN, torch.bfloat16)],
)
def test_the_faster_type_is_taken_and_a_tie_is_float32(
    monkeypatch: pytest.MonkeyPatch, bfloat16: float, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(measured, "product_speed", lambda *_: ProductSpeed(200.0, bfloat16))
    chosen = choose_precision("auto", LlamaConfig(hidden_size=64, intermediate_size=96))
    assert (chosen.dtype, chosen.name) == (dtype, str(dtype).removeprefix("torch."))
    assert chosen.speed == ProductSpeed(200.0, bfloat16)


def test_the_models_own_shapes_are_measured_and_a_large_one_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(measured, "product_speed", lambda *shape: seen.append(shape) or ProductSpeed(1.0, 2.0))
    choose_precision("auto", LlamaConfig(hidden_size=576, intermediate_size=1536))
    choose_precision("auto", LlamaConfig(hidden_size=8192, intermediate_size=29568))
    choose_precision("auto", None)
    assert seen == [(576, 1536), (4096, 4096), (1024, 4096)]


def test_the_measurement_is_short_told_in_one_line_and_made_once(caplog: pytest.LogCaptureFixture) -> None:
    product_speed.cache_clear()
    started = time.perf_counter()
    with caplog.at_level(logging.INFO):
        first = product_speed(128, 384)
        second = product_speed(128, 384)
    assert time.perf_counter() - started < 2.0  # 0.05 s on an idle core
    assert first is second
    assert min(first) > 0
    (line,) = caplog.messages
    assert line.startswith("model.precision=auto: products of 512 x 128 x 384 at ")
    assert line.endswith("is taken")


def test_policy_and_plan_take_the_same_type(monkeypatch: pytest.MonkeyPatch) -> None:
    source = RandomLlama(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2)
    for bfloat16, dtype in ((3.0, torch.bfloat16), (0.5, torch.float32)):
        speed = ProductSpeed(1.0, bfloat16)
        monkeypatch.setattr(measured, "product_speed", lambda *_, speed=speed: speed)
        policy = build_policy(source=source, precision="auto", lora_rank=2)
        assert (policy.compute_dtype, policy.product_speed) == (dtype, speed)
        assert outline_model(source=source, precision="auto", lora_rank=2).dtype == dtype
