"""SIGTERM and SIGINT end a run with the shell's code, once; a second one kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from msgrpo_lab.stopping import Stopped, Stopping


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_raises_and_the_handlers_are_given_back(signum: int, code: int) -> None:
    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as stopped, Stopping() as stopping:
        os.kill(os.getpid(), signum)
    assert stopped.value.code == code
    assert stopping.signum == signum
    assert signal.getsignal(signum) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_drops_is_heard_at_the_next_look() -> None:
    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # the handler runs in here, where what it raises is only printed
                pass

    with Stopping() as stopping:
        stopping.check()
        deaf = Deaf()
        del deaf
        with pytest.raises(Stopped):
            stopping.check()


SECOND = """
import os, signal, time
from msgrpo_lab.stopping import Stopping
with Stopping():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
"""


def test_a_second_signal_kills_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, timeout=25, check=False)
    assert done.returncode == -signal.SIGTERM
