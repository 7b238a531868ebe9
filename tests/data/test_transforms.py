"""Augmentation: a pure function of its key, equal to timm's; random erasing in two halves; the plain view."""

import io
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing

from proteus.config import Augment
from proteus.data.decode import decode
from proteus.data.transforms import (
    Box,
    Crop,
    EvalTransform,
    TrainTransform,
    crop_and_resize,
    draw_box,
    fill_boxes,
    seeded,
)
from proteus.errors import InputError
from proteus.models import create_model
from proteus.models.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD

PLAIN = {"auto_augment": None, "erasing": 0.0}


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    """Smooth colours with fine noise on top: no two crops are alike."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)
    noise = rng.integers(-12, 13, (height, width, 3))
    return Image.fromarray((np.asarray(coarse, dtype=int) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def photo():
    return picture()


def under(key, transform, image):
    with seeded(*key):
        return transform(image)


def global_states():
    """What `random`, numpy and torch would draw from next, in comparable form."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return random.getstate(), (kind, keys.tobytes(), *rest), torch.default_generator.get_state().numpy().tobytes()


# Purity


def test_same_key_same_pixels_whatever_was_drawn_before(photo):
    transform = TrainTransform(32, Augment())
    first = [under((1, 2, position), transform, photo) for position in range(40)]
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    torch.manual_seed(99)
    again = [under((1, 2, position), TrainTransform(32, Augment()), photo) for position in reversed(range(40))][::-1]
    for (pixels, box, *_), (other, other_box, *_) in zip(first, again, strict=True):
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, 32, 32)
        assert torch.equal(pixels, other)
        assert box == other_box
    assert 2 <= sum(view.box is not None for view in first) <= 20  # a quarter of 40, give or take 3 sigma


def test_another_key_gives_other_pixels_and_boxes(photo):
    transform = TrainTransform(32, Augment(erasing=1.0))
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (5, 1, 2), (5, 2, 1), (1, 5, 2), (2**62, 0, 1), (2**62, 1, 0)]
    results = [under(key, transform, photo) for key in keys]
    assert len({view.pixels.numpy().tobytes() for view in results}) == len(keys)
    assert len({view.box for view in results}) == len(keys)


def test_all_three_generators_are_drawn_from_and_given_back(photo):
    transform = TrainTransform(32, Augment())
    random.gauss(0, 1)  # leaves a second value waiting
    np.random.standard_normal()  # noqa: NPY002
    torch.randn(3)
    before = global_states()
    moved = [False, False, False]
    for position in range(6):
        with seeded(0, 0, position):
            inside = global_states()
            transform(photo)
            moved = [m or a != b for m, a, b in zip(moved, inside, global_states(), strict=True)]
        assert global_states() == before
    assert moved == [True, True, True]
    expected = random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)  # noqa: NPY002
    random.setstate(before[0])
    assert random.gauss(0, 1) == expected[0]


def test_generators_are_given_back_when_the_transform_raises():
    before = global_states()

    def fails_after_drawing(_):
        drawn.extend([random.random(), np.random.random(), float(torch.rand(1))])  # noqa: NPY002
        raise ZeroDivisionError

    drawn: list[float] = []
    with pytest.raises(ZeroDivisionError):
        under((3, 4, 5), fails_after_drawing, None)
    assert len(drawn) == 3
    assert global_states() == before
    with pytest.raises(TypeError):
        under((3, 4, 5), TrainTransform(32, Augment()), "no image")
    assert global_states() == before


def test_seeding_nests(photo):
    transform = TrainTransform(32, Augment())
    with seeded(1, 1, 1):
        random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
        outer = global_states()
        inner = under((2, 2, 2), transform, photo)
        assert global_states() == outer
    assert torch.equal(inner[0], under((2, 2, 2), transform, photo)[0])


# Crops


def test_a_view_is_that_of_its_crop(photo):
    transform = TrainTransform(32, Augment(**PLAIN))
    flips = set()
    for i in range(40):
        view = under((0, 0, i), transform, photo)
        top, left, height, width, flip = view.crop
        seen = photo.crop((left, top, left + width, top + height)).resize((32, 32), Image.BICUBIC)
        expected = np.asarray(seen.transpose(Image.FLIP_LEFT_RIGHT) if flip else seen).astype(int)
        difference = np.abs(view.pixels.permute(1, 2, 0).numpy() - expected)
        assert difference.max() <= 2
        assert difference.mean() < 0.5
        flips.add(flip)
    assert flips == {True, False}


