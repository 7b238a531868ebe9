"""The protocols' constants, and what a smaller task makes of them."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from proteus.errors import InputError
from proteus.evaluation.dense.presets import (
    DEPTH,
    HALF,
    SEGMENTATION,
    depth_preset,
    layers_of,
    segmentation_preset,
)
from proteus.models.encoder import IMAGENET_MEAN


@pytest.mark.parametrize(
    ("name", "depth", "layers"),
    [
        ("dinov2-lin", 12, [11]),
        ("dinov2-lin", 1, [0]),
        ("dinov2-ms", 12, [8, 9, 10, 11]),
        ("dinov2-ms", 3, [0, 1, 2]),
        ("proteus-lin", 12, [3, 5, 7, 11]),
        ("proteus-upernet", 24, [7, 11, 15, 23]),
        ("proteus-lin", 4, [0, 1, 2, 3]),
        ("proteus-lin", 2, [0, 1]),
        ("proteus-upernet", 2, [0, 0, 0, 1]),  # a pyramid has four levels
        ("dinov2-lin1", 24, [23]),
        ("dinov2-lin4", 12, [2, 5, 8, 11]),
        ("dinov2-lin4", 24, [4, 11, 17, 23]),
        ("dinov2-dpt", 40, [9, 19, 29, 39]),
        ("dinov2-dpt", 6, [0, 2, 3, 5]),
        ("proteus-dpt", 24, [7, 11, 15, 23]),
    ],
)
def test_blocks(name, depth, layers):
    assert layers_of((SEGMENTATION | DEPTH)[name], depth) == layers


# From the published configurations: learning rate, weight decay, iterations, warm-up, crop, window, stride.
CONSTANTS = {
    "dinov2-lin": (1e-3, 1e-4, 40_000, 1500, (512, 512), (512, 512), (341, 341)),
    "dinov2-ms": (1e-3, 1e-4, 40_000, 1500, (640, 640), (640, 640), (320, 320)),
    "proteus-lin": (8e-4, 0.05, 60_000, 1500, (518, 518), (518, 518), (345, 345)),
    "proteus-upernet": (1e-4, 0.05, 60_000, 1500, (518, 518), (518, 518), (345, 345)),
    "dinov2-lin1": (1e-4, 0.01, 38_400, 12_800, (416, 544), None, (1, 1)),
    "dinov2-lin4": (1e-4, 0.01, 38_400, 12_800, (416, 544), None, (1, 1)),
    "dinov2-dpt": (1e-4, 0.01, 38_400, 12_800, (416, 544), None, (1, 1)),
    "proteus-dpt-frozen": (4e-4, 0.01, 25_000, 1500, (518, 518), (518, 518), (129, 129)),
    "proteus-dpt": (4e-4, 0.01, 25_000, 1500, (518, 518), (518, 518), (129, 129)),
}


def test_the_published_constants():
    presets = SEGMENTATION | DEPTH
    assert presets.keys() == CONSTANTS.keys()
    for name, p in presets.items():
        found = (p.lr, p.weight_decay, p.iterations, p.warmup, p.crop, p.window, p.stride)
        assert found == CONSTANTS[name], name
        assert p.name == name
        assert p.frozen == (name not in ("proteus-upernet", "proteus-dpt"))
        assert p.norm == (name in ("dinov2-lin", "dinov2-ms"))
        assert p.mean == (HALF if name.startswith("proteus-dpt") else IMAGENET_MEAN)
        assert p.shifted == name.startswith("proteus")  # mmengine counts the curve from the end of the warm-up
    assert SEGMENTATION["dinov2-ms"].ratios == (1.0, 1.32, 1.73, 2.28, 3.0)
    assert {name for name, p in presets.items() if p.flip} == {"dinov2-ms", *DEPTH}
    assert {p.clamp for name, p in DEPTH.items() if name.startswith("proteus")} == {False}


def test_what_depends_on_the_size_of_the_encoder():
    small, base, large = (SimpleNamespace(embed_dim=d, num_blocks=n) for d, n in ((384, 12), (768, 12), (1024, 24)))
    numbers = [(p.batch, p.iterations, p.drop_path) for p in (upernet(e) for e in (small, base, large))]
    assert numbers == [(32, 60_000, 0.1), (16, 60_000, 0.1), (8, 160_000, 0.2)]
    assert [depth_preset("proteus-dpt", e).lr for e in (small, base, large)] == [4e-4, 1e-4, 1e-4]
    assert {depth_preset("dinov2-lin4", e).lr for e in (small, base, large)} == {1e-4}
    assert segmentation_preset("dinov2-lin", large) == SEGMENTATION["dinov2-lin"]


def upernet(encoder):
    return segmentation_preset("proteus-upernet", encoder)


def test_an_unknown_name_is_told_its_nearest():
    with pytest.raises(InputError, match=r"'dinov2-lim'; did you mean 'dinov2-lin'\?"):
        segmentation_preset("dinov2-lim", SimpleNamespace())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dinov2-lin", {"iterations": 300}, "a warm-up of 1500 steps in a run of 300"),
        ("dinov2-lin", {"stride": (512, 513)}, "steps over pixels"),
        ("dinov2-lin4", {"batch": 0}, "at least 1"),
    ],
)
def test_what_cannot_be(name, changes, message):
    with pytest.raises(InputError, match=message):
        replace((SEGMENTATION | DEPTH)[name], **changes)
