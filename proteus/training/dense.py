"""Labels for every pixel: batches of views of images and their targets."""

import numpy as np
import torch
from torch.utils.data import Dataset

from proteus.data.dense import IGNORE, DenseSource
from proteus.data.loader import Batch, readable
from proteus.data.sampler import Draw
from proteus.data.transforms import seeded
from proteus.errors import UnreadableError
from proteus.evaluation.dense.augment import SegmentationView
from proteus.evaluation.dense.data import read
from proteus.evaluation.dense.presets import UNBOUNDED, SegmentationPreset
from proteus.losses.logits import IGNORE_LABEL
from proteus.models.encoder import IMAGENET_MEAN


def square_views(size: int) -> SegmentationPreset:
    """How images of size x size pixels are cut for training and predicted by sliding windows.

    Scales, crops and colours are those of DINOv2's linear segmentation, its sizes in proportion.
    """
    return SegmentationPreset(
        name="segmentation",
        head="plain",
        layers="last",
        norm=True,
        crop=(size, size),
        short=size,
        long=4 * size,
        ratio_range=(0.5, 2.0),
        iterations=1,
        batch=1,
        lr=1.0,
        weight_decay=0.0,
        warmup=0,
        warmup_start=0.0,
        shifted=False,
        test_short=size,
        test_long=UNBOUNDED,
        window=(size, size),
        stride=(size * 2 // 3, size * 2 // 3),
    )


class DenseTrainingSet(Dataset):
    """Turns the draws of a micro-batch into a Batch with labels [B, S, S]. A view depends on its draw alone.

    A source may say, as `unlabelled_from`, which number its images without a target begin with.
    """

    def __init__(self, source: DenseSource, size: int, seed: int, patches: int):
        self.source, self.seed, self.patches = source, seed, patches
        self.view = SegmentationView(square_views(size), IMAGENET_MEAN)

    def __getitems__(self, draws: list[Draw]) -> Batch | UnreadableError:
        try:
            return self.batch(draws)
        except UnreadableError as error:  # handed over, not raised: a worker would wrap it in its traceback
            return error

    def batch(self, draws: list[Draw]) -> Batch:
        """The Batch of some draws; UnreadableError for a broken labelled one, of which there are few."""
        images, labels = [], []
        bad: list[int] = []
        for draw in draws:
            image, target = self._pair(draw.image, bad)
            with seeded(self.seed, draw.epoch, draw.position):
                pixels, seen = self.view(image, target)
            images.append((pixels * 255).round().byte())
            labels.append(torch.where(seen == IGNORE, IGNORE_LABEL, seen.long()))
        masks = torch.zeros(0, self.patches, dtype=torch.bool)
        return Batch(torch.stack(images), masks, torch.stack(labels), [], bad)

    def _pair(self, index: int, bad: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Image [H, W, 3] and target [H, W]; of the unlabelled ones the next that can be read."""
        first = getattr(self.source, "unlabelled_from", len(self.source))
        if index < first:
            return read(self.source, index)
        image, _ = readable(self.source, index, bad, first)
        return np.asarray(image), np.full((image.height, image.width), IGNORE, dtype=np.uint8)
