"""The three stages: what they leave, that they are done once, that they go on, and who is tested on what."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from proteus.config_files import load_config
from proteus.data.sources import DigitsSource
from proteus.evaluation.extract import View
from proteus.transfer import pipeline, stages
from proteus.transfer.config import TransferConfig
from proteus.transfer.model import load_task_model
from proteus.transfer.scores import task_score
from proteus.transfer.target import open_target
from tests.transfer.conftest import SEGMENTATION, results, stage

STAGES = ("adapt", "oriented/transfer", "oriented/finetune")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_the_three_stages_and_what_they_leave(transfer_here, done, tmp_path, capsys):
    seed = done
    for name, steps in zip(STAGES, (8, 6, 4), strict=True):
        facts = stage(seed / name)
        assert facts["steps"] == steps
        assert facts["best_step"] <= steps
        assert 0 <= facts["score"] <= 1
        assert (seed / name / "student.safetensors").is_file()
        assert (seed / name / "head.safetensors").is_file()
    teacher, student = results(tmp_path / "run")
    assert (teacher["method"], student["method"]) == ("teacher", "oriented")
    assert student["steps"] == 10
    assert student["flops"] == sum(stage(seed / name)["flops"] for name in STAGES)
    assert teacher["flops"] == stage(seed / "adapt")["flops"]
    assert "| task-oriented transfer |" in (tmp_path / "run" / "results.md").read_text()
    assert transfer_here() == 0  # what is done is shown again
    assert "| task-oriented transfer |" in capsys.readouterr().out


def test_a_stage_starts_from_the_one_before(transfer_here, tmp_path):
    # A rate of almost nothing, and one validation, of the last step: what a stage begins with is what it ends with.
    assert transfer_here("finetune.optimizer.lr=1e-12", "finetune.schedule.warmup_lr=0", "target.val=null") == 0
    seed = tmp_path / "run" / "seed_1"
    for name in ("student.safetensors", "head.safetensors"):
        before, after = (load_file(seed / "oriented" / part / name) for part in ("transfer", "finetune"))
        assert before.keys() == after.keys()
        for key in before:
            torch.testing.assert_close(after[key], before[key], atol=1e-8, rtol=0)


def test_what_is_done_is_not_done_again(transfer_here, done, tmp_path, monkeypatch):
    before = _files(tmp_path)

    def never(*_, **__):
        raise AssertionError("trained or tested again")

    monkeypatch.setattr(stages, "train", never)
    monkeypatch.setattr(pipeline, "task_score", never)
    assert transfer_here() == 0
    assert _files(tmp_path) == before


def test_one_stage_alone_is_done_again_where_its_folder_is_deleted(transfer_here, done, tmp_path, monkeypatch):
    seed = tmp_path / "run" / "seed_1"
    before = _files(seed)
    shutil.rmtree(seed / "oriented" / "finetune")
    trained = []
    train = stages.train
    monkeypatch.setattr(stages, "train", lambda cfg, **more: trained.append(cfg.run.dir) or train(cfg, **more))
    assert transfer_here() == 0
    assert trained == [str(seed / "oriented" / "finetune")]
    assert _files(seed) == before


@pytest.mark.parametrize("update", [3, 11, 16], ids=["in adapt", "in transfer", "in finetune"])
def test_a_signal_stops_in_a_stage_and_the_same_command_goes_on(
    transfer_here, done_once, tmp_path, monkeypatch, update
):
    from proteus.training import learner

    updates, finite_step = 0, learner.finite_step

    def interrupted(*args):
        nonlocal updates
        updates += 1
        if updates == update:
            os.kill(os.getpid(), signal.SIGINT)
        return finite_step(*args)

    monkeypatch.setattr(learner, "finite_step", interrupted)
    assert transfer_here() == 130
    assert updates == update
    assert not (tmp_path / "run" / "results.json").exists()
    assert transfer_here() == 0
    assert updates == 8 + 6 + 4
    whole, broken = done_once / "seed_1", tmp_path / "run" / "seed_1"
    for name in STAGES:
        for file in ("student.safetensors", "head.safetensors"):
            assert (whole / name / file).read_bytes() == (broken / name / file).read_bytes()
        assert stage(whole / name)["score"] == stage(broken / name)["score"]
    assert results(done_once)[1]["test"] == results(tmp_path / "run")[1]["test"]


CHANGED = [
    ("adapt.optimizer.lr=0.5", "adapt", "optimizer.lr was 0.01 and is 0.5"),
    ("transfer.temperature=3", "oriented/transfer", "temperature was 1.0 and is 3.0"),
    ("transfer.schedule.steps=7", "oriented/transfer", "schedule.steps was 6 and is 7"),
    ("finetune.validate_every=1", "oriented/finetune", "validation images, crop or interval have changed"),
    ("crop=0.5", "adapt", "validation images, crop or interval have changed"),
    ("target.val.per_class=3", "adapt", "images it learns from have changed"),
    ("target.train.per_class=4", "adapt", "images it learns from have changed"),
    ("adapt.batch_size=8", "adapt", "images of a step was 16 and is 8"),
]


@pytest.mark.parametrize(("override", "folder", "told"), CHANGED, ids=[change[0] for change in CHANGED])
def test_another_setting_of_a_stage_that_is_done_is_refused(
    transfer_here, done, tmp_path, capsys, override, folder, told
):
    before = _files(tmp_path)
    config = (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    assert transfer_here(override) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: {tmp_path}/run/seed_1/{folder} is done, in another way: ")
    assert told in said
    assert _files(tmp_path) == before
    assert (tmp_path / "run" / "config.yaml").read_text() == config


def test_another_setting_of_a_stage_that_was_stopped_is_refused(transfer_here, tmp_path, monkeypatch, capsys):
    from proteus.training import learner

    updates, finite_step = [], learner.finite_step
    with monkeypatch.context() as patch:
        patch.setattr(
            learner,
            "finite_step",
            lambda *args: (
                updates.append(1) or (len(updates) == 12 and os.kill(os.getpid(), signal.SIGINT)) or finite_step(*args)
            ),
        )
        assert transfer_here() == 130
    assert transfer_here("transfer.temperature=5") == 2
    assert "oriented/transfer is begun, in another way: temperature was 1.0" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run" / "seed_1" / "adapt")
    assert transfer_here("adapt.schedule.steps=2") == 2
    assert "oriented/transfer is begun, in another way: stages before have been done" in capsys.readouterr().err


def test_other_images_under_the_same_names_are_another_transfer_set(transfer_here, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(16):
            Image.new("RGB", (16, 16), (10 * index, 99 * (name == "b"), 0)).save(tmp_path / name / f"{index}.png")
    assert transfer_here(f"transfer.data={{root: {tmp_path / 'a'}}}", "transfer.own=false") == 0
    assert transfer_here(f"transfer.data={{root: {tmp_path / 'b'}}}", "transfer.own=false") == 2
    assert "oriented/transfer is done, in another way: images it learns" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_another_start(transfer_here, tmp_path, capsys):
    assert transfer_here(directory="first") == 0
    start = tmp_path / "start.safetensors"
    shutil.copy(tmp_path / "first/seed_1/oriented/transfer/student.safetensors", start)
    options = ["--compare=pretrained-own", "run.seeds=1", f"pretrained={{own: {start}}}"]
    assert transfer_here(*options) == 0
    shutil.copy(tmp_path / "first/seed_1/oriented/finetune/student.safetensors", start)
    assert transfer_here(*options) == 2
    assert "pretrained-own is done, in another way: student.checkpoint was 'sha256" in capsys.readouterr().err


def test_a_stage_made_anew_puts_those_after_it_out_of_date(transfer_here, done, capsys):
    shutil.rmtree(done / "adapt")
    assert transfer_here("adapt.schedule.steps=9") == 2
    assert "oriented/transfer is done, in another way: stages before have" in capsys.readouterr().err


def test_the_same_stage_made_anew_leaves_those_after_it(transfer_here, done, monkeypatch):
    shutil.rmtree(done / "adapt")
    trained = []
    train = stages.train
    monkeypatch.setattr(stages, "train", lambda cfg, **more: trained.append(cfg.run.dir) or train(cfg, **more))
    assert transfer_here() == 0
    assert trained == [str(done / "adapt")]


def test_incidental_settings_may_change(transfer_here, done):
    settings = ["run.log_every=3", "run.save_every=5", "run.keep=1", "run.workers=1", "teacher.download=true"]
    assert transfer_here(*settings, "adapt.grad_checkpointing=true") == 0


def test_a_comparison_and_a_single_run_keep_their_own_results(transfer_here, done, tmp_path):
    assert transfer_here("--compare=scratch,oriented", "run.seeds=1") == 0
    assert [row["method"] for row in results(tmp_path / "run")] == ["teacher", "oriented"]
    assert [row["method"] for row in results(tmp_path / "run", "compare")] == ["scratch", "teacher", "oriented"]


def test_the_test_set_is_read_once_after_all_training(transfer_here, tmp_path, monkeypatch):
    events = []
    train, score = stages.train, pipeline.task_score
    monkeypatch.setattr(stages, "train", lambda cfg, **more: events.append("train") or train(cfg, **more))
    monkeypatch.setattr(pipeline, "task_score", lambda *args: events.append("test") or score(*args))
    loads = []
    load = DigitsSource.load
    monkeypatch.setattr(DigitsSource, "load", lambda self, i: loads.append((len(self), events.copy())) or load(self, i))
    assert transfer_here() == 0
    assert events == ["train"] * 3 + ["test"] * 2  # the adapted teacher and the student
    of_test = [seen for size, seen in loads if size == 450]
    assert len(of_test) == 2 * 450
    assert all(seen[:3] == ["train"] * 3 for seen in of_test)


def test_the_model_of_the_last_stage_is_what_was_scored(transfer_here, tiny, tmp_path):
    assert transfer_here("adapt.schedule.steps=30") == 0
    cfg = load_config(str(tiny), [], TransferConfig)
    target = open_target(cfg, 1)
    for row, folder in zip(results(tmp_path / "run"), ("adapt", "oriented/finetune"), strict=True):
        model = load_task_model(tmp_path / "run" / "seed_1" / folder)
        assert model.classes == [str(digit) for digit in range(10)]
        with torch.no_grad():
            assert task_score(model, target.test, View(16, 1.0, 50)) == row["test"]
        assert task_score(model, target.val, View(16, 1.0, 7)) == row["validation"]
    assert results(tmp_path / "run")[0]["test"] > 0.8  # 30 steps on a head, from a teacher that knows digits


def test_a_folder_that_is_no_stage_is_one_line(tmp_path):
    from proteus.errors import InputError

    with pytest.raises(InputError, match=r"student.safetensors: not there; give the folder of a stage that is done"):
        load_task_model(tmp_path)


@pytest.mark.parametrize("tune", ["all", "lora"])
def test_the_teacher_adapts_as_a_whole_or_by_adapters(transfer_here, tmp_path, tune):
    assert transfer_here(f"adapt.tune={tune}", "target.val=null") == 0
    before = load_file("benchmarks/demo/teacher.safetensors")
    after = load_file(tmp_path / "run" / "seed_1" / "adapt" / "student.safetensors")
    assert before.keys() - after.keys() == set()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert "blocks.0.attn.qkv.weight" in changed
    assert ("blocks.0.norm1.weight" in changed) == (tune == "all")
    load_task_model(tmp_path / "run" / "seed_1" / "adapt")


def test_a_head_alone_leaves_the_teacher_as_it_is(done):
    before = load_file("benchmarks/demo/teacher.safetensors")
    after = load_file(done / "adapt" / "student.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_segmentation(transfer_here, tmp_path):
    assert transfer_here(*SEGMENTATION) == 0
    seed = tmp_path / "run" / "seed_1"
    for name in STAGES:
        assert (seed / name / "head.safetensors").is_file()
        assert 0 < stage(seed / name)["score"] < 1
    model = load_task_model(seed / "oriented" / "finetune")
    assert model.classes == ["wall", "floor", "ball", "box", "cone"]
    assert model(torch.rand(2, 3, 32, 48)).shape == (2, 5, 8, 12)
    row = results(tmp_path / "run")[1]
    cfg = load_config(str(tmp_path / "tiny.yaml"), SEGMENTATION, TransferConfig)
    assert task_score(model, open_target(cfg, 1).test, View(32, 1.0)) == pytest.approx(row["test"], abs=1e-12)


def test_without_a_validation_set_the_last_weights_are_kept(transfer_here, tmp_path):
    assert transfer_here("target.val=null") == 0
    seed = tmp_path / "run" / "seed_1"
    for name, steps in zip(STAGES, (8, 6, 4), strict=True):
        assert (stage(seed / name)["score"], stage(seed / name)["best_step"]) == (None, steps)
        kept = load_file(seed / name / "head.safetensors")
        last = load_file(seed / name / "checkpoints" / f"step_{steps}" / "model.safetensors")
        assert torch.equal(kept["weight"], last["classifier.weight"])


def test_labels_alone_are_enough(transfer_here, tmp_path, capsys):
    assert transfer_here("target={set: digits, train: {split: train, per_class: 2}}") == 0
    teacher, student = results(tmp_path / "run")
    assert (teacher["test"], student["test"], student["validation"]) == (None, None, None)
    assert "| task-oriented transfer | not measured |" in capsys.readouterr().out
    assert load_task_model(student["student"]).classes[-1] == "9"


def test_without_a_test_set_validation_is_shown_and_nothing_compared(transfer_here, tmp_path, capsys):
    assert transfer_here("target.test=null") == 0
    said = capsys.readouterr().out
    assert "validation accuracy (%)" in said
    assert f"| task-oriented transfer | {100 * results(tmp_path / 'run')[1]['validation']:.1f} |" in said
    assert transfer_here("target.test=null", "--compare=all") == 2
    assert "target.test is not given" in capsys.readouterr().err
