"""Position embeddings at another grid than they were trained on."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor


class PositionRule(NamedTuple):
    """How a family of networks resizes its position embedding.

    offset:        DINO, SynCLR, and DINOv2 without registers sample at scale (grid + 0.1) / native, which shifts
                   every sample a little; 0 asks for the target size itself.
    antialias:     whether the filter widens when the grid shrinks.
    mode:          bicubic or bilinear.
    align_corners: as torch's `interpolate` has it.
    crop:          RADIO: resized to a square as large as the longer side, of which the top left is taken.
    """

    offset: float
    antialias: bool
    mode: str = "bicubic"
    align_corners: bool | None = None
    crop: bool = False


DINOV2 = PositionRule(offset=0.1, antialias=False)
DINOV2_REGISTERS = PositionRule(offset=0.0, antialias=True)
TIMM = PositionRule(offset=0.0, antialias=True)
RADIO = PositionRule(offset=0.0, antialias=False, mode="bilinear", align_corners=False, crop=True)
PE = PositionRule(offset=0.0, antialias=False, mode="bilinear", align_corners=False)
RADIO_ALIGNED = RADIO._replace(align_corners=True)


def resize_position_embedding(
    embedding: Tensor, native: tuple[int, int], grid: tuple[int, int], rule: PositionRule
) -> Tensor:
    """Patch position embeddings [1, h0 * w0, D] of the native grid (h0, w0) at `grid` (h, w): [1, h * w, D]."""
    if grid == native:
        return embedding
    dim = embedding.shape[-1]
    image = embedding.float().reshape(1, *native, dim).permute(0, 3, 1, 2)  # [1, D, h0, w0]
    target = (max(grid), max(grid)) if rule.crop else grid
    options: dict[str, Any] = {"mode": rule.mode, "antialias": rule.antialias, "align_corners": rule.align_corners}
    if rule.offset:
        scale = [(size + rule.offset) / size0 for size, size0 in zip(target, native, strict=True)]
        image = F.interpolate(image, scale_factor=scale, **options)
    else:
        image = F.interpolate(image, size=target, **options)
    image = image[..., : grid[0], : grid[1]] if rule.crop else image
    assert tuple(image.shape[-2:]) == grid, f"position embedding came out as {tuple(image.shape[-2:])}, not {grid}"
    return image.permute(0, 2, 3, 1).reshape(1, -1, dim).to(embedding.dtype)  # [1, h * w, D]
