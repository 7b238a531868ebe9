"""Random views of an image and its target together, as the dense protocols draw them.

An image is uint8 [H, W, 3], a target [H, W], classes in uint8 or metres in float32. All draw from `random`, so that
`proteus.data.transforms.seeded` decides.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from proteus.data.dense import IGNORE
from proteus.evaluation.dense.presets import DepthPreset, SegmentationPreset

Pair = tuple[np.ndarray, np.ndarray]


class SegmentationView:
    """A training view: pixels [3, h, w] float in [0, 1] and classes [h, w] uint8, of the preset's crop."""

    def __init__(self, preset: SegmentationPreset, fill: Sequence[float]):
        self.preset, self.fill = preset, fill

    def __call__(self, image: np.ndarray, target: np.ndarray) -> tuple[Tensor, Tensor]:
        preset = self.preset
        image, target = random_resize(image, target, preset.short, preset.long, preset.ratio_range)
        image, target = random_crop(image, target, preset.crop, preset.cat_max_ratio)
        image, target = random_flip(image, target)
        return to_tensors(photometric(image), target, preset.crop, self.fill, IGNORE)


class DepthView:
    """A training view: pixels [3, h, w] float in [0, 1] and metres [h, w], of the preset's crop."""

    def __init__(self, preset: DepthPreset, fill: Sequence[float]):
        self.preset, self.fill = preset, fill

    def __call__(self, image: np.ndarray, target: np.ndarray) -> tuple[Tensor, Tensor]:
        preset = self.preset
        if random.random() < preset.depth_mix:
            image = depth_mix(image, target, preset.max_depth)
        if preset.box is not None:
            image, target = cut_box(image, target, preset.box)
        if preset.rotation and random.random() < 0.5:
            image, target = rotate(image, target, random.uniform(-preset.rotation, preset.rotation))
        image, target = random_flip(image, target)
        image, target = random_resize(image, target, preset.short, preset.long, preset.ratio_range)
        image, target = random_crop(image, target, preset.crop)
        image = bts_colour(image) if preset.colour == "bts" else albumentations_colour(image)
        return to_tensors(image, target, preset.crop, self.fill, 0)


# ------------------------------------------------------------------------------------------------------------ geometry


def scaled_size(height: int, width: int, short: float, long: float) -> tuple[int, int]:
    """The largest size of that aspect whose sides fit into short and long, rounded as mmcv does."""
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, H, W] at another size, bilinear between pixel centres, without antialiasing (as cv2's)."""
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def random_resize(
    image: np.ndarray, target: np.ndarray, short: int | None, long: int, ratio_range: tuple[float, float]
) -> Pair:
    """Both at the size of short and long times a factor drawn from `ratio_range`; classes and depths nearest."""
    if short is None:
        return image, target
    ratio = random.uniform(*ratio_range)
    size = scaled_size(target.shape[0], target.shape[1], int(short * ratio), int(long * ratio))
    if size == target.shape:
        return image, target
    pixels = resize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], size)[0]
    values = F.interpolate(torch.from_numpy(np.array(target))[None, None], size=size, mode="nearest")[0, 0]
    return pixels.permute(1, 2, 0).numpy(), values.numpy()


def random_crop(
    image: np.ndarray, target: np.ndarray, crop: tuple[int, int], cat_max_ratio: float | None = None
) -> Pair:
    """A crop of that size or, where the image is smaller, all of it.

    cat_max_ratio: drawn again, ten times at most, where one class has this share of the pixels that count.
    """
    height, width = target.shape
    h, w = min(crop[0], height), min(crop[1], width)
    for tries in range(11):
        top, left = random.randint(0, height - h), random.randint(0, width - w)
        part = target[top : top + h, left : left + w]
        if cat_max_ratio is None or tries == 10:
            break
        counts = np.bincount(part.ravel(), minlength=IGNORE + 1)[:IGNORE]
        if (counts > 0).sum() > 1 and counts.max() / counts.sum() < cat_max_ratio:
            break
    return image[top : top + h, left : left + w], part


def random_flip(image: np.ndarray, target: np.ndarray) -> Pair:
    """Both mirrored left to right, half of the time."""
    return (image[:, ::-1], target[:, ::-1]) if random.random() < 0.5 else (image, target)


def cut_box(image: np.ndarray, target: np.ndarray, box: tuple[int, int, int, int]) -> Pair:
    """The box (left, top, right, bottom) of an image of 640 x 480 pixels, in proportion at any other size."""
    height, width = target.shape
    left, right = (round(x * width / 640) for x in box[::2])
    top, bottom = (round(y * height / 480) for y in box[1::2])
    return image[top:bottom, left:right], target[top:bottom, left:right]


