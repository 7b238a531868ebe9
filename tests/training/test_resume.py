"""A run that is killed, stopped, or started twice: real processes, real signals."""

import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SLOW_DISK = """
import time
from proteus.engine import atomic
_sync = atomic._sync
def slow(path):
    if "step_" in str(path):
        time.sleep(0.15)
    _sync(path)
atomic._sync = slow
"""


def assert_same_end(one: Path, other: Path, step: int) -> None:
    """Weights, averages and optimiser state of two runs are the same bit for bit."""
    for file in ("student.safetensors", "student_ema.safetensors", f"checkpoints/step_{step}/model.safetensors"):
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), f"{file}: {key}"
    a, b = (
        torch.load(run / f"checkpoints/step_{step}/optimizer.pt", weights_only=True)["state"] for run in (one, other)
    )
    assert a.keys() == b.keys()
    for parameter in a:
        for key in a[parameter]:
            assert torch.equal(a[parameter][key], b[parameter][key]), key


@pytest.fixture
def whole(trainer):
    """An uninterrupted run of 40 steps, started and not yet waited for."""
    return trainer("whole", "schedule.steps=40")


def test_killed_at_a_random_step_ends_bit_identical_with_other_workers(trainer, whole):
    step = random.randint(6, 35)
    killed = trainer("killed", "schedule.steps=40", "data.workers=2")
    killed.wait_until(lambda: killed.steps() >= step)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not (killed.directory / "student.safetensors").exists()

    resumed = trainer("killed", "schedule.steps=40", "data.workers=1")
    assert resumed.wait() == 0, resumed.output()
    assert "resumed from" in resumed.output()
    assert "results may differ" not in resumed.output()
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, killed.directory, 40)


def test_killed_while_a_checkpoint_is_written_ends_bit_identical(trainer, whole):
    killed = trainer("killed", "schedule.steps=40", prelude=SLOW_DISK)
    pending = killed.directory / "checkpoints" / ".pending-step_20"
    killed.wait_until(pending.exists)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert pending.exists()
    assert not (killed.directory / "checkpoints" / "step_20").exists()

    resumed = trainer("killed", "schedule.steps=40")
    assert resumed.wait() == 0, resumed.output()
    assert "step_15" in resumed.output()
    assert "warning: .pending-step_20" in resumed.output()
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, killed.directory, 40)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_same_command_goes_on(trainer, whole, number):
    stopped = trainer("stopped", "schedule.steps=40", "run.save_every=1000")
    stopped.wait_until(lambda: stopped.steps() >= 7)
    stopped.kill(number)
    assert stopped.wait() == 128 + number, stopped.output()
    assert f"stopped by signal {int(number)}" in stopped.output()
    (saved,) = (stopped.directory / "checkpoints").glob("step_*")
    assert int(saved.name.removeprefix("step_")) >= 7

    resumed = trainer("stopped", "schedule.steps=40", "run.save_every=1000")
    assert resumed.wait() == 0, resumed.output()
    assert whole.wait() == 0, whole.output()
    assert_same_end(whole.directory, stopped.directory, 40)


def test_a_second_signal_exits_at_once(trainer):
    # A disk on which a checkpoint takes minutes: the first signal waits for it, the second does not.
    stuck = trainer("stuck", "schedule.steps=100000", prelude=SLOW_DISK.replace("0.15", "100"))
    stuck.wait_until(lambda: stuck.steps() >= 1)
    stuck.kill(signal.SIGTERM)
    stuck.wait_until((stuck.directory / "checkpoints").exists)
    stuck.kill(signal.SIGTERM)
    assert stuck.wait(timeout=20) == 128 + signal.SIGTERM


def test_a_second_run_on_the_directory_refuses_and_names_the_pid(trainer, run_here, capsys):
    first = trainer("run", "schedule.steps=100000")
    first.wait_until(lambda: first.steps() >= 1)
    assert run_here() == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert f"process {first.process.pid}" in line
    first.kill()
    first.wait()
    assert run_here("schedule.steps=1") == 0  # the dead holder's lock is free


def test_a_finished_run_started_again_changes_nothing(run_here, tmp_path):
    assert run_here() == 0
    before = load_file(tmp_path / "run/student.safetensors")
    rows = (tmp_path / "run/log.jsonl").read_text()
    assert run_here() == 0
    after = load_file(tmp_path / "run/student.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "run/log.jsonl").read_text() == rows


def test_the_newest_checkpoints_are_kept_and_hold_no_teacher(run_here, tmp_path):
    assert run_here("run.keep=2", "run.save_every=2") == 0
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert folders == ["step_10", "step_12"]
    keys = load_file(tmp_path / "run/checkpoints/step_12/model.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"student", "heads"}


def test_a_half_written_checkpoint_is_left_out_with_a_warning(run_here, tmp_path, capsys):
    assert run_here("schedule.steps=10") == 0
    (tmp_path / "run/checkpoints/step_10/progress.json").unlink()
    assert run_here("schedule.steps=10") == 0
    said = capsys.readouterr().err
    assert "warning: step_10" in said
    assert "resumed from" in said
    assert "step_5" in said


def test_resume_never_refuses_a_used_directory_and_a_path_goes_on_elsewhere(run_here, tmp_path, capsys):
    assert run_here() == 0
    assert run_here("--resume=never") == 2
    assert "step_12" in capsys.readouterr().err
    assert run_here(f"--resume={tmp_path}/run/checkpoints/step_10", directory="other") == 0
    a, b = (load_file(tmp_path / name / "student.safetensors") for name in ("run", "other"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_changed_config_is_told_on_resume(run_here, capsys):
    assert run_here("schedule.steps=5") == 0
    assert run_here("schedule.steps=10", "run.seed=3") == 0
    said = capsys.readouterr().err
    assert "run.seed: 0 -> 3" in said
    assert "schedule.steps: 5 -> 10" in said


def test_a_checkpoint_of_another_network_is_an_error(run_here, capsys):
    assert run_here("schedule.steps=5") == 0
    assert run_here("schedule.steps=10", "student.arch.embed_dim=32") == 2
    assert "does not belong to this run" in capsys.readouterr().err.splitlines()[-1]
