"""The student's networks: the encoder in the shape it learns in, and its classifier."""

import torch
from accelerate import Accelerator
from timm.layers import convert_sync_batchnorm
from torch import nn

from proteus.config import LABEL_CE, Config
from proteus.data.dense import DenseSource, is_dense
from proteus.data.sources import Source
from proteus.engine.shard import shards
from proteus.errors import InputError
from proteus.models import Encoder, create_model
from proteus.models.attention import use_attention
from proteus.models.heads import PixelClassifier, build_head, read_head
from proteus.training.sizes import Sizes, match_sizes, student_size
from proteus.training.teacher import Teacher
from proteus.training.tune import tune


def build_student(cfg: Config, teachers: list[Teacher], accelerator: Accelerator) -> tuple[Encoder, Sizes]:
    """The student, its grid fixed by the image size that its teachers lead to, and all sizes."""
    section = cfg.student
    assert section is not None

    def create(image_size: int) -> Encoder:
        return create_model(section.name, checkpoint=section.checkpoint, image_size=image_size, **section.arch)

    first = cfg.data.image_size if section.image_size == "auto" else section.image_size
    student = create(first)
    size = student_size(cfg, student, teachers)
    if size != first:  # what leads to the size, the patch, is a fact of the network
        torch.manual_seed(cfg.run.seed)
        student = create(size)
    sizes = match_sizes(cfg, student, size, teachers)
    if not any(parameter.requires_grad for parameter in student.network.parameters()):
        raise InputError(f"student.name={student.name} has no parameter that its features depend on and that can learn")
    tune(student, section.tune, section.rank)
    if section.grad_checkpointing:
        student.set_grad_checkpointing(section.grad_checkpointing)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        student = convert_sync_batchnorm(student)
    use_attention(student.network, cfg.run.attention)
    if accelerator.device.type == "cuda" and not shards(accelerator):  # FSDP knows no other layout
        student.use_channels_last()
    return student, sizes


def compile_student(student: Encoder) -> None:
    """Compile its parts one by one, for training and for evaluation mode: blocks may differ in a constant."""
    parts = student.compile_parts()
    torch._dynamo.config.recompile_limit += 4 * len(parts)  # counted by code, which the blocks of all students share
    for part in parts:
        part.compile(dynamic=False)


def build_classifier(
    cfg: Config, source: Source | DenseSource, teachers: list[Teacher], student: Encoder
) -> tuple[nn.Module | None, list[str]]:
    """The student's head, should a loss want one, and what its outputs are called (empty where nobody says).

    For the classes of the teachers' heads, else of the labels; for each pixel, where theirs are.
    """
    if not {LABEL_CE, "logits_kl"} & cfg.computed_losses:
        return None, []
    heads = [teacher for teacher in teachers if teacher.head]
    classes = next((teacher.classes for teacher in heads if teacher.classes), []) or list(source.classes)
    count = _count_classes(cfg, source, teachers)
    classes = classes if len(classes) == count else []
    start = cfg.student.head if cfg.student else None
    if start:
        head, named = read_head(start, student.embed_dim, "student.head")
        if head.num_classes != count:
            raise InputError(f"student.head={start} has {head.num_classes} classes, the task {count}")
        if getattr(head, "with_patches", False):
            raise InputError(f"student.head={start} reads the mean patch token too: give one of a run's own")
        return head.requires_grad_(True), named or classes
    pixels = isinstance(heads[0].head, PixelClassifier) if heads else is_dense(source)
    head = build_head(student.embed_dim, count, "pixel" if pixels else "class", cfg.head_mix)
    return head, classes


def _count_classes(cfg: Config, source: Source | DenseSource, teachers: list[Teacher]) -> int:
    """Outputs of the student's head."""
    counts = {
        f"{key}.head": int(teacher.head.num_classes)  # type: ignore[arg-type]
        for key, teacher in zip(cfg.all_teachers, teachers, strict=True)
        if teacher.head
    }
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{key} {count}" for key, count in counts.items())
        raise InputError(f"the student has one classifier, and its teachers' differ in their classes: {told}")
    if counts:
        return next(iter(counts.values()))
    return len(source.classes) or int(source.labels.max()) + 1  # type: ignore[union-attr]
