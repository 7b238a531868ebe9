"""What a model of the task is worth on labelled images: accuracy, or mean intersection over union."""

import math
from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from proteus.data.dense import DenseSource, is_dense
from proteus.data.sources import Source
from proteus.errors import InputError
from proteus.evaluation.dense.measure import measure
from proteus.evaluation.dense.segmentation import predict_classes
from proteus.evaluation.dense_metrics import SegmentationMetric
from proteus.evaluation.extract import View, image_batches
from proteus.training.dense import square_views

Predict = Callable[[Tensor], Tensor]  # images [B, 3, S, S], uint8 or in [0, 1], to logits [B, K] or [B, K, h, w]


def task_score(predict: Predict, source: Source | DenseSource, view: View) -> float:
    """Accuracy or, where every pixel has a label, mIoU: a share in [0, 1], the same on every process.

    The images are shared out over the processes, and scored in float32. InputError where one cannot be read.
    """
    return mean_iou(predict, source, view) if is_dense(source) else accuracy(predict, source, view)  # type: ignore


@torch.no_grad()
def accuracy(predict: Predict, source: Source, view: View) -> float:
    """Share of images, under the plain view, whose most probable class is their label."""
    state = PartialState()
    assert source.labels is not None
    numbers = list(range(state.process_index, len(source), state.num_processes))
    batches = [numbers[first : first + view.batch_size] for first in range(0, len(numbers), view.batch_size)]
    right = torch.zeros((), dtype=torch.int64, device=state.device)
    unreadable: list[str] = []
    for batch, images in zip(batches, image_batches(source, view, batches, state.device), strict=True):
        if isinstance(images, InputError):
            unreadable.append(str(images))
            break
        labels = torch.from_numpy(source.labels[batch]).to(state.device)
        right += (predict(images.to(state.device, non_blocking=True)).argmax(1) == labels).sum()
    unreadable, counts = gather_object(unreadable), gather_object([int(right)])
    if unreadable:
        raise InputError(unreadable[0])
    return sum(counts) / len(source)


@torch.no_grad()
def mean_iou(predict: Predict, source: DenseSource, view: View) -> float:
    """mIoU at the images' own size; a window of S x S pixels slides over the image whose short side is S."""
    state, views = PartialState(), square_views(view.size)
    metric = SegmentationMetric(len(source.classes)).to(state.device)
    measure(
        lambda image: predict_classes(predict, image, views),
        source,
        metric,
        lambda *_: None,
        "segmentation",
        accelerator=state,
        workers=view.workers,
        progress=False,
    )
    score = metric.compute().miou
    if math.isnan(score):
        raise InputError(f"no pixel of the {len(source)} images from {source.name(0)} on counts: every one is ignored")
    return score
