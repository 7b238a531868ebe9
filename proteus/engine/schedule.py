"""The learning rate as a function of the step."""

import math
from typing import Literal

from proteus.config import Schedule


def learning_rate(step: int, total_steps: int, steps_per_epoch: int, base: float, schedule: Schedule) -> float:
    """Rate of update `step` (from 0): linear warm-up from `warmup_lr`, then cosine to `min_lr`, as timm's scheduler.

    The cosine runs over all steps, warm-up included. With `per: epoch` the rate is that of the epoch's first step.
    Where linear scaling puts `base` below them, `warmup_lr` and `min_lr` are `base`: a rate never climbs at its end.
    """
    first, last = min(schedule.warmup_lr, base), min(schedule.min_lr, base)
    warmup = warmup_steps(schedule, steps_per_epoch)
    if schedule.per == "epoch":
        step -= step % steps_per_epoch
    if step < warmup:
        return first + (base - first) * step / warmup
    return last + 0.5 * (base - last) * (1 + math.cos(math.pi * step / total_steps))


def warmup_steps(schedule: Schedule, steps_per_epoch: int) -> int:
    """Updates of the warm-up."""
    return schedule.warmup_steps or round(schedule.warmup_epochs * steps_per_epoch)


def scaled_rate(lr: float, lr_batch: int | None, global_batch: int) -> float:
    """Linear scaling: `lr` holds for a global batch of `lr_batch` images; None leaves it alone (Goyal et al., 2017)."""
    return lr if lr_batch is None else lr * global_batch / lr_batch


def decayed_rate(
    step: int,
    total_steps: int,
    base: float,
    *,
    shape: Literal["line", "cosine"],
    warmup: int = 0,
    start: float = 0.0,
    final: float = 0.0,
    shifted: bool = False,
) -> float:
    """Rate of update `step` (from 0) in mmcv's way: a curve from `base` to `final` * base, times a linear warm-up.

    shape:   "line" (mmcv's poly with power 1) or "cosine".
    warmup:  steps over which the factor rises from `start` to 1.
    shifted: the curve begins where the warm-up ends (mmengine), not with the run (mmcv).
    """
    ramp = start + (1 - start) * step / warmup if step < warmup else 1.0
    begin = warmup if shifted else 0
    done = max(step - begin, 0) / (total_steps - begin)
    left = 1 - done if shape == "line" else 0.5 * (1 + math.cos(math.pi * done))
    return base * ramp * (final + (1 - final) * left)
