"""Data workers that are killed, frozen or hang, in real runs and tools."""

import signal
import threading
import time
from contextlib import suppress

import numpy as np
import psutil
import pytest
from PIL import Image

from proteus.data.packed import PackedSource
from proteus.data.sources import DigitsSource, FolderSource, hold_out
from proteus.training.state import list_checkpoints
from tests.faults.runs import SLOW_STEP, assert_same_end
from tests.training.conftest import LAUNCH
from tools import pack

HANG = """
import os, time
from proteus.data.sources import DigitsSource
load = DigitsSource.load
def hang(self, index):
    if index == {index} and os.environ.get("LOCAL_RANK", "0") == "{rank}":
        time.sleep(10**6)
    return load(self, index)
DigitsSource.load = hang
"""


def workers_of(trainer: psutil.Process) -> list[psutil.Process]:
    """Its data workers, by the name that torch gives them."""
    found = []
    for child in trainer.children():
        with suppress(psutil.Error, ProcessLookupError):
            if child.name() == "pt_data_worker" and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSEGV, marks=pytest.mark.slow)])
def test_a_run_goes_on_without_its_workers(forked, run_here, tmp_path, number, thorough):
    assert run_here("data.workers=0", "run.accumulate=2", directory="whole") == 0
    run = forked("run", "data.workers=2", "run.accumulate=2", prelude=SLOW_STEP.format(0.1))
    kills = 0
    for step in (1, 3, 5, 7) if thorough else (1, 6):
        assert run.wait_until(lambda step=step: run.steps() >= step)
        workers = workers_of(psutil.Process(run.process.pid))
        with suppress(psutil.NoSuchProcess, IndexError):  # the moment may be between two crews
            workers[step // 2 % 2].send_signal(number)
            kills += 1
    assert run.wait() == 0, run.output()
    said = run.output().count("the workers are started again")
    assert 1 <= said <= kills
    assert "Traceback" not in run.output()
    assert f"a data worker was killed by signal {int(number)}" in run.output()
    assert_same_end(tmp_path / "whole", tmp_path / "run", 12)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_outlives_its_trainer(forked, number):
    run = forked("run", "data.workers=2", prelude=SLOW_STEP.format(0.2))
    assert run.wait_until(lambda: run.steps() >= 1)
    workers = workers_of(psutil.Process(run.process.pid))
    assert workers
    run.kill(number)
    assert run.wait(30) == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_hanging_worker_stops_the_run_which_then_goes_on(forked, run_here, tmp_path):
    assert run_here("data.workers=0", directory="whole") == 0
    settings = ("data.workers=2", "data.timeout=3", "run.save_every=5")
    order = np.random.default_rng((0, 0)).permutation(1347)
    hanging = int(order[8 * 9])  # of the tenth batch: 16 images, each twice
    run = forked("run", *settings, prelude=HANG.format(index=hanging, rank=0) + SLOW_STEP.format(0.01))
    assert run.wait_until(lambda: run.steps() >= 7)
    start = time.monotonic()
    assert run.wait(60) == 1, run.output()
    assert time.monotonic() - start < 25
    (line,) = [line for line in run.output().splitlines() if line.startswith("error:")]
    assert "no batch for 3 s from the workers at digit " in line
    assert line.count("digit") == 1
    assert "data.timeout" in line
    assert "Traceback" not in run.output()
    saved = list_checkpoints(tmp_path / "run/checkpoints")[-1].name
    assert 7 <= int(saved.removeprefix("step_")) <= 9  # what was learnt is kept
    again = forked("run", *settings)
    assert again.wait() == 0
    assert saved in again.output()
    assert_same_end(tmp_path / "whole", tmp_path / "run", 12)


@pytest.mark.parametrize("part", ["bank", "held out"])
def test_a_hanging_worker_of_the_probe_stops_the_run(forked, part):
    digits = DigitsSource("train")
    bank, held_out = hold_out(digits, 1024, seed=0)
    hanging = int({"bank": bank, "held out": held_out}[part].indices[0])
    settings = ("data.workers=2", "data.timeout=3", "probe.every_epochs=1")
    run = forked("run", *settings, prelude=HANG.format(index=hanging, rank=0))
    assert run.wait(60) == 1, run.output()
    (line,) = [line for line in run.output().splitlines() if line.startswith("error:")]
    assert f"no batch for 3 s from the workers at {digits.name(hanging)}: " in line
    assert "Traceback" not in run.output()
    assert run.steps() == 0


def test_a_hanging_worker_stops_the_plan_of_a_run(forked):
    hanging = int(np.random.default_rng((0, 0)).permutation(1347)[8 * 3])  # the first batch is read without workers
    run = forked("run", "data.workers=2", "data.timeout=3", "--plan", prelude=HANG.format(index=hanging, rank=0))
    assert run.wait(60) == 1, run.output()
    assert f"error: data: no batch for 3 s from the workers at {DigitsSource('train').name(hanging)}: " in run.output()


@pytest.mark.slow
def test_frozen_workers_stop_the_run(forked):
    run = forked("run", "data.workers=2", "data.timeout=2", "schedule.steps=500", prelude=SLOW_STEP.format(0.05))
    assert run.wait_until(lambda: run.steps() >= 3)
    for worker in workers_of(psutil.Process(run.process.pid)):
        worker.suspend()
    assert run.wait(60) == 1, run.output()
    assert "error: data: no batch for 2 s from the workers" in run.output()
    assert "Traceback" not in run.output()


@pytest.mark.slow
def test_workers_of_one_process_of_two(trainer, run_together):
    settings = ("run.batch_size=8", "run.accumulate=2", "schedule.steps=25")  # workers are gone before the last steps
    whole = run_together("whole", 2, *settings, "data.workers=0")
    run = trainer("run", *settings, "data.workers=2", launcher=LAUNCH, prelude=SLOW_STEP.format(0.2))
    for step in (2, 5):
        run.wait_until(lambda step=step: run.steps() >= step)
        with suppress(psutil.NoSuchProcess, IndexError):  # the moment may be between two crews
            workers_of(psutil.Process(run.pid()))[0].kill()
    assert run.wait() == 0, run.output()
    assert 1 <= run.output().count("the workers are started again") <= 2
    assert_same_end(whole, run.directory, 25)


@pytest.mark.slow
def test_a_worker_that_hangs_in_one_process_of_two(trainer):
    hanging = int(np.random.default_rng((0, 0)).permutation(1347)[60])
    settings = ("run.batch_size=8", "data.workers=2", "data.timeout=3")
    run = trainer("run", *settings, launcher=LAUNCH, prelude=HANG.format(index=hanging, rank=1))
    assert run.wait(180) == 1, run.output()
    assert run.output().count("error: data: no batch for 3 s from the workers at digit ") == 1


# Tools


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(200):
        pixels = np.random.default_rng(index).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return folder


def harm(act) -> threading.Thread:
    """`act` on each worker that this process has, until it has been done to one."""

    def watch() -> None:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            for worker in workers_of(psutil.Process()):
                time.sleep(0.1)
                act(worker)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def slow_load(monkeypatch, seconds, hanging=None):
    load = FolderSource.load

    def slow(self, index):
        time.sleep(10**6 if index == hanging else seconds)
        return load(self, index)

    monkeypatch.setattr(FolderSource, "load", slow)


def test_packing_goes_on_without_a_worker(photos, tmp_path, monkeypatch, capfd):
    assert pack.main(["--root", str(photos), "--out", str(tmp_path / "whole"), "--workers=0"]) == 0
    slow_load(monkeypatch, 0.005)
    harm(lambda worker: worker.kill())
    assert pack.main(["--root", str(photos), "--out", str(tmp_path / "packed"), "--workers=2"]) == 0
    assert capfd.readouterr().err.count("the workers are started again") == 1
    one, other = (PackedSource(tmp_path / name) for name in ("whole", "packed"))
    assert [one.name(i) for i in range(200)] == [other.name(i) for i in range(200)]
    assert (tmp_path / "whole/index.json").read_bytes() == (tmp_path / "packed/index.json").read_bytes()


def test_packing_tells_where_it_hangs(photos, tmp_path, monkeypatch, capfd):
    slow_load(monkeypatch, 0, hanging=77)
    monkeypatch.setattr(pack.load_batches, "__kwdefaults__", {**pack.load_batches.__kwdefaults__, "timeout": 2})
    assert pack.main(["--root", str(photos), "--out", str(tmp_path / "packed"), "--workers=2"]) == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "no batch for 2 s from the workers at 077.png" in line


def test_writing_a_cache_goes_on_without_a_worker_and_tells_where_it_hangs(forked, tmp_path):
    settings = ("teacher_cache.views=1", "teacher_cache.tokens=all", "--yes")
    whole = forked("whole", "data.workers=0", *settings, tool="cache")
    assert whole.wait() == 0, whole.output()
    prelude = HANG.format(index=700, rank=0)
    hanging = forked("cache", "data.workers=2", "data.timeout=3", *settings, tool="cache", prelude=prelude)
    assert hanging.wait(60) == 1, hanging.output()
    (line,) = [line for line in hanging.output().splitlines() if line.startswith("error:")]
    assert "no batch for 3 s from the workers at digit " in line
    slow = HANG.format(index=-1, rank=0).replace("    return load", "    time.sleep(0.002)\n    return load")
    run = forked("cache", "data.workers=2", *settings, tool="cache", prelude=slow)
    assert run.wait_until(lambda: bool(workers_of(psutil.Process(run.process.pid))))
    time.sleep(0.3)
    workers_of(psutil.Process(run.process.pid))[0].kill()
    assert run.wait() == 0, run.output()
    assert "a data worker was killed by signal 9" in run.output()
    for path in (tmp_path / "whole").glob("*chunk*"):
        assert path.read_bytes() == (tmp_path / "cache" / path.name).read_bytes()
