"""Workers that are killed, frozen or hang: the batches stay what they are, or one error says where it hangs."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils.data import Dataset

from proteus.data.workers import RESTARTS, load_batches, note
from proteus.errors import WorkerError

ROOT = Path(__file__).resolve().parents[2]


class Slow(Dataset):
    """Batches that are their numbers; `act(index)` is what happens in the worker that loads an image."""

    def __init__(self, act=lambda index: None):
        self.source, self._act = self, act

    def name(self, index: int) -> str:
        return f"photo\n{index}.png"

    def __getitems__(self, numbers: list[int]) -> torch.Tensor:
        for index in numbers:
            note(index)
            self._act(index)
        return torch.tensor(numbers)


def numbers(count: int, size: int = 2):
    return lambda done: iter([list(range(size * i, size * i + size)) for i in range(done, count)])


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


def expected(count: int) -> list[list[int]]:
    return [[2 * i, 2 * i + 1] for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_batches_come_in_order_and_no_process_stays(count):
    before = workers()
    assert [batch.tolist() for batch in load_batches(Slow(), numbers(20), count)] == expected(20)
    assert workers() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_workers_change_no_batch(number, capfd):
    seen = []
    with closing(load_batches(Slow(lambda _: time.sleep(0.002)), numbers(60), 2, timeout=60)) as batches:
        for batch in batches:
            seen.append(batch.tolist())
            if len(seen) in (1, 2, 9, 30):
                os.kill(workers()[len(seen) % 2].pid, number)  # pytest's faulthandler may tell where that was
    assert seen == expected(60)
    lines = [line for line in capfd.readouterr().err.splitlines() if "data:" in line]  # torch has a word of its own
    assert 1 <= len(lines) <= 4
    for line in lines:
        assert f"a data worker was killed by signal {int(number)}" in line
        assert line.endswith("the workers are started again")


def test_every_worker_killed_at_every_batch():
    seen = []
    for batch in load_batches(Slow(), numbers(8), 2, timeout=60):
        seen.append(batch.tolist())
        for worker in workers():
            worker.kill()
    assert seen == expected(8)


def test_a_death_in_the_middle_of_a_step_is_no_exception_there():
    batches = load_batches(Slow(lambda _: time.sleep(0.01)), numbers(40), 2, timeout=60)
    next(batches)
    for worker in workers():
        worker.kill()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:  # Python code that a signal handler could raise in
        pass
    assert len(list(batches)) == 39


def test_an_image_that_kills_its_worker_is_told_in_the_end(capfd):
    def act(index: int) -> None:
        if index == 9:
            os.kill(os.getpid(), signal.SIGSEGV)

    seen = []
    with pytest.raises(WorkerError) as caught:
        seen.extend(batch.tolist() for batch in load_batches(Slow(act), numbers(20), 2, timeout=60))
    assert seen == expected(4)[: len(seen)]  # what a worker has handed over may go with it
    (line,) = str(caught.value).splitlines()
    assert r"signal 11 at photo\n9.png 4 times" in line
    assert capfd.readouterr().err.count("started again") >= RESTARTS  # a batch between two deaths makes one more
    assert workers() == []


def hang(index: int) -> None:
    if index in (4, 7):
        time.sleep(10**6)


def test_workers_that_hang_are_told_with_their_images():
    seen = []
    start = time.monotonic()
    with pytest.raises(WorkerError, match="no batch for 2 s") as caught:
        seen.extend(batch.tolist() for batch in load_batches(Slow(hang), numbers(20), 2, timeout=2))
    assert seen == expected(2)
    (line,) = str(caught.value).splitlines()
    assert r" at photo\n4.png, photo\n7.png:" in line
    assert 2 <= time.monotonic() - start < 12
    assert workers() == []


def test_frozen_workers_are_told_and_ended():
    batches = load_batches(Slow(lambda _: time.sleep(0.005)), numbers(500), 2, timeout=2)
    next(batches)
    for worker in workers():
        worker.suspend()
    start = time.monotonic()
    with pytest.raises(WorkerError, match="no batch for 2 s"):
        list(batches)
    assert time.monotonic() - start < 15
    assert workers() == []


def test_slow_batches_are_waited_for():
    batches = load_batches(Slow(lambda _: time.sleep(1.3)), numbers(2), 1, timeout=4)
    assert [batch.tolist() for batch in batches] == expected(2)


def test_an_error_of_the_data_set_is_that_error():
    def act(index: int) -> None:
        if index == 5:
            raise ZeroDivisionError("my mistake")

    with pytest.raises(ZeroDivisionError, match="my mistake"):
        list(load_batches(Slow(act), numbers(20), 2))


def test_leaving_early_ends_the_workers_at_once():
    batches = load_batches(Slow(lambda _: time.sleep(0.001)), numbers(10**6), 2)
    next(batches)
    start = time.monotonic()
    batches.close()
    assert time.monotonic() - start < 4
    assert workers() == []


SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from tests.data.test_load_batches import Slow, hang, numbers, workers
from proteus.data.workers import load_batches
batches = load_batches(Slow({act}), numbers(1000), 2, timeout=600)
print(next(batches), [worker.pid for worker in workers()], flush=True)
{end}
"""


def start(act: str, end: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    script = SCRIPT.format(root=str(ROOT), act=act, end=end)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    return process, [psutil.Process(int(pid)) for pid in line[line.rindex("[") + 1 : -2].split(",")]


def test_a_hanging_worker_does_not_keep_its_process():
    process, found = start("hang", "time.sleep(1)")  # and no close
    assert process.wait(30) == 0
    psutil.wait_procs(found, timeout=10)
    assert not any(worker.is_running() for worker in found)


def test_workers_end_with_a_process_that_is_killed():
    process, found = start("lambda _: None", "time.sleep(100)")
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(found, timeout=2)
    assert not alive
