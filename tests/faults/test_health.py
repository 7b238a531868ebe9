"""A long run takes no more memory, file handles or disk at its end than at its beginning."""

import contextlib
import statistics
import time
from pathlib import Path

import psutil
import pytest

from tests.training.conftest import read_log

KEEPS_BATCHES = """
from proteus.training.learner import Learner
learn, kept = Learner.learn, []
def leaking(self, batch, *args):
    kept.append(batch)
    return learn(self, batch, *args)
Learner.learn = leaking
"""
# A batch of 16 images of 16 pixels in float32 is 49 kB: a run that keeps a fifth of what it sees is found out.
LEAK_A_STEP = 10_000  # bytes
SLACK = 4_000_000  # bytes that caches and the allocator may take or give back between two looks


def watch(run) -> list[tuple[int, list[int], list[int], int]]:
    """Until a run ends: its step, unique memory and open files of it and its workers, bytes on disk."""
    rows: list[tuple[int, list[int], list[int], int]] = []
    while run.process.is_alive():
        time.sleep(0.03)
        try:
            main = psutil.Process(run.process.pid)
            family = [main, *main.children()]
            memory = [process.memory_full_info().uss for process in family]
            files = [process.num_fds() for process in family]
        except psutil.Error:
            continue
        step = run.steps()
        if len(family) == 3 and step:
            rows.append((step, memory, files, used(run.directory / "checkpoints")))
    return rows


def used(folder: Path) -> int:
    """Bytes of what is whole."""
    sizes = 0
    for checkpoint in folder.glob("step_*"):
        with contextlib.suppress(FileNotFoundError):  # the oldest one goes
            sizes += sum(path.stat().st_size for path in checkpoint.iterdir())
    return sizes


def growth(rows, steps: int) -> list[float]:
    """How much more unique memory each process has in the last quarter of a run than in its second, in bytes."""
    then = [memory for step, memory, *_ in rows if steps / 4 <= step < steps / 2]
    late = [memory for step, memory, *_ in rows if steps * 3 / 4 <= step < steps]
    assert len(then) >= 4
    assert len(late) >= 4
    # The least of each: what a step takes and gives back is no growth.
    return [min(m[p] for m in late) - min(m[p] for m in then) for p in range(3)]


def bound(steps: int) -> float:
    """Growth, in bytes, that is no leak; `growth` is of half the run."""
    return SLACK + LEAK_A_STEP * steps / 2


def run_of(forked, steps: int, prelude: str = ""):
    """Rows of a run with two workers, and the run."""
    settings = (f"schedule.steps={steps}", "run.save_every=25", "data.workers=2", "probe.every_epochs=0")
    run = forked("run", *settings, prelude=prelude)
    rows = watch(run)
    assert run.wait() == 0, run.output()
    return rows, run


@pytest.mark.slow
def test_a_long_run_takes_no_more_at_its_end(forked, thorough):
    steps = 2000 if thorough else 300
    rows, run = run_of(forked, steps)
    grown = growth(rows, steps)
    print(f"{steps} steps, {len(rows)} looks: grown by {[round(g / 1e6, 2) for g in grown]} MB")
    assert max(grown) < bound(steps)
    # Batches come from workers as open files, a few more or less at a time.
    for process in range(3):
        quarters = ((low, low + steps / 4) for low in (steps / 4, steps * 3 / 4))
        then, late = ([files[process] for step, _, files, _ in rows if a <= step < b] for a, b in quarters)
        assert abs(statistics.mean(late) - statistics.mean(then)) < 5
    assert [row["step"] for row in read_log(run.directory)] == list(range(1, steps + 1))
    one = used(run.directory / "checkpoints") / 3
    assert len(list((run.directory / "checkpoints").iterdir())) == 3
    assert max(disk for *_, disk in rows) <= 4.1 * one  # the newest is whole before the oldest goes


@pytest.mark.slow
def test_a_run_that_keeps_its_batches_would_be_seen(forked):
    rows, _ = run_of(forked, 300, KEEPS_BATCHES)
    grown = growth(rows, 300)
    assert grown[0] > bound(300)
