"""A run that is killed, stopped, or started twice: real processes, real signals."""

import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.conftest import LAUNCH, read_log

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
    settings = ("schedule.steps=100000", "run.save_every=100000")
    stuck = trainer("stuck", *settings, prelude=SLOW_DISK.replace("0.15", "100"))
    stuck.wait_until(lambda: stuck.steps() >= 1)
    stuck.kill(signal.SIGTERM)
    stuck.wait_until(lambda: any((stuck.directory / "checkpoints").glob(".pending-step_*")))
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
    assert {key.split(".")[0] for key in keys} == {"student", "adaptors"}


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
    assert run_here(f"--resume={tmp_path}/run/checkpoints/step_10") == 2  # here it would end under newer ones
    assert "goes on to step 12" in capsys.readouterr().err.splitlines()[-1]


def test_a_changed_config_is_told_on_resume(run_here, capsys):
    assert run_here("schedule.steps=5") == 0
    assert run_here("schedule.steps=10", "run.seed=3") == 0
    said = capsys.readouterr().err
    assert "run.seed: 0 -> 3" in said
    assert "schedule.steps: 5 -> 10" in said


def test_a_checkpoint_of_another_network_is_an_error(run_here, capsys):
    assert run_here("schedule.steps=5") == 0
    assert run_here("schedule.steps=10", "student.arch.embed_dim=32") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "step_5 is of other networks: student was timm/vit_tiny_patch16_224 {" in said
    assert said.endswith("at 16 px; start another run.dir")


def test_teachers_that_change_their_places_are_an_error(run_here, capsys):
    """Their heads would fit each other's student."""
    arch = "{patch_size: 4, embed_dim: 16, num_heads: 2, depth: 1}"
    one = f"{{name: timm/vit_tiny_patch16_224, checkpoint: random, arch: {arch}}}"
    two = one.replace("depth: 1", "depth: 2")
    assert run_here("teacher=null", f"teachers=[{one}, {two}]", "schedule.steps=5") == 0
    for changed in (f"{two}, {one}", one, f"{one}, {two}, {one}", f"{one[:-1]}, standardize: true}}, {two}"):
        assert run_here("teacher=null", f"teachers=[{changed}]", "schedule.steps=10") == 2
        assert "step_5 is of other networks: teachers." in capsys.readouterr().err.splitlines()[-1]
    assert run_here("teacher=null", f"teachers=[{one}, {two}]", "schedule.steps=6", "student.arch.drop_path=0.2") == 0


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optimizer.pt", "progress.json"])
@pytest.mark.parametrize("length", [0, 0.5])
def test_a_damaged_checkpoint_is_one_line(run_here, tmp_path, capsys, file, length):
    assert run_here("schedule.steps=5") == 0
    path = tmp_path / "run/checkpoints/step_5" / file
    path.write_bytes(path.read_bytes()[: int(length * path.stat().st_size)])
    assert run_here("schedule.steps=10") == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "step_5 is damaged or of another network" in said.splitlines()[-1]


def test_a_step_that_means_other_images_is_refused(run_here, capsys):
    assert run_here("schedule.steps=5") == 0
    assert run_here("schedule.steps=10", "run.batch_size=8") == 2
    assert "steps of 16 images, this run of 8" in capsys.readouterr().err.splitlines()[-1]
    assert run_here("schedule.steps=10", "data.classes=0.5") == 2
    assert "a set of 1347 images, and there are" in capsys.readouterr().err.splitlines()[-1]
    assert run_here("schedule.steps=10", "run.batch_size=8", "run.accumulate=2") == 0


def test_changed_optimiser_settings_are_taken(run_here, tmp_path):
    assert run_here("schedule.steps=5") == 0
    assert run_here("schedule.steps=10", "optimizer.weight_decay=0.7", "optimizer.betas=[0.5, 0.6]") == 0
    state = torch.load(tmp_path / "run/checkpoints/step_10/optimizer.pt", weights_only=True)
    assert {group["weight_decay"] for group in state["param_groups"]} == {0.0, 0.7}
    assert all(group["betas"] == (0.5, 0.6) for group in state["param_groups"])


