"""What is known of each network: data, nothing else.

A fact that matters to the numbers (activation, final norm, what stands in for the class token, position rule, input
convention) stands in an entry here and nowhere else. timm builds the networks and could be wrong, or change its mind:
a test holds every entry against what timm builds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from proteus.models.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from proteus.models.position import DINOV2, DINOV2_REGISTERS, PE, RADIO, RADIO_ALIGNED, TIMM, PositionRule

HALF = (0.5, 0.5, 0.5)
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)


@dataclass(frozen=True)
class Entry:
    """A network's facts.

    timm, tag:   the architecture in timm, and the tag of its weights on the hub (None: there are none).
    width:       D of the tokens.
    depth:       blocks; a convnet's stages.
    heads:       of the blocks' attention; None where there is none.
    patch_size:  pixels a side of one patch token: a patch, or a convnet's stride.
    image_size:  the native one, in pixels; where there is a learned position embedding, it lives at this size.
    activation:  of the MLP.
    cls:         what is Features.cls: the class token, attention pooling, or the average of the patches.
    prefix:      tokens before the patches, class token and registers.
    final_norm:  the tokens it covers: all, the class token alone, or there is none.
    norm_eps:    of the blocks' norms; None for convnets.
    position:    how the position embedding is resized; None where it is computed (rotary) or there is none.
    mean, std:   the input convention, of RGB in [0, 1].
    licence:     of the weights.
    official:    their publisher's file, and its checksum where it is known.
    args:        what timm's builder is told beyond its own defaults.
    """

    timm: str
    tag: str | None
    width: int
    depth: int
    heads: int | None
    patch_size: int
    image_size: int
    activation: Literal["gelu", "quickgelu", "gelu_tanh", "swiglu"] = "gelu"
    cls: Literal["token", "attention", "average"] = "token"
    prefix: int = 1
    final_norm: Literal["all", "cls", "none"] = "all"
    norm_eps: float | None = 1e-6
    position: PositionRule | None = TIMM
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    licence: str = "apache-2.0"
    official: str | None = None
    sha256: str | None = None
    args: dict[str, Any] = field(default_factory=dict)


_entry: Callable[..., Entry] = Entry  # a row's shape is spread over several arguments, which mypy cannot follow


def _dinov2() -> dict[str, Entry]:
    """timm's own position rule is not that of the networks without registers: 2 to 3 % off in the features at 224."""
    shapes = {
        "s": ("small", 384, 12, 6),
        "b": ("base", 768, 12, 12),
        "l": ("large", 1024, 24, 16),
        "g": ("giant", 1536, 40, 24),
    }
    url = "https://dl.fbaipublicfiles.com/dinov2/{0}/{0}{1}_pretrain.pth"
    entries = {}
    for size, (word, *shape) in shapes.items():
        name = f"dinov2_vit{size}14"
        entry = _entry(f"vit_{word}_patch14_dinov2", "lvd142m", *shape, 14, 518, position=DINOV2)
        entry = replace(entry, official=url.format(name, ""), activation="swiglu" if size == "g" else "gelu")
        entries[name] = entry
        entries[f"{name}_reg"] = replace(
            entry,
            timm=f"vit_{word}_patch14_reg4_dinov2",
            prefix=5,
            position=DINOV2_REGISTERS,
            official=url.format(name, "_reg4"),
        )
    return entries