def test_a_given_crop_is_shown_and_nothing_else_changes(photo):
    """With the crop that would be drawn it is the same view; with another, the same augmentation and erasing of it."""
    transform = TrainTransform(32, Augment(erasing=0.5))
    other = Crop(3, 40, 50, 21, True)
    for i in range(40):
        drawn = under((0, 0, i), transform, photo)
        with seeded(0, 0, i):
            again = transform(photo, drawn.crop)
            after = global_states()
        with seeded(0, 0, i):
            elsewhere = transform(photo, other)
            assert global_states() == after  # every draw is made
        assert torch.equal(again.pixels, drawn.pixels)
        assert again[1:] == drawn[1:]
        assert elsewhere.crop == other
        assert elsewhere.box == drawn.box
    plain = TrainTransform(32, Augment(**PLAIN))
    assert torch.equal(under((0, 0, 1), plain, photo).pixels, under((0, 0, 1), plain, photo).pixels)
    assert torch.equal(plain(photo, other).pixels, plain(photo, other._replace(flip=False)).pixels.flip(-1))


@pytest.mark.parametrize("kind", ["array", "decoded"])
def test_both_kinds_of_images_give_the_same_pixels(photo, kind):
    """A decoder's tensor and Pillow's own memory."""
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95)
    image = decode(buffer)
    plain = Image.open(buffer).convert("RGB")
    if kind == "array":
        image.load()  # which leaves Pillow's memory alone
    assert (image.pixels is None) == (kind == "array")
    transform = TrainTransform(48, Augment())
    for i in range(20):
        assert torch.equal(under((0, 0, i), transform, image).pixels, under((0, 0, i), transform, plain).pixels)


def test_crops_of_tiny_images_hold_a_pixel():
    transform = TrainTransform(8, Augment(**PLAIN))
    for size in ((1, 1), (2, 1), (1, 3), (2, 2)):
        image = Image.new("RGB", size, (200, 100, 50))
        for i in range(30):
            view = under((0, 0, i), transform, image)
            assert 0 <= view.crop.top <= size[1] - view.crop.height < size[1]
            assert 0 <= view.crop.left <= size[0] - view.crop.width < size[0]
            assert torch.equal(view.pixels, torch.tensor([200, 100, 50]).byte().view(3, 1, 1).expand(3, 8, 8))


def test_resizing_is_close_to_pillow_at_any_scale():
    rng = np.random.default_rng(0)
    for width, height, size in ((3000, 2000, 224), (1200, 90, 56), (30, 20, 224), (224, 224, 224), (225, 223, 224)):
        image = Image.fromarray(rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8))
        image = image.resize((width, height), Image.BICUBIC)
        ours = crop_and_resize(image, Crop(0, 0, height, width, False), size).permute(1, 2, 0).numpy()
        difference = np.abs(np.asarray(image.resize((size, size), Image.BICUBIC)).astype(int) - ours)
        assert difference.max() <= 4
        assert difference.mean() < 0.3


# On the device


def test_randaugment_of_the_device_is_drawn_and_not_applied(photo):
    here, there = TrainTransform(32, Augment(erasing=0.5)), TrainTransform(32, Augment(erasing=0.5, device=True))
    plain = TrainTransform(32, Augment(**PLAIN))
    drawn = 0
    for i in range(40):
        with seeded(0, 0, i):
            applied = here(photo)
            after = global_states()
        with seeded(0, 0, i):
            view = there(photo)
            assert global_states() == after
        assert torch.equal(view.pixels, under((0, 0, i), plain, photo).pixels)
        assert (view.box, view.crop) == (applied.box, applied.crop)
        assert applied.ops == []
        if torch.equal(applied.pixels, view.pixels):
            continue
        drawn += 1
        assert view.ops
    assert drawn > 15


# The recipe


def test_randaugment_acts(photo):
    """Two layers, each applied with probability 1/2: three images in four change, less those it leaves as they are."""
    with_it, without = TrainTransform(32, Augment(erasing=0)), TrainTransform(32, Augment(**PLAIN))
    changed = [
        not torch.equal(under((0, 0, i), with_it, photo)[0], under((0, 0, i), without, photo)[0]) for i in range(100)
    ]
    assert 55 <= sum(changed) <= 92


