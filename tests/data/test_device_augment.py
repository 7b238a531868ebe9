"""RandAugment on the device: timm's draws, Pillow's pixels."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, RandAugment, rand_augment_transform
from torchvision.transforms.functional import pil_to_tensor

from proteus.config import Augment
from proteus.data.device_augment import FILL, Op, apply_ops, draw_ops
from proteus.data.transforms import TrainTransform, mend_posterize, seeded
from proteus.errors import InputError

RECIPE = "rand-m9-mstd0.5-inc1"
HEIGHT, WIDTH = 48, 61
# What timm is told by TrainTransform. Shifts by pixels are given so that they end between pixels.
HPARAMS = {"translate_const": 27.3, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
GEOMETRY = ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"]
LEFT_OUT = ["GaussianBlurRand"]  # draws a second time while it is applied; no RandAugment name has it
NAMES = [name for name in LEVEL_TO_ARG if name not in LEFT_OUT]


def photo(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth colours, a sharp edge and fine noise, of a range that seed 0 leaves narrow for AutoContrast."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    pixels = np.asarray(coarse) + rng.normal(0, 8, (height, width, 3))
    pixels[height // 3 :, width // 2 :] *= 0.6
    pixels = 60 + 0.5 * pixels if seed == 0 else pixels
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photos():
    return [photo(seed) for seed in range(6)]


def stacked(pictures) -> torch.Tensor:
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


def generators():
    _, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), keys.tobytes(), rest, torch.default_generator.get_state().tolist()


def named(name: str) -> RandAugment:
    return mend_posterize(rand_augment_transform(name, dict(HPARAMS)))


def single(name: str, magnitude: float) -> RandAugment:
    """timm's operation of a name, always applied."""
    return mend_posterize(RandAugment([AugmentOp(name, 1.0, magnitude, HPARAMS)], num_layers=1))


def both(augment: RandAugment, pictures, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[list[Op]]]:
    """timm's pixels and ours under the same seeds, and the operations."""
    theirs, ops = [], []
    for number, picture in enumerate(pictures):
        with seeded(seed, number):
            theirs.append(augment(picture))
        with seeded(seed, number):
            ops.append(draw_ops(augment))
    return stacked(theirs), apply_ops(stacked(pictures), ops), ops


# Draws


@pytest.mark.parametrize("name", [RECIPE, "rand-m12-n3-mstd2-mmax15", "rand-m9-mstd101-tweights", "rand-n4-t3aw-p0.8"])
def test_operations_and_generators_are_timms(name):
    augment = named(name)
    met: list[Op] = []
    expected = named(name)
    for op in expected.ops:
        op.aug_fn = lambda image, *value, name=op.name, **_: met.append(Op(name, *value)) or image
    names = set()
    for key in range(150):
        with seeded(key):
            met.clear()
            expected(None)
            after = generators()
        with seeded(key):
            assert draw_ops(augment) == met
            assert generators() == after
        names |= {op.name for op in met}
    assert len(names) >= 8


def test_drawing_changes_nothing_of_timms_augmentation(photos):
    augment = named(RECIPE)
    with seeded(3):
        before = augment(photos[0])
    with seeded(3):
        ops = draw_ops(augment)
    with seeded(3):
        assert augment(photos[0]).tobytes() == before.tobytes()
    assert ops
    assert pickle.loads(pickle.dumps(ops)) == ops  # workers send them


def test_an_operation_that_the_device_does_not_know_is_an_error():
    augment = named("rand-n1-p0")  # of probability 0: known before it is drawn
    augment.ops.append(AugmentOp("GaussianBlurRand", hparams=HPARAMS))
    with pytest.raises(InputError, match=r"data\.augment\.device.*GaussianBlurRand.*'GaussianBlur'"):
        draw_ops(augment)


# Pixels


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_gives_pillows_pixels(name, photos):
    seen, differences = [], []
    for magnitude in (0, 0.4, 1, 2.5, 3, 5, 6.6, 8, 9, 9.5, 10):
        theirs, ours, ops = both(single(name, magnitude), photos, seed=int(10 * magnitude))
        seen += [op.value for row in ops for op in row]
        differences.append((theirs.int() - ours.int()).abs())
    assert len(seen) == 11 * len(photos)
    difference = torch.stack(differences)
    if name in GEOMETRY:
        assert min(seen) < 0 < max(seen)
        assert difference.max() <= 1  # float32 in place of float64, then truncated
        assert (difference > 0).float().mean() < 0.002
        assert difference.float().mean((2, 3, 4)).max() < 0.02  # of each image
    else:
        assert difference.max() == 0


@pytest.mark.parametrize("degrees", [90.0, -180.0, 37.5, 720.25])
def test_rotations_further_than_the_recipes(degrees, photos):
    theirs = stacked(p.rotate(degrees, resample=Image.BICUBIC, fillcolor=FILL) for p in photos)
    ours = apply_ops(stacked(photos), [[Op("Rotate", degrees)]] * len(photos))
    assert (theirs.int() - ours.int()).abs().max() <= 1


def test_uncovered_pixels_take_the_fill_colour(photos):
    images = stacked(photos)
    shifted = apply_ops(images, [[Op("TranslateX", -20)]] * len(photos), fill=(1, 2, 3))
    assert (shifted[..., :20] == torch.tensor([1, 2, 3]).view(3, 1, 1)).all()
    assert torch.equal(shifted[..., 20:], images[..., :-20])
    assert FILL == (124, 116, 104)
    lifted = apply_ops(images, [[Op("TranslateYRel", 0.25)]] * len(photos))
    assert (lifted[:, :, -12:] == torch.tensor(FILL).view(3, 1, 1)).all()
    assert torch.equal(lifted[:, :, :-12], images[:, :, 12:])


