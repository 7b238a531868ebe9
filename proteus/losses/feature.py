"""The feature losses: every token to every token, or every patch token alone."""

import torch.nn.functional as F
from torch import Tensor

from proteus.losses.views import Projected, Target


def feature_loss(student: Projected, target: Target) -> Tensor:
    """Mean squared error over class and patch tokens together, 1 + N of them (Proteus: feature-level objective).

    The class token is projected by the token head, as in the token loss, and so counts there and here. The mean over
    the concatenation [B, 1 + N, D] is taken without making it.
    """
    tokens = student.plain.patch.shape[1]  # N
    cls = F.mse_loss(student.plain.cls.float(), target.features.cls.float())
    patch = F.mse_loss(student.plain.patch.float(), target.features.patch.float())
    return (cls + tokens * patch) / (1 + tokens)


def patch_feature_loss(student: Projected, target: Target) -> Tensor:
    """Mean squared error of the patch tokens [B, N, D], none of them masked (arXiv 2311.18237, for segmentation)."""
    return F.mse_loss(student.plain.patch.float(), target.features.patch.float())
