"""What the dense heads are trained on."""

import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from torch.distributed.nn.functional import all_reduce

from proteus.data.dense import IGNORE
from proteus.evaluation.dense.augment import resize


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of logits [B, classes, h, w], upsampled to the target [B, H, W]: the sum over pixels that count by all pixels.

    mmsegmentation divides by all; a batch without any pixel that counts has the loss 0.
    """
    logits = resize(logits.float(), (target.shape[-2], target.shape[-1]))
    return F.cross_entropy(logits, target.long(), ignore_index=IGNORE, reduction="sum") / target.numel()


def sig_loss(depth: Tensor, target: Tensor, mean_only: bool = False) -> Tensor:
    """sqrt(var(g) + 0.15 mean(g)^2) with g = ln(depth + 1e-3) - ln(target + 1e-3), where the target [B, H, W] is > 0.

    Over all pixels of the batch, of all processes (the original: of each GPU's two images). mean_only leaves the
    variance out, as the first steps do. AdaBins (Bhat et al., 2021) by way of DINOv2's depth toolbox.
    """
    valid = target > 0
    g = torch.where(valid, (depth.clamp(min=0) + 1e-3).log() - (target + 1e-3).log(), 0.0).double()
    sums = torch.stack([valid.sum().double(), g.sum(), g.square().sum()])
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        sums = all_reduce(sums)
    count, total, squares = sums
    mean = total / count.clamp(min=1)
    variance = (squares - count * mean.square()).clamp(min=0) / (count - 1).clamp(min=1)
    # The root's slope at 0 is infinite.
    return ((0 if mean_only else variance) + 0.15 * mean.square() + 1e-12).sqrt().float()


def gradient_loss(depth: Tensor, target: Tensor) -> Tensor:
    """The differences of g (as in `sig_loss`) over two pixels, down and across, summed over four scales.

    As in MegaDepth (Li and Snavely, 2018) and DINOv2's toolbox, with the slices on the image's axes. [B, H, W].
    """
    loss = depth.new_zeros(())
    for step in (1, 2, 4, 6):
        d, t = depth[:, ::step, ::step], target[:, ::step, ::step]
        valid = t > 0
        g = torch.where(valid, (d.clamp(min=0) + 1e-3).log() - (t + 1e-3).log(), 0.0)
        down = (g[:, 2:] - g[:, :-2]).abs() * (valid[:, 2:] & valid[:, :-2])
        across = (g[:, :, 2:] - g[:, :, :-2]).abs() * (valid[:, :, 2:] & valid[:, :, :-2])
        loss = loss + (down.sum() + across.sum()) / valid.sum().clamp(min=1)
    return loss


def silog_loss(depth: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """sqrt(mean(g^2) - 0.5 mean(g)^2) of each image [H, W], g = ln target - ln depth, then the mean over the batch.

    Where the depth is below eps there is no gradient. An image without a reading has the loss 0 (Eigen et al., 2014).
    """
    valid = (target > eps).flatten(1)
    g = torch.where(valid, (target.clamp(min=eps).log() - depth.clamp(min=eps).log()).flatten(1), 0.0)  # [B, H * W]
    count = valid.sum(1).clamp(min=1)
    inside = g.square().sum(1) / count - 0.5 * (g.sum(1) / count).square()
    return (inside.clamp(min=0) + 1e-12).sqrt().mean()
