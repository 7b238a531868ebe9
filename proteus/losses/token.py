"""The token loss: class token to class token."""

import torch.nn.functional as F
from torch import Tensor

from proteus.losses.views import Projected, Target


def token_loss(student: Projected, target: Target) -> Tensor:
    """Mean squared error of the class tokens [B, D], over all elements (Proteus, section 3: token-level objective)."""
    return F.mse_loss(student.plain.cls.float(), target.features.cls.float())
