"""Machines that hours are given for: their data sheets, and how much of them this program is taken to use."""

from __future__ import annotations

from dataclasses import dataclass, replace

Range = tuple[float, float]
"""Lowest and highest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A machine that one job runs on."""

    name: str
    peak_tflops: float
    """Dense matrix products a second, in bfloat16 with float32 sums where it has them, TFLOP/s."""
    bandwidth_gbs: float
    """Of its memory, GB/s."""
    memory_gb: float | None
    """GB (10^9 bytes); None: that of the machine which plans."""
    utilisation: Range
    """Share of the peak that updates and the reading of prompts reach (model operations, nothing counted twice)."""
    bandwidth_share: Range
    """Share of the bandwidth that a step of decoding reaches while it reads the weights."""
    layer_call_ms: Range
    """Least time of one layer in one call, forward, however few its tokens; thrice that in an update."""
    measured: bool
    """Whether the utilisation was measured with this program on such a machine."""
    source: str


GPU_SHARE: Range = (0.05, 0.30)
GPU_BANDWIDTH: Range = (0.30, 0.80)
GPU_CALL_MS: Range = (0.3, 1.0)
UNMEASURED = "peaks of the data sheets; nothing of this program was measured on a GPU"


def _gpu(name: str, peak_tflops: float, bandwidth_gbs: float, memory_gb: float) -> Device:
    return Device(
        name=name,
        peak_tflops=peak_tflops,
        bandwidth_gbs=bandwidth_gbs,
        memory_gb=memory_gb,
        utilisation=GPU_SHARE,
        bandwidth_share=GPU_BANDWIDTH,
        layer_call_ms=GPU_CALL_MS,
        measured=False,
        source=UNMEASURED,
    )


GPUS = (
    _gpu("H200", 989.0, 4800.0, 141.0),
    _gpu("H100", 989.0, 3350.0, 80.0),
    _gpu("A100-80G", 312.0, 2039.0, 80.0),
    _gpu("L40S", 362.0, 864.0, 48.0),
    _gpu("RTX 4090", 165.0, 1008.0, 24.0),
)
"""SXM modules of H200, H100 and A100; peaks without sparsity, in bfloat16 with float32 sums."""

CPU_BFLOAT16 = Device(
    name="2-core CPU",
    peak_tflops=2.6,
    bandwidth_gbs=30.0,
    memory_gb=None,
    utilisation=(0.075, 0.10),
    bandwidth_share=(0.3, 0.8),
    layer_call_ms=(0.2, 0.6),
    measured=True,
    source="docs/results/speed.md: two Xeon cores with AMX, bfloat16, SmolLM2",
)
CPU_FLOAT32 = Device(
    name="2-core CPU",
    peak_tflops=0.33,
    bandwidth_gbs=30.0,
    memory_gb=None,
    utilisation=(0.26, 0.42),
    bandwidth_share=(0.3, 0.8),
    layer_call_ms=(0.2, 0.6),
    measured=True,
    source="rollouts and updates of SmolLM2 on two Xeon cores without AMX, float32: 90 to 140 GFLOP/s, where products "
    "of 2048³ reach 170; the peak is the cores' arithmetic",
)
CPU_FLOAT32_SMALL = replace(
    CPU_FLOAT32,
    utilisation=(0.10, 0.17),
    source="updates of `tiny` on two Xeon cores, float32: 34 to 55 GFLOP/s; the peak is the cores' arithmetic",
)
SMALL_HIDDEN = 256
"""Hidden width up to which a model is taken to be as `tiny`, whose matrices are too small for a product to be fast."""


def cpu(item: int, hidden: int) -> Device:
    """The CPU that was measured, for numbers of `item` bytes and a model's hidden width."""
    if item == 2:
        return CPU_BFLOAT16
    return CPU_FLOAT32 if hidden > SMALL_HIDDEN else CPU_FLOAT32_SMALL
