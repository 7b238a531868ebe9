"""Images and masks at another size than they were made for."""

import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # (h, w) in patches


def resize_images(images: Tensor, size: int) -> Tensor:
    """Images [B, 3, S, S] at another size, bicubic with antialiasing, float; as they are where equal.

    uint8 becomes [0, 1] first. Nothing is clamped: the noise of random erasing leaves [0, 1] on purpose.
    """
    if images.shape[-2:] == (size, size):
        return images
    if not images.is_floating_point():
        images = images / 255
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)


def resize_mask(mask: Tensor, grid: Grid, target: Grid) -> Tensor:
    """A mask [M, N] bool of a grid on another one [M, N'], by nearest neighbour; where M is 0, of any grid."""
    if not len(mask):  # of several students' grids it can be of one alone
        return mask.new_zeros(0, target[0] * target[1])
    if grid == target:
        return mask
    cells = mask.unflatten(1, grid).unsqueeze(1).float()  # [M, 1, h, w]
    return F.interpolate(cells, size=target, mode="nearest-exact").flatten(1) > 0
