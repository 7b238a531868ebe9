"""Losses by name. Each is a pure function of what the student's heads project and what the teacher says."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from proteus.errors import InputError, nearest
from proteus.losses.contrastive import contrastive_loss
from proteus.losses.feature import feature_loss, patch_feature_loss
from proteus.losses.logits import IGNORE_LABEL, label_ce, logits_kl
from proteus.losses.patch import patch_loss
from proteus.losses.token import token_loss
from proteus.losses.views import Projected, Target

__all__ = ["IGNORE_LABEL", "LOSSES", "Loss", "Projected", "Target", "check_losses"]


class Loss(NamedTuple):
    """A loss and the heads whose outputs it reads (a head that no loss reads is not built)."""

    function: Callable[[Projected, Target], Tensor]
    heads: tuple[str, ...]
    needs_labels: bool = False


LOSSES: dict[str, Loss] = {
    "token": Loss(token_loss, ("token",)),
    "feature": Loss(feature_loss, ("token", "feature")),
    "patch_feature": Loss(patch_feature_loss, ("feature",)),
    "patch": Loss(patch_loss, ("patch",)),
    "contrastive": Loss(contrastive_loss, ("token",)),
    "logits_kl": Loss(logits_kl, ("logits",)),
    "label_ce": Loss(label_ce, ("logits",), needs_labels=True),
}


def check_losses(names: list[str]) -> None:
    """Raise InputError for the first unknown name, with the nearest valid one."""
    for name in names:
        if name not in LOSSES:
            raise InputError(f"unknown loss {name!r}{nearest(name, LOSSES)}")
