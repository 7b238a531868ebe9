"""What bad input gets: the error table of the design, row by row, by the trainer's own main."""

import itertools
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from proteus.data.sources import FolderSource
from tests.training.conftest import read_log


@pytest.fixture
def complaint(run_here, capsys):
    """Run with overrides that cannot work; returns the lines of the complaint."""

    def run(*overrides: str, status: int = 2, **where) -> list[str]:
        capsys.readouterr()
        assert run_here(*overrides, **where) == status
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return [line for line in said.splitlines() if line.startswith("error: ")]

    return run


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.sede=1", "unknown key 'run.sede'; did you mean 'run.seed'?"),
        ("run.batch_size=many", "run.batch_size"),
        ("losses.tokn=1", "unknown loss 'tokn'; did you mean 'token'?"),
        ("student.name=proteus_vits41", "unknown model 'proteus_vits41'; did you mean 'proteus_vits14'?"),
        ("teacher.name=timm/vit_tny_patch16_224", "did you mean 'timm/vit_tiny_patch16_224'?"),
        ("student.name=timm/resnet18", "timm/resnet18"),
        ("student.arch.widht=3", "widht"),
        ("run.precision=fp16", "run.precision=fp16 needs a GPU"),
        ("data.augment.auto_augment=rand-m9-foo1", "data.augment.auto_augment"),
        ("data.image_size=18", "18 x 18 pixels"),
        ("data.kind=folder", "data.root is not set"),
        ("data.split=val", "the digits have splits train and test"),
        ("student.checkpoint=nowhere.safetensors", "student.checkpoint=nowhere.safetensors: no such file"),
        ("teacher.image_size=18", "teacher.image_size=18: timm/vit_tiny_patch16_224: an image of 18 x 18 pixels"),
        ("student.image_size=18", "student.image_size=18: timm/vit_tiny_patch16_224: an image of 18 x 18 pixels"),
        ("--resume=nowhere", "--resume nowhere"),
        ("data.mask.ratio=0.05", "mask 8 of 16 images and 0 of 16 patches"),
        ("run.batch_size=1", "mask 0 of 1 images"),
        ("probe.split=train", "probe.split=train: give data.split another split"),
        ("student.arch.image_size=28", "student.arch: image_size is not an argument of the network"),
        ("student.arch.patch_size=0", "cannot be built with"),
        ("data.merge=[{kind: folder}]", "data.merge.0.root is not set"),
    ],
)
def test_one_line_that_names_the_key(complaint, override, said):
    (line,) = complaint(override)
    assert said in line


