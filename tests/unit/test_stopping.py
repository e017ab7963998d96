"""SIGTERM and SIGINT end a run with the shell's code, once; a second one kills."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from msgrpo_lab.runs.stopping import PassingOn, Stopped, Stopping


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


TWICE = """
import os, signal, sys, time
from msgrpo_lab.runs.stopping import Stopping
with Stopping():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        time.sleep(float(sys.argv[1]))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
"""


@pytest.mark.parametrize(("pause_s", "code"), [(0.0, 143), (1.2, -signal.SIGTERM)])
def test_a_second_signal_kills_unless_it_is_the_first_one_told_twice(pause_s: float, code: int) -> None:
    done = subprocess.run([sys.executable, "-c", TWICE, str(pause_s)], capture_output=True, timeout=25, check=False)
    assert done.returncode == code


def test_a_sweep_passes_sigterm_on_and_waits_until_its_jobs_have_stopped() -> None:
    """The worker takes its time; the sweep ends when it has, not before."""
    worker = subprocess.Popen(
        [sys.executable, "-c", "import signal, time; signal.signal(15, lambda *_: (time.sleep(0.6), exit(7)));"
         "print('ready', flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert worker.stdout is not None
    worker.stdout.readline()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, PassingOn(lambda: [worker.pid], lambda: worker.poll() is None):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 143
    assert worker.returncode == 7
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_worker_that_does_not_stop_is_not_waited_for_for_ever() -> None:
    with pytest.raises(Stopped), PassingOn(lambda: [2**22 + 1], lambda: True, patience_s=0.3):
        os.kill(os.getpid(), signal.SIGTERM)
