"""Heads of one layer, and what heads are made of. A head takes the Features of some blocks, all on one grid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from proteus.evaluation.dense.augment import resize
from proteus.models.features import Features


def as_map(features: Features) -> Tensor:
    """Patch tokens as a map [B, D, h, w]."""
    return features.patch.transpose(1, 2).unflatten(2, features.grid)


def with_class(features: Features) -> Tensor:
    """The map [B, 2D, h, w] of patch tokens, each with the class token behind it."""
    patches = as_map(features)
    return torch.cat([patches, features.cls[:, :, None, None].expand_as(patches)], dim=1)


class LinearSegmentation(nn.Module):
    """The blocks' tokens side by side to logits [B, classes, h, w]: a 1 x 1 convolution, after BatchNorm or without."""

    def __init__(self, width: int, classes: int, batch_norm: bool):
        super().__init__()
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.classify = classifier(width, classes)

    def forward(self, features: Sequence[Features]) -> Tensor:
        return self.classify(self.norm(torch.cat([as_map(part) for part in features], dim=1)))


class BinsDepth(nn.Module):
    """DINOv2's linear depth head: metres [B, 1, 4h, 4w], a mean over bins of depth that are evenly spaced.

    The tokens of each block with its class token, upsampled, go through a 1 x 1 convolution to one logit a bin; bin
    weights are relu(logit) + 0.1 over their sum. Upsampling comes second here: its weights sum to 1, so it does not
    matter to the convolution, which has a sixteenth of the work.
    """

    sums: Tensor

    def __init__(self, width: int, bins: int, min_depth: float, max_depth: float, upsample: int):
        super().__init__()
        self.upsample = upsample
        self.classify = nn.Conv2d(width, bins, 1)
        depths = torch.linspace(min_depth, max_depth, bins)
        self.register_buffer("sums", torch.stack([depths, torch.ones(bins)]), persistent=False)  # [2, bins]

    def forward(self, features: Sequence[Features]) -> Tensor:
        logits = self.classify(torch.cat([with_class(part) for part in features], dim=1))  # [B, bins, h, w]
        height, width = features[0].grid
        weights = resize(logits, (height * self.upsample, width * self.upsample)).relu() + 0.1
        metres, total = (self.sums @ weights.flatten(2)).split(1, dim=1)  # [B, 1, 4h * 4w]
        return (metres / total).unflatten(2, weights.shape[-2:])


def classifier(width: int, outputs: int) -> nn.Conv2d:
    """The last 1 x 1 convolution of a head: weights N(0, 0.01), no bias at first."""
    conv = nn.Conv2d(width, outputs, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def conv(inputs: int, outputs: int, kernel: int, *, norm: bool = False, act: bool = False, bias: bool | None = None):
    """A convolution that keeps the size, then BatchNorm and ReLU where asked for; biased where there is no norm."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm if bias is None else bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return nn.Sequential(layer, *([nn.BatchNorm2d(outputs)] if norm else []), *([nn.ReLU()] if act else []))
