"""What every encoder does, whatever network it holds: take images as they are and return Features.

An encoder adds what a library of networks leaves to its caller: the input convention, masking, and one pass over a
plain and a masked view. `vit` and `opaque` hold its two kinds.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from proteus.errors import InputError
from proteus.models.features import Features

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Encoder(nn.Module, ABC):
    """Images [B, 3, H, W], RGB in [0, 1] or uint8, to Features.

    Float images are neither clamped nor range-checked: with mean 0 and std 1 they enter the network as they are.

    network:     the wrapped network; its state dict is what `save_encoder` writes.
    name, arch:  what `create_model` builds the same network from.
    embed_dim:   D, the width of class and patch tokens.
    patch_size:  pixels a side that one patch token stands for: a patch, or a convnet's stride.
    num_blocks:  how many blocks (a convnet: stages) `intermediate` can look behind.
    image_size:  the size the network is meant to be fed, `int` or (h, w).
    mask_token:  what stands in for a masked patch, learned: [1, D], or [1, 3] where input cells are masked.
    """

    _mean: Tensor  # [3, 1, 1]
    _std: Tensor  # [3, 1, 1]

    network: Any  # an nn.Module, whose attributes are its class's own
    embed_dim: int
    patch_size: int
    num_blocks: int
    image_size: int | tuple[int, int]

    def __init__(
        self,
        network: nn.Module,
        mask_width: int,
        *,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        arch: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._frozen = False
        self.network = network
        self.mask_token = nn.Parameter(torch.zeros(1, mask_width))
        self.name, self.arch = name, arch or {}
        self.set_convention(mean, std)

    @abstractmethod
    def forward(self, images: Tensor, mask: Tensor | None = None) -> Features:
        """Features of B images. `mask` [B, N] bool: True patches are replaced by the mask token."""

    @abstractmethod
    def forward_pair(self, images: Tensor, mask: Tensor) -> tuple[Features, Features]:
        """Features of all B images plain, and of the first M masked by `mask` [M, N], in one pass."""

    @abstractmethod
    def intermediate(self, images: Tensor, layers: int | Sequence[int], norm: bool = True) -> list[Features]:
        """Features after some blocks: the last `layers` ones, or those with the given indices, in that order.

        norm: apply the final norm to each. `cls` is None where the network has no class token.
        """

    @abstractmethod
    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (h, w) of an image of that many pixels; ValueError where the network cannot take it."""

    @abstractmethod
    def param_groups(self, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """The parameters by depth, each group with the factor `lr_scale` its learning rate is multiplied by."""

    @abstractmethod
    def set_grad_checkpointing(self, enable: bool | Literal["selective"] = True) -> None:
        """Keep only the blocks' inputs for backward and compute their insides again: less memory, a third more work.

        selective: keep the outputs of matrix products and attention as well, and compute only what is cheap again.
        """

    def use_channels_last(self) -> None:
        """Lay convolutions out as a GPU's tensor cores want them, [B, H, W, C] in memory; transformers have none.

        Not for a CPU: torch 2.15 gains little there, and crashes in the backward of some grouped convolutions.
        """

    @abstractmethod
    def compile_parts(self) -> list[nn.Module]:
        """The modules worth compiling one by one."""

    def blocks(self) -> list[nn.Module]:
        """The modules that hold most weights and are computed one after the other; empty where none are known."""
        return []

    def freeze(self) -> "Encoder":
        """No parameter takes a gradient, and `train()` no longer changes the mode: what a teacher is."""
        self.requires_grad_(False).eval()
        self._frozen = True
        return self

    def train(self, mode: bool = True) -> "Encoder":
        """As any module's, but a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self._frozen)

    def set_convention(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Replace the input convention: three values a piece, of RGB in [0, 1]."""
        if len(mean) != 3 or len(std) != 3:
            raise InputError(f"mean and std take three values, one a channel, not {mean!r} and {std!r}")
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        device = self.mask_token.device
        self.register_buffer("_mean", torch.tensor(self.mean, device=device).view(3, 1, 1), persistent=False)
        self.register_buffer("_std", torch.tensor(self.std, device=device).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] as the network wants them, in float32."""
        if images.ndim != 4:
            raise ValueError(f"{self.name} takes images [B, 3, H, W], not {list(images.shape)}")
        if not images.is_floating_point():
            images = images / 255
        return (images.float() - self._mean) / self._std

    def _wanted(self, layers: int | Sequence[int]) -> list[int]:
        """The indices that `intermediate` was asked for."""
        wanted = range(-layers, 0) if isinstance(layers, int) else layers
        if not wanted or not all(-self.num_blocks <= layer < self.num_blocks for layer in wanted):
            raise ValueError(f"{self.name} has blocks 0 to {self.num_blocks - 1}; asked for {layers}")
        return [layer % self.num_blocks for layer in wanted]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.set_convention(self.mean, self.std)  # which stays float32: bfloat16 has 8 bits for a mean
        return self


def square_or_pair(size: Sequence[int]) -> int | tuple[int, int]:
    """An image size [h, w] as users give it: one number where it is square."""
    return size[0] if size[0] == size[1] else (size[0], size[1])
