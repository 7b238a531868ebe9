"""The step as published, the baseline of every comparison here, written from its description.

Two full passes of the student a step, the first with masks, both over the whole batch; a teacher with float32 weights;
fp16 autocast with a loss scaler on a GPU, float32 on a CPU; an unfused AdamW; every step four numbers are read, the
device is waited for, and the average of the weights is updated tensor by tensor. Nothing is compiled.

`Changes` makes one thing at a time otherwise, so that what each improvement brings can be told apart.
"""

import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from benchmarks.speed.timing import wait
from proteus.data.loader import Batch
from proteus.engine.ema import PAPER_DECAY
from proteus.models import Encoder
from proteus.models.features import Features
from proteus.training.networks import compile_student

RATE, WEIGHT_DECAY = 1e-4, 0.05


@dataclass(frozen=True)
class Changes:
    """What is done otherwise than published.

    masked_half:      the masked pass takes only the images that have a mask.
    shared_embedding: both views through one patch embedding and one pass of the blocks.
    teacher_bf16:     the teacher's weights in bfloat16.
    bf16:             bfloat16 autocast, without a loss scaler, in place of fp16 (on a CPU: of float32).
    fused:            a fused AdamW and an average of all weights at once.
    no_wait:          nothing is read, and nobody waits for the device.
    compiled:         torch.compile of the teacher, and of the student block by block.
    """

    masked_half: bool = False
    shared_embedding: bool = False
    teacher_bf16: bool = False
    bf16: bool = False
    fused: bool = False
    no_wait: bool = False
    compiled: bool = False


class Prepared(NamedTuple):
    """What the loader hands over.

    images: [B, 3, S, S] float32 in [0, 1].
    mask:   [B, N] bool, of all images: those that are not masked have nothing masked.
    hidden: [K] int64, where in the B * N patches the masked ones are.
    """

    images: Tensor
    mask: Tensor
    hidden: Tensor


class PublishedStep:
    """The step on one prepared batch, called as often as wanted; its stages one by one for timing them.

    teacher, student: on any device; copied, as several variants start from the same weights.
    heads:            LayerNorm and linear layer by the names of the losses: token, feature, patch.
    batch:            as our loader gives it; images become float32 in advance, as they leave the authors' loader.
    """

    def __init__(
        self,
        teacher: Encoder,
        student: Encoder,
        heads: nn.ModuleDict,
        batch: Batch,
        device: torch.device,
        changes: Changes = Changes(),
    ):
        self.device, self.changes = device, changes
        self.teacher = copy.deepcopy(teacher).to(device, torch.bfloat16 if changes.teacher_bf16 else torch.float32)
        self.student, self.heads = copy.deepcopy(student).to(device), copy.deepcopy(heads).to(device)
        groups = param_groups_weight_decay(nn.ModuleList([self.student, self.heads]), WEIGHT_DECAY)
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, fused=changes.fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda" and not changes.bf16)
        self.average = copy.deepcopy(self.student).requires_grad_(False)
        self.fast_average = ModelEmaV3(self.student, PAPER_DECAY) if changes.fused else None
        images, self.masked = batch.to(device).images.cpu(), len(batch.mask)
        unmasked = batch.mask.new_zeros(len(images) - self.masked, batch.mask.shape[1])
        mask = torch.cat([batch.mask, unmasked])  # [B, N]
        prepared = Prepared(images, mask, mask.flatten().nonzero().flatten())
        self.prepared = Prepared(*(each.pin_memory() for each in prepared)) if device.type == "cuda" else prepared
        self.read: list[float] = []
        if changes.compiled:
            self.teacher.compile(dynamic=False)
            compile_student(self.student)

    def __call__(self) -> dict[str, Tensor]:
        """A whole step; its losses."""
        data = self.data()
        losses = self.forward(data, self.teach(data))
        self.backward(losses)
        self.update(losses)
        return losses

    def data(self) -> Prepared:
        """The batch on the device."""
        return Prepared(*(tensor.to(self.device, non_blocking=True) for tensor in self.prepared))

    @torch.no_grad()
    def teach(self, data: Prepared) -> Features:
        """What the teacher says of the images, unmasked."""
        with self._autocast(not self.changes.teacher_bf16):
            return self.teacher(data.images)

    def forward(self, data: Prepared, target: Features) -> dict[str, Tensor]:
        """The three losses, each of weight 1."""
        with self._autocast():
            plain, masked = self._views(data)
            cls = self.heads["token"](plain.cls)  # [B, D]
            tokens = torch.cat([cls.unsqueeze(1), self.heads["feature"](plain.patch)], dim=1)  # [B, 1 + N, D]
            wanted = torch.cat([target.cls.unsqueeze(1), target.patch], dim=1)  # [B, 1 + N, D]
            hidden = self.heads["patch"](masked.patch.flatten(0, 1)[data.hidden])  # [K, D], of the K masked patches
            return {
                "token": F.mse_loss(cls.float(), target.cls.float()),
                "feature": F.mse_loss(tokens.float(), wanted.float()),
                "patch": F.mse_loss(hidden.float(), target.patch.flatten(0, 1)[data.hidden].float()),
            }

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Gradients of the sum of the losses, which is looked at before."""
        total = torch.stack(list(losses.values())).sum()
        if not self.changes.no_wait:
            self.read = [total.item()]
        self.optimizer.zero_grad()
        self.scaler.scale(total).backward()

    def update(self, losses: dict[str, Tensor]) -> None:
        """The optimiser's step, the wait for the device, the average, and the other three numbers."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not self.changes.no_wait:
            wait(self.device)
        if self.fast_average is not None:
            self.fast_average.update(self.student)
        else:
            self._average()
        if not self.changes.no_wait:
            self.read += [loss.item() for loss in losses.values()]

    def _views(self, data: Prepared) -> tuple[Features, Features]:
        """Features of the plain and of the masked view."""
        mask = data.mask
        if self.changes.masked_half:
            mask = mask[: self.masked]
        if self.changes.shared_embedding:
            return self.student.forward_pair(data.images, mask)
        masked = self.student(data.images[: len(mask)], mask)
        return self.student(data.images), masked

    @torch.no_grad()
    def _average(self) -> None:
        state = self.student.state_dict()
        for name, value in self.average.state_dict().items():
            value.copy_(value * PAPER_DECAY + (1 - PAPER_DECAY) * state[name])

    def _autocast(self, enabled: bool = True) -> torch.autocast:
        dtype = torch.bfloat16 if self.changes.bf16 or self.device.type == "cpu" else torch.float16
        return torch.autocast(
            self.device.type, dtype, enabled=enabled and (self.changes.bf16 or self.device.type == "cuda")
        )
