"""Training views: geometry that image and target share, colours within their bounds, nothing but the seed decides."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from proteus.data.transforms import seeded
from proteus.evaluation.dense import augment
from proteus.evaluation.dense.presets import DEPTH, SEGMENTATION
from tests.evaluation.dense.scenes import COLOURS, METRES, Scenes

SCENE = Scenes(1, 3)


def pair(depth=False):
    target = METRES[SCENE.colours(0)] if depth else SCENE.colours(0)
    return np.asarray(SCENE.load(0)), target


def assert_colours_match(image, target):
    """Every pixel has its class's colour still."""
    assert np.array_equal(image, COLOURS[target])


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 512, 2048, (512, 683)),
        ((640, 480), 512, 2048, (683, 512)),
        ((200, 2000), 512, 2048, (205, 2048)),  # the long side decides
        ((480, 640), 518, 2044, (518, 691)),
        ((375, 500), 512, 10**8, (512, 683)),
        ((1, 5000), 512, 2048, (1, 2048)),
    ],
)
def test_sizes_are_mmcvs(size, short, long, expected):
    assert augment.scaled_size(*size, short, long) == expected


def test_resizing_is_bilinear_between_pixel_centres():
    line = torch.tensor([0.0, 10.0, 30.0]).expand(1, 1, 3, 3)
    # Pixel i of 5 lies at (i + 0.5) * 3 / 5 - 0.5.
    expected = torch.tensor([0.0, 4.0, 10.0, 22.0, 30.0])
    torch.testing.assert_close(augment.resize(line, (3, 5))[0, 0], expected.expand(3, 5))


def test_resizing_draws_the_ratio_and_moves_both_alike():
    image, target = pair()
    heights = []
    for seed in range(40):
        with seeded(seed):
            small, classes = augment.random_resize(image, target, 40, 400, (0.5, 2.0))
        assert small.shape[:2] == classes.shape
        assert set(np.unique(classes)) <= set(np.unique(target))
        inside = np.abs(small.astype(int) - COLOURS[classes]).max(-1) < 3
        assert inside.mean() > 0.7  # all but the edges, which the image blends and the classes do not
        heights.append(len(classes))
    assert 20 <= min(heights) < 30
    assert 65 < max(heights) <= 80


def test_crops_avoid_one_class():
    target = np.zeros((60, 60), np.uint8)
    target[:, 50:] = 1  # only crops from the right have two classes
    image = COLOURS[target]
    shares = {None: [], 0.75: []}
    for seed in range(200):
        for ratio, found in shares.items():
            with seeded(seed):
                part, classes = augment.random_crop(image, target, (20, 20), ratio)
            assert_colours_match(part, classes)
            assert classes.shape == (20, 20)
            found.append((classes == 1).mean())
    # Between 25 and 75 % of class 1: 9 of 41 places to the left, 10 tries.
    assert np.mean([0.25 < share < 0.75 for share in shares[None]]) < 0.35
    assert np.mean([0.25 < share < 0.75 for share in shares[0.75]]) > 0.75


