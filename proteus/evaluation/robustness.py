"""The head of the linear probe on other test sets of ImageNet's classes, unchanged: no training, no choice."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from proteus.data.sources import Source, Subset
from proteus.errors import InputError
from proteus.evaluation.extract import View
from proteus.evaluation.linear_head import LinearHead, class_subset, classify
from proteus.evaluation.metrics import SEVERITIES, accuracy, real_accuracy
from proteus.models.encoder import Encoder


def predict(
    encoder: Encoder,
    head: LinearHead,
    source: Source,
    accelerator: Accelerator,
    view: View,
) -> np.ndarray:
    """Predictions [n], numbers in `source.classes`: of the head's classes only the set's compete, matched by name.

    Every process gets all of them. InputError where the head does not know a class, or an image cannot be read.
    """
    subset = torch.from_numpy(class_subset(head.classes, source.classes)).to(accelerator.device)
    encoder, head = encoder.to(accelerator.device).eval(), head.to(accelerator.device)

    def answer(images: Tensor) -> Tensor:
        return head.logits(encoder, images)[:, subset].argmax(dim=1, keepdim=True)  # [B, 1]

    return classify(source, view, accelerator, answer, 1)[:, 0]


def top1(
    encoder: Encoder,
    head: LinearHead,
    source: Source,
    accelerator: Accelerator,
    view: View,
) -> float:
    """Share of a set's images that are classified right: ImageNet-Sketch and -V2, and -A and -R with their classes."""
    if source.labels is None:
        raise InputError("robustness: the set has no labels")
    return accuracy(predict(encoder, head, source, accelerator, view), source.labels)


def real_top1(
    encoder: Encoder,
    head: LinearHead,
    source: Source,
    label_sets: Sequence[Collection[int]],
    accelerator: Accelerator,
    view: View,
) -> float:
    """Share of ImageNet-ReaL: the prediction is among the image's labels, numbers in `source.classes`.

    Images without a label are not classified. InputError where there is not one set of labels for every image.
    """
    if len(label_sets) != len(source):
        raise InputError(f"ReaL: {len(label_sets)} sets of labels for {len(source)} images")
    known = np.array([i for i, labels in enumerate(label_sets) if len(labels)], dtype=np.int64)
    predictions = predict(encoder, head, Subset(source, known), accelerator, view)
    return real_accuracy(predictions, [label_sets[i] for i in known])


def corruption_errors(
    encoder: Encoder,
    head: LinearHead,
    open_set: Callable[[str, int], Source],
    corruptions: Sequence[str],
    accelerator: Accelerator,
    view: View,
) -> dict[str, list[float]]:
    """By corruption the share of wrong predictions at severities 1 to 5, of the sets that `open_set` opens one by one.

    `mean_corruption_error` makes ImageNet-C's mCE of them. Its images are crops of 224 already: crop 1 takes them as
    they are (whether DINOv2 resized them is not known).
    """
    return {
        name: [
            1 - top1(encoder, head, open_set(name, severity), accelerator, view)
            for severity in range(1, SEVERITIES + 1)
        ]
        for name in corruptions
    }
