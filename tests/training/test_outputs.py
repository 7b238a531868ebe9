"""What a run leaves behind, and what it shows on the way."""

import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from proteus.models import create_model, load_checkpoint
from proteus.models.features import Features
from proteus.training.pictures import component_colours, components_picture
from tests.training.conftest import read_log

PROBE = ("probe.every_epochs=1", "probe.split=test", "probe.images=50", "probe.bank=200", "probe.crop=1.0")
ONE_EPOCH = ("schedule.steps=null", "schedule.epochs=1", "run.batch_size=64", "run.log_every=5")


@pytest.fixture
def finished(run_here, tmp_path):
    """The directory of a run of one epoch with its probe."""
    assert run_here(*PROBE, *ONE_EPOCH) == 0
    return tmp_path / "run"


def test_everything_the_design_names_is_there(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        *("lock", "config.yaml", "log.jsonl", "tensorboard", "checkpoints", "pictures"),
        *("student.safetensors", "student_ema.safetensors"),
    }
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["run"]["batch_size"] == 64
    assert resolved["optimizer"]["weight_decay"] == 0.05  # defaults are written out


def test_the_log_says_what_the_step_did(finished):
    rows = read_log(finished)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 21]
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_token"] + row["loss_patch"] + row["loss_feature"], rel=1e-6)
        assert row["images_per_s"] > 0
        assert 0 <= row["data_wait"] <= 1
        assert row["memory_gb"] > 0.1
        assert row["skipped_steps"] == row["bad_images"] == 0
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_probe_measures_before_and_after(finished):
    probes = [
        row for line in (finished / "log.jsonl").read_text().splitlines() if "cosine_cls" in (row := json.loads(line))
    ]
    assert [row["step"] for row in probes] == [0, 21]
    before, after = probes
    assert after["cosine_cls"] > before["cosine_cls"] + 0.05
    assert after["cosine_patch"] > before["cosine_patch"] + 0.05
    assert before["knn_teacher"] == after["knn_teacher"] > 0.1
    assert 0.1 < after["knn_student"] <= 1


def test_tensorboard_has_scalars_and_the_picture(finished):
    events = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/lr", "train/images_per_s", "probe/cosine_cls", "probe/knn_student"} <= set(
        tags["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == [5, 10, 15, 20, 21]
    assert [event.step for event in events.Images("components")] == [0, 21]
    picture = np.asarray(Image.open(finished / "pictures/step_21.png").convert("RGB"))
    assert picture.std() > 20  # it shows something
    assert events.Images("components")[0].width == picture.shape[1]


def test_the_student_loads_by_create_model_by_file_and_by_timm(finished):
    arch = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    file = str(finished / "student.safetensors")
    images = torch.rand(2, 3, 16, 16)
    by_file = load_checkpoint(file).eval()
    by_name = create_model("timm/vit_tiny_patch16_224", checkpoint=file, **arch).eval()
    vit = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=0, **arch).eval()
    vit.load_state_dict(load_file(file), strict=True)
    with torch.no_grad():
        expected = vit((images - 0.5) / 0.5)  # timm's convention for this network
        torch.testing.assert_close(by_file(images).cls, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(by_name(images).cls, expected, atol=1e-6, rtol=0)
    average = load_file(finished / "student_ema.safetensors")
    assert any(not torch.equal(average[key], value) for key, value in load_file(file).items())


def test_classes_of_two_splits_are_matched_by_name(run_here, tmp_path):
    """The held-out split lacks the first class: its numbers are not the training split's."""
    for split, names in (("train", "abcd"), ("val", "bcd")):
        for name in names:
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(20):
                colour = tuple(200 * (name == which) + number for which in "bcd")
                Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
    data = ("data.kind=folder", f"data.root={tmp_path / 'set'}", "data.split=train", "probe.neighbours=5")
    assert run_here(*data, "probe.every_epochs=1", "probe.split=val", "schedule.steps=1") == 0
    (probe,) = [row for line in (tmp_path / "run/log.jsonl").read_text().splitlines()[:1] if (row := json.loads(line))]
    assert probe["knn_student"] == probe["knn_teacher"] == 1.0


def test_components_of_tokens_on_a_line_are_their_order():
    along = torch.linspace(-1, 1, 64).reshape(1, 64, 1) * torch.randn(1, 1, 8)  # [1, 64, 8]: one direction of variance
    colours = component_colours(along + 1e-6 * torch.randn(1, 64, 8))
    first = colours[0, :, 0]
    steps = first[2:-2].diff()
    assert (steps > 0).all() or (steps < 0).all()
    assert first.min() == 0
    assert first.max() == 1


def test_tokens_of_one_space_have_one_colour(tmp_path):
    teacher = Features(torch.randn(2, 8), torch.randn(2, 16, 8), (4, 4))
    images = torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    same = components_picture(images, teacher, teacher, True, tmp_path / "same.png")
    other = components_picture(
        images, teacher, teacher._replace(patch=torch.randn(2, 16, 8)), True, tmp_path / "other.png"
    )
    third = same.shape[1] // 3

    def distance(picture):
        return np.abs(picture[40:, third : 2 * third].astype(int) - picture[40:, 2 * third : 3 * third]).mean()

    assert distance(same) < 0.25 * distance(other)