def _proteus() -> dict[str, Entry]:
    """DINOv2's network at 224 pixels, without registers, LayerScale starting at 1 (papers: section A1)."""
    sizes = {"t": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
    entries = {}
    for size, (width, depth, heads) in sizes.items():
        args = {"embed_dim": width, "depth": depth, "num_heads": heads, "init_values": 1.0}
        timm = f"vit_{'large' if size == 'l' else 'base' if size == 'b' else 'small'}_patch14_dinov2"
        entries[f"proteus_vit{size}14"] = _entry(timm, None, width, depth, heads, 14, 224, position=DINOV2, args=args)
    return entries


def _clip() -> dict[str, Entry]:
    """OpenAI's: QuickGELU (timm's names without `quickgelu` build GELU), and ln_post on the class token alone."""
    base, large, huge = (768, 12, 12, 16, 224), (1024, 24, 16, 14, 224), (1280, 32, 16, 14, 224)
    facts: dict[str, Any] = {"norm_eps": 1e-5, "mean": CLIP_MEAN, "std": CLIP_STD}
    url = "https://openaipublic.azureedge.net/clip/models/"
    openai = {
        "clip_vitb16": (
            _entry("vit_base_patch16_clip_quickgelu_224", "openai", *base, **facts),
            "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        ),
        "clip_vitl14": (
            _entry("vit_large_patch14_clip_quickgelu_224", "openai", *large, **facts),
            "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        ),
        "clip_vitl14_336": (
            _entry("vit_large_patch14_clip_quickgelu_336", "openai", *large[:-1], 336, **facts),
            "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02/ViT-L-14-336px.pt",
        ),
    }
    entries = {
        name: replace(
            entry, activation="quickgelu", final_norm="cls", official=url + file, sha256=file.partition("/")[0]
        )
        for name, (entry, file) in openai.items()
    }
    b16, l14, h14 = "vit_base_patch16_clip_224", "vit_large_patch14_clip_224", "vit_huge_patch14_clip_224"
    quick_l14, quick_h14 = (name.replace("clip_", "clip_quickgelu_") for name in (l14, h14))
    apple: dict[str, Any] = {"licence": "apple-ascl"}
    return entries | {
        "openclip_vitb16_laion2b": _entry(b16, "laion2b", *base, **facts),
        "openclip_vitb16_datacompxl": _entry(b16, "datacompxl", *base, **facts),
        "openclip_vitb16_dfn2b": _entry(b16, "dfn2b", *base, **facts, **apple),
        "openclip_vitl14_laion2b": _entry(l14, "laion2b", *large, norm_eps=1e-5, mean=HALF, std=HALF),  # and not CLIP's
        "openclip_vitl14_datacompxl": _entry(l14, "datacompxl", *large, **facts),
        "openclip_vitl14_dfn2b": _entry(quick_l14, "dfn2b", *large, activation="quickgelu", **facts, **apple),
        "openclip_vith14_laion2b": _entry(h14, "laion2b", *huge, **facts),
        "openclip_vith14_dfn5b": _entry(quick_h14, "dfn5b", *huge, activation="quickgelu", **facts, **apple),
    }


def _synclr() -> dict[str, Entry]:
    """Its evaluation normalises with CLIP's statistics, its published training code with ImageNet's."""
    url = "https://www.dropbox.com/scl/fi/{}&dl=1"
    facts: dict[str, Any] = {"position": DINOV2, "mean": CLIP_MEAN, "std": CLIP_STD}
    return {
        "synclr_vitb16": _entry(
            "vit_base_patch16_224", None, 768, 12, 12, 16, 224, **facts,
            official=url.format("ogktmm26yojhlgsbwqqti/synclr_vit_b_16.pth?rlkey=2bn6j4upcrqy93d5b9fgrrj02"),
        ),
        "synclr_vitl14": _entry(
            "vit_large_patch14_224", None, 1024, 24, 16, 14, 224, **facts,
            official=url.format("al5a8d045ir0zsqo4ogpg/synclr_vit_l_14.pth?rlkey=ksyktxamcs17zqr6wha6ekdp4"),
        ),
    }  # fmt: skip


def _dinov3() -> dict[str, Entry]:
    facts: dict[str, Any] = {"prefix": 5, "norm_eps": 1e-5, "position": None, "licence": "dinov3-license"}
    swiglu: dict[str, Any] = {"activation": "swiglu", **facts}
    satellite: dict[str, Any] = {"mean": SATELLITE_MEAN, "std": SATELLITE_STD}
    vit = "vit_{}_patch16_dinov3"
    entries = {
        "dinov3_vits16": _entry(vit.format("small"), "lvd1689m", 384, 12, 6, 16, 256, **facts),
        "dinov3_vits16plus": _entry(vit.format("small_plus"), "lvd1689m", 384, 12, 6, 16, 256, **swiglu),
        "dinov3_vitb16": _entry(vit.format("base"), "lvd1689m", 768, 12, 12, 16, 256, **facts),
        "dinov3_vitl16": _entry(vit.format("large"), "lvd1689m", 1024, 24, 16, 16, 256, **facts),
        "dinov3_vitl16_sat": _entry(vit.format("large"), "sat493m", 1024, 24, 16, 16, 256, **facts, **satellite),
        "dinov3_vith16plus": _entry(vit.format("huge_plus"), "lvd1689m", 1280, 32, 20, 16, 256, **swiglu),
        "dinov3_vit7b16": _entry(vit.format("7b"), "lvd1689m", 4096, 40, 32, 16, 256, **swiglu),
        "dinov3_vit7b16_sat": _entry(vit.format("7b"), "sat493m", 4096, 40, 32, 16, 256, **swiglu, **satellite),
    }
    for size, width in {"tiny": 768, "small": 768, "base": 1024, "large": 1536}.items():
        entries[f"dinov3_convnext_{size}"] = _entry(
            f"convnext_{size}", "dinov3_lvd1689m", width, 4, None, 32, 224,
            cls="average", prefix=0, norm_eps=None, position=None, licence="dinov3-license",
        )  # fmt: skip
    return entries


def _siglip2() -> dict[str, Entry]:
    """No class token: attention pooling stands in. Its GELU is the tanh form; timm builds the exact one for some."""
    shapes = {
        "vitb16": ("base_patch16", 768, 12, 12, 16, (224, 256, 384, 512)),
        "vitb32": ("base_patch32", 768, 12, 12, 32, (256,)),
        "vitl16": ("large_patch16", 1024, 24, 16, 16, (256, 384, 512)),
        "so400m14": ("so400m_patch14", 1152, 27, 16, 14, (224, 378)),
        "so400m16": ("so400m_patch16", 1152, 27, 16, 16, (256, 384, 512)),
        "giantopt16": ("giantopt_patch16", 1536, 40, 16, 16, (256, 384)),
    }
    return {
        f"siglip2_{short}_{size}": _entry(
            f"vit_{word}_siglip_{size}", "v2_webli", *shape, size,
            activation="gelu_tanh",
            args={"act_layer": "gelu_tanh"},
            cls="attention", prefix=0, mean=HALF, std=HALF,
        )
        for short, (word, *shape, sizes) in shapes.items()
        for size in sizes
    }  # fmt: skip


def _eva02() -> dict[str, Entry]:
    """The norm of the masked-image models is what timm calls fc_norm; here every token gets it."""
    facts: dict[str, Any] = {"activation": "swiglu", "mean": CLIP_MEAN, "std": CLIP_STD, "licence": "mit"}
    tiny, small, base, large = (192, 12, 3, 14), (384, 12, 6, 14), (768, 12, 12, 14), (1024, 24, 16, 14)
    return {
        "eva02_vitt14": _entry("eva02_tiny_patch14_224", "mim_in22k", *tiny, 224, **facts),
        "eva02_vits14": _entry("eva02_small_patch14_224", "mim_in22k", *small, 224, **facts),
        "eva02_vitb14": _entry("eva02_base_patch14_224", "mim_in22k", *base, 224, **facts),
        "eva02_vitl14": _entry("eva02_large_patch14_224", "mim_m38m", *large, 224, **facts),
        "eva02_clip_vitb16": _entry("eva02_base_patch16_clip_224", "merged2b", *base[:-1], 16, 224, **facts),
        "eva02_clip_vitl14": _entry("eva02_large_patch14_clip_224", "merged2b", *large, 224, **facts),
        "eva02_clip_vitl14_336": _entry("eva02_large_patch14_clip_336", "merged2b", *large, 336, **facts),
    }


def _mae_dino_sam() -> dict[str, Entry]:
    meta = "https://dl.fbaipublicfiles.com/"
    mae: dict[str, Any] = {"licence": "cc-by-nc-4.0"}
    entries = {
        "mae_vitb16": _entry("vit_base_patch16_224", "mae", 768, 12, 12, 16, 224, **mae),
        "mae_vitl16": _entry("vit_large_patch16_224", "mae", 1024, 24, 16, 16, 224, **mae),
        "mae_vith14": _entry("vit_huge_patch14_224", "mae", 1280, 32, 16, 14, 224, **mae),
    }
    for word, shape, short in (("small", (384, 12, 6), "deitsmall"), ("base", (768, 12, 12), "vitbase")):
        for patch in (16, 8):
            file = f"{meta}dino/dino_{short}{patch}_pretrain/dino_{short}{patch}_pretrain.pth"
            entries[f"dino_vit{word[0]}{patch}"] = _entry(
                f"vit_{word}_patch{patch}_224", "dino", *shape, patch, 224, position=DINOV2, official=file
            )
    # The image encoder with its neck, 256 wide: what SAM's decoder is given.
    # Its norms' epsilon is 1e-6, where timm builds 1e-5.
    sam: dict[str, Any] = {"cls": "average", "prefix": 0, "final_norm": "none", "position": None}
    sam["args"] = {"norm_eps": 1e-6}
    shapes = {"b": ("base", 12, 12, "01ec64"), "l": ("large", 24, 16, "0b3195"), "h": ("huge", 32, 16, "4b8939")}
    for short, (word, depth, heads, digest) in shapes.items():
        entries[f"sam_vit{short}16"] = _entry(
            f"samvit_{word}_patch16", "sa1b", 256, depth, heads, 16, 1024, **sam,
            official=f"{meta}segment_anything/sam_vit_{short}_{digest}.pth",
        )  # fmt: skip
    return entries


def _radio() -> dict[str, Entry]:
    """The features have no final norm, by design. Whether corners align differs between the released versions.

    It has a class token for each of its own teachers, and its published summary puts several of them side by side; the
    class token here is the first.
    """
    facts: dict[str, Any] = {
        "final_norm": "none",
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "licence": "nvidia-open-model-license",
    }
    shapes = {
        "v3_vitb16": ("base_patch16_radio_v3", 768, 12, 12, 8, RADIO_ALIGNED),
        "v3_vitl16": ("large_patch16_radio_v3", 1024, 24, 16, 8, RADIO),
        "v3_vith16": ("huge_patch16_radio_v3", 1280, 32, 16, 8, RADIO_ALIGNED),
        "v3_vitg16": ("giant_patch16_radio_v3", 1536, 40, 24, 8, RADIO),
        "v4_so400m16": ("so400m_patch16_radio_v4", 1152, 27, 16, 10, RADIO),
        "v4_vith16": ("huge_patch16_radio_v4", 1280, 32, 16, 10, RADIO),
    }
    return {
        f"cradio_{short}": _entry(f"vit_{word}", "c_radio", *shape, 16, 512, prefix=prefix, position=rule, **facts)
        for short, (word, *shape, prefix, rule) in shapes.items()
    }


def _pe() -> dict[str, Entry]:
    """Perception Encoder: core is pooled by attention; spatial has no final norm.

    At another size its rotary positions go on counting, where timm scales them to the native grid.
    """
    shapes = {
        "vitt16": ("tiny_patch16", 192, 12, 3, 16, 384, 512),
        "vits16": ("small_patch16", 384, 12, 6, 16, 384, 512),
        "vitb16": ("base_patch16", 768, 12, 12, 16, 224, 512),
        "vitl14": ("large_patch14", 1024, 24, 16, 14, 336, 448),
        "vitg14": ("gigantic_patch14", 1536, 50, 16, 14, 448, 448),
    }
    entries = {}
    for short, (word, width, depth, heads, patch, core, spatial) in shapes.items():
        shape = (width, depth, heads, patch)
        facts: dict[str, Any] = {"norm_eps": 1e-5, "mean": HALF, "std": HALF, "prefix": 0 if short == "vitg14" else 1}
        facts["position"] = PE
        entries[f"pe_core_{short}"] = _entry(f"vit_pe_core_{word}_{core}", "fb", *shape, core, cls="attention", **facts)
        entries[f"pe_spatial_{short}"] = _entry(
            f"vit_pe_spatial_{word}_{spatial}", "fb", *shape, spatial,
            cls="token" if facts["prefix"] else "average", final_norm="none", **facts,
        )  # fmt: skip
    return entries


ENTRIES: dict[str, Entry] = (
    _proteus()
    | _dinov2()
    | _dinov3()
    | _clip()
    | _synclr()
    | _siglip2()
    | _eva02()
    | _mae_dino_sam()
    | _radio()
    | _pe()
)
