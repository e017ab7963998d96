"""The heap keeps what is freed, where the C library can be told to."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from msgrpo_lab.training import heap

TOUCH_AGAIN = """
import resource, sys
import torch
from msgrpo_lab.training.heap import keep_freed_memory
assert not {keep} or keep_freed_memory()
for _ in range(12):  # the first ones find where in the heap it fits
    torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    done = subprocess.run(
        [sys.executable, "-c", TOUCH_AGAIN.format(keep=keep)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library has no mallopt")
def test_a_large_tensor_made_again_costs_no_page_faults():
    without = faults(keep=False)
    if without == 0:
        pytest.skip("this system counts no page faults")
    assert faults(keep=True) < without / 10


def test_a_library_without_the_switch_is_told_nothing(monkeypatch, caplog):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    with caplog.at_level("INFO"):
        assert not heap.keep_freed_memory()
    assert sys.platform != "linux" or "cannot be told" in caplog.text
