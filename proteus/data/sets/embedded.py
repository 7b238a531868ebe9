"""What needs no file: scikit-learn's digits, whole, corrupted or some of them only; and drawn scenes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from proteus.data.scenes import SceneSource
from proteus.data.sets.files import choose
from proteus.data.sources import DigitsSource, Source, Subset
from proteus.errors import InputError, nearest

SIDE = 16  # pixels at which a digit of 8 x 8 is corrupted
SEVERITIES = (1, 2, 3, 4, 5)
COUNTS = {"train": 160, "test": 80}  # scenes


def digits(
    root: Path | None,
    split: str,
    corruption: str | None = None,
    severity: int = 1,
    only: Sequence[int] | None = None,
) -> Source:
    """scikit-learn's digits. Splits train (1,347), test (450).

    corruption, severity: one of CORRUPTIONS, from 1 (mild) to 5, as ImageNet-C does to ImageNet.
    only: these digits alone, labelled 0, 1, ... in that order, as ImageNet-A and -R hold some of ImageNet's classes.
    """
    choose("digits", split, {"train": "train", "test": "test"})
    source: Source = DigitsSource(split)
    if only is not None:
        source = ClassSubset(source, only)
    return source if corruption is None else Corrupted(source, corruption, severity)


def scenes(root: Path | None, split: str, height: int = 32, width: int = 32) -> SceneSource:
    """Drawn scenes with 5 classes (`proteus.data.scenes`). Splits train (160), test (80)."""
    return SceneSource(int(choose("scenes", split, _AS_TEXT)), int(split == "test"), False, height, width)


def scenes_depth(root: Path | None, split: str, height: int = 32, width: int = 32) -> SceneSource:
    """Drawn scenes with depth, up to 9 m. Splits train (160), test (80)."""
    return SceneSource(int(choose("scenes-depth", split, _AS_TEXT)), int(split == "test"), True, height, width)


_AS_TEXT = {split: str(count) for split, count in COUNTS.items()}


class ClassSubset(Subset):
    """The images of some classes of a labelled source, labelled 0, 1, ... in the order in which those are given."""

    def __init__(self, source: Source, kept: Sequence[int]):
        if source.labels is None or not kept or not set(kept) <= set(range(len(source.classes))):
            raise InputError(f"digits: only={list(kept)}: expected some of 0 to {len(source.classes) - 1}")
        super().__init__(source, np.flatnonzero(np.isin(source.labels, kept)))
        number = {label: position for position, label in enumerate(kept)}
        self.labels = np.array([number[label] for label in source.labels[self.indices]], dtype=np.int64)
        self.classes = [source.classes[label] for label in kept]


class Corrupted:
    """A source whose images are SIDE x SIDE and corrupted; image i is corrupted in the same way each time."""

    def __init__(self, source: Source, corruption: str, severity: int):
        if corruption not in CORRUPTIONS:
            raise InputError(f"digits: no corruption {corruption!r}{nearest(corruption, CORRUPTIONS)}")
        if severity not in SEVERITIES:
            raise InputError(f"digits: severity={severity} is not one of {', '.join(map(str, SEVERITIES))}")
        self.source, self.labels, self.classes = source, source.labels, source.classes
        self.corruption, self.severity = corruption, severity

    def __len__(self) -> int:
        return len(self.source)

    def load(self, index: int) -> Image.Image:
        image = self.source.load(index).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        rng = np.random.default_rng((int(index), list(CORRUPTIONS).index(self.corruption)))  # alike at every severity
        return CORRUPTIONS[self.corruption](image, self.severity, rng)

    def name(self, index: int) -> str:
        return f"{self.source.name(index)} ({self.corruption} {self.severity})"


def _gaussian_noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    return _image(pixels + 255 * (0.1, 0.2, 0.3, 0.45, 0.6)[severity - 1] * rng.standard_normal(pixels.shape))


def _gaussian_blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur((0.8, 1.2, 1.6, 2.2, 3.0)[severity - 1]))


def _contrast(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float64)
    return _image((pixels - pixels.mean()) * (0.8, 0.65, 0.5, 0.4, 0.3)[severity - 1] + pixels.mean())


def _brightness(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    return _image(np.asarray(image, dtype=np.float64) + 255 * (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1])


def _occlusion(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    pixels, side = np.array(image), severity + 2
    top, left = (rng.random(2) * (SIDE - side + 1)).astype(int)
    pixels[top : top + side, left : left + side] = 255
    return _image(pixels)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


CORRUPTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "gaussian_noise": _gaussian_noise,
    "gaussian_blur": _gaussian_blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "occlusion": _occlusion,
}
