"""The number type of a policy, by measurement: the one whose products are faster here, at the model's own shapes.

No list of processor features decides it. With AVX-512 BF16 and no AMX, bfloat16 products ran at 2.1 times the rate of
float32 ones on an EPYC (Zen 4), and at 0.7 times on a Xeon.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any, Literal, NamedTuple

import torch
from transformers import PretrainedConfig

log = logging.getLogger(__name__)

Precision = Literal["auto", "float32", "bfloat16"]

ROWS = 512
"""Tokens of the product that is timed: a part of an update's forward pass."""
REPEATS = 5
"""Products of each type; the fastest counts, so that other work on the machine does not."""
WIDEST = 4096
"""Sides of the product at most, so that a large model is answered as quickly as a small one."""
MARGIN = 1.15
"""bfloat16 must be so many times as fast: less is within the noise, and float32 rounds less."""


class ProductSpeed(NamedTuple):
    """Rates of one matrix product in each type, GFLOP/s."""

    float32: float
    bfloat16: float

    @property
    def faster(self) -> torch.dtype:
        """The type to compute in."""
        return torch.bfloat16 if self.bfloat16 >= MARGIN * self.float32 else torch.float32


class ChosenPrecision(NamedTuple):
    """A type, and what it was chosen by."""

    dtype: torch.dtype
    speed: ProductSpeed | None
    """None where nothing was measured: the type was asked for, or a GPU has it."""

    @property
    def name(self) -> Literal["float32", "bfloat16"]:
        """The type as `model.precision` spells it."""
        return "bfloat16" if self.dtype == torch.bfloat16 else "float32"


def choose_precision(precision: Precision, config: PretrainedConfig | None) -> ChosenPrecision:
    """The type that is asked for; for `auto` bfloat16 on a GPU that has it, and on a CPU the faster one.

    Args:
        precision: `model.precision`.
        config: of the model, for its shapes; None measures at 1024 × 4096.
    """
    if precision != "auto":
        return ChosenPrecision(torch.bfloat16 if precision == "bfloat16" else torch.float32, None)
    if torch.cuda.is_available():
        return ChosenPrecision(torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32, None)
    text: Any = None if config is None else config.get_text_config()
    width = int(getattr(text, "hidden_size", 1024))
    inner = int(getattr(text, "intermediate_size", 4 * width))
    speed = product_speed(min(width, WIDEST), min(inner, WIDEST))
    return ChosenPrecision(speed.faster, speed)


@functools.cache
def product_speed(width: int, inner: int) -> ProductSpeed:
    """Times ROWS × `width` times `width` × `inner` in both types, in turn; once a process, some 50 ms."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, width, generator=generator) for rows in (ROWS, inner))
    operands = {dtype: (x.to(dtype), weight.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(operands, float("inf"))
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            for dtype, (left, right) in operands.items():
                started = time.perf_counter()
                torch.nn.functional.linear(left, right)
                if repeat:  # the first one of each type also makes its kernel
                    seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    rate = {dtype: 2 * ROWS * width * inner / 1e9 / taken for dtype, taken in seconds.items()}
    speed = ProductSpeed(rate[torch.float32], rate[torch.bfloat16])
    log.info(
        "model.precision=auto: products of %d x %d x %d at %.0f GFLOP/s in float32, %.0f in bfloat16; %s is taken",
        *(ROWS, width, inner, speed.float32, speed.bfloat16),
        str(speed.faster).removeprefix("torch."),
    )
    return speed
