"""An encoder as a dense task uses it: any image size, some blocks' tokens."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from proteus.errors import InputError
from proteus.evaluation.dense.presets import Preset, layers_of
from proteus.models.encoder import Encoder
from proteus.models.features import Features
from proteus.models.vit import VitEncoder


class Backbone(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to the Features of some blocks, all of one width and one grid.

    An image that the patch does not divide is padded around with the encoder's mean, which is 0 after normalisation.
    A network without a class token gets the mean of its patch tokens for one.
    """

    mean: Tensor

    def __init__(self, encoder: Encoder, layers: Sequence[int], norm: bool, autocast: bool):
        super().__init__()
        self.encoder, self.layers, self.norm, self.autocast = encoder, list(layers), norm, autocast
        self.register_buffer("mean", torch.tensor(encoder.mean).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Features]:
        images = self.pad(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast and images.is_cuda):
            features = self.encoder.intermediate(images, self.layers, norm=self.norm)
        return [_in_float(part) for part in features]

    def pad(self, images: Tensor) -> Tensor:
        """Images in the middle of the next size that the patch divides (DINOv2's CenterPad)."""
        height, width = images.shape[-2:]
        patch = self.encoder.patch_size
        down, across = -height % patch, -width % patch
        if not down and not across:
            return images
        canvas = self.mean.repeat(len(images), 1, height + down, width + across)
        canvas[..., down // 2 : down // 2 + height, across // 2 : across // 2 + width] = images
        return canvas

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """What a size becomes."""
        patch = self.encoder.patch_size
        return size[0] + -size[0] % patch, size[1] + -size[1] % patch


def build_backbone(encoder: Encoder, preset: Preset, device: torch.device) -> Backbone:
    """The encoder of a preset on a device: itself where it stays frozen, otherwise a copy to be trained.

    InputError for a network that does not show tokens of one width and one grid behind its blocks.
    """
    if encoder.num_blocks < 1:
        raise InputError(f"{preset.name}: {encoder.name} does not show what is behind its blocks")
    if not preset.frozen:
        encoder = copy.deepcopy(encoder)
    backbone = Backbone(encoder.to(device), layers_of(preset, encoder.num_blocks), preset.norm, preset.autocast)
    backbone.to(device)
    if not preset.frozen:
        _open(backbone, preset)
    with torch.no_grad():
        seen = backbone.eval()(torch.zeros(1, 3, *preset.crop, device=device))
    shapes = {(part.patch.shape[-1], part.grid) for part in seen}
    if len(shapes) > 1:
        raise InputError(f"{preset.name}: {encoder.name} is a pyramid; its blocks differ in width or grid: {shapes}")
    return backbone


def _open(backbone: Backbone, preset: Preset) -> None:
    """Make what its features depend on trainable, the positions at the grid of the crop."""
    encoder = backbone.encoder
    encoder._frozen = False
    if isinstance(encoder, VitEncoder):
        encoder.move_to_grid(encoder.grid_of(*backbone.padded(preset.crop)))
    set_drop_path(encoder, preset.drop_path)
    encoder.requires_grad_(True)
    images = torch.zeros(1, 3, *preset.crop, device=backbone.mean.device)
    total = sum(part.patch.sum() + part.cls.sum() for part in backbone.eval()(images))
    parameters: list[nn.Parameter] = list(encoder.parameters())
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:  # the mask token, or a final norm that is left out: DDP would wait for them
            parameter.requires_grad_(False)


def set_drop_path(encoder: Encoder, rate: float) -> None:
    """Stochastic depth, its rate growing from 0 at the first block to `rate` at the last."""
    blocks: Any = getattr(encoder.network, "blocks", None)
    if blocks is None:
        if rate:
            raise InputError(f"{encoder.name} has no blocks that drop path could drop; set drop_path to 0")
        return
    for index, block in enumerate(blocks):
        for name in ("drop_path1", "drop_path2", "drop_path"):
            if hasattr(block, name):
                share = rate * index / max(1, len(blocks) - 1)
                setattr(block, name, DropPath(share) if share else nn.Identity())


def _in_float(features: Features) -> Features:
    patch = features.patch.float()
    cls = patch.mean(1) if features.cls is None else features.cls.float()
    return Features(cls, patch, features.grid)
