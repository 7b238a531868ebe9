"""DPT heads for depth (Ranftl et al., 2021): DINOv2's, and the one of Proteus's depth results."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from proteus.evaluation.dense.augment import resize
from proteus.evaluation.dense.heads import as_map, classifier, conv
from proteus.evaluation.dense.upernet import size_of
from proteus.models.features import Features


class Dpt(nn.Module):
    """Four blocks' tokens to metres [B, 1, H, W]. In both heads the class token is projected into the patches.

    proteus False: no BatchNorm, three convolutions with an upsampling between them; depth = relu(x) + min_depth, at 16
    times the grid.
    proteus True:  BatchNorm in the residual units, dropout and one convolution; depth is what comes out, of either
    sign, at 8 times the grid.
    """

    def __init__(self, width: int, channels: int, *, proteus: bool, dropout: float, min_depth: float):
        super().__init__()
        self.proteus, self.min_depth = proteus, min_depth
        self.reassemble = Reassemble(width, channels)
        self.fusions = nn.ModuleList(Fusion(channels, norm=proteus, first=i == 0) for i in range(4))
        self.project = conv(channels, channels, 3, norm=proteus, act=True)
        self.predict: nn.Module
        if proteus:
            self.predict = nn.Sequential(nn.Dropout2d(dropout), classifier(channels, 1))
        else:
            self.predict = nn.Sequential(
                nn.Conv2d(channels, channels // 2, 3, padding=1),
                nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                nn.Conv2d(channels // 2, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 1, 1),
            )

    def forward(self, features: Sequence[Features]) -> Tensor:
        maps = self.reassemble(features)
        x = self.fusions[0](maps[3])
        for fusion, skip in zip(self.fusions[1:], maps[2::-1], strict=True):
            x = fusion(x, skip)
        x = self.predict(self.project(x))
        return x if self.proteus else x.relu() + self.min_depth


class Reassemble(nn.Module):
    """Four blocks' tokens to maps of `channels` at 4, 2, 1 and 1/2 times the grid, by way of D/8, D/4, D/2 and D."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        widths = [width // 8, width // 4, width // 2, width]
        self.readouts = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.GELU()) for _ in range(4))
        self.projects = nn.ModuleList(conv(width, w, 1) for w in widths)
        self.scales = nn.ModuleList(
            [
                nn.ConvTranspose2d(widths[0], widths[0], 4, stride=4),
                nn.ConvTranspose2d(widths[1], widths[1], 2, stride=2),
                nn.Identity(),
                nn.Conv2d(widths[3], widths[3], 3, stride=2, padding=1),
            ]
        )
        self.widen = nn.ModuleList(conv(w, channels, 3, bias=False) for w in widths)

    def forward(self, features: Sequence[Features]) -> list[Tensor]:
        maps = []
        for i, part in enumerate(features):
            both = torch.cat([part.patch, part.cls[:, None].expand_as(part.patch)], dim=-1)  # [B, N, 2D]
            part = part._replace(patch=self.readouts[i](both))
            maps.append(self.widen[i](self.scales[i](self.projects[i](as_map(part)))))
        return maps


class Fusion(nn.Module):
    """A finer map added to what comes from the coarser ones, refined, doubled in size."""

    def __init__(self, channels: int, norm: bool, first: bool):
        super().__init__()
        self.enter = None if first else Residual(channels, norm)
        self.refine = Residual(channels, norm)
        self.grow = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.project = conv(channels, channels, 1)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.enter is not None and skip is not None:
            x = x + self.enter(resize(skip, size_of(x)))
        return self.project(self.grow(self.refine(x)))


class Residual(nn.Module):
    """A pre-activation residual unit."""

    def __init__(self, channels: int, norm: bool):
        super().__init__()
        first, second = (conv(channels, channels, 3, norm=norm, bias=False) for _ in range(2))
        self.layers = nn.Sequential(nn.ReLU(), first, nn.ReLU(), second)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)
