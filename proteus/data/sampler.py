"""Which image stands where: a pure function of (seed, epoch, position in the global batch).

No iterator state exists. A run that starts at any update step sees what it would have seen, with any number of
workers, and W processes of batch B see the global batches of one process of batch W * B.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


class Draw(NamedTuple):
    """One place of a batch: which image, and the key (epoch, position) of its crop, augmentation, erasing and mask."""

    image: int
    epoch: int
    position: int
    masked: bool


@dataclass(frozen=True)
class Sampler:
    """The data order of a run of `processes` processes with `batch_size` images each, `accumulate` times an update.

    A global micro-batch holds G = processes * batch_size images. Micro-batch a of update step s of an epoch covers
    positions p = (s * accumulate + a) * G + i; process r takes i = r, r + processes, ... The first
    floor(G * mask_probability) are masked, so masked images come first in every process.
    """

    size: int
    batch_size: int
    processes: int = 1
    accumulate: int = 1
    repeats: int = 1
    mask_probability: float = 0.0
    seed: int = 0

    @property
    def global_batch(self) -> int:
        """Images of a micro-batch over all processes."""
        return self.batch_size * self.processes

    @property
    def images_per_step(self) -> int:
        """Images of an update over all processes."""
        return self.global_batch * self.accumulate

    @property
    def steps_per_epoch(self) -> int:
        """Update steps of an epoch; a set smaller than one batch wraps."""
        return max(1, self.size // self.images_per_step)

    @property
    def masked(self) -> int:
        """Masked images of a global micro-batch."""
        return int(self.global_batch * self.mask_probability + 1e-9)  # 100 * 0.29 is 29

    def micro_batch(self, step: int, a: int, rank: int) -> list[Draw]:
        """What process `rank` sees in micro-batch `a` of update `step`, counted from the start of the run."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _permutation(self.size, self.seed, epoch)
        first = (step * self.accumulate + a) * self.global_batch
        return [
            Draw(int(order[(first + i) // self.repeats % self.size]), epoch, first + i, i < self.masked)
            for i in range(rank, self.global_batch, self.processes)
        ]

    def run(self, start: int, stop: int, rank: int) -> Iterator[list[Draw]]:
        """All micro-batches of a process from update `start` to `stop`."""
        for step in range(start, stop):
            for a in range(self.accumulate):
                yield self.micro_batch(step, a, rank)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
