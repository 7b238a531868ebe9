"""The moving average of the student's weights."""

from timm.utils import ModelEmaV3
from torch import nn

PAPER_DECAY = 0.99996


def build_ema(module: nn.Module, decay: float | str | None, total_steps: int) -> ModelEmaV3 | None:
    """timm's average of `module`; None where the config wants none.

    `auto` is min(0.99996, 1 - 10 / steps): the paper's decay remembers 25,000 steps, and a short run would end with
    its random start still in the average.
    """
    if decay is None:
        return None
    if decay == "auto":
        decay = min(PAPER_DECAY, max(0.0, 1 - 10 / total_steps))
    ema = ModelEmaV3(module, decay=float(decay))
    ema.module.requires_grad_(False)
    return ema
