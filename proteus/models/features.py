"""The one currency: what every network says about a batch of images."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """What an encoder returns for B images whose patches form an h x w grid, after the final norm.

    cls:   [B, D] class token, or what the zoo entry says stands in for it; None where `intermediate` has none.
    patch: [B, N, D] patch tokens, row-major, N = h * w.
    grid:  (h, w).
    """

    cls: Tensor
    patch: Tensor
    grid: tuple[int, int]


def resize_patches(features: Features, grid: tuple[int, int]) -> Features:
    """Patch tokens interpolated to another grid, bilinear with antialiasing, in float32; as they are where equal."""
    if features.grid == grid:
        return features
    patch = features.patch.float().unflatten(1, features.grid)  # [B, h, w, D]
    rows, columns = (_bilinear(old, new, patch.device) for old, new in zip(features.grid, grid, strict=True))
    # Two products with small matrices, not F.interpolate on the tokens: its backward is not deterministic on a GPU.
    with torch.autocast(patch.device.type, enabled=False):
        patch = torch.einsum("ih,jw,bhwd->bijd", rows, columns, patch)
    return features._replace(patch=patch.flatten(1, 2), grid=grid)  # [B, h' * w', D]


def resize_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [B, C, h, w] at another size (h', w'), bilinear with antialiasing, in float32; as they are where equal."""
    old = (maps.shape[-2], maps.shape[-1])
    if old == tuple(size):
        return maps
    rows, columns = (_bilinear(was, new, maps.device) for was, new in zip(old, size, strict=True))
    with torch.autocast(maps.device.type, enabled=False):  # products, for the reason above
        return rows @ (maps.float() @ columns.T)  # [B, C, h', w']


def _bilinear(old: int, new: int, device: torch.device) -> Tensor:
    """The matrix [new, old] that resamples a line of `old` values to `new`: what interpolation does to unit vectors."""
    lines = torch.eye(old, device=device)[None, None]  # [1, 1, old, old], a unit vector in each column
    return F.interpolate(lines, size=(new, old), mode="bilinear", antialias=True)[0, 0]