@pytest.mark.parametrize(("shift", "uncovered"), [(0.5 - 1e-9, False), (0.5, True)])
def test_pixels_at_the_border_fall_on_pillows_side_of_it(shift, uncovered, photos):
    size = (WIDTH, HEIGHT)
    moved = [p.transform(size, Image.AFFINE, (1, 0, shift, 0, 1, 0), Image.BICUBIC, fillcolor=FILL) for p in photos]
    ours = apply_ops(stacked(photos), [[Op("TranslateX", shift)]] * len(photos))
    assert (stacked(moved).int() - ours.int()).abs().max() <= 1
    assert bool((ours[..., -1] == torch.tensor(FILL).view(3, 1)).all()) == uncovered


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize", "ContrastIncreasing", "SharpnessIncreasing"])
def test_images_of_few_levels(name):
    pictures = [Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ((0, 0, 0), (255, 255, 255), (7, 0, 200))]
    pictures.append(pictures[2].copy())
    pictures[3].paste((9, 0, 3), (0, 0, 30, 30))
    theirs, ours, _ = both(single(name, 9), pictures)
    assert torch.equal(theirs, ours)
    assert not torch.equal(ours[3], stacked(pictures)[3])


def test_an_image_of_too_few_pixels_to_equalize():
    pictures = [photo(seed, 15, 16) for seed in range(3)]
    theirs, ours, _ = both(single("Equalize", 9), pictures)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, stacked(pictures))


# Batches


@pytest.mark.parametrize("name", [RECIPE, "rand-m9-n3-p0.9-t3aw"])
def test_batches_are_timms(name):
    pictures = [photo(seed, 64, 64) for seed in range(48)]
    theirs, ours, ops = both(named(name), pictures)
    mean = (theirs.int() - ours.int()).abs().float().mean((1, 2, 3))
    assert mean.max() < 0.5  # one level before another operation can be several after it
    assert mean.median() == 0
    changed = (theirs.int() - stacked(pictures).int()).abs().float().mean((1, 2, 3))
    assert changed.mean() > 15
    assert len({len(row) for row in ops}) > 1


def test_views_are_those_of_the_workers():
    left, done = TrainTransform(64, Augment(device=True)), TrainTransform(64, Augment())
    views, expected = [], []
    for key in range(40):
        for transform, found in ((left, views), (done, expected)):
            with seeded(key):
                found.append(transform(photo(key, 90, 120)))
    assert [(view.crop, view.box) for view in views] == [(view.crop, view.box) for view in expected]
    assert not any(view.ops for view in expected)
    pixels = torch.stack([view.pixels for view in expected])
    ours = apply_ops(torch.stack([view.pixels for view in views]), [view.ops for view in views])
    assert (ours.int() - pixels.int()).abs().float().mean((1, 2, 3)).max() < 0.5


def test_rows_are_by_themselves(photos):
    images = stacked(photos)
    ops = [
        [Op("Rotate", 20.0), Op("Color", 0.3), Op("ShearY", 0.1)],
        [],
        [Op("Color", 1.8), Op("Rotate", -20.0)],
        [Op("Equalize")],
        [Op("Rotate", 5.0), Op("Equalize")],
        [Op("SolarizeAdd", 99), Op("GaussianBlur", 1.7)],
    ]
    before = images.clone()
    together = apply_ops(images, ops)
    alone = [apply_ops(images[row : row + 1], ops[row : row + 1])[0] for row in range(len(ops))]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(images, before)
    assert torch.equal(apply_ops(images.to(memory_format=torch.channels_last), ops), together)
    assert torch.equal(together[1], images[1])
    assert all(not torch.equal(together[row], images[row]) for row in (0, 2, 3, 4, 5))


def test_operations_follow_their_order(photos):
    images = stacked(photos[:2])
    result = apply_ops(images, [[Op("Invert"), Op("SolarizeAdd", 100)], [Op("SolarizeAdd", 100), Op("Invert")]])
    wide = images.int()
    inverted = 255 - wide[0]
    assert torch.equal(result[0].int(), torch.where(inverted < 128, (inverted + 100).clamp(max=255), inverted))
    assert torch.equal(result[1].int(), 255 - torch.where(wide[1] < 128, (wide[1] + 100).clamp(max=255), wide[1]))


def every_operation() -> list[list[Op]]:
    ops = []
    for number, name in enumerate(NAMES):
        with seeded(number):
            ops.append(draw_ops(single(name, 7)))
    return ops


def test_nothing_waits_for_the_device():
    # A tensor without data refuses whatever has to read a value: item(), a mask as an index, a size from data.
    ops = every_operation()
    result = apply_ops(torch.empty(len(ops), 3, 32, 32, dtype=torch.uint8, device="meta"), ops)
    assert result.shape == (len(ops), 3, 32, 32)
    assert result.dtype == torch.uint8


@pytest.mark.gpu
def test_a_gpu_gives_the_same(photos):
    ops = every_operation()
    ops = [first + second for first, second in zip(ops, reversed(ops), strict=True)]
    images = stacked(photos[number % len(photos)] for number in range(len(ops)))
    on_gpu = images.cuda()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = apply_ops(on_gpu, ops)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    difference = (result.cpu().int() - apply_ops(images, ops).int()).abs()
    assert difference.float().mean((1, 2, 3)).max() < 0.05
    assert (difference > 0).float().mean() < 0.001
