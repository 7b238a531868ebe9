"""UperNet on a plain transformer (Xiao et al., 2018, as mmsegmentation and BEiT build it)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from proteus.evaluation.dense.augment import resize
from proteus.evaluation.dense.heads import as_map, classifier, conv
from proteus.models.features import Features

POOLS = (1, 2, 3, 6)


class Logits(NamedTuple):
    """Main and auxiliary logits [B, classes, h, w] of a head in training."""

    main: Tensor
    auxiliary: Tensor


class UperNet(nn.Module):
    """Four blocks' tokens [B, N, D] to logits [B, classes, 4h, 4w]; in training to Logits."""

    def __init__(self, width: int, classes: int, dropout: float):
        super().__init__()
        self.neck = Neck(width)
        self.pools = nn.ModuleList(conv(width, width, 1, norm=True, act=True) for _ in POOLS)
        self.bottleneck = conv(width * (1 + len(POOLS)), width, 3, norm=True, act=True)
        self.laterals = nn.ModuleList(conv(width, width, 1, norm=True, act=True) for _ in range(3))
        self.smooths = nn.ModuleList(conv(width, width, 3, norm=True, act=True) for _ in range(3))
        self.fuse = conv(width * 4, width, 3, norm=True, act=True)
        self.classify = nn.Sequential(nn.Dropout2d(dropout), classifier(width, classes))
        self.auxiliary = nn.Sequential(
            conv(width, 256, 3, norm=True, act=True), nn.Dropout2d(dropout), classifier(256, classes)
        )

    def forward(self, features: Sequence[Features]) -> Tensor | Logits:
        maps = self.neck([as_map(part) for part in features])  # at 4, 2, 1 and 1/2 times the grid
        levels = [lateral(x) for lateral, x in zip(self.laterals, maps, strict=False)] + [self.pyramid(maps[3])]
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize(levels[i + 1], size_of(levels[i]))
        smooth = [layer(x) for layer, x in zip(self.smooths, levels, strict=False)] + [levels[3]]
        fused = self.fuse(torch.cat([resize(x, size_of(smooth[0])) for x in smooth], dim=1))
        logits = self.classify(fused)
        return Logits(logits, self.auxiliary(maps[2])) if self.training else logits

    def pyramid(self, x: Tensor) -> Tensor:
        """Pyramid pooling of the coarsest level [B, D, h/2, w/2]."""
        pooled = [
            resize(layer(F.adaptive_avg_pool2d(x, pool)), size_of(x))
            for pool, layer in zip(POOLS, self.pools, strict=True)
        ]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class Neck(nn.Module):
    """Four maps of one grid to a pyramid: times 4, 2, 1 and 1/2."""

    def __init__(self, width: int):
        super().__init__()
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, stride=2),
                ),
                nn.ConvTranspose2d(width, width, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2, stride=2),
            ]
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps, strict=True)]


def size_of(x: Tensor) -> tuple[int, int]:
    """(h, w) of a map."""
    return x.shape[-2], x.shape[-1]
