"""The loop that trains a dense head, with its encoder or on a frozen one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from proteus.data.dense import DenseSource
from proteus.data.sampler import Sampler
from proteus.engine.schedule import decayed_rate
from proteus.engine.update import finite_step, scaled_groups, set_rate
from proteus.errors import InputError, RunError
from proteus.evaluation.dense.backbone import Backbone
from proteus.evaluation.dense.data import View, training_views
from proteus.evaluation.dense.presets import Preset

Loss = Callable[[Any, Tensor, int], Tensor]  # output, target [B, h, w], step


class Network:
    """A backbone and a head, of which the head trains, or both.

    trained: what is optimised: the head, or backbone and head.
    """

    def __init__(self, backbone: Backbone, head: nn.Module, preset: Preset, accelerator: Accelerator):
        self.backbone, self.frozen = backbone, preset.frozen
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
            head = convert_sync_batchnorm(head)
        self.head = head
        self.trained = head if preset.frozen else nn.Sequential(backbone, head)
        self.trained.to(accelerator.device)

    def inputs(self, images: Tensor) -> Any:
        """What `trained` takes of images [B, 3, H, W]: Features of a frozen backbone, or the images."""
        if not self.frozen:
            return images
        with torch.no_grad():
            return self.backbone(images)

    def __call__(self, images: Tensor) -> Any:
        return self.trained(self.inputs(images))


def train(
    network: Network,
    loss: Loss,
    source: DenseSource,
    view: View,
    preset: Preset,
    accelerator: Accelerator,
    seed: int,
    workers: int,
    progress: bool,
) -> list[str]:
    """Train by the preset, in place; returns warnings. Views depend on seed and step, dropout on the process as well.

    InputError where the processes do not divide the batch; RunError where most gradients are not finite.
    """
    rank, processes, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    sampler = Sampler(len(source), share_of(preset, network, accelerator), processes, seed=seed)
    batches = training_views(source, view, sampler, preset.iterations, rank, workers)
    groups = parameter_groups(network, preset)
    adamw = torch.optim.AdamW(groups, lr=preset.lr, betas=preset.betas, fused=True)
    optimizer = AcceleratedOptimizer(adamw)
    model = network.trained
    if processes > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    skipped_steps = torch.zeros((), dtype=torch.int64, device=device)

    model.train()
    show = progress and accelerator.is_main_process
    for step in tqdm(range(preset.iterations), desc=preset.name, unit="step", disable=None if show else True):
        images, target = (x.to(device, non_blocking=True) for x in next(batches))
        set_rate(optimizer, rate_of(step, preset))
        torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0]))  # on all devices
        value = loss(model(network.inputs(images)), target, step)
        accelerator.backward(value)
        _, skipped = finite_step(accelerator, optimizer, preset.clip_grad)
        skipped_steps += skipped
    batches.close()
    model.eval()

    if processes > 1:  # running statistics are each process's own
        for buffer in network.trained.buffers():
            broadcast(buffer)
    return _complaints(int(skipped_steps), preset)


def rate_of(step: int, preset: Preset) -> float:
    """The learning rate of update `step`, from 0."""
    return decayed_rate(
        step,
        preset.iterations,
        preset.lr,
        shape=preset.shape,
        warmup=preset.warmup,
        start=preset.warmup_start,
        final=preset.final,
        shifted=preset.shifted,
    )


def share_of(preset: Preset, network: Network, accelerator: Accelerator) -> int:
    """Images of an update in one process."""
    share, rest = divmod(preset.batch, accelerator.num_processes)
    if rest:
        raise InputError(
            f"{preset.name}: a batch of {preset.batch} cannot be shared by {accelerator.num_processes} processes evenly"
        )
    normed = [m for m in network.head.modules() if isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    if preset.head == "upernet" and share == 1 and normed:
        raise InputError(f"{preset.name}: one image a process has no batch statistics where it is pooled to one pixel")
    return share


def parameter_groups(network: Network, preset: Preset) -> list[dict[str, Any]]:
    """The optimiser's groups: rates by depth, weight decay by the preset's rule.

    The encoder's by `Encoder.param_groups`: position embedding, class token and patch embedding
    layer_decay ** (L + 1), block i layer_decay ** (L - i). Position embedding and class token take weight decay like
    the rest, unless the preset gives them a rate of their own: then they take none.
    """
    groups: list[dict[str, Any]] = [{"params": list(network.head.parameters()), "lr_scale": 1.0}]
    own: list[nn.Parameter] = []
    if not preset.frozen:
        encoder = network.backbone.encoder
        if preset.positions_rate is not None:
            found = (getattr(encoder.network, name, None) for name in ("pos_embed", "cls_token"))
            own = [p for p in found if isinstance(p, nn.Parameter) and p.requires_grad]
        for group in encoder.param_groups(preset.layer_decay):
            rest = [p for p in group["params"] if p.requires_grad and not any(p is other for other in own)]
            groups.append({"params": rest, "lr_scale": group["lr_scale"] * preset.backbone_rate})
    positions = [{"params": own, "lr_scale": preset.positions_rate, "weight_decay": 0.0}] if own else []
    return scaled_groups(groups, preset.weight_decay, preset.decay_vectors) + positions


def _complaints(skipped: int, preset: Preset) -> list[str]:
    if not skipped:
        return []
    told = f"{preset.name}: {skipped} of {preset.iterations} steps had a gradient that was not finite"
    if 2 * skipped > preset.iterations:
        raise RunError(f"{told}: nothing was learnt")
    return [f"{told} and were left out"]
