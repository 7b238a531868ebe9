"""A trained head on the test images, shared out over the processes, the same for classes and depths."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from proteus.data.dense import DenseSource
from proteus.errors import InputError, UnreadableError
from proteus.evaluation.dense.data import whole_images

SHOWN = 4  # test images that are kept to be looked at

E = TypeVar("E")


def measure(
    predict: Callable[[Tensor], Tensor],
    source: DenseSource,
    metric: Metric,
    example: Callable[[np.ndarray, np.ndarray, Tensor], E],
    name: str,
    *,
    accelerator: Accelerator,
    workers: int,
    progress: bool,
) -> list[E]:
    """Update the metric with this process's images, and return examples of the first ones, the same on every process.

    predict: a map [H, W] of an image [3, H, W] in [0, 1], on the device.
    example: of an image [H, W, 3] uint8, its target [H, W] and the map, on the CPU.
    """
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    kept: list[tuple[int, E]] = []
    show = progress and accelerator.is_main_process
    images = whole_images(source, rank, processes, workers)
    total = len(range(rank, len(source), processes))
    for number, image, target in tqdm(
        images, total=total, desc=f"{name} test", unit="image", disable=None if show else True
    ):
        prediction = predict(image.to(device).float() / 255)
        try:
            metric.update(prediction[None], target.to(device)[None])
        except InputError as error:  # which the other processes do not meet
            raise UnreadableError(f"{source.name(number)}: {error}") from None
        if number < SHOWN:
            kept.append((number, example(image.permute(1, 2, 0).numpy(), target.numpy(), prediction.cpu())))
    return [one for _, one in sorted(gather_object(kept), key=lambda pair: pair[0])]
