"""From a decoded image to pixels: the recipe's augmentation, and the plain view that probes see."""

import math
import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms.functional import center_crop, pil_to_tensor

from proteus.config import Augment
from proteus.data.decode import DecodedImage
from proteus.errors import InputError
from proteus.models.encoder import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from proteus.data.device_augment import Op

RATIO = (3 / 4, 4 / 3)  # width to height of a crop
LONGEST = 32  # times the short side: as much of the long one, in its middle, is all that the plain view looks at


class Box(NamedTuple):
    """A rectangle to be filled with noise: pixels, and the seed of the noise."""

    top: int
    left: int
    height: int
    width: int
    seed: int


class Crop(NamedTuple):
    """The part of a decoded image that a view shows, in its pixels, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool


class View(NamedTuple):
    """A view of an image for training.

    pixels: [3, S, S] uint8.
    box:    what is erased after normalisation, or None.
    crop:   where it is from.
    ops:    the operations of RandAugment that are left to the device; empty without data.augment.device.
    """

    pixels: Tensor
    box: Box | None
    crop: Crop
    ops: "list[Op]"


class TrainTransform:
    """The recipe's augmentation of one image: RandomResizedCrop (bicubic), flip, RandAugment, random erasing.

    A `crop` that is given takes the place of the one drawn; the draws are the same with it and without. Erasing writes
    standard-normal noise AFTER normalisation, so it cannot be done to uint8 pixels: `fill_boxes` does it on the device.
    """

    def __init__(self, size: int, cfg: Augment):
        self._size, self._cfg = size, cfg
        self._augment: RandAugment | None = None
        if cfg.auto_augment:
            # As timm sets it: shifts up to 45 % of the side, and what a shift uncovers takes the mean colour.
            colour = tuple(round(255 * value) for value in IMAGENET_MEAN)
            hparams = {
                "translate_const": int(size * 0.45),
                "img_mean": colour,
                "interpolation": Image.Resampling.BICUBIC,
            }
            try:
                self._augment = _rand_augment(cfg.auto_augment, hparams)
                with seeded(0):
                    self._augment(Image.new("RGB", (size, size)))  # some names fail on their first image only
            except Exception as error:  # timm checks a name by stumbling over it
                raise InputError(
                    f"data.augment.auto_augment={cfg.auto_augment!r} is no RandAugment name of timm"
                    + (f": {error}" if str(error) else "; rand-m9-mstd0.5-inc1 is one")
                ) from None

    def __call__(self, image: Image.Image, crop: Crop | None = None) -> View:
        drawn = self._draw_crop(image)
        crop = crop or drawn
        pixels = crop_and_resize(image, crop, self._size)
        ops: list[Op] = []
        if self._augment and self._cfg.device:
            from proteus.data.device_augment import draw_ops

            ops = draw_ops(self._augment)
        elif self._augment:
            seen = DecodedImage(pixels)
            augmented = self._augment(seen)
            if augmented is not seen:  # half of the operations drawn are left out
                pixels = pil_to_tensor(augmented)
        box = draw_box(self._size) if random.random() < self._cfg.erasing else None
        return View(pixels, box, crop, ops)

    def _draw_crop(self, image: Image.Image) -> Crop:
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(image, self._cfg.scale, RATIO)
        height, width = max(height, 1), max(width, 1)  # of an image of a few pixels it may be none
        top, left = min(top, image.height - height), min(left, image.width - width)
        return Crop(top, left, height, width, bool(torch.rand(1) < self._cfg.hflip))


def crop_and_resize(image: Image.Image, crop: Crop, size: int) -> Tensor:
    """A crop of an RGB image as [3, S, S] uint8, bicubic and antialiased, channels last in memory.

    torch's resize rounds other than Pillow's, and takes half of its time: on photos one value in 40 differs by one
    level, one in 20,000 by more, and the largest difference seen is 12.
    """
    right, bottom = crop.left + crop.width, crop.top + crop.height
    if isinstance(image, DecodedImage) and image.pixels is not None:
        seen = image.pixels[:, crop.top : bottom, crop.left : right]
    else:
        seen = pil_to_tensor(image.crop((crop.left, crop.top, right, bottom)))
    seen = seen[None].contiguous(memory_format=torch.channels_last)  # torch's fast kernel reads no other
    resized = functional.interpolate(seen, (size, size), mode="bicubic", antialias=True)[0]
    resized = resized.flip(-1) if crop.flip else resized
    return resized.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def _rand_augment(name: str, hparams: dict[str, Any]) -> RandAugment:
    return mend_posterize(rand_augment_transform(name, hparams))


def mend_posterize(augment: RandAugment) -> RandAugment:
    """Let timm's posterizing take 0 bits too, which magnitude 10 asks for: that is black, and Pillow 13 refuses it."""
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    return image if bits >= 8 else image.point([value & ~(2 ** (8 - bits) - 1) for value in range(256)] * 3)


def draw_box(size: int) -> Box | None:
    """A box of 2 % to a third of the area and aspect ratio 0.3 to 3.3, log-uniform; None where ten draws do not fit.

    Zhong et al., 2017, with timm's constants.
    """
    for _ in range(10):
        area = random.uniform(0.02, 1 / 3) * size * size
        aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height < size and width < size:
            seed = random.getrandbits(63)
            return Box(random.randint(0, size - height), random.randint(0, size - width), height, width, seed)
    return None


def fill_boxes(images: Tensor, boxes: list[tuple[int, Box]]) -> Tensor:
    """Float images [B, 3, H, W] in [0, 1] with noise in their boxes, written in place; `boxes` are (row, box).

    The noise is standard normal after normalisation with ImageNet's statistics, the recipe's: in pixels mean + std * z,
    so that every encoder, whatever its own convention, sees the same picture.
    """
    if boxes:
        mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1).to(images.device, non_blocking=True)
        std = torch.tensor(IMAGENET_STD).view(3, 1, 1).to(images.device, non_blocking=True)
        generator = torch.Generator(images.device)
        for row, (top, left, height, width, seed) in boxes:
            noise = torch.randn(3, height, width, generator=generator.manual_seed(seed), device=images.device)
            images[row, :, top : top + height, left : left + width] = mean + std * noise
    return images


class EvalTransform:
    """Resize the short side to S / crop (bicubic), centre crop S: uint8 [3, S, S]."""

    def __init__(self, size: int, crop: float):
        bicubic = transforms.InterpolationMode.BICUBIC
        self._steps = transforms.Compose([transforms.Resize(round(size / crop), bicubic), transforms.CenterCrop(size)])

    def __call__(self, image: Image.Image) -> Tensor:
        longest = LONGEST * min(image.size)
        if max(image.size) > longest:  # a line of 20,000 x 1 pixels would become one of 5,000,000 x 256
            width, height = image.size
            image = center_crop(image, [min(height, longest), min(width, longest)])
        return pil_to_tensor(self._steps(image))


def seed_generators(*key: int) -> None:
    """Seed `random`, numpy and torch (CPU) by `key`: timm's augmentation draws from all three."""
    a, b, c = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(a))
    np.random.seed(b)
    torch.default_generator.manual_seed(int(c))


@contextmanager
def generators_kept():
    """After it, `random`, numpy and torch (CPU) draw on as if nothing had been drawn in it.

    It takes a tenth of a millisecond, twenty times what `seed_generators` takes.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@contextmanager
def seeded(*key: int):
    """Inside, `random`, numpy and torch (CPU) draw from generators seeded by `key`; after, they are as they were."""
    with generators_kept():
        seed_generators(*key)
        yield
