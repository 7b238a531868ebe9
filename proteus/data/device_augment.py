"""RandAugment where the networks are: drawn in the workers as timm draws it, applied to whole batches on the device.

The arithmetic is Pillow's, to its rounding: geometry samples at pixel centres with the cubic kernel of a = -1, and both
it and blends are truncated, not rounded. Largest differences to timm's operations on photos of 224 pixels, magnitudes 0
to 10, in levels of 255 (where float32 in place of Pillow's float64 falls on the other side of a level):

    lookups, blends, blur            none
    Rotate, ShearX, ShearY           1, in 0.025 % of the values at most; mean over an image 0.001
    Translate, in pixels or shares   1, in 0.2 % of the values; mean over an image 0.003

A level can decide more in the operation that follows. Under rand-m9-mstd0.5-inc1 four images in five are equal, and the
mean over an image is at most 0.01.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from timm.data.auto_augment import AugmentOp, RandAugment
from torch import Tensor
from torch.nn.functional import pad

from proteus.errors import InputError, nearest
from proteus.models.encoder import IMAGENET_MEAN

FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # where geometry has no source, as timm sets it


class Op(NamedTuple):
    """An operation as it was drawn: timm's name, and what timm calls its function with (degrees, a factor, ...)."""

    name: str
    value: float | int | None = None


def draw_ops(augment: RandAugment) -> list[Op]:
    """The operations that `augment` would apply to its next image, first to last.

    timm itself draws, with its calls of `random` and numpy in its order: the operations and their magnitudes are those
    an image would have met, and the generators end where they would have ended. InputError where `augment` may choose
    an operation that `apply_ops` does not know.
    """
    return _recorder(augment)([])


@lru_cache(maxsize=4)  # copies take longer than the draws
def _recorder(augment: RandAugment) -> RandAugment:
    recorder = copy(augment)
    recorder.ops = [_recording(op) for op in augment.ops]
    return recorder


def _recording(op: AugmentOp) -> AugmentOp:
    if op.name not in _KERNELS:
        raise InputError(
            f"data.augment.device=true: no {op.name} of RandAugment's on a device{nearest(op.name, _KERNELS)}"
        )
    recording = copy(op)
    recording.aug_fn = partial(_record, op.name)
    return recording


def _record(name: str, ops: list[Op], value: float | int | None = None, **_: object) -> list[Op]:
    return [*ops, Op(name, value)]


def apply_ops(images: Tensor, ops: Sequence[Sequence[Op]], fill: Sequence[int] = FILL) -> Tensor:
    """Images after their operations: uint8 [B, 3, H, W] to another such, on the same device; nothing waits for it.

    ops:  B lists, the operations of each row, first to last.
    fill: RGB levels where geometry has no source.
    """
    height, width = images.shape[-2:]
    images = images.clone()
    for step in range(max(map(len, ops), default=0)):
        groups: dict[Kernel, list[tuple[int, tuple[float, ...]]]] = defaultdict(list)
        for row, drawn in enumerate(ops):
            if step < len(drawn):
                kernel, parameters = _KERNELS[drawn[step].name]
                values = parameters(drawn[step].value or 0, height, width)
                groups[kernel].append((row, (*values, *fill) if kernel is _affine else values))
        for kernel, members in groups.items():
            rows = torch.tensor([row for row, _ in members]).to(images.device, non_blocking=True)
            table = torch.tensor([values for _, values in members], dtype=torch.float64)
            changed = kernel(images.index_select(0, rows), table.to(images.device, non_blocking=True))
            images.index_copy_(0, rows, changed)
    return images


# Kernels: uint8 [R, 3, H, W] and float64 [R, K], the rows' parameters, to uint8 [R, 3, H, W]


