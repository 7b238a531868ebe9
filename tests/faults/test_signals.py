"""Signals to a run, to one of its processes, to its launcher; and two runs on one directory."""

import os
import signal
import time

import psutil
import pytest

from proteus.training.stop import GRACE
from tests.faults.runs import SLOW_CHECKPOINT, SLOW_STEP, assert_same_end, assert_same_log, resumed_from
from tests.training.conftest import LAUNCH

STEPS = 24
SETTINGS = (f"schedule.steps={STEPS}", "data.images_per_class=0.1")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(forked, number):
    whole = forked("whole", *SETTINGS)
    slow = SLOW_STEP.format(0.05)  # or it is done before the signal is there
    stopped = forked("stopped", *SETTINGS, "run.save_every=1000", "data.workers=2", prelude=slow)
    assert stopped.wait_until(lambda: stopped.steps() >= 7), stopped.output()
    stopped.kill(number)
    assert stopped.wait() == 128 + number, stopped.output()
    assert f"stopped by signal {int(number)}" in stopped.output()
    (saved,) = (stopped.directory / "checkpoints").glob("*")
    step = int(saved.name.removeprefix("step_"))
    assert 7 <= step == stopped.steps() < STEPS

    resumed = forked("stopped", *SETTINGS, "run.save_every=1000")
    assert resumed.wait() == 0, resumed.output()
    assert resumed_from(resumed.output()) == step
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, stopped.directory, STEPS)


def test_a_second_signal_exits_at_once(forked):
    # A disk on which a checkpoint takes minutes: the first signal waits for it, the second does not.
    stuck = forked("stuck", "schedule.steps=100000", "run.save_every=100000", prelude=SLOW_CHECKPOINT.format(100))
    assert stuck.wait_until(lambda: stuck.steps() >= 1), stuck.output()
    stuck.kill(signal.SIGTERM)
    assert stuck.wait_until(lambda: any((stuck.directory / "checkpoints").glob(".pending-step_*"))), stuck.output()
    stuck.kill(signal.SIGTERM)  # as a launcher does that has got the same one
    time.sleep(GRACE + 0.2)
    assert stuck.process.is_alive()
    stuck.kill(signal.SIGTERM)
    assert stuck.wait(timeout=20) == 128 + signal.SIGTERM


def test_a_second_run_on_the_directory_refuses_and_does_no_harm(forked, run_here, capsys):
    whole = forked("whole", *SETTINGS)
    first = forked("run", *SETTINGS, prelude=SLOW_STEP.format(0.15))
    assert first.wait_until(lambda: first.steps() >= 1), first.output()
    assert run_here(*SETTINGS, "data.images_per_class=0.2") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {first.directory} is in use by process {first.process.pid}: ")
    assert first.wait() == 0, first.output()
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, first.directory, STEPS)
    assert run_here(*SETTINGS) == 0  # the lock of a process that has ended is free


LAUNCHER = pytest.param("launcher", marks=pytest.mark.slow)


@pytest.mark.parametrize("to", ["main process", LAUNCHER])
def test_a_signal_stops_two_processes_at_one_step_without_waiting_for_the_interval(trainer, to):
    settings = ("schedule.steps=1000", "run.log_every=10", "run.save_every=1000")
    # The other process must not end while the checkpoint is written: a launcher then ends the main one as well.
    slow = SLOW_STEP.format(0.3) + SLOW_CHECKPOINT.format(0.5)
    run = trainer("two", *settings, launcher=LAUNCH, prelude=slow)
    run.wait_until(lambda: run.steps() >= 10)
    number = signal.SIGUSR1 if to == "main process" else signal.SIGTERM
    if to == "main process":
        run.kill(number)
    else:
        run.process.send_signal(number)  # which passes it on and gives 30 seconds
    run.wait(timeout=60)
    (saved,) = (run.directory / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert 10 < step < 20
    assert f"stopped by signal {int(number)} after step {step};" in run.output()


@pytest.mark.slow
def test_one_of_two_processes_is_killed_then_their_launcher(trainer, run_together, run_here, capsys, thorough):
    settings = ("schedule.steps=40", "run.batch_size=8")
    slow = SLOW_STEP.format(0.1) + SLOW_CHECKPOINT.format(0.2)
    whole = run_together("whole", 2, *settings)
    for victim in ("main process", "other process") if thorough else ("main process",):
        run = trainer("killed", *settings, launcher=LAUNCH, prelude=slow)
        if victim == "main process":  # while it writes the second checkpoint
            run.wait_until((run.directory / "checkpoints" / ".pending-step_10").exists)
        else:
            run.wait_until(lambda run=run: "resumed from" in run.output() and run.steps() >= 12)
        both = psutil.Process(run.process.pid).children()
        assert len(both) == 2
        (killed,) = [process for process in both if (process.pid == run.pid()) == (victim == "main process")]
        killed.kill()
        killed_at = time.monotonic()
        assert run.wait(timeout=60) != 0
        # Unless the launcher is there first, with a SIGTERM for whoever is left.
        told = ("error: another process of the run has ended", "exitcode  : -15")
        assert any(line in run.output() for line in told), run.output()
        assert "]: Traceback" not in run.output()  # of a rank
        gone, alive = psutil.wait_procs(both, timeout=60 - (time.monotonic() - killed_at))
        assert len(gone) == 2
        assert not alive

    # A launcher that is killed cannot end its processes: they go on to the end, and the directory stays theirs.
    run = trainer("killed", *settings, launcher=LAUNCH, prelude=SLOW_STEP.format(0.3))
    run.wait_until(lambda: "resumed from" in run.output() and run.steps() >= 12)
    both, main = psutil.Process(run.process.pid).children(), run.pid()
    os.kill(run.process.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    capsys.readouterr()
    assert run_here(*settings, directory="killed") == 2
    assert f"in use by process {main}: " in capsys.readouterr().err
    _, alive = psutil.wait_procs(both, timeout=120)
    assert not alive
    assert_same_end(whole, run.directory, 40)
    assert_same_log(whole, run.directory, 40)
