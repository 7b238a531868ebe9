"""A network as an encoder without a look inside: images go in, tokens or a map come out."""

import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from proteus.errors import InputError
from proteus.models.encoder import Encoder
from proteus.models.features import Features

LARGE = 256  # pixels, a multiple of every usual stride


class OpaqueEncoder(Encoder):
    """Convnets, hierarchical transformers, and a user's own network.

    The network returns Features, tokens [B, P + N, D] or a map [B, D, h, w]. Width and grid are what a dry run
    returns. A map's mean stands in for the class token. Masked patches are masked in the pixels: the cells of the
    patch grid are filled with a learned colour.

    own: the user's network, called as it is; its tokens begin with a class token. timm's are asked for their features.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: int | tuple[int, int],
        arch: dict[str, Any] | None = None,
        own: bool = False,
    ):
        super().__init__(network, 3, name=name, mean=mean, std=std, arch=arch)
        self._layout = torch.contiguous_format
        self._own, self._pools = own, hasattr(network, "forward_head")
        self.image_size = image_size
        self.num_blocks = len(getattr(network, "feature_info", ())) if not own else 0
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        try:
            features = self._dry_run(height, width, freeze_unused=True)
        except (Exception, SystemExit) as error:  # whatever the network may raise
            raise InputError(f"{name} does not take images of {height} x {width}: {_one_line(error)}") from error
        self.embed_dim = features.patch.shape[-1]
        self.patch_size = self._stride(height // features.grid[0])

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Features:
        """As Encoder's."""
        x = self.normalise(images)  # [B, 3, H, W]
        if mask is not None:
            x = self._masked(x, mask)
        return self._features(x)

    def forward_pair(self, images: Tensor, mask: Tensor) -> tuple[Features, Features]:
        """As Encoder's. Both views share a batch, and its statistics where the network has BatchNorm."""
        x = self.normalise(images)  # [B, 3, H, W]
        both = self._features(torch.cat([x, self._masked(x[: len(mask)], mask)]))
        views = zip(both.cls.split([len(x), len(mask)]), both.patch.split([len(x), len(mask)]), strict=True)
        plain, masked = (Features(cls, patch, both.grid) for cls, patch in views)
        return plain, masked

    def intermediate(self, images: Tensor, layers: int | Sequence[int], norm: bool = True) -> list[Features]:
        """As Encoder's: maps of timm's stages, each in its own width and grid."""
        if not hasattr(self.network, "forward_intermediates") or self._own:
            raise ValueError(f"{self.name} does not show what is between its input and its output")
        indices = self._wanted(layers)
        x = self.normalise(images).to(self._dtype)
        maps = self.network.forward_intermediates(x, sorted(set(indices)), norm=norm, intermediates_only=True)
        by_index = dict(zip(sorted(set(indices)), maps, strict=True))  # index -> [B, d, h, w]
        return [Features(None, _flat(by_index[index]), tuple(by_index[index].shape[-2:])) for index in indices]  # type: ignore[arg-type]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """As Encoder's."""
        if (height, width) not in self._grids:
            try:
                self._dry_run(height, width)
            except Exception as error:
                reason = _one_line(error)
                raise ValueError(f"{self.name} does not take images of {height} x {width}: {reason}") from None
        return self._grids[height, width]

    def param_groups(self, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """As Encoder's, by timm's order of the network's layers."""
        if not hasattr(self.network, "group_matcher"):
            if layer_decay != 1:
                raise ValueError(f"{self.name} does not say which layer comes first: layer_decay needs that")
            return [{"params": list(self.parameters()), "lr_scale": 1.0}]
        depth = group_parameters(self.network, self.network.group_matcher(coarse=False), reverse=True)
        groups: dict[int, list[nn.Parameter]] = {max(depth.values()): [self.mask_token]}
        for name, parameter in self.network.named_parameters():
            groups.setdefault(max(depth.values()) - depth[name], []).append(parameter)
        return [{"params": groups[height], "lr_scale": layer_decay**height} for height in sorted(groups)]

    def set_grad_checkpointing(self, enable: bool | Literal["selective"] = True) -> None:
        """As Encoder's; InputError for a network that cannot."""
        if enable == "selective":
            raise InputError(f"{self.name}: grad_checkpointing=selective is for transformers; true is for any network")
        try:
            self.network.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError):
            raise InputError(f"{self.name} has no gradient checkpointing") from None

    def use_channels_last(self) -> None:
        """As Encoder's."""
        self.network.to(memory_format=torch.channels_last)
        self._layout = torch.channels_last

    def compile_parts(self) -> list[nn.Module]:
        """The network's outermost parts."""
        return list(self.network.children())

    @property
    def _dtype(self) -> torch.dtype:
        return self.mask_token.dtype

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """Normalised images [M, 3, H, W] with the cells of mask [M, N] filled."""
        size = (x.shape[-2], x.shape[-1])
        cells = mask.unflatten(1, self.grid_of(*size)).unsqueeze(1)  # [M, 1, h, w]
        pixels = F.interpolate(cells.float(), size=size, mode="nearest") > 0  # [M, 1, H, W]
        return torch.where(pixels, self.mask_token.to(x.dtype).view(1, 3, 1, 1), x)

    def _features(self, x: Tensor) -> Features:
        """Normalised images [B, 3, H, W] through the network."""
        network, aspect = self.network, x.shape[-2] / x.shape[-1]
        x = x.to(self._dtype).contiguous(memory_format=self._layout)
        out = network(x) if self._own else network.forward_features(x)
        if isinstance(out, Features):
            return out
        if not isinstance(out, Tensor) or out.ndim not in (3, 4):
            shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"{self.name} returns {shape}: not Features, tokens [B, 1 + N, D] or a map [B, D, h, w]")
        normed = self._norm()(out)
        if out.ndim == 3:
            patch, grid = self._read_tokens(normed, aspect)
        else:
            if str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC"):
                normed = normed.permute(0, 3, 1, 2)
            patch, grid = _flat(normed), (normed.shape[2], normed.shape[3])
        return Features(self._pooled(out, normed, patch), patch, grid)

    def _pooled(self, out: Tensor, normed: Tensor, patch: Tensor) -> Tensor:
        """What stands for the whole image: timm's own pooling if it is as wide as the patches, else their mean."""
        if self._own:
            return normed[:, 0] if normed.ndim == 3 else patch.mean(dim=1)
        if self._pools:
            pooled = self.network.forward_head(out, pre_logits=True)
            self._pools = pooled.shape == patch[:, 0].shape  # some go on to another width (MobileNet)
        return pooled if self._pools else patch.mean(dim=1)

    def _norm(self) -> nn.Module:
        """The norm that timm keeps for behind the pool, in the head (ConvNeXt) or beside it: each patch gets it too."""
        network = self.network
        head_norm = getattr(getattr(network, "head", None), "norm", None)
        if isinstance(head_norm, nn.Module) and not self._own:
            return head_norm
        behind_pool = isinstance(getattr(network, "norm", None), nn.Identity) and hasattr(network, "fc_norm")
        return network.fc_norm if behind_pool and not self._own else nn.Identity()

    def _read_tokens(self, tokens: Tensor, aspect: float) -> tuple[Tensor, tuple[int, int]]:
        """The patches of tokens [B, P + N, D], and their grid."""
        patch = tokens[:, self._prefix(tokens.shape[1], aspect) :]
        grid = _grid_of(patch.shape[1], aspect)
        if grid is None or tokens.shape[1] == 1:
            raise InputError(
                f"{self.name} returns {list(tokens.shape)}: of these tokens no grid of patches can be made"
            )
        return patch, grid

    def _prefix(self, tokens: int, aspect: float) -> int:
        """How many of the tokens come before the patches."""
        declared = getattr(self.network, "num_prefix_tokens", None)
        if declared is not None:
            return declared
        return 1 if self._own or _grid_of(tokens, aspect) is None else 0

    def _stride(self, otherwise: int) -> int:
        """Pixels to a cell, at a size that shows it (of 16 pixels a stride of 32 makes one cell, too)."""
        with contextlib.suppress(Exception):  # a network of one size only
            return LARGE // self._dry_run(LARGE, LARGE).grid[0]
        stages = getattr(self.network, "feature_info", None)
        return stages[-1]["reduction"] if isinstance(stages, list) and stages else otherwise

    def _dry_run(self, height: int, width: int, freeze_unused: bool = False) -> Features:
        """Features of one image in evaluation mode; of timm's networks in shapes alone, with nothing computed.

        freeze_unused: freeze the parameters that Features do not depend on (a classifier's last layers). They cannot
        learn, and data-parallel training stops at a parameter that gets no gradient.
        """
        from torch._subclasses.fake_tensor import FakeTensorMode  # a second of imports that a ViT does not need

        training = self.training
        logger = logging.getLogger("torch._subclasses.fake_tensor")  # it tells of sizes a network does not take
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        self.eval()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) if not self._own else contextlib.nullcontext():
                with torch.set_grad_enabled(freeze_unused):
                    out = self._features(torch.zeros(1, 3, height, width, device=self.mask_token.device))
                _check(out)
                if freeze_unused:
                    _freeze_unused(self.network, out)
        finally:
            self.train(training)
            logger.setLevel(level)
        self._grids[height, width] = out.grid
        return out


def _check(features: Features) -> None:
    """That a network's Features of one image are what they are said to be."""
    count, dim = features.grid[0] * features.grid[1], features.cls.shape[-1]
    if features.cls.shape != (1, dim) or features.patch.shape != (1, count, dim) or not count or not dim:
        raise InputError(
            f"of one image, cls is {list(features.cls.shape)} and patch {list(features.patch.shape)} on a grid "
            f"{tuple(features.grid)}: not [1, D] and [1, h * w, D]"
        )
    if not (features.cls.is_floating_point() and features.patch.is_floating_point()):
        raise InputError("tokens are floating-point numbers")


def _freeze_unused(network: nn.Module, features: Features) -> None:
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    total = features.cls.sum() + features.patch.sum()
    if not parameters or not total.requires_grad:
        return
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            parameter.requires_grad_(False)


def _flat(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # [B, D, h, w] to [B, h * w, D]


def _grid_of(tokens: int, aspect: float) -> tuple[int, int] | None:
    """The grid (h, w) of that many patches whose sides are as the image's, height / width; None where none is."""
    height = max(1, round((tokens * aspect) ** 0.5))
    width = round(height / aspect)
    return (height, width) if height * width == tokens else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
