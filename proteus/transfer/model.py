"""What comes out of a transfer: a small model that knows the task."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from proteus.errors import InputError
from proteus.models import Encoder, create_model, load_checkpoint
from proteus.models.heads import read_head


class TaskModel(nn.Module):
    """An encoder and the head that it learnt the task with.

    classes: what the outputs are called, by number.
    """

    def __init__(self, encoder: Encoder, head: nn.Module, classes: list[str]):
        super().__init__()
        self.encoder, self.head, self.classes = encoder, head, classes

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, 3, H, W], uint8 or float in [0, 1]; [B, K, h, w] on the patch grid for pixels."""
        return self.head(self.encoder(images))


def load_task_model(folder: str | Path, name: str | None = None, **arch: Any) -> TaskModel:
    """The model in a stage's folder, student.safetensors and head.safetensors, in evaluation mode.

    name, arch: of a network of your own, whose code the file must not name. InputError where a file is missing or
    does not fit.
    """
    student, head = Path(folder) / "student.safetensors", Path(folder) / "head.safetensors"
    for path in (student, head):
        if not path.is_file():
            raise InputError(f"{path}: not there; give the folder of a stage that is done")
    encoder = create_model(name, checkpoint=str(student), **arch) if name else load_checkpoint(str(student))
    return TaskModel(encoder, *read_head(str(head), encoder.embed_dim, "head")).eval()
