"""Images with a value for every pixel: what segmentation and depth are measured on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeGuard

import numpy as np
from PIL import Image

from proteus.data.decode import decode
from proteus.errors import InputError

IGNORE = 255  # the class number of pixels that count nowhere


class DenseSource(Protocol):
    """n images, numbered from 0, each with its target.

    classes: names of the classes, by number; empty where the targets are depths.
    """

    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, index: int) -> Image.Image:
        """Decode image `index` to RGB."""
        ...

    def target(self, index: int) -> np.ndarray:
        """Classes [H, W] uint8, IGNORE where none counts; or depth [H, W] float32 in metres, 0 where there is none."""
        ...

    def name(self, index: int) -> str:
        """What to call image `index` in a message."""
        ...


def is_dense(source: object) -> TypeGuard[DenseSource]:
    """Whether a source has a target for every pixel."""
    return hasattr(source, "target")


class PairedFiles:
    """Images and targets in files below a folder, pair by pair; a target that is not of its image's size is an error.

    read: turns the path of a target into its array (`read_classes` or `read_depth`, their options bound).
    """

    def __init__(
        self,
        root: Path,
        images: Sequence[str],
        targets: Sequence[str],
        classes: list[str],
        read: Callable[[Path], np.ndarray],
    ):
        self.root, self.classes, self._read = root, classes, read
        # Two arrays of bytes: lists of strings would be copied into every worker, page by page.
        self._images = np.array([os.fsencode(path) for path in images])
        self._targets = np.array([os.fsencode(path) for path in targets])

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> Image.Image:
        return decode(self.name(index))

    def target(self, index: int) -> np.ndarray:
        path = self.root / os.fsdecode(self._targets[index])
        target = self._read(path)
        try:
            with Image.open(self.name(index)) as image:  # reads the header only
                width, height = image.size
        except Exception as error:  # decoders raise anything
            raise InputError(f"{self.name(index)}: not readable as an image ({_one_line(error)})") from None
        if target.shape != (height, width):
            raise InputError(
                f"{path}: {target.shape[1]} x {target.shape[0]} pixels, but its image {self.name(index)} has "
                f"{width} x {height}"
            )
        return target

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self._images[index]))


def read_classes(path: Path, classes: int, reduce_zero_label: bool = False, ignore: int = IGNORE) -> np.ndarray:
    """A mask file as class numbers [H, W] uint8, IGNORE where none counts; InputError names a number above the last.

    reduce_zero_label: 0 counts nowhere, and 1 is the first class (ADE20K).
    ignore:            another number in the file that counts nowhere.
    """
    values = _pixels(path, "of class numbers").astype(np.int32)
    nowhere = (values == ignore) | (values == IGNORE)
    if reduce_zero_label:
        nowhere |= values == 0  # before the subtraction: what counts nowhere must not become a class
        values = values - 1
    wrong = ~nowhere & ((values < 0) | (values >= classes))
    if wrong.any():
        number, first = int(values[wrong][0]) + reduce_zero_label, int(reduce_zero_label)
        raise InputError(f"{path}: holds class {number}; there are {first} to {classes - 1 + first}")
    return np.where(nowhere, IGNORE, values).astype(np.uint8)


def read_depth(path: Path, per_metre: float = 1000.0, invalid: Sequence[int] = (0,)) -> np.ndarray:
    """A 16-bit depth file as metres [H, W] float32, 0 where there is no reading.

    per_metre: what the file holds at one metre; 1000 where it is in millimetres.
    invalid:   numbers in the file that mean no reading.
    """
    values = _pixels(path, "of depths")
    if values.dtype == np.uint8:
        raise InputError(f"{path}: 8 bits a pixel, which are a picture of depths; the 16-bit file is needed")
    depth = (values.astype(np.float64) / per_metre).astype(np.float32)
    depth[np.isin(values, invalid)] = 0
    return depth


def _pixels(path: Path, what: str) -> np.ndarray:
    """The single channel of an image file, [H, W], as it is stored."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image)
    except FileNotFoundError:
        raise InputError(f"{path}: not there; every image needs its file {what}") from None
    except Exception as error:  # decoders raise anything
        raise InputError(f"{path}: not readable as an image {what} ({_one_line(error)})") from None
    if pixels.ndim != 2:
        raise InputError(f"{path}: a picture in colour; expected one channel {what}")
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
