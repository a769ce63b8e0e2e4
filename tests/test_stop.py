"""A signal or a deadline asks for a stop; a request told twice is one; another signal, later, stops at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastgen import stop

SCRIPT = """
import os, signal, time
from fastgen.stop import SAME_REQUEST_SECONDS, StopRequest

with StopRequest() as stop:
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    print("asked", stop.requested, flush=True)
    time.sleep(SAME_REQUEST_SECONDS)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
    print("still here", flush=True)
"""


def test_signals_of_one_request_are_one_and_a_later_one_ends_the_process():
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "asked True\n"
    assert ended.returncode == -2


def test_the_first_signal_is_the_one_that_is_told():
    request = stop.StopRequest()
    assert not request.requested
    request._note(15, None)
    request._note(2, None)
    with pytest.raises(stop.Stopped) as caught:
        request.check()
    assert caught.value.exit_code == 128 + 15


@pytest.mark.usefixtures("_signals_are_heard")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_each_of_the_signals_asks_for_a_stop_and_is_given_back(number):
    before = signal.getsignal(number)
    with stop.StopRequest() as request:
        assert (request.requested, request.number) == (False, 0)
        os.kill(os.getpid(), number)
        assert (request.requested, request.number) == (True, number)
    assert signal.getsignal(number) == before


def test_the_end_of_the_time_asks_for_a_stop():
    request = stop.StopRequest(time.monotonic() + 1000)
    assert (request.requested, request.number) == (False, 0)
    request.check()
    request = stop.StopRequest(time.monotonic())
    assert (request.requested, request.number) == (True, signal.SIGALRM)
    with pytest.raises(stop.Stopped, match=r"the time of .* is over") as caught:
        request.check()
    assert caught.value.exit_code == 128 + signal.SIGALRM
    # A signal that comes then is told, and is no second request.
    request._note(signal.SIGTERM, None)
    assert request.number == signal.SIGTERM


def test_a_lost_connection_is_no_request_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.StopRequest() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
