"""SIGKILL at random moments: the same command goes on, and the end is the uninterrupted run's, bit for bit."""

import random
import secrets
import signal
import time
from pathlib import Path

import pytest

from tests.faults.runs import (
    SLOW_CHECKPOINT,
    SLOW_FILES,
    Forked,
    all_rows,
    assert_nothing_lost,
    assert_same_end,
    assert_same_log,
    complete,
    resumed_from,
)

STEPS = 60
SETTINGS = (f"schedule.steps={STEPS}", "run.save_every=4", "data.images_per_class=0.1")
CACHE = (
    "--yes",
    "teacher_cache.views=3",
    "teacher_cache.tokens=all",
    "teacher_cache.components=32",
    "data.images_per_class=0.05",
)
SMALL_CHUNKS = """
from proteus.data import view_cache
from proteus.training import cache_writer
view_cache.CHUNK, cache_writer.PASS, cache_writer.CHECKED = 16, 12, 48
"""


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print(f"random moments of seed {seed}")  # pytest shows it where the test fails
    return random.Random(seed)


def wait_for_step(run: Forked, rng: random.Random, step: int) -> None:
    assert run.wait_until(lambda: run.steps() >= step), run.output()
    time.sleep(rng.uniform(0, 0.02))  # anywhere in the next step or two


def wait_for_checkpoint(run: Forked, rng: random.Random, step: int) -> None:
    folder = run.directory / "checkpoints"

    def writes_new() -> bool:
        names = [path.name.removeprefix(".pending-step_") for path in folder.glob(".pending-step_*")]
        return any(int(name) > step for name in names)

    assert run.wait_until(writes_new), run.output()
    time.sleep(rng.uniform(0, 0.7))  # its files, their folder, the new name, the oldest one's end


def wait_for_export(run: Forked, rng: random.Random, step: int) -> None:
    assert run.wait_until(lambda: any(run.directory.glob("*student*"))), run.output()
    time.sleep(rng.uniform(0, 0.6))


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(forked, rng, thorough):
    """While it steps, while it writes a checkpoint, while it writes the student and its average."""
    stepping, saving, exporting = (10, 6, 3) if thorough else (2, 1, 1)
    whole = forked("whole", *SETTINGS)
    later = [wait_for_step] * (stepping - 1) + [wait_for_checkpoint] * saving
    rng.shuffle(later)
    during = [wait_for_step, *later]  # the first one before there is a checkpoint
    moments = zip([2, *sorted(rng.sample(range(5, STEPS - 12), len(later)))], during, strict=True)
    killed_at: list[int] = []
    before: list[str] = []
    directory = whole.directory.with_name("killed")
    for step, wait in (*moments, *[(STEPS, wait_for_export)] * exporting):
        slow = SLOW_CHECKPOINT.format(0.08) if wait is wait_for_checkpoint else ""
        slow = SLOW_FILES.format(0.15) if wait is wait_for_export else slow
        # The number of workers may differ from run to run.
        run = forked("killed", *SETTINGS, f"data.workers={rng.choice((0, 0, 1, 2))}", prelude=slow)
        newest = max([int(name.removeprefix("step_")) for name in before if name.startswith("step_")], default=0)
        wait(run, rng, step)
        assert_nothing_lost(before, directory, keep=3)
        before = complete(directory)
        run.kill()
        assert run.wait() == -signal.SIGKILL, f"{wait.__name__}, {step}:\n{run.output()}"
        assert_nothing_lost(before, directory, keep=3)
        before = complete(directory)
        assert "damaged" not in run.output(), run.output()
        assert resumed_from(run.output()) in (0, newest)  # 0: it has not come to say so
        killed_at.append(run.steps())
    assert len(killed_at) == stepping + saving + exporting
    assert killed_at[0] < killed_at[-1] == STEPS

    last = forked("killed", *SETTINGS)
    assert last.wait() == 0, last.output()
    assert resumed_from(last.output()) == STEPS
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, directory, STEPS)
    assert_same_log(whole.directory, directory, STEPS)
    assert len(all_rows(directory)) == STEPS
    assert not list(directory.rglob(".pending*"))


def test_a_cache_killed_again_and_again_is_the_same_to_the_byte(forked, rng, thorough):
    whole = forked("whole", *CACHE, tool="cache", prelude=SMALL_CHUNKS)
    slow = SMALL_CHUNKS + SLOW_FILES.format(0.1)
    kills = 4 if thorough else 1
    for _ in range(kills):
        run = forked("killed", *CACHE, tool="cache", prelude=slow)
        before = contents(run.directory)
        # From the fit of the components on, through the chunks that are left.
        assert run.wait_until(lambda run=run: any(run.directory.glob(".pending-c*"))), run.output()
        time.sleep(rng.uniform(0, 0.5))
        run.kill()
        assert run.wait() == -signal.SIGKILL, run.output()
        after = contents(run.directory)
        assert {name: after.get(name) for name in before if name != "identity.json"} == {
            name: data for name, data in before.items() if name != "identity.json"
        }
    last = forked("killed", *CACHE, tool="cache", prelude=SMALL_CHUNKS)
    assert last.wait() == 0, last.output()
    assert whole.wait() == 0, whole.output()
    assert contents(last.directory) == contents(whole.directory)
    assert len([name for name in contents(whole.directory) if name.startswith("chunk_")]) == 5


def contents(directory: Path) -> dict[str, bytes]:
    """What is whole in a cache."""
    files = directory.glob("[!.]*") if directory.is_dir() else ()
    return {path.name: path.read_bytes() for path in files if path.name != "lock"}
