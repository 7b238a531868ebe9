"""A vision transformer as an encoder: masked as DINOv2 masks, with its family's own position-embedding rule."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import HybridEmbed, PatchDropout, PatchDropoutWithIndices, PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from proteus.errors import InputError
from proteus.models.encoder import Encoder, square_or_pair
from proteus.models.features import Features
from proteus.models.position import PositionRule, resize_position_embedding


class VitEncoder(Encoder):
    """timm's `VisionTransformer` or `Eva` (DINOv3, EVA-02, PE), with a patch embedding of patches or of a convnet.

    H and W are multiples of the patch size. The network is timm's; the way through its parts is here, because the
    mask token comes before the position embedding and the position embedding follows the family's rule.

    position:    how the position embedding is resized when the image is not of its native size.
    native_grid: (h, w) where it lives.
    patch_norm:  whether patch tokens go through the final norm too, as the class token does (not so in OpenAI's CLIP).
    """

    def __init__(
        self,
        network: VisionTransformer | Eva,
        *,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        position: PositionRule,
        patch_norm: bool = True,
        arch: dict[str, Any] | None = None,
    ):
        super().__init__(network, network.embed_dim, name=name, mean=mean, std=std, arch=arch)
        if not len(network.blocks):
            raise InputError(f"{name} has no blocks")
        if isinstance(network.patch_drop, PatchDropout | PatchDropoutWithIndices):
            raise InputError(f"{name}: patch_drop_rate is not for an encoder, whose patches keep their grid")
        self.position, self.patch_norm = position, patch_norm
        self.embed_dim: int = network.embed_dim
        self.num_blocks: int = len(network.blocks)
        embed = network.patch_embed
        self.native_grid: tuple[int, int] = tuple(embed.grid_size)
        self.patch_size: int = embed.feat_ratio(as_scalar=True)  # of a convnet before it, the strides together
        self.image_size = square_or_pair([side * self.patch_size for side in self.native_grid])
        self._checkpoint: Callable[..., Tensor] | None = None
        # grid -> the weights it was resized from, their version, the positions
        self._resized: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}

    def check(self) -> None:
        """InputError where arguments have made a network that does not give Features; on the meta device only."""
        height, width = [side * self.patch_size for side in self.native_grid]
        x = torch.zeros(1, 3, height, width, device="meta")
        with torch.no_grad():
            features = self(x)
        dims = (1, self.embed_dim), (1, self.native_grid[0] * self.native_grid[1], self.embed_dim)
        if (features.cls.shape, features.patch.shape) != dims:
            shapes = f"cls {list(features.cls.shape)} and patch {list(features.patch.shape)}"
            raise InputError(f"{self.name} gives {shapes}, not {' and '.join(str(list(dim)) for dim in dims)}")

    @staticmethod
    def wraps(network: nn.Module) -> bool:
        """Whether this is a network whose parts are known here; a subclass may do anything between them."""
        return type(network) in (VisionTransformer, Eva) and type(network.patch_embed) in (PatchEmbed, HybridEmbed)

    @property
    def cls(self) -> Literal["token", "attention", "average"]:
        """What Features.cls is: the class token, unless the network was trained with attention pooling instead."""
        if self.network.attn_pool is not None:
            return "attention"
        return "token" if self.network.cls_token is not None else "average"

    @property
    def num_heads(self) -> int | None:
        """Attention heads of a block; None for blocks that are not made of one attention."""
        return getattr(getattr(self.network.blocks[0], "attn", None), "num_heads", None)

    @property
    def norm_eps(self) -> float | None:
        """Epsilon of the blocks' norms."""
        return getattr(getattr(self.network.blocks[0], "norm1", None), "eps", None)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Features:
        """As Encoder's."""
        x, grid = self._embed(images)  # [B, N, D]
        if mask is not None:
            x = self._masked(x, mask)
        return self._features(self._blocks(self._assemble(x, grid), grid), grid)

    def forward_pair(self, images: Tensor, mask: Tensor) -> tuple[Features, Features]:
        """As Encoder's. The patches are embedded once; tokens never meet across the batch."""
        x, grid = self._embed(images)  # [B, N, D]
        masked = self._masked(x[: len(mask)], mask)  # [M, N, D]
        tokens = self._blocks(self._assemble(torch.cat([x, masked]), grid), grid)  # [B + M, P + N, D]
        plain, masked = tokens.split([len(x), len(mask)])
        return self._features(plain, grid), self._features(masked, grid)

    def intermediate(self, images: Tensor, layers: int | Sequence[int], norm: bool = True) -> list[Features]:
        """As Encoder's."""
        indices = self._wanted(layers)
        x, grid = self._embed(images)
        tokens: dict[int, Tensor] = {}
        self._blocks(self._assemble(x, grid), grid, keep=tokens, last=max(indices))
        return [self._features(tokens[index], grid, norm=norm, pool=False) for index in indices]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """As Encoder's; ValueError where the patch does not divide the image."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{self.name}: an image of {height} x {width} pixels is not divided by its patch of {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def param_groups(self, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """As Encoder's.

        With L blocks: the final norm 1, block i layer_decay ** (L - i), everything before the blocks
        layer_decay ** (L + 1) (BEiT's rule, as in the dense protocols).
        """
        depth = self.num_blocks
        groups: dict[int, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if name.startswith("network.blocks."):
                height = depth - int(name.split(".")[2])
            else:
                last = name.startswith(("network.norm.", "network.fc_norm.", "network.attn_pool."))
                height = 0 if last else depth + 1
            groups.setdefault(height, []).append(parameter)
        return [{"params": groups[height], "lr_scale": layer_decay**height} for height in sorted(groups)]

    def set_grad_checkpointing(self, enable: bool | Literal["selective"] = True) -> None:
        """As Encoder's."""
        contexts = {"context_fn": _keep_products} if enable == "selective" else {}
        self._checkpoint = partial(checkpoint, use_reentrant=False, **contexts) if enable else None

    def compile_parts(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.network.blocks)

    def blocks(self) -> list[nn.Module]:
        """As Encoder's."""
        return list(self.network.blocks)

    @torch.no_grad()
    def move_to_grid(self, grid: tuple[int, int]) -> None:
        """Resize the position embedding for good: other libraries, whose rules differ, then have nothing to resize."""
        network = self.network
        if network.pos_embed is not None:
            bare = network.num_prefix_tokens if network.no_embed_class else 0  # prefix tokens that have no position
            learns = network.pos_embed.requires_grad
            network.pos_embed = nn.Parameter(self._positions(grid)[:, bare:].clone(), requires_grad=learns)
        self.native_grid = grid

    def _embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch embeddings [B, N, D] of images [B, 3, H, W], and their grid."""
        images = self.normalise(images)
        grid = self.grid_of(*images.shape[-2:])
        embed = self.network.patch_embed
        x = images.to(self.mask_token.dtype)
        if isinstance(embed, HybridEmbed):
            x = embed.backbone(x)
            x = x[-1] if isinstance(x, list | tuple) else x
        x = embed.proj(x).flatten(2).transpose(1, 2)  # [B, N, D]
        return (embed.norm(x) if isinstance(embed, PatchEmbed) else x), grid

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.shape != x.shape[:2]:
            raise ValueError(f"{self.name}: a mask {list(mask.shape)} for patches {list(x.shape[:2])}")
        return torch.where(mask.unsqueeze(-1), self.mask_token.to(x.dtype), x)  # [M, N, D]

    def _assemble(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch embeddings [B, N, D] to the blocks' input [B, P + N, D]: prefix tokens first, positions added."""
        network = self.network
        prefix = [token for token in (network.cls_token, network.reg_token) if token is not None]
        tokens = torch.cat([*(token.expand(x.shape[0], -1, -1) for token in prefix), x], dim=1)
        if network.pos_embed is not None:
            tokens = tokens + self._positions(grid)
        return network.norm_pre(network.pos_drop(tokens))

    def _blocks(
        self, x: Tensor, grid: tuple[int, int], keep: dict[int, Tensor] | None = None, last: int | None = None
    ) -> Tensor:
        """The blocks' output [B, P + N, D]; `keep` is given each block's, and none after block `last` is computed."""
        rope = self._rope(grid)
        for index, block in enumerate(self.network.blocks):
            options: dict[str, Any] = {} if rope is None else {"rope": rope[index] if self._rope_of_block else rope}
            if self._checkpoint and torch.is_grad_enabled():
                x = self._checkpoint(block, x, **options)
            else:
                x = block(x, **options)
            if keep is not None:
                keep[index] = x
            if index == last:
                break
        return x

    @property
    def _rope_of_block(self) -> bool:
        return getattr(self.network, "rope_mixed", False)

    def _rope(self, grid: tuple[int, int]) -> Tensor | None:
        """Rotary position embedding of the patches [N, dim], or one for each block; None where there is none."""
        rope = getattr(self.network, "rope", None)
        return None if rope is None else rope.get_embed(shape=grid)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embedding [1, P + N, D] at a grid; zero for prefix tokens that have none."""
        network, embedding = self.network, self.network.pos_embed
        # A compiler cannot follow versions, and inference tensors have none.
        keeps = not (embedding.requires_grad or torch.compiler.is_compiling() or embedding.is_inference())
        cached = self._resized.get(grid) if keeps else None
        if cached and cached[0] is embedding and cached[1] == embedding._version:
            return cached[2]
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        patch = resize_position_embedding(embedding[:, prefix:], self.native_grid, grid, self.position)
        without = embedding.new_zeros(1, network.num_prefix_tokens - prefix, self.embed_dim)
        positions = torch.cat([without, embedding[:, :prefix], patch], dim=1)
        if keeps:
            self._resized[grid] = (embedding, embedding._version, positions)
        return positions

    def _features(self, tokens: Tensor, grid: tuple[int, int], norm: bool = True, pool: bool = True) -> Features:
        """The blocks' output [B, P + N, D] as Features."""
        network, prefix = self.network, self.network.num_prefix_tokens
        # Networks pooled by averaging keep their final norm for after the pool; tokens get it one by one.
        norms_after_pool = isinstance(network.norm, nn.Identity)
        final_norm = network.fc_norm if norms_after_pool else network.norm
        if norm and not self.patch_norm:
            return Features(final_norm(tokens[:, 0]), tokens[:, prefix:], grid)
        normed = final_norm(tokens) if norm else tokens
        patch = normed[:, prefix:]
        if self.cls == "token" or (not pool and network.cls_token is not None):
            return Features(normed[:, 0], patch, grid)
        # timm's own pooling stands in.
        pooled = network.forward_head(tokens if norms_after_pool else normed, pre_logits=True) if pool else None
        return Features(pooled, patch, grid)  # type: ignore[arg-type]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._resized.clear()  # moved to another device or precision
        return self


def _keep_products():
    """Contexts of a checkpoint that computes only element by element again (norms, GELU, LayerScale)."""
    return create_selective_checkpoint_contexts(_keep_product)


def _keep_product(_context, op, *_, **__) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._flash_attention_forward.default,
    _aten._efficient_attention_forward.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}
