"""A run that goes on: from which checkpoint, and what may have changed. `tests/faults` kills runs in earnest."""

import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteus.training.learner import Learner
from proteus.training.probe import Probe
from tests.faults.runs import assert_same_end
from tests.training.conftest import LAUNCH, read_log
from tests.training.together import run_tool


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
    assert run_here("schedule.steps=10", "losses.token=0.5", "data.mask.ratio=0.25") == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "config has changed" in line]
    for change in ("losses.token: 1.0 -> 0.5", "schedule.steps: 5 -> 10", "data.mask.ratio: 0.5 -> 0.25"):
        assert change in line


@pytest.mark.parametrize("change", ["run.seed=3", "data.repeats=1", "student.tune=lora"])
def test_a_change_that_a_run_cannot_take_is_refused(run_here, tmp_path, capsys, change):
    assert run_here("schedule.steps=5") == 0
    kept = (tmp_path / "run/config.yaml").read_text()
    capsys.readouterr()
    assert run_here("schedule.steps=10", change) == 2
    (line,) = capsys.readouterr().err.splitlines()
    key, value = change.split("=")
    assert line.startswith(f"error: a run cannot go on from {tmp_path}/run/checkpoints/step_5 with {key}: ")
    assert f" -> {value}: take the change back" in line
    assert (tmp_path / "run/config.yaml").read_text() == kept
    for directory in ("run", "other"):  # nor where a checkpoint is named
        path = f"--resume={tmp_path}/run/checkpoints/step_5"
        assert run_here(path, "schedule.steps=10", change, directory=directory) == 2
        assert capsys.readouterr().err.splitlines() == [line]


def test_a_change_of_no_consequence_is_not_told(run_here, tmp_path, capsys):
    assert run_here() == 0
    whole = load_file(tmp_path / "run/student.safetensors")
    shutil.rmtree(tmp_path / "run/checkpoints/step_12")
    shutil.rmtree(tmp_path / "run/checkpoints/step_10")
    assert run_here("data.workers=1", "run.log_every=3", "run.save_every=4", "run.keep=9", "data.timeout=50") == 0
    said = capsys.readouterr().err
    assert "step_5" in said
    assert "config has changed" not in said
    again = load_file(tmp_path / "run/student.safetensors")
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_other_images_in_equal_number_are_told(run_here, tmp_path, capsys):
    for folder, color in (("a", 0), ("b", 90)):
        (tmp_path / folder).mkdir()
        for index in range(20):
            Image.new("RGB", (20, 20), (color, index, 0)).save(tmp_path / folder / f"{folder[0]}{index}.png")
    settings = ("data.kind=folder", "data.split=null", "run.batch_size=4")
    assert run_here(f"data.root={tmp_path}/a", *settings, "schedule.steps=5") == 0
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert run_here(f"data.root={tmp_path}/moved", *settings, "schedule.steps=6") == 0
    assert "other names" not in capsys.readouterr().err
    assert run_here(f"data.root={tmp_path}/b", *settings, "schedule.steps=7") == 0
    assert "warning: the images have other names than at the checkpoint" in capsys.readouterr().err
    assert run_here(f"data.root={tmp_path}/b", *settings, "schedule.steps=8") == 0
    assert "other names" not in capsys.readouterr().err


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


FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "progress.json", "checksums.json"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0 if path.suffix == ".json" else len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(run_here, tmp_path, capsys, file):
    assert run_here() == 0  # checkpoints of steps 5, 10 and 12
    whole = load_file(tmp_path / "run/student.safetensors")
    checkpoints = tmp_path / "run/checkpoints"
    (checkpoints / "step_10" / file).unlink()
    flip_a_bit(checkpoints / "step_12" / file)
    capsys.readouterr()
    assert run_here() == 0
    said = capsys.readouterr().err.splitlines()
    for step, wrong in ((12, "is not as it was written"), (10, "is missing")):
        (line,) = [line for line in said if f"step_{step} is damaged" in line]
        assert line == (
            f"warning: {checkpoints}/step_{step} is damaged ({file} {wrong}); it is kept as damaged-step_{step}, "
            "and the one before is used"
        )
    assert f"resumed from {checkpoints}/step_5" in said
    names = ["damaged-step_10", "damaged-step_12", "step_10", "step_12", "step_5"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    again = load_file(tmp_path / "run/student.safetensors")
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_where_no_checkpoint_is_whole_nothing_begins_again(run_here, tmp_path, capsys):
    assert run_here("schedule.steps=10") == 0
    checkpoints = tmp_path / "run/checkpoints"
    flip_a_bit(checkpoints / "step_5/optimizer.pt")
    (checkpoints / "step_10/model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert run_here("schedule.steps=12") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: no checkpoint in {checkpoints} is whole (step_10: model.safetensors is not as it was written; "
        "step_5: optimizer.pt is not as it was written): restore one, or give another run.dir to begin again"
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_10", "step_5"]


def test_a_damaged_checkpoint_to_branch_from_is_one_line(run_here, tmp_path, capsys):
    assert run_here() == 0
    flip_a_bit(tmp_path / "run/checkpoints/step_10/ema.safetensors")
    capsys.readouterr()
    assert run_here(f"--resume={tmp_path}/run/checkpoints/step_10", directory="other") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("checkpoints/step_10 is damaged: ema.safetensors is not as it was written")
    assert (tmp_path / "run/checkpoints/step_10").is_dir()


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


@pytest.mark.parametrize("ending", ["a signal", "a kill before the probe"])
def test_a_probe_that_an_ending_cut_off_is_made_on_resume(run_here, tmp_path, monkeypatch, ending):
    settings = ("probe.every_epochs=1", "probe.split=test", "probe.images=20", "probe.bank=40")
    settings += ("data.images_per_class=0.1", "schedule.steps=20", "run.save_every=8")  # 8 steps an epoch
    assert run_here(*settings, directory="whole") == 0
    asked = itertools.count(1)

    def until(number, end, work):
        return lambda *args: (end() if next(asked) == number else None, work(*args))[1]

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if ending == "a signal":
            patch.setattr(Learner, "update", until(8, lambda: os.kill(os.getpid(), signal.SIGTERM), Learner.update))
        else:
            patch.setattr(Probe, "measure", until(2, interrupt, Probe.measure))
        assert run_here(*settings) == (143 if ending == "a signal" else 130)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_8"]
    assert run_here(*settings) == 0
    assert run_here(*settings) == 0  # it is done, and so is its last probe
    logs = [map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines()) for name in ("run", "whole")]
    rows, others = ([row for row in log if "cosine_cls" in row] for log in logs)
    assert rows == others
    assert [row["step"] for row in rows] == [0, 8, 16, 20]
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("probe/cosine_cls")] == [0, 8, 16, 20]


