"""The one currency: what every network says about a batch of images."""

from typing import NamedTuple

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
