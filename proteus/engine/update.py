"""The finite step: an update that is applied only where the gradient is finite, decided on the device."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from proteus.config import Optimizer
from proteus.engine.shard import own_share, replication, whole


def build_optimizer(module: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """Fused AdamW. Weight decay on all but vectors (biases, norms, LayerScale): timm's rule, and the paper's code."""
    groups = param_groups_weight_decay(module, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def scaled_groups(groups: Iterable[dict[str, Any]], weight_decay: float, decay_vectors: bool) -> list[dict[str, Any]]:
    """Groups that carry an `lr_scale`, with their weight decay: each split in two where vectors take none."""
    split = []
    for group in groups:
        matrices = [p for p in group["params"] if decay_vectors or p.ndim > 1]
        vectors = [p for p in group["params"] if not decay_vectors and p.ndim <= 1]
        split += [group | {"params": matrices, "weight_decay": weight_decay}] if matrices else []
        split += [group | {"params": vectors, "weight_decay": 0.0}] if vectors else []
    return split


def finite_step(
    accelerator: Accelerator, optimizer: AcceleratedOptimizer, clip_grad: float | None
) -> tuple[Tensor, Tensor]:
    """Clip, then step unless the gradient norm is infinite or not a number: (norm, skipped), both on the device.

    The gradient has been reduced over the processes, so they all decide alike; the fused optimiser takes the decision
    as a device flag (`found_inf`), so the host does not wait. In fp16 the loss scaler does the same with its own flag.
    """
    accelerator.unscale_gradients(optimizer)
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(gradients, foreach=True))
    skipped = ~torch.isfinite(norm)
    if clip_grad is not None:
        torch._foreach_mul_(list(map(own_share, gradients)), torch.clamp(clip_grad / (norm + 1e-6), max=1.0))
    if accelerator.scaler is None:
        optimizer.optimizer.found_inf = skipped.float()
        optimizer.optimizer.grad_scale = None
    with replication():
        optimizer.step()
    optimizer.zero_grad()
    return norm, skipped


def set_rate(optimizer: AcceleratedOptimizer, rate: float) -> None:
    """Give every group its learning rate: `rate` times the group's `lr_scale`, 1 where it has none."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
