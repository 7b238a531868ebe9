"""Frozen features of a set of images under the plain view."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from proteus.config import Share
from proteus.data.loader import PlainSet
from proteus.data.sources import Source
from proteus.data.transforms import EvalTransform
from proteus.data.workers import TIMEOUT, load_batches
from proteus.models.features import Features


class PlainImages(NamedTuple):
    """Images that could be read, [n, 3, S, S] uint8, and their labels [n] (None where the source has none)."""

    images: Tensor
    labels: np.ndarray | None


def load_images(source: Source, size: int, crop: Share, workers: int = 0, timeout: float = TIMEOUT) -> PlainImages:
    """A source under the plain view (`EvalTransform`), all in memory; what cannot be read is left out.

    WorkerError where the workers die again and again, or give no batch for `timeout` seconds.
    """
    plain, count, batch = PlainSet(source, EvalTransform(size, crop)), len(source), 64

    def numbers(done: int) -> Iterator[range]:
        return (range(first, min(first + batch, count)) for first in range(done * batch, count, batch))

    images = [image for batch in load_batches(plain, numbers, workers, timeout=timeout) for image in batch]
    readable = np.array([image is not None for image in images], dtype=bool)
    kept = [image for image in images if image is not None]
    stacked = torch.stack(kept) if kept else torch.zeros(0, 3, size, size, dtype=torch.uint8)
    return PlainImages(stacked, None if source.labels is None else source.labels[readable])


@torch.no_grad()
def class_tokens(encode: Callable[[Tensor], Features], images: Tensor, device: torch.device, batch: int = 64) -> Tensor:
    """Class tokens [n, D] float32 on the CPU of images [n, 3, S, S]."""
    return torch.cat([encode(part.to(device)).cls.float().cpu() for part in images.split(batch)])
