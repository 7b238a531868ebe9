"""Images and targets of a dense source: checked, cut into views for training, whole for testing."""

from collections.abc import Callable, Generator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from proteus.data.dense import IGNORE, DenseSource
from proteus.data.sampler import Draw, Sampler
from proteus.data.sources import one_line
from proteus.data.transforms import seeded
from proteus.data.workers import load_batches, note
from proteus.errors import InputError, UnreadableError

View = Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]


class Whole(NamedTuple):
    """An image of a set by its number: uint8 [3, H, W], and its target [H, W]."""

    number: int
    image: Tensor
    target: Tensor


def read(source: DenseSource, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] and target [H, W] uint8 or float32; UnreadableError where one is not what it should be."""
    note(index)
    name = one_line(source.name(index))
    try:
        image: Image.Image = source.load(index)
    except InputError as error:
        raise UnreadableError(*error.lines) from None
    except Exception as error:  # a decoder of a broken file may raise anything
        raise UnreadableError(f"{name} cannot be read: {' '.join(str(error).split())}") from None
    try:
        target = source.target(index)
    except InputError as error:
        raise UnreadableError(*error.lines) from None
    except Exception as error:  # as above
        raise UnreadableError(f"the target of {name} cannot be read: {' '.join(str(error).split())}") from None
    if target.shape != (image.height, image.width):
        size = " x ".join(map(str, target.shape[::-1]))
        raise UnreadableError(f"{name} has {image.width} x {image.height} pixels, its target {size}: they must agree")
    if source.classes:
        wrong = target[(target >= len(source.classes)) & (target != IGNORE)]
        if wrong.size:
            raise UnreadableError(
                f"the target of {name} holds class {wrong[0]}; there are 0 to {len(source.classes) - 1}, "
                f"and {IGNORE} for pixels to ignore"
            )
        return np.asarray(image.convert("RGB")), target.astype(np.uint8, copy=False)
    if not np.isfinite(target).all():
        raise UnreadableError(f"the target of {name} holds depths that are not finite; no reading is 0")
    return np.asarray(image.convert("RGB")), target.astype(np.float32, copy=False)


def check_sources(train: DenseSource, test: DenseSource, dense: bool) -> None:
    """InputError where a set is empty, or the two are not of one task. dense: classes are wanted, not depths."""
    for what, source in (("training", train), ("test", test)):
        if not len(source):
            raise InputError(f"the {what} set has no images")
        if dense and not source.classes:
            raise InputError(f"segmentation: the {what} set has no classes")
        if not dense and source.classes:
            raise InputError(f"depth: the {what} set has classes ({source.classes[0]}, ...), not depths")
    if list(train.classes) != list(test.classes):
        differ = [pair for pair in zip(train.classes, test.classes, strict=False) if pair[0] != pair[1]]
        first = f", first {differ[0][0]!r} and {differ[0][1]!r}" if differ else ""
        raise InputError(
            f"the classes of the training set ({len(train.classes)}) and of the test set ({len(test.classes)}) "
            f"differ{first}"
        )


class _Views(Dataset):
    """Views of a training set, each a function of (seed, epoch, position) alone."""

    def __init__(self, source: DenseSource, view: View, seed: int):
        self.source, self.view, self.seed = source, view, seed

    def __getitems__(self, draws: list[Draw]) -> "tuple[Tensor, Tensor] | InputError":
        try:
            views = [self._view(draw) for draw in draws]
        except InputError as error:  # handed over, not raised: a worker would wrap it in its traceback
            return error
        images, targets = zip(*views, strict=True)
        return torch.stack(images), torch.stack(targets)

    def _view(self, draw: Draw) -> tuple[Tensor, Tensor]:
        image, target = read(self.source, draw.image)
        with seeded(self.seed, draw.epoch, draw.position):
            return self.view(image, target)


def training_views(
    source: DenseSource, view: View, sampler: Sampler, iterations: int, rank: int, workers: int
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Batches of process `rank`: images [B, 3, h, w] in [0, 1] and targets [B, h, w], `iterations` of them."""
    views, pin = _Views(source, view, sampler.seed), torch.cuda.is_available()
    remaining = lambda done: islice(sampler.run(0, iterations, rank), done, None)  # noqa: E731
    for batch in load_batches(views, remaining, workers, pin=pin):
        if isinstance(batch, InputError):
            raise batch
        yield batch


class _WholeImages(Dataset):
    def __init__(self, source: DenseSource):
        self.source = source

    def __getitems__(self, indices: list[int]) -> Whole | InputError:
        (index,) = indices
        try:
            image, target = read(self.source, index)
        except InputError as error:  # as above
            return error
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return Whole(index, pixels, torch.from_numpy(np.array(target)))


def whole_images(source: DenseSource, rank: int, processes: int, workers: int) -> Generator[Whole, None, None]:
    """Every `processes`-th image from `rank` on, one at a time: each image is some process's, and none is padding."""
    mine, pin = range(rank, len(source), processes), torch.cuda.is_available()
    for image in load_batches(_WholeImages(source), lambda done: ([i] for i in mine[done:]), workers, pin=pin):
        if isinstance(image, InputError):
            raise image
        yield image
