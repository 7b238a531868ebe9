"""The patch loss: what the student makes of patches it did not see."""

from torch import Tensor

from proteus.losses.views import Projected, Target


def patch_loss(student: Projected, target: Target) -> Tensor:
    """Mean squared error of patch tokens at masked positions only (Proteus: patch-level objective, after iBOT).

    The student saw the first M images masked, the teacher saw them whole. Written as a weighted mean over all
    positions: indexing with the mask would make the host wait for the device to count it.
    """
    teacher = target.features.patch[: len(target.mask)]  # [M, N, D]
    error = (student.masked.patch.float() - teacher.float()).square().mean(dim=-1)  # [M, N]
    return (error * target.mask).sum() / target.mask.sum().clamp(min=1)
