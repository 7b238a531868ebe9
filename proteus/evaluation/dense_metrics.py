"""The figures of semantic segmentation and depth estimation, gathered image by image on the device.

Each process updates with its own images; `compute` sums over the processes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassConfusionMatrix

from proteus.errors import InputError

IGNORE = 255  # of a segmentation target


class SegmentationScores(NamedTuple):
    """Shares in [0, 1]; NaN where there is nothing to divide by.

    miou:           mean of `iou` over the classes that are predicted or in the targets.
    pixel_accuracy: of all pixels.
    class_accuracy: mean over the classes that are in the targets.
    iou:            of each class; NaN of one that is neither predicted nor in the targets.
    """

    miou: float
    pixel_accuracy: float
    class_accuracy: float
    iou: list[float]


class SegmentationMetric(MulticlassConfusionMatrix):
    """mIoU as of ADE20K: intersections and unions summed over all images, then divided. Pixels of 255 are ignored."""

    def __init__(self, classes: int):
        super().__init__(classes, ignore_index=IGNORE, validate_args=False)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count class numbers [...] against those of targets [...]; InputError where one is none of the classes."""
        if predictions.shape != targets.shape:
            raise ValueError(f"predictions are {list(predictions.shape)}, targets {list(targets.shape)}")
        known = (targets < self.num_classes) | (targets == IGNORE)
        if not bool(known.all()):  # waits for the device, as counting does
            wrong = int(targets[~known][0])
            raise InputError(f"a segmentation target holds class {wrong}; there are 0 to {self.num_classes - 1}")
        super().update(predictions, targets)

    def compute(self) -> SegmentationScores:  # type: ignore[override]
        """The scores of all images of all processes."""
        matrix = super().compute().double()  # [target, prediction]
        hit, target, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou, recall = hit / (target + predicted - hit), hit / target  # 0 / 0 is NaN, and left out
        return SegmentationScores(
            iou.nanmean().item(), (hit.sum() / target.sum()).item(), recall.nanmean().item(), iou.tolist()
        )


class Crop(NamedTuple):
    """Rows top:bottom and columns left:right of images of height x width pixels."""

    top: int
    bottom: int
    left: int
    right: int
    height: int
    width: int


EIGEN_CROP = Crop(45, 471, 41, 601, 480, 640)  # of NYU-Depth V2


class DepthScores(NamedTuple):
    """Means over images of what each scores on its own valid pixels. p: prediction, d: target, g = ln p - ln d.

    rmse:     sqrt(mean (p - d)^2), in metres.        abs_rel: mean |p - d| / d.      sq_rel: mean (p - d)^2 / d.
    rmse_log: sqrt(mean g^2).                         log10:   mean |g| / ln 10.
    silog:    sqrt(mean g^2 - 0.5 (mean g)^2).        delta:   share of max(p / d, d / p) < 1.25, 1.25^2, 1.25^3.
    images:   how many images the means are over.     left_out: how many had no valid pixel.
    """

    rmse: float
    abs_rel: float
    sq_rel: float
    rmse_log: float
    log10: float
    silog: float
    delta1: float
    delta2: float
    delta3: float
    images: int
    left_out: int


class DepthMetric(Metric):
    """The nine figures of Eigen et al. (2014), averaged over images and not over pixels.

    Valid are pixels with min_depth < target < max_depth, inside `crop` where there is one. clamp: predictions are first
    brought into [min_depth, max_depth], as DINOv2's toolbox does; without it a prediction of 0 or less makes the
    logarithmic figures NaN, and counts against the deltas.
    """

    full_state_update = False
    sums: Tensor  # [9]
    counts: Tensor  # [2], images used and left out

    def __init__(
        self, min_depth: float = 1e-3, max_depth: float = 10.0, crop: Crop | None = EIGEN_CROP, clamp: bool = True
    ):
        super().__init__()
        self.min_depth, self.max_depth, self.crop, self.clamp = min_depth, max_depth, crop, clamp
        self.add_state("sums", torch.zeros(9, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add images: metres [B, H, W], predictions already at the size of the targets, in which 0 is no reading."""
        if predictions.shape != targets.shape or predictions.ndim != 3:
            raise ValueError(f"predictions are {list(predictions.shape)}, targets {list(targets.shape)}, not [B, H, W]")
        if self.crop is not None:
            top, bottom, left, right, *size = self.crop
            if list(targets.shape[1:]) != size:
                raise InputError(f"depth: the crop is of {size[0]} x {size[1]} pixels, not {list(targets.shape[1:])}")
            predictions, targets = (x[:, top:bottom, left:right] for x in (predictions, targets))
        p, d = predictions.double().flatten(1), targets.double().flatten(1)  # [B, pixels]
        if self.clamp:
            p = p.clamp(self.min_depth, self.max_depth)
        valid = (d > self.min_depth) & (d < self.max_depth)
        count = valid.sum(1)  # [B]
        d = torch.where(valid, d, 1.0)
        p = torch.where(valid, p, 1.0)

        def mean(values: Tensor) -> Tensor:
            return torch.where(valid, values, 0.0).sum(1) / count  # [B]

        error, g = p - d, p.log() - d.log()
        log_square = mean(g**2)
        # Of a negative prediction both ratios are negative, and it would pass for a near one.
        ratio = torch.where(p > 0, torch.maximum(p / d, d / p), torch.inf)
        figures = [
            mean(error**2).sqrt(),
            mean(error.abs() / d),
            mean(error**2 / d),
            log_square.sqrt(),
            mean(g.abs()) / math.log(10),
            (log_square - 0.5 * mean(g) ** 2).sqrt(),
            *(mean((ratio < 1.25**power).double()) for power in (1, 2, 3)),
        ]
        used = count > 0
        self.sums += torch.where(used[:, None], torch.stack(figures, dim=1), 0.0).sum(0)
        self.counts += torch.stack([used.sum(), (~used).sum()])

    def compute(self) -> DepthScores:
        """The scores of all images of all processes; NaN without any."""
        means = (self.sums / self.counts[0]).tolist()  # 0 / 0 is NaN
        return DepthScores(*means, *self.counts.tolist())