def test_flip_mirrors_the_same_crop(photo):
    flipped = TrainTransform(32, Augment(hflip=1.0, **PLAIN))
    straight = TrainTransform(32, Augment(hflip=0.0, **PLAIN))
    half = TrainTransform(32, Augment(hflip=0.5, **PLAIN))
    sides = []
    for i in range(100):
        a, b, c = (under((0, 0, i), transform, photo)[0] for transform in (flipped, straight, half))
        assert torch.equal(a, b.flip(-1))
        assert torch.equal(c, a) or torch.equal(c, b)
        sides.append(torch.equal(c, a))
    assert 30 <= sum(sides) <= 70  # 4 sigma


def test_scale_bounds_the_share_of_the_area_that_is_seen():
    """On an image whose red is x and green is y, the range of the colours tells how much of it a crop covers."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    ramp = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    for scale in ((0.08, 0.12), (0.4, 0.5)):
        transform = TrainTransform(64, Augment(scale=scale, **PLAIN))
        for i in range(40):
            pixels = under((0, 0, i), transform, ramp)[0].float()
            width, height = (pixels[c].max() - pixels[c].min() + 1 for c in (0, 1))
            assert scale[0] - 0.04 < width * height / 40000 < scale[1] + 0.04
            assert 0.65 < width / height < 1.5  # 3/4 to 4/3


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        (32, {}),
        (56, {"auto_augment": "rand-m7-n3-mstd1-inc1", "scale": (0.3, 0.9), "hflip": 0.2, "erasing": 0.6}),
        (32, {"auto_augment": "rand-m5-inc0", "erasing": 1.0}),
    ],
)
def test_draws_pixels_and_box_sizes_are_those_of_timm(photo, size, settings):
    cfg = Augment(**settings)
    crop_flip, augment, finish = create_transform(
        (3, size, size),
        is_training=True,
        scale=cfg.scale,
        hflip=cfg.hflip,
        auto_augment=cfg.auto_augment,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        re_prob=cfg.erasing,
        re_mode="pixel",
        separate=True,
    )
    transform, plain = TrainTransform(size, cfg), TrainTransform(size, Augment(**(settings | PLAIN)))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    erased = 0
    for position in range(80):
        pixels, box, *_ = under((11, 0, position), transform, photo)
        resized = under((11, 0, position), plain, photo).pixels.permute(1, 2, 0).numpy()
        with seeded(11, 0, position):
            # Pillow's resize rounds otherwise than torch's, which RandAugment may magnify: it continues from ours.
            difference = np.abs(np.asarray(crop_flip(photo)).astype(int) - resized)
            theirs = augment(Image.fromarray(resized))
            final = finish(theirs)
        assert difference.max() <= 2
        assert difference.mean() < 0.5
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(theirs))
        noise = ((final - (pixels.float() / 255 - mean) / std).abs() > 1e-5).any(0)
        assert noise.any() == (box is not None)
        if box is not None:
            rows, columns = noise.any(1).sum(), noise.any(0).sum()
            assert (rows, columns) == (box.height, box.width)
            erased += 1
    assert abs(erased - 80 * cfg.erasing) <= 4 * math.sqrt(80 * cfg.erasing * (1 - cfg.erasing))


def test_the_strongest_posterizing_makes_an_image_black(photo):
    """PosterizeIncreasing keeps 4 - int(4 * magnitude / 10) bits: none at 10, which the recipe's noise reaches."""
    transform = TrainTransform(32, Augment(auto_augment="rand-m10-n1-inc1", erasing=0.0))
    black = sum(int(under((0, 0, i), transform, photo)[0].max() == 0) for i in range(600))
    assert 6 <= black <= 36  # one operation of 15, applied to half of the images: 20, 3.5 sigma


@pytest.mark.parametrize(
    "name", ["foo", "augmix-m3-w3", "original", "v0", "rand-m9-q5", "rand-w0", "rand-n2.5", "randaugment"]
)
def test_unknown_augmentation_names_are_input_errors(name):
    with pytest.raises(InputError) as caught:
        TrainTransform(32, Augment(auto_augment=name))
    (line,) = caught.value.lines
    assert "data.augment.auto_augment" in line
    assert repr(name) in line
    assert "\n" not in line


