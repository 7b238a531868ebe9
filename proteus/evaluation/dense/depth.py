"""Monocular depth: train a head, then the mean errors of the test images."""

from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from proteus.data.dense import DenseSource
from proteus.data.transforms import seeded
from proteus.evaluation.dense.augment import DepthView, resize
from proteus.evaluation.dense.backbone import build_backbone
from proteus.evaluation.dense.data import check_sources
from proteus.evaluation.dense.dpt import Dpt
from proteus.evaluation.dense.heads import BinsDepth
from proteus.evaluation.dense.inference import Predict, views
from proteus.evaluation.dense.losses import gradient_loss, sig_loss, silog_loss
from proteus.evaluation.dense.measure import measure
from proteus.evaluation.dense.presets import DepthPreset
from proteus.evaluation.dense.train import Loss, Network, train
from proteus.evaluation.dense_metrics import DepthMetric
from proteus.models.encoder import Encoder


class DepthExample(NamedTuple):
    """A test image: image [H, W, 3] uint8; target (0: no reading) and prediction [H, W] float32, metres."""

    image: np.ndarray
    target: np.ndarray
    prediction: np.ndarray


class DepthResult(NamedTuple):
    """Means over images, as of `DepthScores`; what to warn of; the first test images."""

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
    warnings: list[str]
    predictions: list[DepthExample]


def depth(
    encoder: Encoder,
    train_set: DenseSource,
    test_set: DenseSource,
    preset: DepthPreset,
    *,
    accelerator: Accelerator,
    seed: int = 0,
    workers: int = 0,
    progress: bool = True,
) -> DepthResult:
    """Train a depth head by the preset and measure it on `test_set`, at the size of its targets.

    The encoder comes back as it was, but for its device; a preset that fine-tunes trains a copy.
    `accelerator` has no mixed precision of its own. Every process gets the same result. The protocols report the best
    of several checkpoints on the test set; this is the last. InputError where an image does not fit its target, or the
    crop of the metric; RunError where hardly a gradient is finite.
    """
    check_sources(train_set, test_set, dense=False)
    mode = encoder.training
    try:
        backbone = build_backbone(encoder, preset, accelerator.device)
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        # The caller's generators stay where they are.
        with seeded(seed), torch.random.fork_rng(devices):
            head = build_head(preset, backbone.encoder.embed_dim, len(backbone.layers))
            network = Network(backbone, head, preset, accelerator)
            view = DepthView(preset, encoder.mean)
            warnings = train(network, build_loss(preset), train_set, view, preset, accelerator, seed, workers, progress)
        metric = DepthMetric(preset.min_depth, preset.max_depth, preset.crop_metric, preset.clamp)
        metric = metric.to(accelerator.device)
        examples = measure(
            lambda image: predict_depth(network, image, preset),
            test_set,
            metric,
            lambda image, target, prediction: DepthExample(image, target, prediction.numpy()),
            preset.name,
            accelerator=accelerator,
            workers=workers,
            progress=progress,
        )
    finally:
        encoder.train(mode)
    scores = metric.compute()
    if scores.left_out:
        warnings = [*warnings, f"{preset.name}: {scores.left_out} test images have no valid depth and are left out"]
    return DepthResult(*scores, warnings, examples)


def build_head(preset: DepthPreset, width: int, layers: int) -> nn.Module:
    """The preset's head for the tokens of so many blocks."""
    if preset.head == "bins":
        return BinsDepth(2 * width * layers, preset.bins, preset.min_depth, preset.max_depth, preset.upsample)
    proteus = preset.head == "dpt-bn"
    return Dpt(width, preset.channels, proteus=proteus, dropout=preset.dropout, min_depth=preset.min_depth)


def build_loss(preset: DepthPreset) -> Loss:
    """The preset's loss of a depth map, upsampled to its target."""

    def loss(output: Tensor, target: Tensor, step: int) -> Tensor:
        predicted = resize(output.float(), (target.shape[-2], target.shape[-1]))[:, 0]  # [B, H, W]
        if preset.loss == "silog":
            value = silog_loss(predicted, target)
        else:
            value = sig_loss(predicted, target, mean_only=step < preset.sig_warmup)
        if preset.gradient_weight:
            value = value + preset.gradient_weight * gradient_loss(predicted, target)
        return value

    return loss


@torch.no_grad()
def predict_depth(predict: Predict, image: Tensor, preset: DepthPreset) -> Tensor:
    """Metres [H, W] of an image [3, H, W] in [0, 1]."""

    def bounded(images: Tensor) -> Tensor:
        metres = predict(images)
        return metres.clamp(preset.min_depth, preset.max_depth) if preset.clamp else metres

    size = image.shape[-2], image.shape[-1]
    each = [resize(metres[None], size)[0, 0] for metres in views(bounded, image, preset)]
    return torch.stack(each).mean(0)
