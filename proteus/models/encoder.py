"""A vision transformer that takes images as they are and returns Features.

The network is timm's; what is added is what timm leaves to its caller: the input convention, the family's
position-embedding rule at other image sizes, the mask token, and one pass over a plain and a masked view.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from proteus.errors import InputError
from proteus.models.features import Features
from proteus.models.position import PositionRule, resize_position_embedding

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Encoder(nn.Module):
    """Images [B, 3, H, W], RGB in [0, 1] or uint8, to Features; H and W are multiples of the patch size.

    Float images are neither clamped nor range-checked: with mean 0 and std 1 they enter the network as they are.

    name, arch:  what `create_model` builds the same network from.
    position:    how the position embedding is resized when the image is not of its native size.
    image_size:  the size the network is meant to be fed, `int` or (h, w).
    """

    _mean: Tensor  # [3, 1, 1]
    _std: Tensor  # [3, 1, 1]

    def __init__(
        self,
        vit: VisionTransformer,
        *,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        position: PositionRule,
        image_size: int | tuple[int, int] | None = None,
        arch: dict[str, Any] | None = None,
    ):
        super().__init__()
        self._frozen = False
        if type(vit) is not VisionTransformer or type(vit.patch_embed) is not PatchEmbed or not _is_plain(vit):
            raise InputError(
                f"{name} is no plain VisionTransformer of timm (it is a {type(vit).__name__}), which an encoder needs"
            )
        self.vit = vit
        self.mask_token = nn.Parameter(torch.zeros(1, vit.embed_dim))
        self.name, self.arch, self.position = name, arch or {}, position
        self.set_convention(mean, std)
        self.embed_dim: int = vit.embed_dim
        self.num_blocks: int = len(vit.blocks)
        self.num_heads: int = vit.blocks[0].attn.num_heads
        self.patch_size: int = vit.patch_embed.patch_size[0]
        self.native_grid: tuple[int, int] = tuple(vit.patch_embed.grid_size)
        self.image_size = image_size or square_or_pair([side * self.patch_size for side in self.native_grid])
        # grid -> the weights it was resized from, their version, the positions
        self._resized: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Features:
        """Features of B images. `mask` [B, N] bool: True patches are replaced by the mask token."""
        x, grid = self._embed(images)  # [B, N, D]
        if mask is not None:
            x = self._masked(x, mask)
        return self._features(self._blocks(x, grid), grid)

    def forward_pair(self, images: Tensor, mask: Tensor) -> tuple[Features, Features]:
        """Features of all B images plain, and of the first M masked by `mask` [M, N], in one pass.

        The patches are embedded once. Tokens never meet across the batch, so each view is as if it went alone.
        """
        x, grid = self._embed(images)  # [B, N, D]
        masked = self._masked(x[: len(mask)], mask)  # [M, N, D]
        tokens = self._blocks(torch.cat([x, masked]), grid)  # [B + M, P + N, D]
        plain, masked = tokens.split([len(x), len(mask)])
        return self._features(plain, grid), self._features(masked, grid)

    def intermediate(self, images: Tensor, layers: int | Sequence[int], norm: bool = True) -> list[Features]:
        """Features after some blocks: the last `layers` ones, or those with the given indices, in that order.

        norm: apply the final norm to each. `cls` is None where the network has no class token.
        """
        wanted = range(-layers, 0) if isinstance(layers, int) else layers
        if not wanted or not all(-self.num_blocks <= layer < self.num_blocks for layer in wanted):
            raise ValueError(f"{self.name} has blocks 0 to {self.num_blocks - 1}; asked for {layers}")
        indices = [layer % self.num_blocks for layer in wanted]
        x, grid = self._embed(images)
        x = self._assemble(x, grid)
        after = {}
        for index, block in enumerate(self.vit.blocks[: max(indices) + 1]):
            x = block(x)
            if index in indices:
                after[index] = self._features(x, grid, norm=norm, pool=False)
        return [after[index] for index in indices]

    def param_groups(self, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """The parameters by depth, each group with the factor `lr_scale` its learning rate is multiplied by.

        With L blocks: the final norm 1, block i layer_decay ** (L - i), everything before the blocks
        layer_decay ** (L + 1) (BEiT's rule, as in the dense protocols).
        """
        depth = self.num_blocks
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if name.startswith("vit.blocks."):
                height = depth - int(name.split(".")[2])
            else:
                height = 0 if name.startswith(("vit.norm.", "vit.fc_norm.", "vit.attn_pool.")) else depth + 1
            groups.setdefault(height, []).append(parameter)
        return [{"params": groups[height], "lr_scale": layer_decay**height} for height in sorted(groups)]

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

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid (h, w) of an image of that many pixels; ValueError where the patch does not divide it."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{self.name}: an image of {height} x {width} pixels is not divided by its patch of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        if images.ndim != 4:
            raise ValueError(f"{self.name} takes images [B, 3, H, W], not {list(images.shape)}")
        grid = self.grid_of(*images.shape[-2:])
        if not images.is_floating_point():
            images = images / 255
        images = (images.float() - self._mean) / self._std
        patch_embed = self.vit.patch_embed
        x = patch_embed.proj(images.to(patch_embed.proj.weight.dtype))  # [B, D, h, w]
        return patch_embed.norm(x.flatten(2).transpose(1, 2)), grid  # [B, N, D]

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)  # [M, N, D]

    def _blocks(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.vit.blocks(self._assemble(x, grid))  # [B, P + N, D]

    def _assemble(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch embeddings [B, N, D] to the blocks' input [B, P + N, D]: prefix tokens first, positions added."""
        vit = self.vit
        prefix = [token for token in (vit.cls_token, vit.reg_token) if token is not None]
        tokens = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        if vit.pos_embed is not None:
            tokens = tokens + self._positions(grid)
        return vit.norm_pre(vit.patch_drop(vit.pos_drop(tokens)))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding [1, P + N, D] at a grid; zero for prefix tokens that have none."""
        vit, embedding = self.vit, self.vit.pos_embed
        cached = self._resized.get(grid)
        if cached and not embedding.requires_grad and cached[0] is embedding and cached[1] == embedding._version:
            return cached[2]
        prefix = 0 if vit.no_embed_class else vit.num_prefix_tokens
        patch = resize_position_embedding(embedding[:, prefix:], self.native_grid, grid, self.position)
        without = embedding.new_zeros(1, vit.num_prefix_tokens - prefix, self.embed_dim)
        positions = torch.cat([without, embedding[:, :prefix], patch], dim=1)
        if not embedding.requires_grad:
            self._resized[grid] = (embedding, embedding._version, positions)
        return positions

    def _features(self, tokens: Tensor, grid: tuple[int, int], norm: bool = True, pool: bool = True) -> Features:
        """The blocks' output [B, P + N, D] as Features."""
        vit = self.vit
        # Networks pooled by averaging keep their final norm for after the pool; tokens get it one by one.
        norms_after_pool = isinstance(vit.norm, nn.Identity)
        final_norm = vit.fc_norm if norms_after_pool else vit.norm
        normed = final_norm(tokens) if norm else tokens
        patch = normed[:, vit.num_prefix_tokens :]
        if vit.has_class_token:
            return Features(normed[:, 0], patch, grid)
        # Without a class token timm's own pooling (attention or average) stands in.
        pooled = vit.forward_head(tokens if norms_after_pool else normed, pre_logits=True) if pool else None
        return Features(pooled, patch, grid)  # type: ignore[arg-type]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._resized.clear()  # moved to another device or precision
        self.set_convention(self.mean, self.std)  # which stays float32: bfloat16 has 8 bits for a mean
        return self


def _is_plain(vit: VisionTransformer) -> bool:
    return all(hasattr(block, "attn") and hasattr(block.attn, "num_heads") for block in vit.blocks)


def square_or_pair(size: Sequence[int]) -> int | tuple[int, int]:
    """An image size [h, w] as users give it: one number where it is square."""
    return size[0] if size[0] == size[1] else (size[0], size[1])