# Random erasing


@pytest.fixture(scope="module")
def boxes():
    random.seed(5)
    return [draw_box(224) for _ in range(4000)]


def test_boxes_keep_their_bounds(boxes):
    assert None not in boxes
    area = 224 * 224
    for top, left, height, width, _ in boxes:
        assert 0 <= top <= 224 - height
        assert 0 <= left <= 224 - width
        assert 0 < height < 224
        assert 0 < width < 224
        # The sides are rounded: some real rectangle within half a pixel of them keeps the bounds.
        assert (height - 0.5) * (width - 0.5) <= area / 3
        assert (height + 0.5) * (width + 0.5) >= 0.02 * area
        assert (height + 0.5) / (width - 0.5) >= 0.3
        assert (height - 0.5) / (width + 0.5) <= 1 / 0.3
    shares = np.array([box.height * box.width / area for box in boxes])
    assert shares.min() < 0.025
    assert shares.max() > 0.325
    aspects = np.array([box.height / box.width for box in boxes])
    assert aspects.min() < 0.32
    assert aspects.max() > 3.1
    assert abs(np.log(aspects).mean()) < 0.05  # upright and lying alike


def test_boxes_lie_uniformly(boxes):
    inside = [box for box in boxes if box.height < 180 and box.width < 180]
    for offset, side in ((0, 2), (1, 3)):
        # (offset + u) / (places) with u in [0, 1) makes the discrete uniform continuous.
        jitter = np.random.default_rng(offset).random(len(inside))
        places = [(box[offset] + u) / (224 - box[side] + 1) for box, u in zip(inside, jitter, strict=True)]
        assert stats.kstest(places, "uniform").pvalue > 1e-3
    assert len({box.seed for box in boxes}) == len(boxes)
    assert all(0 <= box.seed < 2**63 for box in boxes)


def test_box_sides_are_those_of_timm_draw_for_draw():
    """The noise's seed is drawn between a box's sides and its place, so places are compared as distributions."""
    erase = RandomErasing(probability=1.0, mode="const", device="cpu")
    ours, theirs = [], []
    for number in range(1500):
        random.seed(number)
        random.random()  # timm's decision to erase
        box = draw_box(96)
        random.seed(number)
        hole = erase(torch.ones(1, 96, 96))[0] == 0
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert (len(rows), len(columns)) == (box.height, box.width)
        ours.append((box.top, box.left))
        theirs.append((int(rows[0]), int(columns[0])))
    for axis in (0, 1):
        a, b = ([place[axis] for place in places] for places in (ours, theirs))
        assert stats.ks_2samp(a, b).pvalue > 1e-3


def test_erasing_probability_is_the_share_of_images_with_a_box(photo):
    def share(erasing: float) -> float:
        transform = TrainTransform(8, Augment(auto_augment=None, erasing=erasing))
        return sum(under((0, 0, i), transform, photo)[1] is not None for i in range(600)) / 600

    assert share(0.0) == 0
    assert share(1.0) == 1
    assert abs(share(0.25) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 600)


