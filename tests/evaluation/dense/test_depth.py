"""Depth end to end on drawn scenes, where the colour tells the depth."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from proteus.errors import InputError
from proteus.evaluation.dense.depth import depth
from proteus.evaluation.dense.presets import DEPTH
from proteus.evaluation.dense_metrics import DepthMetric
from tests.evaluation.dense.scenes import Scenes, tiny

SMALL = {"crop": (24, 24), "iterations": 40, "warmup": 4, "batch": 4, "lr": 4e-2, "crop_metric": None}
SMALL |= {"sig_warmup": 5, "box": None, "bins": 32, "channels": 8, "weight_decay": 0.0}
SHORT = {"iterations": 3, "warmup": 1}
PROTEUS = {"short": 32, "long": 96, "test_short": 32, "test_long": 96, "window": (24, 24), "stride": (16, 16)}


def scenes(count, seed):
    return Scenes(count, seed, depth=True)


def run(name, train, test, encoder=None, **changes):
    encoder = tiny() if encoder is None else encoder
    preset = replace(DEPTH[name], **SMALL | (PROTEUS if name.startswith("proteus") else {}) | changes)
    return depth(encoder, train, test, preset, accelerator=Accelerator(cpu=True), progress=False)


def constant(source, metres):
    """RMSE of one depth for all pixels."""
    metric = DepthMetric(crop=None)
    for i in range(len(source)):
        target = torch.from_numpy(source.target(i))[None]
        metric.update(torch.full_like(target, metres), target)
    return metric.compute().rmse


def test_it_learns_what_can_be_learnt():
    test = scenes(5, 1)
    result = run("dinov2-lin4", scenes(16, 0), test)
    best = min(constant(test, metres) for metres in np.arange(1, 8, 0.25))
    assert result.rmse < 0.7 * best
    assert result.delta1 > 0.3
    assert (result.images, result.left_out, result.warnings) == (5, 0, [])
    untrained = run("dinov2-lin4", scenes(16, 0), test, **SHORT)
    assert untrained.rmse > best


@pytest.mark.parametrize("name", sorted(DEPTH))
def test_every_protocol_runs_and_leaves_the_encoder_alone(name):
    encoder = tiny().eval()
    before = copy.deepcopy(encoder.state_dict())
    result = run(name, scenes(6, 0), scenes(5, 1), encoder, gradient_weight=0.5, **SHORT)
    assert np.isfinite(result.rmse)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert len(result.predictions) == 4
    for i, (image, target, prediction) in enumerate(result.predictions):
        assert np.array_equal(image, np.asarray(scenes(5, 1).load(i)))
        assert target.shape == prediction.shape == image.shape[:2]
    if DEPTH[name].clamp:
        assert min(prediction.min() for _, _, prediction in result.predictions) >= 1e-3


def test_fine_tuning_learns():
    test = scenes(4, 1)
    tuned = run("dinov2-dpt", scenes(16, 0), test, iterations=40, lr=3e-3, frozen=False)
    assert tuned.rmse < 0.9 * min(constant(test, metres) for metres in np.arange(1, 8, 0.25))


class Broken(Scenes):
    def __init__(self, value):
        super().__init__(3, 0, depth=True)
        self.value = value

    def target(self, index):
        target = super().target(index)
        if index == 1:
            target[:] = self.value
        return target


def test_images_without_a_reading_are_left_out_and_told():
    result = run("dinov2-lin1", Broken(0.0), Broken(0.0), **SHORT)
    assert (result.images, result.left_out) == (2, 1)
    assert result.warnings == ["dinov2-lin1: 1 test images have no valid depth and are left out"]


def test_depths_that_are_no_numbers():
    with pytest.raises(InputError, match="the target of scene 1 holds depths that are not finite"):
        run("dinov2-lin1", Broken(np.nan), scenes(2, 0), **SHORT)


def test_the_crop_of_the_metric_is_of_nyu():
    with pytest.raises(InputError, match="the crop is of 480 x 640 pixels"):
        run("dinov2-lin1", scenes(2, 0), scenes(2, 0), **SHORT, crop_metric=DEPTH["dinov2-lin1"].crop_metric)


def test_classes_are_not_depths():
    with pytest.raises(InputError, match="the training set has classes"):
        run("dinov2-lin1", Scenes(2, 0), scenes(2, 0), **SHORT)
