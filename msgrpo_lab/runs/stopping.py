"""SIGTERM and SIGINT: the batch in flight is dropped, what is finished is kept, the exit code is the signal's."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0
"""A signal that comes again within so many seconds is the same one, told by two senders: a process group and the
sweep that passes it on, or a batch system and its shell."""


class Stopped(SystemExit):
    """A signal told the process to end; the code is 128 + its number, as shells have it: 143 or 130."""

    job_of_sweep: ClassVar[int | None] = None
    """The signal that ended a job in this process. It begins no other, though a sweep's worker is handed the next."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


class Stopping:
    """While it is entered, the first SIGTERM or SIGINT raises `Stopped` in the main thread, and a later one kills.

    Python drops what is raised while it destroys an object. So the signal is remembered too, and `check` raises again;
    training calls it between turns and batches.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        """Takes over the signals, where Python allows it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Stopped` if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002  Python's signature
        if self.signum is not None:
            _kill_if_meant(signum, self._came)
            return
        self.signum, self._came = signum, time.monotonic()
        raise Stopped(signum)


def _kill_if_meant(signum: int, came: float) -> None:
    """What a repeated signal does: nothing within `SAME_S` of the first, which came at `came`; later it kills."""
    if time.monotonic() - came >= SAME_S:
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)


class PassingOn:
    """While it is entered, SIGTERM is passed on to the workers of a sweep; when they have stopped, `Stopped` is raised.

    Only SIGTERM: a terminal sends SIGINT to the whole group by itself.

    Args:
        workers: process ids of the workers that are alive.
        busy: whether one of their jobs is still being stopped.
        patience_s: how long they are waited for.
    """

    def __init__(
        self, workers: Callable[[], list[int]], busy: Callable[[], bool], *, patience_s: float = 120.0
    ) -> None:
        self.workers = workers
        self.busy = busy
        self.patience_s = patience_s
        self._before: Any = None
        self._entered = False

    def __enter__(self) -> PassingOn:
        """Takes the signal over, where Python allows it: in the main thread."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._handle)
            self._entered = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives it back."""
        if self._entered:
            signal.signal(signal.SIGTERM, self._before)
            self._entered = False

    def _handle(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002  Python's signature
        came = time.monotonic()
        signal.signal(signum, lambda again, _: _kill_if_meant(again, came))
        for worker in self.workers():
            try:
                os.kill(worker, signum)
            except ProcessLookupError:
                continue
        while self.workers() and self.busy() and time.monotonic() < came + self.patience_s:
            time.sleep(0.1)
        raise Stopped(signum)
