"""The C library's heap, told to keep what is freed.

By default glibc gives every block above some megabytes back to the system as soon as it is freed, and asks for it again
a moment later; each of its pages is then a page fault. On a CPU the tensors of a model are such blocks, and the faults
cost about as much as the computing.
"""

from __future__ import annotations

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

# glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_GROW_BY = 64 * 2**20
"""Bytes by which the heap grows at least."""


def keep_freed_memory() -> bool:
    """Tells glibc to take large blocks from the heap and never to give the heap's end back to the system.

    The process holds on to its peak; its peak is not raised by more than fragmentation. Returns whether it could be
    told: other C libraries have no such switch, and keep their own ways.
    """
    if sys.platform != "linux":
        return False
    tune = getattr(ctypes.CDLL(None), "mallopt", None)
    told = tune is not None and all(
        tune(key, value) for key, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _GROW_BY))
    )
    if not told:
        log.info("the C library's heap cannot be told to keep freed memory; large tensors cost page faults")
    return told
