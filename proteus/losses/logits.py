"""Losses on class logits: what Proteus removes, kept for its study of dataset bias."""

import torch.nn.functional as F
from torch import Tensor

from proteus.losses.views import Projected, Target


def logits_kl(student: Projected, target: Target) -> Tensor:
    """KL(teacher || student) of softened class probabilities, mean over the batch, times T^2 (Hinton et al., 2015)."""
    temperature = target.temperature
    log_student = F.log_softmax(student.logits.float() / temperature, dim=-1)  # [B, K]
    log_teacher = F.log_softmax(target.logits.float() / temperature, dim=-1)  # [B, K]
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def label_ce(student: Projected, target: Target) -> Tensor:
    """Cross-entropy of the student's logits [B, K] with the labels [B]."""
    return F.cross_entropy(student.logits.float(), target.labels)
