"""From a decoded image to pixels: the recipe's augmentation, and the plain view that probes see."""

import math
import random
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from proteus.config import Augment
from proteus.errors import InputError
from proteus.models.encoder import IMAGENET_MEAN, IMAGENET_STD


class Box(NamedTuple):
    """A rectangle to be filled with noise: pixels, and the seed of the noise."""

    top: int
    left: int
    height: int
    width: int
    seed: int


class TrainTransform:
    """The recipe's augmentation of one image: RandomResizedCrop (bicubic), flip, RandAugment, random erasing.

    Returns uint8 [3, S, S] and the box to erase, or None. Erasing writes standard-normal noise AFTER normalisation,
    so it cannot be done to uint8 pixels: `fill_boxes` does it on the device.
    """

    def __init__(self, size: int, cfg: Augment):
        steps: list = [
            RandomResizedCropAndInterpolation(size, scale=cfg.scale, interpolation="bicubic"),
            transforms.RandomHorizontalFlip(cfg.hflip),
        ]
        if cfg.auto_augment:
            # As timm sets it: shifts up to 45 % of the side, and what a shift uncovers takes the mean colour.
            colour = tuple(round(255 * value) for value in IMAGENET_MEAN)
            hparams = {
                "translate_const": int(size * 0.45),
                "img_mean": colour,
                "interpolation": Image.Resampling.BICUBIC,
            }
            try:
                steps.append(_rand_augment(cfg.auto_augment, hparams))
                with seeded(0):
                    steps[-1](Image.new("RGB", (size, size)))  # some names fail on their first image only
            except Exception as error:  # timm checks a name by stumbling over it
                raise InputError(
                    f"data.augment.auto_augment={cfg.auto_augment!r} is no RandAugment name of timm: {error}"
                ) from None
        self._steps = transforms.Compose(steps)
        self._size, self._erasing = size, cfg.erasing

    def __call__(self, image: Image.Image) -> tuple[Tensor, Box | None]:
        pixels = pil_to_tensor(self._steps(image))  # uint8 [3, S, S]
        return pixels, draw_box(self._size) if random.random() < self._erasing else None


def _rand_augment(name: str, hparams: dict[str, Any]) -> RandAugment:
    augment = rand_augment_transform(name, hparams)
    for op in augment.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return augment


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # As timm's, but for 0 bits too, which magnitude 10 asks for: that is black, and Pillow 13 refuses it.
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
        return pil_to_tensor(self._steps(image))


@contextmanager
def seeded(*key: int):
    """Inside, `random`, numpy and torch (CPU) draw from generators seeded by `key`; after, they are as they were.

    timm's augmentation draws from all three.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    a, b, c = np.random.SeedSequence(key).generate_state(3)
    random.seed(int(a))
    np.random.seed(b)
    torch.default_generator.manual_seed(int(c))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
