"""Predictions for an image of any size: whole, or by a window that slides over it."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from proteus.evaluation.dense.augment import resize, scaled_size
from proteus.evaluation.dense.presets import Preset

WINDOWS = 8  # at once
Predict = Callable[[Tensor], Tensor]  # images [B, 3, h, w] to maps [B, C, any, any]


def slide(predict: Predict, image: Tensor, window: tuple[int, int] | None, stride: tuple[int, int]) -> Tensor:
    """The map [C, H, W] of an image [3, H, W]: predictions of windows, at their size, averaged where they overlap.

    The last window of a row or column is moved back to end with the image; one that is larger than the image is the
    image. None: the whole image is the window.
    """
    height, width = image.shape[-2:]
    h, w = (height, width) if window is None else (min(window[0], height), min(window[1], width))
    corners = [(top, left) for top in starts(height, h, stride[0]) for left in starts(width, w, stride[1])]
    total, count = None, image.new_zeros(height, width)
    for first in range(0, len(corners), WINDOWS):
        part = corners[first : first + WINDOWS]
        windows = torch.stack([image[:, top : top + h, left : left + w] for top, left in part])
        maps = resize(predict(windows).float(), (h, w))  # [windows, C, h, w]
        if total is None:
            total = maps.new_zeros(maps.shape[1], height, width)
        for (top, left), one in zip(part, maps, strict=True):
            total[:, top : top + h, left : left + w] += one
            count[top : top + h, left : left + w] += 1
    assert total is not None
    return total / count


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where the windows begin along a side."""
    steps = max(length - window + stride - 1, 0) // stride + 1
    return [min(i * stride, length - window) for i in range(steps)]


def views(predict: Predict, image: Tensor, preset: Preset, ratios: tuple[float, ...] = (1.0,)) -> Iterator[Tensor]:
    """The maps [C, h, w] of an image [3, H, W] at each ratio of the preset's test size, mirrored too if it says so.

    A mirrored image's map is mirrored back.
    """
    for ratio in ratios:
        size = image.shape[-2], image.shape[-1]
        if preset.test_short is not None:
            size = scaled_size(*size, int(preset.test_short * ratio), int(preset.test_long * ratio))
        resized = resize(image[None], size)[0]
        yield slide(predict, resized, preset.window, preset.stride)
        if preset.flip:
            yield slide(predict, resized.flip(-1), preset.window, preset.stride).flip(-1)
