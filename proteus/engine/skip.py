"""What a skipped step must not leave behind, besides what the optimiser sees to. Nothing here waits for the device."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from proteus.engine.shard import own_share


def fail_together(loss: Tensor) -> Tensor:
    """The loss, with a gradient that is not a number where the loss is not finite.

    The gradient is what processes share, so all of them skip a step of which one has seen such a loss.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class Statistics:
    """The buffers of a module that its forward pass may change: BatchNorm's, and whatever else its state has.

    Most transformers have none, and nothing is done for them.
    """

    def __init__(self, module: nn.Module):
        state = module.state_dict()
        self._names = [name for name, _ in module.named_buffers() if name in state]
        self._module = module
        self._kept: list[tuple[list[Tensor], Tensor]] = []  # (buffers of one type, their values then)

    def keep(self) -> None:
        """Remember them as they are."""
        groups: dict[torch.dtype, list[Tensor]] = {}
        for name in self._names:
            buffer = self._module.get_buffer(name)
            groups.setdefault(buffer.dtype, []).append(buffer)
        self._kept = [(buffers, _joined(buffers)) for buffers in groups.values()]

    @torch.no_grad()
    def restore(self, skipped: Tensor) -> None:
        """Bring them back where `skipped`, a bool on the device, is true."""
        for buffers, before in self._kept:
            chosen = torch.where(skipped, before, _joined(buffers)).split([buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(chosen, buffers, strict=True)])
        self._kept = []


def _joined(buffers: list[Tensor]) -> Tensor:
    """All values in one tensor: a convnet has hundreds of buffers, and each kernel its cost."""
    return torch.cat([buffer.flatten() for buffer in buffers])


@torch.no_grad()
def average_unless(skipped: Tensor, ema: ModelEmaV3, module: nn.Module) -> None:
    """Let the state of `module` into its moving average, to the bit as `ema.update` does, unless a step was skipped.

    skipped: bool on the device.
    """
    averages, values = [], []
    for average, value in zip(ema.module.state_dict().values(), module.state_dict().values(), strict=True):
        if average.is_floating_point():
            averages.append(own_share(average))
            values.append(own_share(value))
        else:
            average.copy_(value)
    weight = torch.where(skipped, 0.0, 1.0 - ema.decay)
    torch._foreach_lerp_(averages, values, [weight.to(average.dtype) for average in averages])
