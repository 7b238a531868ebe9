"""Training views as a function of seed, epoch and position; test images shared out without padding."""

from dataclasses import replace

import pytest
import torch

from proteus.data.sampler import Sampler
from proteus.evaluation.dense.augment import SegmentationView
from proteus.evaluation.dense.data import training_views, whole_images
from proteus.evaluation.dense.presets import SEGMENTATION
from tests.evaluation.dense.scenes import Scenes

VIEW = SegmentationView(replace(SEGMENTATION["dinov2-lin"], crop=(20, 20), short=32, long=96), (0.5, 0.5, 0.5))


def views(batch, processes=1, rank=0, workers=0, seed=0):
    """Pixels and classes of two epochs of four scenes, in order."""
    sampler = Sampler(4, batch, processes, seed=seed)
    steps = 8 // sampler.global_batch
    return [
        (image, target)
        for images, targets in training_views(Scenes(4, 0), VIEW, sampler, steps, rank, workers)
        for image, target in zip(images, targets, strict=True)
    ]


def same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_no_view_comes_twice():
    drawn = views(4)
    assert len(drawn) == 8
    assert not any(same(a, b) for i, a in enumerate(drawn) for b in drawn[:i])
    # One scene, at two positions in three epochs.
    batches = training_views(Scenes(1, 0), VIEW, Sampler(1, 2), 3, 0, 0)
    repeated = [image for images, _ in batches for image in images]
    assert len(repeated) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(repeated) for b in repeated[:i])


def test_processes_share_the_views_of_one():
    alone = views(4)
    for processes in (2, 4):
        parts = [views(4 // processes, processes, rank) for rank in range(processes)]
        together = [parts[i % processes][i // processes] for i in range(8)]
        assert all(same(a, b) for a, b in zip(alone, together, strict=True))


def test_workers_change_nothing_and_the_seed_everything():
    assert all(same(a, b) for a, b in zip(views(2), views(2, workers=2), strict=True))
    assert not any(same(a, b) for a, b in zip(views(2), views(2, seed=1), strict=True))


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_test_image_is_some_processs_once(processes):
    source = Scenes(5, 0)
    seen = [image.number for rank in range(processes) for image in whole_images(source, rank, processes, 0)]
    assert sorted(seen) == [0, 1, 2, 3, 4]
