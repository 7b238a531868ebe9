"""What stands on an encoder: projections to the teacher's width, and classifiers."""

import torch
from torch import Tensor, nn

from proteus.errors import InputError
from proteus.models.features import Features
from proteus.models.weights import read_checkpoint


class ProjectionHead(nn.Sequential):
    """LayerNorm then Linear, from the student's width to the teacher's; thrown away after training (papers: A1)."""

    def __init__(self, student_dim: int, teacher_dim: int):
        super().__init__()
        self.add_module("norm", nn.LayerNorm(student_dim))
        self.add_module("linear", nn.Linear(student_dim, teacher_dim))


class TeacherHead(nn.Module):
    """A trained linear classifier on the teacher: Features to logits [B, K].

    Its input is the class token (D wide) or, as DINOv2 publishes it, class token and mean patch token (2 D wide).
    """

    def __init__(self, path: str, teacher_dim: int):
        super().__init__()
        state, _ = read_checkpoint(path)
        weight = state.get("weight", state.get("head.weight"))
        bias = state.get("bias", state.get("head.bias"))
        if weight is None or weight.ndim != 2 or weight.shape[1] not in (teacher_dim, 2 * teacher_dim):
            raise InputError(
                f"teacher.head {path!r}: expected a tensor `weight` of shape [classes, {teacher_dim}] or "
                f"[classes, {2 * teacher_dim}], found {list(weight.shape) if weight is not None else sorted(state)[:5]}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise InputError(f"teacher.head {path!r}: bias is {list(bias.shape)}, not {list(weight.shape[:1])}")
        self.with_patches = weight.shape[1] == 2 * teacher_dim
        self.num_classes = weight.shape[0]
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", torch.zeros(len(weight)) if bias is None else bias.float())

    def forward(self, features: Features) -> Tensor:
        tokens = features.cls.float()
        if self.with_patches:
            tokens = torch.cat([tokens, features.patch.float().mean(dim=1)], dim=-1)
        return nn.functional.linear(tokens, self.weight, self.bias)
