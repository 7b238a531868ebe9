"""From draws to batches: decoding, augmenting, masking, and what happens to an image that cannot be read."""

from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from proteus.data.dense import DenseSource
from proteus.data.sampler import Draw, Sampler
from proteus.data.sources import Source, one_line
from proteus.data.transforms import (
    Box,
    EvalTransform,
    TrainTransform,
    View,
    fill_boxes,
    generators_kept,
    seed_generators,
)
from proteus.data.workers import TIMEOUT, load_batches, note
from proteus.errors import UnreadableError

if TYPE_CHECKING:
    from proteus.data.device_augment import Op
    from proteus.data.view_cache import ViewCache

PREFETCH = 4  # batches that a worker keeps ready
TRIES = 100  # images tried in a row before a batch is given up


class Batch(NamedTuple):
    """What a process sees in a micro-batch.

    images:  [B, 3, S, S] uint8.
    mask:    [M, N] bool, of the first M images.
    labels:  [B] int64, or None.
    boxes:   (row, box) of the images that are erased after normalisation.
    bad:     indices of images that could not be read and were replaced by others.
    targets: [B, R] uint8, rows of the teacher cache, or None.
    ops:     operations of RandAugment left to the device, a list for each image; empty where there are none.
    """

    images: Tensor
    mask: Tensor
    labels: Tensor | None
    boxes: list[tuple[int, Box]]
    bad: list[int]
    targets: Tensor | None = None
    ops: "Sequence[list[Op]]" = ()

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, images as float in [0, 1], augmented, with their boxes filled."""
        images = self.images.to(device, non_blocking=True)
        if self.ops:
            from proteus.data.device_augment import apply_ops

            images = apply_ops(images.contiguous(), self.ops)
        images = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        images = fill_boxes(images, self.boxes)
        mask = self.mask.to(device, non_blocking=True)
        labels, targets = (
            None if tensor is None else tensor.to(device, non_blocking=True) for tensor in (self.labels, self.targets)
        )
        return Batch(images, mask, labels, [], self.bad, targets)


class TrainingSet(Dataset):
    """Turns the draws of a micro-batch into a Batch. Crop, augmentation, erasing and mask depend on the draw alone.

    views: fixed views of each image, whose targets are known; the draw says which of them, and the mask.
    """

    def __init__(
        self,
        source: Source,
        transform: TrainTransform,
        seed: int,
        patches: int,
        mask_ratio: float,
        views: "ViewCache | None" = None,
    ):
        self.source, self.transform, self.seed, self.views = source, transform, seed, views
        self.patches, self.masked_patches = patches, count_masked(patches, mask_ratio)

    def __getitems__(self, draws: list[Draw]) -> "Batch | UnreadableError":
        try:
            return self.batch(draws)
        except UnreadableError as error:  # handed over, not raised: a worker would wrap it in its traceback
            return error

    def batch(self, draws: list[Draw]) -> Batch:
        """The Batch of some draws; UnreadableError where too many images in a row cannot be read."""
        images, masks, labels, boxes, targets, ops = [], [], [], [], [], []
        bad: list[int] = []
        with generators_kept():
            for row, (index, epoch, position, masked) in enumerate(draws):
                image, index = readable(self.source, index, bad)
                view, target = self.view(image, index, epoch, position)
                images.append(view.pixels.permute(1, 2, 0))
                ops.append(view.ops)
                if target is not None:
                    targets.append(target)
                if view.box is not None:
                    boxes.append((row, view.box))
                if masked:
                    masks.append(self.mask(epoch, position))
                if self.source.labels is not None:
                    labels.append(int(self.source.labels[index]))
        return Batch(
            torch.stack(images).permute(0, 3, 1, 2),  # channels last in memory: a worker need not move them apart
            torch.stack(masks) if masks else torch.zeros(0, self.patches, dtype=torch.bool),
            torch.tensor(labels) if labels else None,
            boxes,
            bad,
            torch.stack(targets) if targets else None,
            ops if any(ops) else (),
        )

    def view(self, image: Image.Image, index: int, epoch: int, position: int) -> tuple[View, Tensor | None]:
        """The view of a place, and where there is a teacher cache its target [R] uint8. Seeds the generators."""
        if self.views is None:
            seed_generators(self.seed, epoch, position)
            return self.transform(image), None
        k = self.views.view(index, epoch, position)
        record = self.views.read(index, k)
        seed_generators(*self.views.key(index, k))
        view = self.transform(image, record.crop)
        self.views.check(record, view, self.source.name(index))
        return view, torch.frombuffer(bytearray(record.target), dtype=torch.uint8)

    def mask(self, epoch: int, position: int) -> Tensor:
        """[N] bool: exactly floor(N * ratio) patches, uniformly chosen."""
        chosen = np.random.default_rng((self.seed, epoch, position, 1)).permutation(self.patches)[: self.masked_patches]
        mask = torch.zeros(self.patches, dtype=torch.bool)
        mask[torch.from_numpy(chosen)] = True
        return mask


def readable(source: Source | DenseSource, index: int, bad: list[int], first: int = 0) -> tuple[Image.Image, int]:
    """Image `index`, or the next one from `first` on that can be read; those that cannot are added to `bad`."""
    count = len(source) - first
    for step in range(min(TRIES, count)):
        candidate = first + (index - first + step) % count
        note(candidate)
        try:
            return source.load(candidate), candidate
        except Exception:  # a decoder of a broken file may raise anything
            bad.append(candidate)
    raise UnreadableError(
        f"data: {len(bad)} images in a row cannot be read, from {one_line(source.name(index))} on; see to the storage"
    )


def count_masked(patches: int, ratio: float) -> int:
    """Masked patches of a masked image: floor(N * ratio), where 100 * 0.29 is 29."""
    return int(patches * ratio + 1e-9)


def training_batches(
    dataset: Dataset, sampler: Sampler, start: int, stop: int, rank: int, workers: int, timeout: float = TIMEOUT
) -> Generator[Batch, None, None]:
    """The micro-batches of process `rank` from update `start` to `stop`, in order, loaded by `workers` processes.

    UnreadableError where nothing can be read; WorkerError where the workers die again and again, or give no batch for
    `timeout` seconds.
    """

    def remaining(done: int) -> Iterator[list[Draw]]:
        step, micro = divmod(done, sampler.accumulate)
        return islice(sampler.run(start + step, stop, rank), micro, None)

    pin = torch.cuda.is_available()
    for batch in load_batches(dataset, remaining, workers, timeout=timeout, prefetch=PREFETCH, pin=pin):
        if isinstance(batch, UnreadableError):
            raise batch
        yield batch


class PlainSet(Dataset):
    """A source under the plain view, image by image: uint8 [3, S, S], or None where it cannot be read."""

    def __init__(self, source: Source, transform: EvalTransform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Tensor | None:
        note(index)
        try:
            image = self.source.load(index)
        except Exception:  # as above
            return None
        return self.transform(image)
