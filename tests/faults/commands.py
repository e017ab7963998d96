"""Real training processes that start at once: forked from a server that has imported the libraries, and nothing more.

Most of a short command's time goes into imports. The fork server of `multiprocessing` does them once, in a process
without threads, and each command is then a process of its own: it runs `msgrpo_lab.train.main`, has its own files, its
own tracking connection and its own exit code, and dies by real signals.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ("preloaded",)
"""Modules beside this file that the server imports."""


def run(argv: Sequence[str], log: str) -> None:
    """What a process does: `python -m msgrpo_lab.train argv`, its output in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from msgrpo_lab.train import main

    sys.argv = ["train.py"]
    main(list(argv))


def start(argv: Sequence[str], log: Path) -> ForkServerProcess:
    """Starts a command. Its `exitcode` is negative after a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(target=run, args=(list(argv), str(log)))
    process.start()
    return process


def finished(argv: Sequence[str], log: Path, timeout_s: float = 300) -> int | None:
    """Runs a command to its end, and returns its exit code."""
    process = start(argv, log)
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"{' '.join(argv)}: not at its end after {timeout_s} s; see {log}")
    return process.exitcode
