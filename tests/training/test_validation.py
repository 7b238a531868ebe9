"""A run on given images: which weights a validation keeps, the head that is written and started from, what is tuned."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from proteus.config import Config
from proteus.config_files import load_config
from proteus.data.sampler import Draw
from proteus.data.scenes import SceneSource
from proteus.data.sources import DigitsSource
from proteus.errors import InputError
from proteus.models.heads import read_head
from proteus.training.dense import DenseTrainingSet, square_views
from proteus.training.loop import train
from proteus.training.state import list_checkpoints, read_progress
from proteus.training.validation import Validation

LABELS = [
    "teacher=null",
    "losses={label_ce: 1.0}",
    "ema.decay=null",
    "schedule.steps=6",
    "run.save_every=1",
    "run.keep=9",
]


@pytest.fixture
def labelled(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The config of a tiny run on labels: labelled("run.seed=1") -> Config."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def load(*overrides: str, directory: str = "run") -> Config:
        PartialState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return load_config(str(tiny), [*LABELS, f"run.dir={tmp_path / directory}", *overrides])

    return load


def _last(directory: Path):
    return list_checkpoints(directory / "checkpoints")[-1]


@pytest.mark.parametrize(
    ("scores", "best"),
    [([0.1, 0.4, 0.3, 0.2], 2), ([0.5, 0.4, 0.3, 0.2], 0), ([0.1, 0.4, 0.4, 0.3], 4), ([0.1, 0.2, 0.3, 0.3], 6)],
    ids=["in the middle", "at the start", "the later of equals", "at the end"],
)
def test_the_weights_of_the_best_score_are_kept(labelled, tmp_path, scores, best):
    left = list(scores)
    modes = []

    def score(task) -> float:
        modes.append(task.training)
        return left.pop(0)

    assert train(labelled(), source=DigitsSource("train"), validation=Validation(score, 2)) == 0
    assert not left
    assert modes == [False] * 4
    progress = read_progress(_last(tmp_path / "run"))
    assert (progress.best_step, progress.best_score) == (best, max(scores))
    kept = load_file(tmp_path / "run" / "head.safetensors")
    student = load_file(tmp_path / "run" / "student.safetensors")
    if best:
        then = load_file(tmp_path / "run" / "checkpoints" / f"step_{best}" / "model.safetensors")
        assert torch.equal(kept["weight"], then["classifier.weight"])
        key = "blocks.1.mlp.fc2.weight"
        assert torch.equal(student[key], then[f"student.network.{key}"])


def test_the_last_step_is_scored_even_off_the_interval(labelled, tmp_path):
    steps = []
    validation = Validation(lambda task: steps.append(1) or len(steps), 4)
    assert train(labelled(), source=DigitsSource("train"), validation=validation) == 0
    assert len(steps) == 3  # before the first step, after the fourth, and after the sixth
    assert read_progress(_last(tmp_path / "run")).best_step == 6


def test_a_run_that_goes_on_remembers_its_best(labelled, tmp_path):
    scores = [0.1, 0.9, 0.5]
    cfg = labelled("schedule.steps=4")
    assert train(cfg, source=DigitsSource("train"), validation=Validation(lambda _: scores.pop(0), 2)) == 0
    kept = (tmp_path / "run" / "student.safetensors").read_bytes()
    again = labelled("schedule.steps=6")
    later = [0.8]
    assert train(again, source=DigitsSource("train"), validation=Validation(lambda _: later.pop(0), 2)) == 0
    progress = read_progress(_last(tmp_path / "run"))
    assert (progress.best_step, progress.best_score) == (2, 0.9)
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == kept


def test_a_run_on_labels_leaves_a_head_that_another_starts_from(labelled, tmp_path):
    assert train(labelled()) == 0
    head, classes = read_head(tmp_path / "run" / "head.safetensors", 16)
    assert classes == [str(digit) for digit in range(10)]
    overrides = [f"student.head={tmp_path}/run/head.safetensors", "optimizer.lr=1e-12", "schedule.warmup_lr=0"]
    assert train(labelled(*overrides, directory="next")) == 0
    after = load_file(tmp_path / "next" / "head.safetensors")["weight"]
    torch.testing.assert_close(after, head.weight.detach(), atol=1e-8, rtol=0)


def test_a_head_for_other_classes_is_refused(labelled, tmp_path):
    assert train(labelled()) == 0
    few = DigitsSource("train")
    few.classes = few.classes[:4]
    with pytest.raises(InputError, match=r"student.head=.* has 10 classes, the task 4"):
        train(labelled(f"student.head={tmp_path}/run/head.safetensors", directory="next"), source=few)


def test_a_head_on_patches_as_well_is_no_student_s(labelled, tmp_path):
    torch.save({"weight": torch.zeros(10, 32), "bias": torch.zeros(10)}, tmp_path / "wide.pth")
    with pytest.raises(InputError, match="reads the mean patch token too"):
        train(labelled(f"student.head={tmp_path / 'wide.pth'}"))


def test_a_run_without_losses_on_logits_leaves_no_head(run_here, tmp_path):
    assert run_here("schedule.steps=1") == 0
    assert (tmp_path / "run" / "student.safetensors").is_file()
    assert not (tmp_path / "run" / "head.safetensors").exists()


def test_tuning_the_head_alone_leaves_the_student(labelled, tmp_path):
    assert train(labelled("schedule.steps=1", "optimizer.lr=0.1")) == 0
    first = f"student.checkpoint={tmp_path}/run/student.safetensors"
    assert train(labelled(first, "student.tune=head", directory="head")) == 0
    assert train(labelled(first, "student.tune=all", directory="all")) == 0
    before, head, whole = (load_file(tmp_path / name / "student.safetensors") for name in ("run", "head", "all"))
    assert all(torch.equal(before[key], head[key]) for key in before)
    assert not all(torch.equal(before[key], whole[key]) for key in before)


def test_flops_are_counted_once_and_kept(labelled, tmp_path):
    cfg = labelled("schedule.steps=2", "run.batch_size=8")
    assert train(cfg, source=DigitsSource("train"), measure_flops=True) == 0
    once = read_progress(_last(tmp_path / "run")).flops_per_step
    cfg = labelled("schedule.steps=2", "run.batch_size=16", directory="double")
    assert train(cfg, source=DigitsSource("train"), measure_flops=True) == 0
    assert read_progress(_last(tmp_path / "double")).flops_per_step == 2 * once > 0
    plain = labelled("schedule.steps=2", "run.batch_size=8", directory="plain")
    assert train(plain, source=DigitsSource("train")) == 0
    assert read_progress(_last(tmp_path / "plain")).flops_per_step == 0
    students = [(tmp_path / name / "student.safetensors").read_bytes() for name in ("run", "plain")]
    assert students[0] == students[1]  # counting leaves the run as it is


def test_dense_views_depend_on_their_draw_alone():
    scenes = SceneSource(4, 0, height=40, width=48)
    views = DenseTrainingSet(scenes, 32, seed=3, patches=64)
    draws = [Draw(2, 0, 5, False), Draw(1, 0, 6, False)]
    batch, alone = views.batch(draws), views.batch(draws[1:])
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (2, 3, 32, 32)
    assert batch.labels.shape == (2, 32, 32)
    assert torch.equal(batch.images[1], alone.images[0])
    assert torch.equal(batch.labels[1], alone.labels[0])
    assert set(batch.labels.unique().tolist()) <= {-1, 0, 1, 2, 3, 4}
    other = views.batch([Draw(1, 1, 6, False)])
    assert not torch.equal(other.images[0], alone.images[0])


def test_pixels_that_are_ignored_become_minus_one():
    class Half(SceneSource):
        def target(self, index: int) -> np.ndarray:
            target = super().target(index)
            target[:, : target.shape[1] // 2] = 255
            return target

    batch = DenseTrainingSet(Half(2, 0, height=32, width=32), 32, seed=0, patches=64).batch(
        [Draw(index % 2, 0, index, False) for index in range(16)]
    )
    assert (batch.labels == -1).float().mean() > 0.2
    assert (batch.labels >= 0).float().mean() > 0.2
    assert batch.labels.max() <= 4


def test_windows_of_the_dense_views_cover_an_image():
    views = square_views(32)
    assert views.window == views.crop == (32, 32)
    assert 0 < views.stride[0] <= 32


def test_of_unlabelled_images_the_next_that_can_be_read_is_taken():
    class Mixed(SceneSource):
        unlabelled_from = 2

        def load(self, index: int):
            if index in (1, 3):
                raise OSError("broken")
            return super().load(index)

        def target(self, index: int) -> np.ndarray:
            assert index < 2, "an unlabelled image has no target"
            return super().target(index)

    views = DenseTrainingSet(Mixed(5, 0, height=32, width=32), 32, seed=0, patches=64)
    batch = views.batch([Draw(0, 0, 0, False), Draw(3, 0, 1, False), Draw(4, 0, 2, False)])
    assert batch.bad == [3]
    assert (batch.labels[0] >= 0).any()
    assert (batch.labels[1:] == -1).all()
    same = views.batch([Draw(4, 0, 1, False)])
    assert torch.equal(batch.images[1], same.images[0])
    with pytest.raises(InputError, match="scene 0:1 cannot be read"):
        views.batch([Draw(1, 0, 0, False)])
