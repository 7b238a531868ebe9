"""Semantic segmentation: train a head, then mIoU over the test set."""

from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from proteus.data.dense import DenseSource
from proteus.data.transforms import seeded
from proteus.evaluation.dense.augment import SegmentationView, resize
from proteus.evaluation.dense.backbone import build_backbone
from proteus.evaluation.dense.data import check_sources
from proteus.evaluation.dense.heads import LinearSegmentation
from proteus.evaluation.dense.inference import Predict, views
from proteus.evaluation.dense.losses import cross_entropy
from proteus.evaluation.dense.measure import measure
from proteus.evaluation.dense.presets import SegmentationPreset
from proteus.evaluation.dense.train import Loss, Network, train
from proteus.evaluation.dense.upernet import Logits, UperNet
from proteus.evaluation.dense_metrics import SegmentationMetric
from proteus.models.encoder import Encoder


class SegmentationExample(NamedTuple):
    """A test image: image [H, W, 3], target and prediction [H, W], all uint8; 255 in the target counts nowhere."""

    image: np.ndarray
    target: np.ndarray
    prediction: np.ndarray


class SegmentationResult(NamedTuple):
    """Shares in [0, 1], as of `SegmentationScores`; what to warn of; the first test images."""

    miou: float
    pixel_accuracy: float
    class_accuracy: float
    iou: list[float]
    warnings: list[str]
    predictions: list[SegmentationExample]


def segmentation(
    encoder: Encoder,
    train_set: DenseSource,
    test_set: DenseSource,
    preset: SegmentationPreset,
    *,
    accelerator: Accelerator,
    seed: int = 0,
    workers: int = 0,
    progress: bool = True,
) -> SegmentationResult:
    """Train a head for the classes of `train_set` by the preset, and measure it on `test_set` at full size.

    The encoder comes back as it was, but for its device; a preset that fine-tunes trains a copy.
    `accelerator` has no mixed precision of its own. Every process gets the same result. InputError where the sets do
    not fit each other, or an image does not fit its target; RunError where hardly a gradient is finite.
    """
    check_sources(train_set, test_set, dense=True)
    mode = encoder.training
    try:
        backbone = build_backbone(encoder, preset, accelerator.device)
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        # The caller's generators stay where they are.
        with seeded(seed), torch.random.fork_rng(devices):
            head = build_head(preset, backbone.encoder.embed_dim, len(backbone.layers), len(train_set.classes))
            network = Network(backbone, head, preset, accelerator)
            view = SegmentationView(preset, encoder.mean)
            warnings = train(network, build_loss(preset), train_set, view, preset, accelerator, seed, workers, progress)
        metric = SegmentationMetric(len(test_set.classes)).to(accelerator.device)
        examples = measure(
            lambda image: predict_classes(network, image, preset),
            test_set,
            metric,
            lambda image, target, prediction: SegmentationExample(image, target, prediction.byte().numpy()),
            preset.name,
            accelerator=accelerator,
            workers=workers,
            progress=progress,
        )
    finally:
        encoder.train(mode)
    return SegmentationResult(*metric.compute(), warnings, examples)


def build_head(preset: SegmentationPreset, width: int, layers: int, classes: int) -> nn.Module:
    """The preset's head for the tokens of so many blocks."""
    if preset.head == "upernet":
        return UperNet(width, classes, preset.dropout)
    return LinearSegmentation(width * layers, classes, batch_norm=preset.head == "bn")


def build_loss(preset: SegmentationPreset) -> Loss:
    """Cross-entropy, and that of the auxiliary head where there is one."""

    def loss(output: Tensor | Logits, target: Tensor, _: int) -> Tensor:
        if not isinstance(output, Logits):
            return cross_entropy(output, target)
        return cross_entropy(output.main, target) + preset.auxiliary * cross_entropy(output.auxiliary, target)

    return loss


@torch.no_grad()
def predict_classes(predict: Predict, image: Tensor, preset: SegmentationPreset) -> Tensor:
    """Classes [H, W] of an image [3, H, W] in [0, 1]."""
    size = image.shape[-2], image.shape[-1]
    several = preset.flip or len(preset.ratios) > 1
    total: Any = 0
    for logits in views(predict, image, preset, preset.ratios):
        logits = resize(logits[None], size)[0]  # [classes, H, W]
        total = total + (logits.softmax(0) if several else logits)
    return total.argmax(0)