def normalized(images):
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def test_boxes_are_standard_normal_after_normalisation_and_nothing_else_is_touched():
    images = torch.rand(3, 3, 256, 240, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    states = global_states()
    filled = fill_boxes(images, [(1, Box(20, 7, 200, 210, 12345))])
    assert global_states() == states
    assert torch.equal(filled[0], before[0])
    assert torch.equal(filled[2], before[2])
    outside = torch.ones(256, 240, dtype=torch.bool)
    outside[20:220, 7:217] = False
    assert torch.equal(filled[1][:, outside], before[1][:, outside])
    noise = normalized(filled)[1, :, 20:220, 7:217].double().flatten(1)  # [3, 42000]
    for channel in noise:
        assert abs(channel.mean()) < 4 / math.sqrt(42000)
        assert abs(channel.std() - 1) < 4 / math.sqrt(2 * 42000)
        assert stats.kstest(channel.numpy(), "norm").pvalue > 1e-3
    correlations = torch.corrcoef(noise)[torch.tril_indices(3, 3, -1).unbind()]
    assert correlations.abs().max() < 4 / math.sqrt(42000)
    grid = noise.view(3, 200, 210)
    assert abs((grid[:, :, 1:] * grid[:, :, :-1]).mean()) < 0.012  # neighbours know nothing of each other
    assert abs((grid[:, 1:] * grid[:, :-1]).mean()) < 0.012


def test_noise_depends_on_the_seed_of_the_box_alone():
    def noise(row, rows, size, box, *others):
        images = torch.rand(rows, 3, size, size)
        return fill_boxes(images, [*others, (row, box)])[
            row, :, box.top : box.top + box.height, box.left : box.left + box.width
        ]

    box = Box(3, 5, 10, 14, 77)
    once = noise(0, 1, 32, box)
    assert torch.equal(once, noise(4, 6, 64, box, (0, Box(0, 0, 5, 5, 1)), (2, Box(1, 1, 9, 9, 77))))
    assert torch.equal(once, noise(0, 1, 32, box._replace(top=0, left=0)))
    assert not torch.equal(once, noise(0, 1, 32, box._replace(seed=78)))
    assert noise(0, 1, 32, box._replace(seed=2**63 - 1)).shape == (3, 10, 14)


def test_no_boxes_no_change():
    images = torch.rand(2, 3, 16, 16)
    before = images.clone()
    assert torch.equal(fill_boxes(images, []), before)


def test_encoders_of_other_conventions_see_the_same_picture():
    """Noise is put into pixels: what each network is fed, taken back by its own mean and std, is one picture."""
    images = fill_boxes(torch.rand(2, 3, 32, 32), [(1, Box(4, 8, 20, 16, 9))])
    seen = []
    for mean, std in ((IMAGENET_MEAN, IMAGENET_STD), (CLIP_MEAN, CLIP_STD)):
        encoder = create_model(
            "timm/vit_tiny_patch16_224", image_size=32, mean=mean, std=std, embed_dim=12, depth=1, num_heads=2
        )
        fed = []
        embed = encoder.network.patch_embed.proj
        handle = embed.register_forward_pre_hook(lambda _, args, fed=fed: fed.append(args[0]))
        with torch.no_grad():
            encoder(images)
        handle.remove()
        seen.append((fed[0], fed[0] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)))
    (imagenet, pixels), (clip, other_pixels) = seen
    torch.testing.assert_close(pixels, images, atol=1e-6, rtol=0)
    torch.testing.assert_close(other_pixels, images, atol=1e-6, rtol=0)
    noise = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(imagenet[1, :, 4:24, 8:24], noise, atol=1e-5, rtol=0)
    assert (clip[1, :, 4:24, 8:24] - noise).abs().max() > 0.05


# The plain view


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300)])
def test_plain_view_resizes_the_short_side_and_cuts_the_centre(width, height):
    image = picture(width, height)
    small = image.resize((96, 64) if width > height else (64, 96), Image.BICUBIC)  # 56 / 0.875 = 64
    left, top = (small.width - 56) // 2, (small.height - 56) // 2
    expected = np.asarray(small.crop((left, top, left + 56, top + 56)))
    assert np.array_equal(EvalTransform(56, 0.875)(image).permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (28, 1.0), (98, 0.9), (14, 0.5)])
@pytest.mark.parametrize("shape", [(640, 480), (31, 33), (1, 1), (500, 3), (3, 500)])
def test_plain_view_has_its_size(shape, size, crop):
    pixels = EvalTransform(size, crop)(Image.new("RGB", shape, (10, 130, 250)))
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (3, size, size)
    assert torch.equal(pixels, torch.tensor([10, 130, 250], dtype=torch.uint8).view(3, 1, 1).expand_as(pixels))


def test_plain_view_draws_nothing(photo):
    before = global_states()
    transform = EvalTransform(28, 0.875)
    assert torch.equal(transform(photo), transform(photo))
    assert global_states() == before


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (20_000, 3), (64, 2), (65, 2)])
def test_the_plain_view_of_a_line_is_its_middle(size, monkeypatch):
    image = Image.new("RGB", size, (10, 20, 30))
    image.paste((200, 100, 50), tuple(side // 2 - 2 for side in size) + tuple(side // 2 + 2 for side in size))
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, to, *rest, **more: sizes.append(to) or resize(self, to, *rest, **more)
    )
    view = EvalTransform(16, 1.0)(image)
    assert view.shape == (3, 16, 16)
    assert view[:, 8, 8].tolist() == [200, 100, 50]
    assert max(sizes[0]) <= 16 * 32 + 16
