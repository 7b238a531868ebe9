"""A small encoder, small sets, and processes that are threads."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from proteus.models import create_model


def process(rank, count, reduce=None):
    """What the probes see of an Accelerator. A real one would settle the precision of all tests that come after."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=count,
        process_index=rank,
        is_main_process=rank == 0,
        reduce=reduce,
    )


@pytest.fixture(scope="session")
def accelerator():
    return process(0, 1)


@pytest.fixture(scope="session")
def encoder():
    """Two blocks of width 32 on 4 x 4 patches of 16 x 16 pixels; random weights, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_model(
            "timm/vit_tiny_patch16_224", patch_size=4, embed_dim=32, depth=2, num_heads=2, image_size=16
        ).eval()


class Colours:
    """Images of one noisy colour each; what a class is survives any crop and flip."""

    def __init__(self, count, seed, classes=5):
        rng = np.random.default_rng(seed)
        self.classes = [f"colour {i}" for i in range(classes)]
        self.labels = rng.integers(0, classes, count)
        centres = np.random.default_rng(0).uniform(60, 190, (classes, 3))
        mean = centres[self.labels] + 18 * rng.normal(size=(count, 3))
        self._pixels = (mean[:, None, None] + 8 * rng.normal(size=(count, 20, 20, 3))).clip(0, 255).astype(np.uint8)

    def __len__(self):
        return len(self.labels)

    def load(self, index):
        return Image.fromarray(self._pixels[index])

    def name(self, index):
        return f"{self._pixels[index].mean()} {index}"


@pytest.fixture(scope="session")
def colours():
    """60 images to train on and 40 others, of five classes."""
    return Colours(60, seed=1), Colours(40, seed=2)


class Processes:
    """W processes in lockstep, as threads of which one runs at a time: they swap places where they reduce."""

    def __init__(self, count):
        self.count, self.turn = count, threading.Lock()
        self.barrier = threading.Barrier(count, timeout=60)
        self.parts = [None] * count

    def _reduce(self, rank, tensor, reduction):
        assert reduction == "sum"
        self.parts[rank] = tensor
        self.turn.release()
        self.barrier.wait()
        total = sum(part.clone() for part in self.parts)
        self.barrier.wait()  # nobody writes before all have read
        self.turn.acquire()
        return total

    def run(self, function):
        """What `function` of an accelerator returns in each process."""
        results = [None] * self.count

        def one(rank):
            accelerator = process(rank, self.count, lambda tensor, reduction: self._reduce(rank, tensor, reduction))
            with self.turn:
                try:
                    results[rank] = function(accelerator)
                except BaseException as error:
                    self.barrier.abort()
                    results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


@pytest.fixture
def processes():
    return Processes
