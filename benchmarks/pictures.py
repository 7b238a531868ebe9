"""What a dense head predicts, beside the image and the truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from PIL import Image

from benchmarks.result import Picture
from proteus.data.dense import IGNORE
from proteus.evaluation.dense.depth import DepthExample
from proteus.evaluation.dense.segmentation import SegmentationExample

HEIGHT, GAP = 160, 4  # pixels


def draw(examples: Sequence[SegmentationExample] | Sequence[DepthExample], title: str, path: Path) -> list[Picture]:
    """One PNG of rows (image, target, prediction); its name is relative to the folder of all results."""
    if not examples:
        return []
    rows = [_row(example) for example in examples]
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Image.fromarray(np.concatenate(padded)).save(path)
    file = path.relative_to(path.parent.parent.parent)
    return [Picture(title=f"{title}: image, target, prediction", file=str(file))]


def _row(example: SegmentationExample | DepthExample) -> np.ndarray:
    """[H, W, 3] uint8: three panels of equal height."""
    if isinstance(example, SegmentationExample):
        parts = [_classes(example.target), _classes(example.prediction)]
    else:
        known = example.target[example.target > 0]
        near, far = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        parts = [_depth(depth, near, far) for depth in (example.target, example.prediction)]
    gap = np.full((HEIGHT, GAP, 3), 255, np.uint8)
    panels = [_scaled(example.image, smooth=True), *(_scaled(part, smooth=False) for part in parts)]
    return np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)


def _scaled(pixels: np.ndarray, smooth: bool) -> np.ndarray:
    height, width = pixels.shape[:2]
    size = max(1, round(width * HEIGHT / height)), HEIGHT
    return np.asarray(
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
    )


def _classes(classes: np.ndarray) -> np.ndarray:
    """A colour a class; what counts nowhere is black."""
    palette = (255 * colormaps["tab20"](np.arange(256) * 7 % 20)[:, :3]).astype(np.uint8)
    palette[IGNORE] = 0
    return palette[classes]


def _depth(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Near is bright, far is dark; where there is no reading it is black."""
    share = ((depth - near) / max(far - near, 1e-6)).clip(0, 1)
    pixels = (255 * colormaps["magma_r"](share)[..., :3]).astype(np.uint8)
    pixels[depth <= 0] = 0
    return pixels
