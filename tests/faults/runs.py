"""Runs that are to be harmed, what makes the moment for it last, and what must be the same afterwards."""

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteus.training.state import list_checkpoints
from tests.training.conftest import ROOT, read_log

CLOCK = ("images_per_s", "data_wait", "memory_gb")  # what a row says of the machine, not of the run

SLOW_STEP = """
import time
from proteus.training.learner import Learner
update = Learner.update
def slow(self, rate):
    time.sleep({0})
    return update(self, rate)
Learner.update = slow
"""

# Each file of a checkpoint, the renaming of the folder and the deletion of the oldest one take a while.
SLOW_CHECKPOINT = """
import shutil, time
from proteus.engine import atomic
sync, rmtree = atomic._sync, shutil.rmtree
def slow(path):
    if "step_" in str(path) or path.name == "checkpoints":
        time.sleep({0})
    sync(path)
def slow_rmtree(path, *args, **kwargs):
    if "step_" in str(path) and path.exists():
        time.sleep({0})
    rmtree(path, *args, **kwargs)
atomic._sync, shutil.rmtree = slow, slow_rmtree
"""

# So do the files that are written at the end, or into a cache.
SLOW_FILES = """
import time
from proteus.engine import atomic
sync = atomic._sync
def slow(path):
    if any(part in path.name for part in ("student", "chunk", "components")):
        time.sleep({0})
    sync(path)
    if any(part in path.name for part in ("student", "chunk", "components")):
        time.sleep({0})
atomic._sync = slow
"""


class Forked:
    """A tool in a process of its own that a warm one forks: real signals, without the seconds that imports take."""

    def __init__(self, directory: Path, tool: str, *words: str, prelude: str = ""):
        self.directory, self._output = directory, directory.parent / f"{directory.name}.out"
        self._output.unlink(missing_ok=True)  # of a run before it, which one that is killed at once would leave
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_run_tool, args=(self._output, tool, words, prelude))
        self.process.start()

    def wait(self, timeout: float = 120) -> int:
        """Its exit status, or minus the signal that killed it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"it has not ended after {timeout} s:\n{self.output()}"
        return self.process.exitcode

    def wait_until(self, reached: Callable[[], bool], timeout: float = 120) -> bool:
        """Poll until `reached()`; False where the process ended before."""
        end = time.monotonic() + timeout
        while not reached():
            if not self.process.is_alive():
                return False
            assert time.monotonic() < end, f"waited too long:\n{self.output()}"
            time.sleep(0.002)
        return True

    def kill(self, number: int = signal.SIGKILL) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def steps(self) -> int:
        """The last step in log.jsonl."""
        rows = read_log(self.directory)
        return rows[-1]["step"] if rows else 0

    def output(self) -> str:
        return self._output.read_text() if self._output.is_file() else ""


def warm_up() -> None:
    """Start the process that forks the others; it imports what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    # A process that is killed leaves its semaphores to be cleaned up, which is said where nobody wants to know.
    quiet = "ignore::UserWarning:multiprocessing.resource_tracker"
    before = {key: os.environ.get(key) for key in ("PYTHONPATH", "OMP_NUM_THREADS", "PYTHONWARNINGS")}
    os.environ.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONWARNINGS=quiet)
    multiprocessing.forkserver.ensure_running()
    for key, value in before.items():
        if value is None:
            os.environ.pop(key)
        else:
            os.environ[key] = value


def _run_tool(output: Path, tool: str, words: tuple[str, ...], prelude: str) -> None:
    os.setsid()
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    handle = os.open(output, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    exec(prelude, {})
    from tools import cache, train

    sys.exit({"train": train, "cache": cache}[tool].main(list(words)))


def complete(directory: Path) -> list[str]:
    """Names of what is whole in a run directory."""
    names = [path.name for path in list_checkpoints(directory / "checkpoints")]
    return names + [path.name for path in sorted(directory.glob("*")) if path.is_file() and path.name[0] != "."]


def assert_nothing_lost(before: list[str], directory: Path, keep: int) -> None:
    """What was whole still is, but for checkpoints that newer ones have taken the place of."""
    after = complete(directory)
    gone = set(before) - set(after)
    assert all(name.startswith("step_") for name in gone), gone
    then, now = (
        sorted(int(n.removeprefix("step_")) for n in names if n.startswith("step_")) for names in (before, after)
    )
    assert len(now) >= min(len(then), keep), (before, after)
    assert not then or now[-1] >= then[-1], (before, after)


def assert_same_end(one: Path, other: Path, step: int) -> None:
    """Weights, averages and optimiser state of two runs are the same bit for bit."""
    checkpoint = f"checkpoints/step_{step}"
    written = ("student.safetensors", "student_ema.safetensors")
    for file in (*written, f"{checkpoint}/model.safetensors", f"{checkpoint}/ema.safetensors"):
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{file}: {key}"
    a, b = (torch.load(run / checkpoint / "optimizer.pt", weights_only=True)["state"] for run in (one, other))
    assert a.keys() == b.keys()
    for parameter in a:
        for key in a[parameter]:
            assert torch.equal(a[parameter][key], b[parameter][key]), key


def assert_same_log(one: Path, other: Path, steps: int) -> None:
    """log.jsonl and TensorBoard have each step once, with the same numbers but for those of the machine."""
    assert_same_rows(one, other, steps)
    boards = [_scalars(run) for run in (one, other)]
    assert [step for step, _ in boards[0]["train/loss"]] == list(range(1, steps + 1))
    for name in boards[0].keys() - {f"train/{key}" for key in CLOCK}:
        assert boards[0][name] == boards[1][name], name


def assert_same_rows(one: Path, other: Path, steps: int) -> None:
    """As `assert_same_log`, of log.jsonl alone: event files of one second have no order among them."""
    rows = [
        [{key: value for key, value in row.items() if key not in CLOCK} for row in read_log(run)]
        for run in (one, other)
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, steps + 1))
    assert rows[0] == rows[1]


def _scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    (events,) = {path.parent for path in directory.rglob("events.out.tfevents.*") if path.stat().st_size}
    board = EventAccumulator(str(events)).Reload()
    return {name: [(event.step, event.value) for event in board.Scalars(name)] for name in board.Tags()["scalars"]}


def resumed_from(output: str) -> int:
    """The step that a run says it went on from; 0 where it began afresh."""
    lines = [line for line in output.splitlines() if line.startswith("resumed from")]
    return int(lines[-1].rpartition("step_")[2]) if lines else 0


def all_rows(directory: Path) -> list[dict]:
    """Every row of log.jsonl, of probes too."""
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