@pytest.mark.parametrize(("shares", "redrawn"), [((1, 1), False), ((9, 1), True), ((20, 0), True)])
def test_crops_count_only_pixels_that_count(shares, redrawn):
    """Every crop is alike: 20 columns of a hundred count, that many of class 1 to that many of class 2."""
    columns = np.full(100, 255, np.uint8)
    columns[:20] = np.repeat([1, 2], np.array(shares) * 20 // sum(shares))
    target = np.tile(columns, (4, 3))
    places = np.arange(1200).reshape(4, 300)[..., None]
    found = []
    for ratio in (None, 0.75):
        with seeded(0):
            found.append(augment.random_crop(places, target, (4, 100), ratio)[0][0, 0, 0])
    assert (found[0] != found[1]) == redrawn


def test_a_crop_reaches_every_corner():
    _, target = pair()
    places = set()
    for seed in range(300):
        with seeded(seed):
            part, _ = augment.random_crop(np.arange(16).reshape(4, 4)[..., None], target[:4, :4], (2, 3))
        places.add(int(part[0, 0, 0]))
    assert places == {0, 1, 4, 5, 8, 9}


def test_an_image_smaller_than_the_crop_is_filled_up_with_the_mean_and_ignored():
    image, target = pair()  # 40 x 48
    preset = replace(SEGMENTATION["dinov2-lin"], crop=(64, 40), short=40, long=400, ratio_range=(1.0, 1.0))
    fill = (0.4, 0.5, 0.6)
    with seeded(1):
        pixels, classes = augment.SegmentationView(preset, fill)(image, target)
    assert (pixels.shape, classes.shape, classes.dtype) == ((3, 64, 40), (64, 40), torch.uint8)
    assert (classes[40:] == 255).all()
    assert (classes[:40] < 4).all()
    assert torch.equal(pixels[:, 40:], torch.tensor(fill)[:, None, None].expand(3, 24, 40))


def test_flips_are_of_both_and_half_of_the_time():
    image, target = pair()
    flipped = 0
    for seed in range(200):
        with seeded(seed):
            mirrored, classes = augment.random_flip(image, target)
        assert_colours_match(mirrored, classes)
        flipped += not np.array_equal(classes, target)
    assert 75 < flipped < 125


def test_views_depend_on_the_seed_alone():
    image, target = pair()
    view = augment.SegmentationView(replace(SEGMENTATION["dinov2-lin"], crop=(24, 24), short=32), (0.5, 0.5, 0.5))
    drawn = []
    for key in ((0, 1), (0, 2), (0, 1)):
        with seeded(*key):
            drawn.append(view(image, target))
    assert torch.equal(drawn[0][0], drawn[2][0])
    assert torch.equal(drawn[0][1], drawn[2][1])
    assert not torch.equal(drawn[0][0], drawn[1][0])


# -------------------------------------------------------------------------------------------------------------- colour


def test_hue_turns_saturation_multiplies_value_adds():
    red = np.full((2, 2, 3), (200, 100, 100), np.uint8)
    turned = augment.shift_hsv(red, 1 / 3)
    assert np.abs(turned.astype(int) - (100, 200, 100)).max() <= 2
    grey = augment.shift_hsv(red, 0, saturation=0)
    assert (grey == 200).all()
    assert np.abs(augment.shift_hsv(red, 0, add_saturation=-255).astype(int) - 200).max() == 0
    darker = augment.shift_hsv(red, 0, add_value=-50)
    assert np.abs(darker.astype(int) - (150, 75, 75)).max() <= 2
    assert augment.shift_hsv(red, 0) is red


def test_photometric_distortion_stays_within_its_bounds_and_does_half_of_everything():
    """On grey, hue and saturation do nothing: 128 becomes (128 +- 32) * 0.5 to 1.5."""
    grey = np.full((2, 2, 3), 128, np.uint8)
    values = []
    for seed in range(400):
        with seeded(seed):
            result = augment.photometric(grey)
        assert len(np.unique(result)) == 1
        values.append(int(result[0, 0, 0]))
    assert (min(values) >= 48, max(values) <= 240) == (True, True)
    assert min(values) < 65
    assert max(values) > 215
    assert 70 < values.count(128) < 135  # neither brightness nor contrast: a quarter


def test_photometric_distortion_turns_hues_by_a_tenth_at_most():
    red = np.full((1, 1, 3), (200, 100, 100), np.uint8)
    channels = Counter()
    for seed in range(300):
        with seeded(seed):
            r, g, b = augment.photometric(red)[0, 0].astype(int)
        channels[int(np.sign(g - b))] += 1
        assert r >= max(g, b)  # a sixth would reach yellow
    assert channels[0] > 120  # half of the time, and when it turns by nothing
    assert min(channels[1], channels[-1]) > 40


def test_bts_colours():
    image = np.full((1, 1, 3), 128, np.uint8)
    factors = []
    for seed in range(300):
        with seeded(seed):
            factors.append(augment.bts_colour(image)[0, 0] / 128)
    changed = np.array([f for f in factors if (f != 1).any()])
    assert 115 < len(changed) < 185
    assert changed.min() > 0.9 * 0.75 * 128**-0.1 - 0.01  # gamma alone makes 128 a value of 79 to 208
    assert changed.min() < 0.6
    assert changed.max() > 1.6
    spread = (changed.max(1) / changed.min(1))[changed.max(1) < 1.9]
    assert spread.max() <= 1.1 / 0.9 + 0.03
    assert spread.max() > 1.1
    assert changed.mean(1).min() < 0.8
    assert changed.mean(1).max() > 1.2


def test_albumentations_colours_change_seven_of_eight():
    image = np.full((1, 1, 3), (180, 100, 90), np.uint8)
    results = []
    for seed in range(300):
        with seeded(seed):
            results.append(augment.albumentations_colour(image)[0, 0].astype(int))
    unchanged = sum((result == (180, 100, 90)).all() for result in results)
    assert 20 < unchanged < 56
    assert min(result.mean() for result in results) > 20
    assert max(result.mean() for result in results) < 230


# --------------------------------------------------------------------------------------------------------------- depth


def test_the_box_is_nyus_and_scales():
    target = np.arange(480 * 640, dtype=np.float32).reshape(480, 640)
    image = np.zeros((480, 640, 3), np.uint8)
    cut, depth = augment.cut_box(image, target, DEPTH["dinov2-lin4"].box)
    assert cut.shape[:2] == depth.shape == (427, 565)
    assert depth[0, 0] == 45 * 640 + 43
    assert augment.cut_box(image[::2, ::2], target[::2, ::2], (43, 45, 608, 472))[1].shape == (236 - 22, 304 - 22)


def test_rotation_keeps_depths_as_they_are_and_brings_in_no_reading():
    image, depth = pair(depth=True)
    turned, target = augment.rotate(image, depth, 2.5)
    assert turned.shape == image.shape
    assert set(np.unique(target)) <= {0, *METRES}
    assert 0 < (target == 0).sum() < 100
    assert (turned[target == 0] < 120).mean() > 0.7
    known = target > 0
    expected = COLOURS[np.searchsorted(METRES, target[known])]
    assert (np.abs(turned[known].astype(int) - expected).max(-1) < 3).mean() > 0.7
    assert (target != depth).mean() > 0.02
    other = augment.rotate(image, depth, -2.5)[1]
    assert (other != target).mean() > 0.02


def test_a_strip_shows_its_depth():
    image, depth = pair(depth=True)
    widths = []
    for seed in range(100):
        with seeded(seed):
            mixed = augment.depth_mix(image, depth, 10.0)
        columns = np.flatnonzero((mixed != image).any((0, 2)))
        assert np.array_equal(columns, np.arange(columns[0], columns[-1] + 1))
        grey = np.round(25.5 * depth[:, columns]).astype(np.uint8)  # a tenth of 255 a metre, and no wrapping around
        assert np.array_equal(mixed[:, columns], np.repeat(grey[..., None], 3, axis=-1))
        widths.append(len(columns))
    assert min(widths) == 1
    assert 10 < max(widths) <= 36
    assert np.array_equal(image, pair()[0])


@pytest.mark.parametrize("name", ["dinov2-lin4", "proteus-dpt"])
def test_depth_views_have_the_size_of_the_crop(name):
    image, depth = pair(depth=True)
    preset = replace(DEPTH[name], crop=(30, 50))
    if preset.short:
        preset = replace(preset, short=36, long=60)
    for seed in range(8):
        with seeded(seed):
            pixels, metres = augment.DepthView(preset, (0.4, 0.5, 0.6))(image, depth)
        assert (pixels.shape, metres.shape, metres.dtype) == ((3, 30, 50), (30, 50), torch.float32)
        assert set(metres.unique().tolist()) <= {0.0, *METRES.tolist()}
        assert (metres > 0).float().mean() > 0.4
        assert pixels.min() >= 0
        assert pixels.max() <= 1
