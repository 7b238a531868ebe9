"""The frozen teachers, outside of everything that trains, is wrapped, or is saved."""

import contextlib
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from proteus import config
from proteus.config import Config
from proteus.data.loader import Batch
from proteus.engine.shard import shard
from proteus.errors import InputError
from proteus.models import Encoder, create_model
from proteus.models.attention import use_attention
from proteus.models.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from proteus.models.features import Features
from proteus.models.heads import read_head
from proteus.models.vit import VitEncoder
from proteus.models.weights import find_official
from proteus.training.resize import resize_images

RANDOM = "random"  # teacher.checkpoint: an untrained network, for trying things out

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}

CONVENTIONS = {
    "own": (None, None),
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "clip": (CLIP_MEAN, CLIP_STD),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


class Answer(NamedTuple):
    """What a teacher says about B images: its Features, and logits [B, K] or [B, K, h, w] where it has a head."""

    features: Features
    logits: Tensor | None


class Teacher:
    """A frozen encoder and, for losses on logits, its head. Not a module, so that no module can hold it.

    classes:    what the outputs of the head are, where its file says so; else empty.
    name:       what it is called on screen and in the log.
    image_size: pixels it sees; larger images are resized to it.
    sharded:    whether the processes hold its weights together; then all of them call it, as often as one does.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module | None,
        classes: list[str],
        accelerator: Accelerator,
        dtype: str,
        image_size: int,
        name: str,
        sharded: bool = False,
    ):
        self.encoder = encoder.freeze().to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        if dtype == "auto":
            hold_in_precision(self.encoder, accelerator.mixed_precision)
        self.sharded = sharded and accelerator.num_processes > 1
        if self.sharded:  # from where the weights are: no device need hold them whole
            _shard(self.encoder, accelerator.device)
        else:
            self.encoder.to(accelerator.device)
            if accelerator.device.type == "cuda":
                self.encoder.use_channels_last()
        self.head = head.requires_grad_(False).eval().to(accelerator.device) if head else None
        self.classes = classes
        self.image_size, self.name = image_size, name
        # auto: computing in the run's precision, as the student does.
        self._autocast = accelerator.autocast if dtype == "auto" else contextlib.nullcontext

    # no_grad, not inference_mode: a loss saves its inputs for backward, and inference tensors refuse that.
    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features of images [B, 3, S, S], uint8 or float in [0, 1]."""
        with self._autocast():
            return self.encoder(resize_images(images, self.image_size))

    @torch.no_grad()
    def answer(self, batch: Batch) -> Answer:
        """Features and logits of a batch on the device."""
        features = self(batch.images)
        return Answer(features, self.head(features) if self.head else None)


def _shard(encoder: Encoder, device: torch.device) -> None:
    blocks = encoder.blocks()
    if not blocks:
        raise InputError(f"teacher.shard: {encoder.name} is not made of blocks that are known here: leave it at false")
    shard(encoder, blocks, device)


def hold_in_precision(encoder: Encoder, precision: str) -> None:
    """Hold a transformer's weights of linear layers and convolutions as autocast would cast them at every call.

    What the encoder computes under autocast is the same to the bit; half of its memory goes, and the casts.
    """
    if precision in HALVES and isinstance(encoder, VitEncoder):
        for module in encoder.modules():
            if type(module) in (nn.Linear, nn.Conv2d):  # a subclass may compute with its weight before
                module.to(HALVES[precision])


def find_weights(cfg: config.Teacher) -> str | None:
    """The file a teacher's weights come from, None for an untrained one; InputError where it is not there."""
    if cfg.checkpoint == RANDOM:
        return None
    return cfg.checkpoint or str(find_official(cfg.name, cfg.download))


def build_teachers(cfg: Config, accelerator: Accelerator) -> list[Teacher]:
    """The teachers of a config, with their weights, on their device."""
    teachers: list[Teacher] = []
    for section in cfg.all_teachers.values():
        name, copy = section.name, 2
        while name in [teacher.name for teacher in teachers]:
            name, copy = f"{section.name}_{copy}", copy + 1
        size = section.image_size or cfg.data.image_size
        teachers.append(_build_teacher(section, size, name, cfg.run.attention, accelerator))
    return teachers


def _build_teacher(
    cfg: config.Teacher, image_size: int, name: str, attention: config.Attention, accelerator: Accelerator
) -> Teacher:
    mean, std = CONVENTIONS[cfg.normalize]
    with accelerator.local_main_process_first():  # which fetches them, should that be asked for
        checkpoint = find_weights(cfg)
    encoder = create_model(cfg.name, checkpoint=checkpoint, image_size=image_size, mean=mean, std=std, **cfg.arch)
    use_attention(encoder.network, attention)
    head, classes = read_head(cfg.head, encoder.embed_dim) if cfg.head else (None, [])
    teacher = Teacher(encoder, head, classes, accelerator, cfg.dtype, image_size, name, cfg.shard)
    if cfg.compile:
        teacher.encoder.compile(dynamic=False)
    return teacher
