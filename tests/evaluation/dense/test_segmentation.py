"""Segmentation end to end on drawn scenes, where the colour is the class."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from proteus.errors import InputError, RunError
from proteus.evaluation.dense.presets import SEGMENTATION
from proteus.evaluation.dense.segmentation import segmentation
from tests.evaluation.dense.scenes import COLOURS, Scenes, tiny

SMALL = {"crop": (24, 24), "short": 32, "long": 96, "test_short": 32, "test_long": 96, "window": (24, 24)}
SMALL |= {"stride": (16, 16), "iterations": 40, "warmup": 4, "batch": 4, "lr": 3e-2}
LIN = replace(SEGMENTATION["dinov2-lin"], **SMALL)
SHORT = replace(LIN, iterations=2, warmup=1)


def run(preset, train, test, encoder=None, **options):
    encoder = tiny() if encoder is None else encoder
    return segmentation(encoder, train, test, preset, accelerator=Accelerator(cpu=True), progress=False, **options)


def test_it_learns_what_can_be_learnt():
    result = run(LIN, Scenes(16, 0), Scenes(5, 1))
    assert result.miou > 0.7
    assert result.pixel_accuracy > 0.85
    assert len(result.iou) == 4
    assert result.warnings == []
    shuffled = run(LIN, Scenes(16, 0, shuffled=True), Scenes(5, 1))
    assert shuffled.miou < 0.4


def test_what_comes_back():
    encoder, test = tiny().train(), Scenes(4, 1)
    before = copy.deepcopy(encoder.state_dict())
    result = run(SHORT, Scenes(8, 0), test, encoder)
    assert encoder.training
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.requires_grad for name, p in encoder.named_parameters() if name != "mask_token")
    assert len(result.predictions) == 4
    for i, (image, target, prediction) in enumerate(result.predictions):
        assert np.array_equal(image, np.asarray(test.load(i)))
        assert np.array_equal(target, test.target(i))
        assert prediction.shape == target.shape
        assert prediction.max() < 4
    hits = np.concatenate([(target == prediction).ravel() for _, target, prediction in result.predictions])
    assert result.pixel_accuracy == pytest.approx(hits.mean(), abs=1e-6)


def test_the_first_test_images_are_kept():
    assert len(run(SHORT, Scenes(8, 0), Scenes(6, 1)).predictions) == 4


@pytest.mark.parametrize("name", ["dinov2-ms", "proteus-lin"])
def test_the_other_linear_protocols_run(name):
    preset = replace(SEGMENTATION[name], **SMALL | {"iterations": 2, "warmup": 1})
    assert 0 <= run(preset, Scenes(8, 0), Scenes(2, 1)).miou <= 1


def test_fine_tuning_learns_and_leaves_the_callers_encoder_alone():
    encoder = tiny().eval()
    before = copy.deepcopy(encoder.state_dict())
    preset = replace(SEGMENTATION["proteus-upernet"], **SMALL | {"iterations": 15, "lr": 5e-3})
    result = run(preset, Scenes(16, 0), Scenes(4, 1), encoder)
    assert result.pixel_accuracy > 0.6
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert not encoder.training


def test_results_depend_on_the_seed_alone():
    results = [run(SHORT, Scenes(8, 0), Scenes(4, 1), seed=s, workers=w) for s, w in ((0, 0), (0, 1), (1, 0))]
    state = torch.get_rng_state()
    torch.manual_seed(99)
    results.append(run(SHORT, Scenes(8, 0), Scenes(4, 1)))
    torch.set_rng_state(state)
    assert results[0].iou == results[1].iou == results[3].iou
    assert results[0].iou != results[2].iou


# -------------------------------------------------------------------------------------------------------------- errors


class Broken(Scenes):
    """Scenes of which number 1 is not as it should be."""

    def __init__(self, count, what):
        super().__init__(count, 0)
        self.what = what
        if what == "classes":
            self.classes = ["red", "green", "cyan", "yellow"]

    def load(self, index):
        if self.what == "unreadable" and index == 1:
            raise OSError("image file is truncated")
        return super().load(index)

    def target(self, index):
        target = super().target(index)
        if index == 1 and self.what == "number":
            target[3, 3] = 4
        if index == 1 and self.what == "size":
            return target[:-2]
        return np.full_like(target, 255) if self.what == "ignored" else target


WRONG = {
    "unreadable": "scene 1 cannot be read: image file is truncated",
    "number": "the target of scene 1 holds class 4; there are 0 to 3",
    "size": "scene 1 has 36 x 48 pixels, its target 36 x 46",
    "classes": "classes of the training set .4. and of the test set .4. differ, first",
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("where", ["train", "test"])
def test_what_is_wrong_is_named(what, where):
    good, bad = Scenes(4, 0), Broken(4, what)
    sets = (bad, good) if where == "train" else (good, bad)
    with pytest.raises(InputError, match=WRONG[what]):
        run(SHORT, *sets)


def test_from_a_worker_too():
    with pytest.raises(InputError) as caught:
        run(SHORT, Broken(4, "unreadable"), Scenes(4, 0), workers=1)
    assert str(caught.value) == WRONG["unreadable"]


def test_sets_that_are_empty_or_of_another_task():
    with pytest.raises(InputError, match="the test set has no images"):
        run(SHORT, Scenes(4, 0), Scenes(0, 0))
    with pytest.raises(InputError, match="the training set has no classes"):
        run(SHORT, Scenes(4, 0, depth=True), Scenes(4, 0))


def test_targets_that_are_ignored_altogether_teach_and_count_nothing():
    result = run(SHORT, Broken(4, "ignored"), Scenes(2, 1))
    assert result.warnings == []
    assert np.isnan(run(SHORT, Scenes(4, 0), Broken(2, "ignored")).miou)


def test_a_rate_that_destroys_everything_is_told():
    with pytest.raises(RunError, match="5 of 6 steps had a gradient that was not finite: nothing was learnt"):
        run(replace(SHORT, iterations=6, lr=1e38, warmup_start=1.0), Scenes(4, 0), Scenes(2, 1))


def test_greyscale_images_are_taken():
    class Grey(Scenes):
        def load(self, index):
            return Image.fromarray(COLOURS[self.colours(index)]).convert("L")

    assert run(SHORT, Grey(4, 0), Grey(2, 1)).predictions[0].image.shape == (40, 48, 3)
