"""The zoo: what is known of each network, and how it is built.

A fact that matters to the numbers (patch size, head count, norm epsilon, position rule, input convention) stands in
an entry here and nowhere else.
"""

import fnmatch
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from proteus.errors import InputError, nearest
from proteus.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder
from proteus.models.position import DINOV2, DINOV2_REGISTERS, TIMM, PositionRule

DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}{1}_pretrain.pth"


@dataclass(frozen=True)
class Entry:
    """A vision transformer's facts. `image_size` is the native one: where the position embedding lives."""

    width: int
    depth: int
    heads: int
    patch_size: int = 14
    image_size: int | tuple[int, int] = 518
    # Output width of the MLP's first layer, which SwiGLU halves; None: 4 x width.
    mlp_hidden: int | None = None
    swiglu: bool = False
    registers: int = 0
    embed_prefix: bool = True  # class token and registers have a position embedding of their own
    layer_scale: float | None = 1e-5
    norm_eps: float = 1e-6
    position: PositionRule = DINOV2
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    url: str | None = None

    def build(self, name: str, image_size: int | tuple[int, int] | None = None, drop_path: float = 0.0) -> Encoder:
        """The network with random weights; `image_size` replaces the native one."""
        # int(width * ratio) must give the hidden width back, whatever the division rounds to.
        ratio = 4.0 if self.mlp_hidden is None else (self.mlp_hidden + 0.5) / self.width
        vit = VisionTransformer(
            img_size=image_size or self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=ratio,
            init_values=self.layer_scale,
            reg_tokens=self.registers,
            no_embed_class=not self.embed_prefix,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=self.norm_eps),
            num_classes=0,
            **({"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU} if self.swiglu else {}),
        )
        arch = {"drop_path": drop_path} if drop_path else {}
        return Encoder(vit, name=name, mean=self.mean, std=self.std, position=self.position, arch=arch)


def _dinov2() -> dict[str, Entry]:
    sizes = {
        "s": Entry(384, 12, 6),
        "b": Entry(768, 12, 12),
        "l": Entry(1024, 24, 16),
        "g": Entry(1536, 40, 24, mlp_hidden=8192, swiglu=True),
    }
    entries = {}
    for size, entry in sizes.items():
        name = f"dinov2_vit{size}14"
        entries[name] = replace(entry, url=DINOV2_URL.format(name, ""))
        entries[name + "_reg"] = replace(
            entry, registers=4, embed_prefix=False, position=DINOV2_REGISTERS, url=DINOV2_URL.format(name, "_reg4")
        )
    return entries


def _proteus() -> dict[str, Entry]:
    """DINOv2's network at 224 pixels, without registers, LayerScale starting at 1 (papers: section A1)."""
    sizes = {"t": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
    return {f"proteus_vit{s}14": Entry(*shape, image_size=224, layer_scale=1.0) for s, shape in sizes.items()}


ENTRIES: dict[str, Entry] = _dinov2() | _proteus()


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo that match a shell pattern. `timm/<name>` takes any plain vision transformer of timm besides."""
    return sorted(fnmatch.filter(ENTRIES, pattern))


def is_known(name: str) -> bool:
    """Whether a network of that name can be built."""
    return name in ENTRIES or (name.startswith("timm/") and timm.is_model(name.removeprefix("timm/")))


def check_name(name: str) -> None:
    """Raise InputError, with the nearest valid name, where no network of that name can be built."""
    if not is_known(name):
        valid = [f"timm/{vit}" for vit in timm.list_models("vit_*")] if name.startswith("timm/") else ENTRIES
        raise InputError(f"unknown model {name!r}{nearest(name, valid)}")


def build(name: str, image_size: int | tuple[int, int] | None = None, **arch: Any) -> Encoder:
    """The named network with random weights. `arch`: `drop_path`, or timm's arguments for `timm/...` names."""
    check_name(name)
    try:
        return (
            _build_timm(name, image_size, arch)
            if name.startswith("timm/")
            else ENTRIES[name].build(name, image_size, **arch)
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in {"image_size": image_size, **arch}.items())
        raise InputError(f"{name} cannot be built with {given}: {' '.join(str(error).split())}") from error


def _build_timm(name: str, image_size: int | tuple[int, int] | None, arch: dict[str, Any]) -> Encoder:
    options = {"drop_path_rate" if key == "drop_path" else key: value for key, value in arch.items()}
    if image_size is not None:
        options["img_size"] = image_size
    if "norm_eps" in options:
        options["norm_layer"] = partial(nn.LayerNorm, eps=options.pop("norm_eps"))
    vit = timm.create_model(name.removeprefix("timm/"), num_classes=0, **options)
    cfg = vit.pretrained_cfg
    # timm carries DINOv2 without registers under its own position rule, which is not the one it was trained with.
    position = DINOV2 if "dinov2" in name and "reg" not in name else TIMM
    return Encoder(vit, name=name, mean=cfg["mean"], std=cfg["std"], position=position, arch=arch)
