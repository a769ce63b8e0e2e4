"""A signal asks for a stop; the same request told twice is one; another one, later, stops at once."""

import subprocess
import sys

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
