"""One trainer to a run directory, however the other one ended. The other one is a process."""

import os
import signal
import subprocess
import sys

import pytest

from proteus.engine.lock import RunLock
from proteus.errors import InputError

# Holds the lock; with `fork`, a child of it lives on; with `fork ended`, a child of it has come and gone.
# Prints its pid and its child's, then waits to be killed.
HOLDER = """
import os, sys, time
from pathlib import Path
from proteus.engine.lock import RunLock
assert "torch" not in sys.modules, "the lock is taken before torch is loaded"
lock = RunLock(Path(sys.argv[1]))
child = os.fork() if "fork" in sys.argv else None
if child == 0:
    if "ended" not in sys.argv:
        sys.stdin.read()
    lock.release()
    os._exit(0)
if "ended" in sys.argv:
    os.waitpid(child, 0)
print(os.getpid(), child, flush=True)
sys.stdin.read()
"""
TAKER = """
import sys
from pathlib import Path
from proteus.engine.lock import RunLock
from proteus.errors import InputError
try:
    RunLock(Path(sys.argv[1]))
except InputError as error:
    print(error)
else:
    print("taken")
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of tmp_path: (process, pid of its child or None)."""
    started = []

    def start(*how):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), *how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        pid, child = process.stdout.readline().split()
        assert int(pid) == process.pid
        return process, None if child == "None" else int(child)

    yield start
    for process in started:
        process.kill()
        process.communicate()  # closes the pipe, which ends its child


def take_elsewhere(folder) -> str:
    done = subprocess.run([sys.executable, "-c", TAKER, str(folder)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_second_process_is_refused_and_told_the_pid(tmp_path, holder):
    process, _ = holder()
    for _ in range(2):  # the attempt itself takes nothing away
        with pytest.raises(InputError) as caught:
            RunLock(tmp_path)
        assert f"process {process.pid}:" in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "lock").read_text() == f"{process.pid}\n"


def test_a_killed_process_holds_nothing(tmp_path, holder):
    process, _ = holder()
    process.send_signal(signal.SIGKILL)
    process.wait()
    lock = RunLock(tmp_path)
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
    lock.release()


def test_the_lock_dies_with_its_holder_and_not_with_its_holders_children(tmp_path, holder):
    process, child = holder("fork")
    with pytest.raises(InputError, match=f"process {process.pid}:"):
        RunLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.wait()
    os.kill(child, 0)  # a data worker, say, that is still there
    RunLock(tmp_path).release()
    os.kill(child, 0)


def test_a_child_that_ends_does_not_free_its_parents_lock(tmp_path, holder):
    process, _ = holder("fork", "ended")
    with pytest.raises(InputError, match=f"process {process.pid}:"):
        RunLock(tmp_path)


def test_released_it_is_anyones(tmp_path):
    lock = RunLock(tmp_path)
    assert f"process {os.getpid()}:" in take_elsewhere(tmp_path)
    lock.release()
    assert take_elsewhere(tmp_path) == "taken"


def test_a_refused_attempt_in_the_same_process_tree_keeps_the_first(tmp_path):
    lock = RunLock(tmp_path)
    assert f"process {os.getpid()}:" in take_elsewhere(tmp_path)
    assert f"process {os.getpid()}:" in take_elsewhere(tmp_path)
    lock.release()