def test_everything_that_is_missing_is_said_at_once(complaint, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    lines = complaint(cfg="proteus_l14.yaml")
    assert len(lines) == 3  # weights, fp16 without a GPU, data
    weights, precision, data = lines
    assert "dinov2_vitg14_pretrain.pth" in weights
    assert "https://" in weights
    assert "teacher.checkpoint=PATH" in weights
    assert "teacher.download=true" in weights
    assert "run.precision" in precision
    assert "data.root=PATH" in data
    assert "train/<class>/<image>" in data
    assert not list((tmp_path / "hub").rglob("*"))  # nothing was fetched
    assert not (tmp_path / "run").exists()


def test_data_root_missing_empty_or_without_images(complaint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/readme.txt").write_text("no picture")
    for name, said in (("nowhere", "no such folder"), ("empty", "no images under"), ("texts", "no images under")):
        (line,) = complaint("data.kind=folder", "data.split=null", f"data.root={tmp_path / name}")
        assert said in line
        assert str(tmp_path / name) in line
    (line,) = complaint("data.kind=folder", f"data.root={tmp_path}")
    assert "holds no folder 'train'" in line


def test_weights_that_do_not_fit_are_named(complaint, run_here, tmp_path):
    assert run_here("schedule.steps=1", directory="first") == 0
    file = tmp_path / "first/student.safetensors"
    (line,) = complaint(f"student.checkpoint={file}", "student.arch.embed_dim=32")
    assert "is of a network with embed_dim=16, not 32" in line
    save_file(load_file(file), bare := tmp_path / "bare.safetensors")  # says nothing of itself
    (line,) = complaint(f"student.checkpoint={bare}", "student.arch.embed_dim=32")
    assert "cls_token is [1, 1, 16], not [1, 1, 32]" in line
    (line,) = complaint(f"student.checkpoint={bare}", "student.arch.depth=3")
    assert "missing: blocks.2.norm1.weight" in line
    (line,) = complaint(f"student.checkpoint={bare}", "student.arch.depth=1")
    assert "unexpected: blocks.1.attn.proj.bias" in line
    (tmp_path / "broken.safetensors").write_bytes(b"not weights at all")
    (line,) = complaint(f"student.checkpoint={tmp_path / 'broken.safetensors'}")
    assert "cannot be read" in line


@pytest.fixture
def photos(tmp_path):
    """A folder of 40 noise images; photos(n) breaks the first n of them."""

    def make(broken: int):
        folder = tmp_path / "photos"
        folder.mkdir(exist_ok=True)
        for index in range(40):
            pixels = np.random.default_rng(index).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        for index in range(broken):
            path = folder / f"{index:02d}.png"
            path.write_bytes(path.read_bytes()[:200])
        return "data.kind=folder", "data.split=null", f"data.root={folder}", "data.repeats=1"

    return make


def test_unreadable_images_are_replaced_counted_and_named(photos, run_here, tmp_path):
    assert run_here(*photos(3), "schedule.steps=6", "data.max_bad_files=4") == 0
    assert (tmp_path / "run/skipped_images.txt").read_text().split() == ["00.png", "01.png", "02.png"]
    assert read_log(tmp_path / "run")[-1]["bad_images"] == 3
    facts = json.loads((tmp_path / "run/checkpoints/step_6/progress.json").read_text())
    assert facts["bad_images"] == [0, 1, 2]

    branch = f"--resume={tmp_path}/run/checkpoints/step_6"
    assert run_here(*photos(3), branch, "schedule.steps=7", directory="branch") == 0
    assert (tmp_path / "branch/skipped_images.txt").read_text().split() == ["00.png", "01.png", "02.png"]


def test_a_name_that_is_not_utf8_is_named_as_it_is(photos, run_here, tmp_path):
    settings = photos(1)
    os.rename(os.fsencode(tmp_path / "photos/00.png"), os.fsencode(tmp_path / "photos") + b"/\xff\xfe.png")
    assert run_here(*settings, "schedule.steps=5") == 0
    assert (tmp_path / "run/skipped_images.txt").read_bytes() == b"\xff\xfe.png\n"


def test_too_many_unreadable_images_stop_the_run(photos, complaint, tmp_path):
    settings = photos(12)
    (line,) = complaint(*settings, "schedule.steps=12")
    assert "of 40 images cannot be read" in line
    assert "max_bad_share=0.01" in line
    assert len((tmp_path / "run/skipped_images.txt").read_text().split()) >= 10
    assert complaint(*settings, "schedule.steps=12", "data.max_bad_share=0.5", status=0, directory="patient") == []


@pytest.mark.parametrize("workers", [0, 2])
def test_data_of_which_nothing_can_be_read_is_one_line(photos, complaint, workers):
    (line,) = complaint(*photos(40), f"data.workers={workers}")
    assert "images in a row cannot be read" in line


def test_a_diverging_run_stops_names_the_steps_and_leaves_its_checkpoint(complaint, run_here, tmp_path):
    settings = ("schedule.steps=40", "run.max_nonfinite=5", "run.save_every=2", "schedule.warmup_steps=0")
    assert run_here(*settings, "schedule.steps=2", "optimizer.lr=1e-3") == 0
    (line,) = complaint(*settings, "optimizer.lr=1e30", status=1)
    assert "6 steps" in line
    assert "run.max_nonfinite=5" in line
    assert "optimizer.lr" in line
    rows = read_log(tmp_path / "run")
    assert sum(row["skipped_steps"] for row in rows) == 6
    assert [row["loss"] for row in rows if row["skipped_steps"]] == [None] * 6
    assert (tmp_path / "run/checkpoints").is_dir()
    assert sorted((tmp_path / "run/checkpoints").glob("step_*"))


def test_a_step_skipped_now_and_then_is_no_reason_to_stop():
    """fp16 skips about one step in 2,000 as long as it runs, to find out how large its loss scale may be."""
    from proteus.training.nonfinite import too_many
    from proteus.training.state import Progress

    progress = Progress(images=1000, images_per_step=10)
    for step in range(50, 400_000, 50):
        progress.step = step
        if step % 2000 == 0:
            progress.skipped_steps.append(step - 7)
        assert not too_many(progress, 100)
    assert len(progress.skipped_steps) <= 1
    progress.skipped_steps = list(range(step - 99, step + 1))
    assert not too_many(progress, 100)
    progress.skipped_steps.insert(0, step - 100)
    assert too_many(progress, 100)
    progress.skipped_steps = [step - 1000, step - 999]
    assert not too_many(progress, 1)
    assert progress.skipped_steps == [step - 999]


def storage_goes_after(count: int, patch: pytest.MonkeyPatch) -> None:
    """Let no image be read after so many."""
    load, loaded = FolderSource.load, itertools.count(1)

    def until_it_goes(self, index):
        if next(loaded) > count:
            raise OSError("stale file handle")
        return load(self, index)

    patch.setattr(FolderSource, "load", until_it_goes)


def test_storage_that_goes_away_leaves_a_checkpoint(photos, complaint, tmp_path, monkeypatch):
    storage_goes_after(16 * 5, monkeypatch)
    (line,) = complaint(*photos(0), "run.save_every=1000")
    assert "images in a row cannot be read" in line
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    assert saved.name == "step_5"


def test_what_was_counted_until_the_storage_went_away_is_not_forgotten(
    photos, complaint, run_here, tmp_path, monkeypatch
):
    from tests.faults.test_numbers import spoil

    settings = (*photos(1), "schedule.steps=8", "run.log_every=1000", "run.save_every=1000")
    spoil(monkeypatch.setattr, "nan", (3,))
    assert run_here(*settings, directory="whole") == 0
    with monkeypatch.context() as patch:
        storage_goes_after(16 * 5 + 8, patch)
        complaint(*settings)
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*")
    facts = json.loads((saved / "progress.json").read_text())
    assert (facts["step"], facts["skipped_steps"], facts["bad_images"][0]) == (5, [3], 0)
    (row,) = read_log(tmp_path / "run")
    assert (row["step"], row["skipped_steps"]) == (5, 1)
    assert run_here(*settings) == 0
    resumed, whole = (
        json.loads((tmp_path / name / "checkpoints/step_8/progress.json").read_text()) for name in ("run", "whole")
    )
    assert resumed["skipped_steps"] == whole["skipped_steps"] == [3]
    assert set(resumed["bad_images"]) >= set(whole["bad_images"]) == {0}
    assert "00.png" in (tmp_path / "run/skipped_images.txt").read_text().split()


def test_storage_that_goes_away_in_a_step_leaves_no_part_of_it(photos, complaint, run_here, tmp_path, monkeypatch):
    settings = (*photos(0), "run.batch_size=8", "run.accumulate=2", "teacher.standardize=true", "data.workers=0")
    assert run_here(*settings, "schedule.steps=12", "run.save_every=5", "run.keep=9", directory="whole") == 0
    with monkeypatch.context() as patch:
        storage_goes_after(16 * 5 + 8, patch)  # the first micro-batch of step 6 has been learnt
        assert run_here(*settings, "schedule.steps=12", "run.save_every=1000") == 2
    saved, whole = (load_file(tmp_path / name / "checkpoints/step_5/model.safetensors") for name in ("run", "whole"))
    assert any("standardizers" in key for key in saved)
    assert all(torch.equal(saved[key], whole[key]) for key in whole)
    assert run_here(*settings, "schedule.steps=12") == 0
    one, other = (load_file(tmp_path / name / "student.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_that_cannot_be_written_is_one_line(complaint, tmp_path, monkeypatch):
    import safetensors.torch

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("proteus.training.state.save_file", full)
    (line,) = complaint(status=1)
    assert "the checkpoint of step 5 cannot be written" in line
    assert "No space left on device" in line
    monkeypatch.setattr("proteus.training.state.save_file", safetensors.torch.save_file)
    assert complaint(status=0) == []


def test_a_run_directory_that_cannot_be_used(complaint, tmp_path):
    (tmp_path / "run").write_text("a file")
    (line,) = complaint()
    assert f"run.dir={tmp_path / 'run'} cannot be used" in line
    (tmp_path / "other/lock").mkdir(parents=True)
    (line,) = complaint(directory="other")
    assert "cannot be used" in line