def test_an_average_begun_on_resume_begins_at_the_student(run_here, tmp_path):
    assert run_here("schedule.steps=10", "ema.decay=null") == 0
    assert run_here("schedule.steps=11", "ema.decay=0.5") == 0
    student, average = (load_file(tmp_path / "run" / f"{name}.safetensors") for name in ("student", "student_ema"))
    before = load_file(tmp_path / "run/checkpoints/step_10/model.safetensors")
    key = "blocks.0.mlp.fc1.weight"
    expected = (before[f"student.network.{key}"] + student[key]) / 2
    torch.testing.assert_close(average[key], expected, atol=1e-7, rtol=0)


def test_rows_after_the_checkpoint_are_not_logged_twice(run_here, tmp_path):
    assert run_here("schedule.steps=8") == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step_8")  # as if it had been killed before it
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    assert run_here("schedule.steps=12") == 0
    assert [row["step"] for row in read_log(tmp_path / "run")] == list(range(1, 13))


def test_a_shorter_schedule_than_what_is_done_is_done(run_here, tmp_path, capsys):
    assert run_here("schedule.steps=6") == 0
    (tmp_path / "run/student.safetensors").unlink()
    assert run_here("schedule.steps=3") == 0
    assert "after 6 steps" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "run/student.safetensors").is_file()


def test_the_main_process_says_which_checkpoint_all_load(trainer, tmp_path):
    """A second machine that does not see the run directory is an error, not a run from another step."""
    settings = ("schedule.steps=8", "run.batch_size=8")
    first = trainer("run", *settings, launcher=LAUNCH)
    assert first.wait() == 0, first.output()
    elsewhere = f"import os, sys\nif os.environ['RANK'] == '1': sys.argv.append('run.dir={tmp_path}/elsewhere')"
    run = trainer("run", "schedule.steps=12", "run.batch_size=8", launcher=LAUNCH)
    assert run.wait() == 0, run.output()
    apart = trainer("run", "schedule.steps=16", "run.batch_size=8", launcher=LAUNCH, prelude=elsewhere)
    assert apart.wait() == 0, apart.output()  # the path is the main process's, and this machine sees it
    assert read_log(tmp_path / "run")[-1]["step"] == 16


SLOW_STEP = """
import time
from proteus.training.task import Distillation
forward = Distillation.forward
def slow(self, *args):
    time.sleep(0.3)
    return forward(self, *args)
Distillation.forward = slow
"""


def test_a_signal_stops_two_processes_at_one_step_without_waiting_for_the_interval(trainer):
    settings = ("schedule.steps=1000", "run.log_every=10", "run.save_every=1000")
    run = trainer("two", *settings, launcher=LAUNCH, prelude=SLOW_STEP)
    run.wait_until(lambda: run.steps() >= 10)
    run.process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on and gives 30 seconds
    run.wait(timeout=60)
    (saved,) = (run.directory / "checkpoints").glob("step_*")
    step = int(saved.name.removeprefix("step_"))
    assert 10 < step < 20
    assert f"stopped by signal 15 after step {step};" in run.output()


@pytest.mark.slow
def test_three_killed_processes_end_bit_identical(trainer):
    three = tuple("3" if word == "2" else word for word in LAUNCH)
    settings = ("schedule.steps=20", "run.batch_size=8")
    whole = trainer("whole", *settings, launcher=three)
    assert whole.wait() == 0, whole.output()
    killed = trainer("killed", *settings, launcher=three)
    killed.wait_until(lambda: killed.steps() >= 12)
    killed.kill()
    killed.wait()
    resumed = trainer("killed", *settings, launcher=three)
    assert resumed.wait() == 0, resumed.output()
    assert_same_end(whole.directory, killed.directory, 20)
