"""Losses on class logits, of images or of every place of a map."""

import torch.nn.functional as F
from torch import Tensor

from proteus.losses.views import Projected, Target

IGNORE_LABEL = -1  # a label that counts nowhere


def logits_kl(student: Projected, target: Target) -> Tensor:
    """KL(teacher || student) of softened class probabilities, times T^2 (Hinton et al., 2015).

    Logits [B, K], or maps [B, K, h, w] of one size; the mean is over the batch, and over the places of a map.
    """
    temperature = target.temperature
    log_student = F.log_softmax(student.logits.float() / temperature, dim=1)  # [B, K] or [B, K, h, w]
    log_teacher = F.log_softmax(target.logits.float() / temperature, dim=1)  # the same
    places = log_student.numel() // log_student.shape[1]
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) / places * temperature**2


def label_ce(student: Projected, target: Target) -> Tensor:
    """Cross-entropy of the student's logits [B, K] with labels [B], or of maps [B, K, H, W] with labels [B, H, W].

    Where the label is IGNORE_LABEL nothing is learnt, yet the sum over all others is divided by the number of all
    labels, so that the mean over processes is the mean over the global batch (mmsegmentation divides so too).
    """
    # Reduced by hand: the reduction of a map that torch offers is not deterministic on a GPU.
    losses = F.cross_entropy(
        student.label_logits.float(), target.labels, ignore_index=IGNORE_LABEL, reduction="none"
    )  # [B] or [B, H, W]
    return losses.sum() / losses.numel()
