"""Ranks that meet, whatever they have done before, and what is said when one does not come."""

import os
import socket
import subprocess
import sys
import threading
import time

import paddle
import pytest
from paddle.base import core

from paddlemix.errors import ParallelError
from paddlemix.parallel.groups import connect, free_port

LAST = """
import sys
import paddle
from paddlemix.parallel.groups import connect
size, port = map(int, sys.argv[1:])
connect(size - 1, size, "127.0.0.1", port, timeout=60).all_reduce(paddle.to_tensor([2.0]))
"""


@pytest.mark.slow  # a process is started
def test_who_has_met_others_before_meets_one_that_has_not():
    """Rank 0 of a server or a test makes group after group, each with ranks of its own."""
    for _ in range(2):
        connect(0, 1, "127.0.0.1", free_port())
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, "-c", LAST, "2", str(port)], env=environment)
    try:
        group = connect(0, 2, "127.0.0.1", port, timeout=60)
        assert group.all_reduce(paddle.to_tensor([1.0])).tolist() == [3.0]
        assert [int(process) for _, process in group.processes] == [os.getpid(), other.pid]
        assert other.wait(timeout=60) == 0
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("comes", ["not at all", "without a number", "and goes no further"])
def test_a_meeting_that_one_misses_ends_in_one_sentence(comes):
    """Also where Paddle would wait for ever: for a key of the store, and for the addresses of a group."""
    port, before, began = free_port(), os.environ.get("PADDLE_TRAINER_ID"), time.monotonic()

    def other():
        while socket.socket().connect_ex(("127.0.0.1", port)):  # the store itself would try again after three seconds
            time.sleep(0.01)
        store = core.TCPStore("127.0.0.1", port, False, 2, 20)
        if comes == "and goes no further":
            store.set("process/1", b"elsewhere 1 0")

    if comes != "not at all":
        threading.Thread(target=other, daemon=True).start()
    with pytest.raises(ParallelError, match=r"rank 0 did not meet the others of 2 .* within 1 seconds.*: look for the first"):
        connect(0, 2, "127.0.0.1", port, timeout=1)
    assert time.monotonic() - began < 15
    assert os.environ.get("PADDLE_TRAINER_ID") == before