def rotate(image: np.ndarray, target: np.ndarray, degrees: float) -> Pair:
    """Both turned about the centre, the image bilinear, the depth nearest; what comes in is black, without reading."""
    turned = Image.fromarray(np.ascontiguousarray(image)).rotate(degrees, Image.Resampling.BILINEAR)
    depth = Image.fromarray(np.ascontiguousarray(target)).rotate(degrees, Image.Resampling.NEAREST)
    return np.asarray(turned), np.asarray(depth)


def to_tensors(
    image: np.ndarray, target: np.ndarray, size: tuple[int, int], fill: Sequence[float], missing: int
) -> tuple[Tensor, Tensor]:
    """Pixels [3, h, w] in [0, 1] and the target [h, w], filled up at the bottom and the right."""
    height, width = target.shape
    pixels = torch.tensor(fill, dtype=torch.float32)[:, None, None].repeat(1, *size)
    pixels[:, :height, :width] = torch.from_numpy(image.copy()).permute(2, 0, 1) / 255
    known = torch.from_numpy(target.copy())
    values = torch.full(size, missing, dtype=known.dtype)
    values[:height, :width] = known
    return pixels, values


# -------------------------------------------------------------------------------------------------------------- colour


def photometric(image: np.ndarray) -> np.ndarray:
    """SSD's distortion, with mmsegmentation's constants; every part half of the time.

    Brightness +-32, saturation x 0.5 to 1.5 and hue +-18 of 180; contrast x 0.5 to 1.5 before the latter two or after.
    """
    if random.random() < 0.5:
        image = _clipped(image.astype(np.float32) + random.uniform(-32, 32))
    contrast = random.uniform(0.5, 1.5) if random.random() < 0.5 else None
    contrast_first = random.random() < 0.5
    if contrast is not None and contrast_first:
        image = _clipped(image.astype(np.float32) * contrast)
    saturation = random.uniform(0.5, 1.5) if random.random() < 0.5 else 1.0
    hue = random.randint(-18, 17) / 180 if random.random() < 0.5 else 0.0
    image = shift_hsv(image, hue, saturation)
    if contrast is not None and not contrast_first:
        image = _clipped(image.astype(np.float32) * contrast)
    return image


def shift_hsv(
    image: np.ndarray, hue: float, saturation: float = 1.0, add_saturation: float = 0.0, add_value: float = 0.0
) -> np.ndarray:
    """Hue turned by a share of the circle; saturation multiplied, saturation and value added to, in 0 to 255."""
    if not hue and saturation == 1 and not add_saturation and not add_value:
        return image
    hsv = np.array(Image.fromarray(np.ascontiguousarray(image)).convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(np.int16) + round(hue * 256)) % 256
    hsv[..., 1] = _clipped(hsv[..., 1].astype(np.float32) * saturation + add_saturation)
    hsv[..., 2] = _clipped(hsv[..., 2].astype(np.float32) + add_value)
    return np.asarray(Image.fromarray(hsv, mode="HSV").convert("RGB"))


def bts_colour(image: np.ndarray) -> np.ndarray:
    """Half of the time gamma 0.9 to 1.1, brightness 0.75 to 1.25 and a factor of 0.9 to 1.1 for each channel.

    Gamma acts on values of 0 to 255, as in the code DINOv2's heads were trained with; BTS itself has it on 0 to 1,
    where it changes little.
    """
    if random.random() >= 0.5:
        return image
    gamma, brightness = random.uniform(0.9, 1.1), random.uniform(0.75, 1.25)
    factors = np.array([random.uniform(0.9, 1.1) for _ in range(3)], dtype=np.float32)
    return _clipped(image.astype(np.float32) ** gamma * brightness * factors)


def albumentations_colour(image: np.ndarray) -> np.ndarray:
    """Albumentations' brightness and contrast, gamma, and hue, saturation, value: by default each half of the time."""
    if random.random() < 0.5:
        contrast, brightness = random.uniform(0.8, 1.2), random.uniform(-0.2, 0.2)
        image = _clipped(image.astype(np.float32) * contrast + 255 * brightness)
    if random.random() < 0.5:
        image = _clipped(255 * (image.astype(np.float32) / 255) ** random.uniform(0.8, 1.2))
    if random.random() < 0.5:
        hue, add_saturation, add_value = (random.uniform(-limit, limit) for limit in (20 / 180, 30, 20))
        image = shift_hsv(image, hue, add_saturation=add_saturation, add_value=add_value)
    return image


def depth_mix(image: np.ndarray, target: np.ndarray, max_depth: float) -> np.ndarray:
    """The image with a vertical strip replaced by its depth, black to white (vertical CutDepth; GLPN, 2022)."""
    width = target.shape[1]
    left = int(width * random.random())
    right = left + int(max(1, (width - left) * 0.75 * random.random()))
    mixed = image.copy()
    mixed[:, left:right] = _clipped(255 / max_depth * target[:, left:right])[..., None]
    return mixed


def _clipped(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