def test_rows_after_the_checkpoint_are_not_logged_twice(run_here, tmp_path):
    assert run_here("schedule.steps=8") == 0
    shutil.rmtree(tmp_path / "run/checkpoints/step_8")  # as if it had been killed before it
    with open(tmp_path / "run/log.jsonl", "a") as log:
        log.write('{"step": 9, "lo')
    assert run_here("schedule.steps=12") == 0
    assert [row["step"] for row in read_log(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.parametrize(
    "junk", [b"\0\0\0}\n", b"\xff\xfe junk\n", b'{"x": 1}\n', b'{"step": 4, "lo{"step": 5}\n', b"[]}\n"]
)
def test_a_damaged_row_of_the_log_is_left_out(run_here, tmp_path, junk):
    assert run_here("schedule.steps=5") == 0
    rows = (tmp_path / "run/log.jsonl").read_bytes()
    (tmp_path / "run/log.jsonl").write_bytes(rows + junk)
    assert run_here("schedule.steps=6") == 0
    assert (tmp_path / "run/log.jsonl").read_bytes().startswith(rows)
    assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_what_is_whole_is_not_written_anew(run_here, tmp_path, monkeypatch):
    """As after a resume whose first batch cannot be read: a disk that fails could lose it."""
    from proteus.data.sources import DigitsSource

    assert run_here("schedule.steps=5") == 0
    before = {path: path.stat().st_ino for path in (tmp_path / "run/checkpoints/step_5").iterdir()}

    def gone(*_):
        raise OSError("stale file handle")

    monkeypatch.setattr(DigitsSource, "load", gone)
    assert run_here("schedule.steps=10") == 2
    assert {path: path.stat().st_ino for path in (tmp_path / "run/checkpoints/step_5").iterdir()} == before


def test_storage_that_cannot_be_read_is_no_verdict_on_a_checkpoint(run_here, tmp_path, capsys, monkeypatch):
    import hashlib

    assert run_here("schedule.steps=10") == 0

    def fails(*_):
        raise OSError(5, "Input/output error", "model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", fails)
        capsys.readouterr()
        assert run_here("schedule.steps=11") == 2
    assert capsys.readouterr().err == "error: model.safetensors cannot be read or moved: Input/output error\n"
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step_10", "step_5"]


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_end_the_run(run_here, tmp_path, monkeypatch):
    rmtree = shutil.rmtree

    def busy(path, ignore_errors=False, **kwargs):
        if "step_" in str(path) and Path(path).exists() and not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))
        if "old-step_" not in str(path):
            rmtree(path, ignore_errors=ignore_errors, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        assert run_here("run.keep=1") == 0
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == [".pending-old-step_10", ".pending-old-step_5", "step_12"]
    assert run_here("run.keep=1", "schedule.steps=13") == 0
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_13"]


def test_a_shorter_schedule_than_what_is_done_is_done(run_here, tmp_path, capsys):
    assert run_here("schedule.steps=6") == 0
    (tmp_path / "run/student.safetensors").unlink()
    assert run_here("schedule.steps=3") == 0
    said = capsys.readouterr().err.splitlines()
    assert "warning: 6 steps are done already, and the schedule has 3" in said
    assert "after 6 steps" in said[-1]
    assert (tmp_path / "run/student.safetensors").is_file()


def train_elsewhere(tool: str, argv: list[str]) -> int:
    """The second process looks for the run in another directory."""
    return run_tool(tool, [word + "_elsewhere" * (os.environ["RANK"] == "1" and "run.dir" in word) for word in argv])


def test_the_main_process_says_which_checkpoint_all_load(run_together):
    run_together("run", 2, "schedule.steps=8", "run.batch_size=8")
    directory = run_together("run", 2, "schedule.steps=12", "run.batch_size=8", work=train_elsewhere)
    assert [row["step"] for row in read_log(directory)] == list(range(1, 13))


@pytest.mark.slow
def test_three_killed_processes_end_bit_identical(trainer, run_together):
    three = tuple("3" if word == "2" else word for word in LAUNCH)
    settings = ("schedule.steps=20", "run.batch_size=8")
    whole = run_together("whole", 3, *settings)
    killed = trainer("killed", *settings, launcher=three)
    killed.wait_until(lambda: killed.steps() >= 12)
    killed.kill()
    killed.wait()
    assert_same_end(whole, run_together("killed", 3, *settings), 20)