def _auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    flat = images.flatten(2)
    low, high = (level.double()[..., None] for level in (flat.amin(2), flat.amax(2)))  # [R, 3, 1]
    scale = torch.full_like(high, 255) / (high - low).clamp(min=1)  # 255 / x is a reciprocal and a product, less exact
    levels = torch.arange(256, device=images.device, dtype=torch.float64)
    stretched = (levels * scale - low * scale).clamp(0, 255)
    return _look_up(images, torch.where(high > low, stretched, levels))


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    last = counts.gather(2, flat.amax(2, keepdim=True))  # pixels of the highest level there is
    share = (flat.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    equal = ((share // 2 + below) // share.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(share > 0, equal, torch.arange(256, device=images.device)))


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """What `table` [R, 3, 256] says of each level; fractions are dropped."""
    return table.to(torch.uint8).gather(2, images.flatten(2).long()).view_as(images)


def _invert(images: Tensor, _: Tensor) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    return images & _per_row(bits, torch.uint8)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images < _per_row(threshold, torch.int16), images, 255 - images)


def _solarize_add(images: Tensor, more: Tensor) -> Tensor:
    brighter = (images + _per_row(more, torch.int16)).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(torch.zeros_like(images[:, :1, :1, :1]), images, factor)


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(images)
    count = grey[0].numel()
    mean = (2 * grey.sum((1, 2, 3), keepdim=True) + count) // (2 * count)  # rounded, halves up
    return _blend(mean, images, factor)


def _color(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(images), images, factor)


def _sharpness(images: Tensor, factor: Tensor) -> Tensor:
    wide = images.to(torch.int16)
    rows = wide[:, :, :-2] + wide[:, :, 1:-1] + wide[:, :, 2:]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    smooth = wide.clone()  # the border stays
    smooth[:, :, 1:-1, 1:-1] = (2 * (box + 4 * wide[:, :, 1:-1, 1:-1]) + 13) // 26  # thirteenths, rounded
    return _blend(smooth, images, factor)


def _blend(zero: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """`zero` at factor 0, the images at 1, and beyond; in float32 and truncated, as Pillow's Image.blend."""
    zero = zero.float()
    return (zero + _per_row(factor, torch.float32) * (images.float() - zero)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    """[R, 1, H, W] int32: ITU-R 601 luma in Pillow's fixed point."""
    red, green, blue = images.int().split(1, dim=1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _per_row(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.to(dtype).view(-1, 1, 1, 1)


def _gaussian_blur(images: Tensor, weights: Tensor) -> Tensor:
    near, middle, far = (_per_row(weight, torch.long) for weight in weights.unbind(1))
    wide = images.long()
    for _ in range(2):  # along the rows, then along the columns: Pillow's three box filters each
        for _ in range(3):
            taps = pad(wide.float(), (2, 2, 0, 0), mode="replicate").long().unfold(3, wide.shape[3], 1).unbind(3)
            total = near * taps[2] + middle * (taps[1] + taps[3]) + far * (taps[0] + taps[4])
            wide = (total + (1 << 23)) >> 24
        wide = wide.transpose(2, 3)
    return wide.to(torch.uint8)


def _affine(images: Tensor, values: Tensor) -> Tensor:
    """Output pixel (x, y) shows the source at (a x + b y + c, d x + e y + f); pixel centres are at halves."""
    height, width = images.shape[-2:]
    a, b, c, d, e, f, *fill = values[:, :, None, None].unbind(1)  # [R, 1, 1]
    x = torch.arange(width, device=images.device, dtype=torch.float64) + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float64)[:, None] + 0.5
    # In float64 as in Pillow: float32 puts some pixels of the border on its other side.
    x, y = a * x + b * y + c, d * x + e * y + f  # [R, H, W]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    columns, right = _neighbours(x, width)
    rows, down = _neighbours(y, height)
    starts = [row * width for row in rows]
    flat = images.flatten(2).float()

    def at(places: Tensor) -> Tensor:
        return flat.gather(2, places.flatten(1)[:, None].expand(-1, 3, -1)).view_as(images)

    levels = _cubic([_cubic([at(start + column) for column in columns], right) for start in starts], down)
    colour = torch.stack(fill, dim=1).to(torch.uint8)  # [R, 3, 1, 1]
    return torch.where(inside[:, None], levels.clamp(0, 255).to(torch.uint8), colour)


def _neighbours(place: Tensor, size: int) -> tuple[list[Tensor], Tensor]:
    """Indices of the four pixels around a place, the border repeated, and how far it is from the second of them."""
    first = (place - 0.5).floor()
    return [(first.long() + k).clamp(0, size - 1) for k in (-1, 0, 1, 2)], (place - 0.5 - first).float()[:, None]


def _cubic(taps: list[Tensor], t: Tensor) -> Tensor:
    """The cubic of a = -1 through four neighbours, `t` beyond the second."""
    p, q, r, s = taps
    return q + t * (r - p + t * (2 * (p - q) + r - s + t * (q - p + s - r)))


# Parameters: of an operation's value and the images' height and width


def _none(value: float, height: int, width: int) -> tuple[float, ...]:
    return ()


def _value(value: float, height: int, width: int) -> tuple[float, ...]:
    return (value,)


def _kept_bits(value: float, height: int, width: int) -> tuple[float, ...]:
    return (255 & ~(2 ** max(8 - int(value), 0) - 1),)


def _desaturated(value: float, height: int, width: int) -> tuple[float, ...]:
    return (min(1.0, max(0.0, 1 - value)),)


def _box_weights(value: float, height: int, width: int) -> tuple[float, ...]:
    """A box's weights of a pixel, its neighbours and theirs, in 1 / 2^24: three boxes make a Gaussian of sigma `value`.

    Gwosdek et al., 2011. Sigma is at most 2, timm's limit, where a box reaches two pixels.
    """
    variance = value * value / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    full = int(2**24 / (2 * (whole + part) + 1))
    rest = (2**24 - (2 * whole + 1) * full) // 2
    return (full, full, rest) if whole else (full, rest, 0)


def _rotation(value: float, height: int, width: int) -> tuple[float, ...]:
    angle = -math.radians(value % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y


Kernel = Callable[[Tensor, Tensor], Tensor]
_KERNELS: dict[str, tuple[Kernel, Callable[[float, int, int], tuple[float, ...]]]] = {
    "AutoContrast": (_auto_contrast, _none),
    "Equalize": (_equalize, _none),
    "Invert": (_invert, _none),
    "Posterize": (_posterize, _kept_bits),
    "PosterizeIncreasing": (_posterize, _kept_bits),
    "PosterizeOriginal": (_posterize, _kept_bits),
    "Solarize": (_solarize, _value),
    "SolarizeIncreasing": (_solarize, _value),
    "SolarizeAdd": (_solarize_add, _value),
    "Color": (_color, _value),
    "ColorIncreasing": (_color, _value),
    "Contrast": (_contrast, _value),
    "ContrastIncreasing": (_contrast, _value),
    "Brightness": (_brightness, _value),
    "BrightnessIncreasing": (_brightness, _value),
    "Sharpness": (_sharpness, _value),
    "SharpnessIncreasing": (_sharpness, _value),
    "Desaturate": (_color, _desaturated),
    "GaussianBlur": (_gaussian_blur, _box_weights),
    "Rotate": (_affine, _rotation),
    "ShearX": (_affine, lambda value, height, width: (1, value, 0, 0, 1, 0)),
    "ShearY": (_affine, lambda value, height, width: (1, 0, 0, value, 1, 0)),
    "TranslateX": (_affine, lambda value, height, width: (1, 0, value, 0, 1, 0)),
    "TranslateY": (_affine, lambda value, height, width: (1, 0, 0, 0, 1, value)),
    "TranslateXRel": (_affine, lambda value, height, width: (1, 0, value * width, 0, 1, 0)),
    "TranslateYRel": (_affine, lambda value, height, width: (1, 0, 0, 0, 1, value * height)),
}
