"""The frozen teacher, outside of everything that trains, is wrapped, or is saved."""

import contextlib

import torch
from accelerate import Accelerator
from torch import Tensor

from proteus import config
from proteus.models import Encoder, create_model
from proteus.models.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from proteus.models.features import Features
from proteus.models.heads import TeacherHead
from proteus.models.weights import find_official

RANDOM = "random"  # teacher.checkpoint: an untrained network, for trying things out

CONVENTIONS = {
    "own": (None, None),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class Teacher:
    """A frozen encoder and, for losses on logits, its classifier. Not a module, so that no module can hold it."""

    def __init__(self, encoder: Encoder, head: TeacherHead | None, accelerator: Accelerator, dtype: str):
        self.encoder = encoder.freeze().to(accelerator.device, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        self.head = head.to(accelerator.device) if head else None
        # auto: float32 weights, computing in the run's precision, as the student does.
        self._autocast = accelerator.autocast if dtype == "auto" else contextlib.nullcontext

    # no_grad, not inference_mode: a loss saves its inputs for backward, and inference tensors refuse that.
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] in [0, 1]."""
        with self._autocast():
            return self.encoder(images)

    @torch.no_grad()
    def logits(self, features: Features) -> Tensor | None:
        """The classifier's logits [B, K]; None where there is none."""
        return self.head(features) if self.head else None


def find_weights(cfg: config.Teacher) -> str | None:
    """The file a teacher's weights come from, None for an untrained one; InputError where it is not there."""
    if cfg.checkpoint == RANDOM:
        return None
    return cfg.checkpoint or str(find_official(cfg.name, cfg.download))


def build_teacher(cfg: config.Teacher, image_size: int, accelerator: Accelerator) -> Teacher:
    """The teacher of a config, with its weights, on its device."""
    mean, std = CONVENTIONS[cfg.normalize]
    with accelerator.local_main_process_first():  # which fetches them, should that be asked for
        checkpoint = find_weights(cfg)
    size = image_size if checkpoint is None else None
    encoder = create_model(cfg.name, checkpoint=checkpoint, image_size=size, mean=mean, std=std, **cfg.arch)
    head = TeacherHead(cfg.head, encoder.embed_dim) if cfg.head else None
    teacher = Teacher(encoder, head, accelerator, cfg.dtype)
    if cfg.compile:
        teacher.encoder.compile()
    return teacher
