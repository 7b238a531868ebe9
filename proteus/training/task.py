"""What trains: the student, its heads and the losses, in one module with one `forward`."""

import torch
from torch import Tensor, nn

from proteus.losses import LOSSES, Projected, Target
from proteus.models import Encoder
from proteus.models.features import Features
from proteus.models.heads import ProjectionHead


class Distillation(nn.Module):
    """The student under its losses.

    losses:             name -> weight, all above 0.
    teacher_dim:        width the heads project to; None where no loss needs it.
    num_classes:        outputs of the classifier, for the losses on logits.
    masked_per_process: masked images of a micro-batch, averaged over the processes. Processes that hold more of them
                        weigh more, so that the mean over processes is the mean over the global batch.
    """

    def __init__(
        self,
        student: Encoder,
        losses: dict[str, float],
        teacher_dim: int | None,
        num_classes: int | None = None,
        masked_per_process: float = 0.0,
    ):
        super().__init__()
        self.student = student
        self.losses = losses
        self.masked_per_process = masked_per_process
        needed = sorted({head for name in losses for head in LOSSES[name].heads})
        self.heads = nn.ModuleDict()
        for head in needed:
            if head == "logits":
                assert num_classes is not None, "losses on logits need the number of classes"
                self.heads[head] = nn.Linear(student.embed_dim, num_classes)
            else:
                assert teacher_dim is not None, f"the {head} head needs the teacher's width"
                self.heads[head] = ProjectionHead(student.embed_dim, teacher_dim)

    def forward(self, images: Tensor, target: Target) -> dict[str, Tensor]:
        """Weighted losses by name, of images [B, 3, H, W] in [0, 1]; their sum is what is minimised.

        One pass of the student over the plain batch and the masked images together.
        """
        plain, masked = self.student.forward_pair(images, target.mask)
        projected = self.project(plain, masked)
        losses = {name: weight * LOSSES[name].function(projected, target) for name, weight in self.losses.items()}
        if "patch" in losses and self.masked_per_process:
            losses["patch"] = losses["patch"] * (len(target.mask) / self.masked_per_process)
        return losses

    def project(self, plain: Features, masked: Features) -> Projected:
        """The student's features through the heads there are."""
        return Projected(
            plain=Features(self._head("token", plain.cls), self._head("feature", plain.patch), plain.grid),
            masked=masked._replace(patch=self._head("patch", masked.patch)),
            logits=self.heads["logits"](plain.cls) if "logits" in self.heads else None,  # type: ignore[arg-type]
        )

    def _head(self, name: str, tokens: Tensor) -> Tensor:
        return self.heads[name](tokens) if name in self.heads else tokens

    @torch.no_grad()
    def teacher_space(self, images: Tensor) -> Features:
        """The student's tokens of unmasked images, projected to the teacher's space as far as heads reach; for probes.

        Patch tokens go through the feature head, else the patch head.
        """
        plain = self.student(images)
        return Features(
            self._head("token", plain.cls),
            self._head("feature" if "feature" in self.heads else "patch", plain.patch),
            plain.grid,
        )

    @property
    def reaches_patches(self) -> bool:
        """Whether a head projects patch tokens to the teacher's space."""
        return "feature" in self.heads or "patch" in self.heads
