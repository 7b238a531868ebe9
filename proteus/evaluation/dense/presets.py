"""The dense protocols to the constant, as data. `dataclasses.replace` makes a smaller task of one."""

from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from proteus.errors import InputError, nearest
from proteus.evaluation.dense_metrics import EIGEN_CROP, Crop
from proteus.models.encoder import IMAGENET_MEAN, IMAGENET_STD, Encoder

HALF = (0.5, 0.5, 0.5)  # 127.5 of 255
UNBOUNDED = 10**8  # a long side that bounds nothing

Layers = Literal["last", "last4", "quarters", "proteus"]
LAYERS: dict[Layers, dict[int, tuple[int, ...]]] = {
    "last": {},
    "last4": {},
    "quarters": {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)},  # DINOv2's depth
    "proteus": {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)},
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What segmentation and depth have in common. Sizes are pixels, (height, width) where there are two.

    layers, norm:      which blocks' tokens the head sees, and whether the final norm is applied to them.
    crop:              what the network sees in training, padded around to a multiple of the patch.
    short, long:       a resized image has this short side, but no longer long side than that; None: not resized.
    ratio_range:       in training both are multiplied by a factor drawn from here.
    batch:             images of an update over all processes.
    warmup, ...:       arguments of `engine.schedule.decayed_rate`.
    decay_vectors:     whether biases and norms take weight decay.
    layer_decay, backbone_rate, positions_rate: factors of the learning rate in the encoder: a block's to the next, the
                       whole encoder's, and, where it is not that, of position embedding and class token.
    window, stride:    of the sliding window in testing; None: the whole image at once.
    autocast:          a frozen encoder runs in bfloat16 on a GPU; heads are always float32.
    mean, std:         what the protocol normalised with, for `Encoder.set_convention`; an encoder keeps its own
                       unless the caller sets these.
    """

    name: str
    frozen: bool = True
    layers: Layers
    norm: bool
    head: str
    crop: tuple[int, int]
    short: int | None
    long: int
    ratio_range: tuple[float, float] = (1.0, 1.0)
    iterations: int
    batch: int
    lr: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    decay_vectors: bool = True
    warmup: int
    warmup_start: float
    shape: Literal["line", "cosine"] = "line"
    final: float = 0.0
    shifted: bool
    clip_grad: float | None = None
    layer_decay: float = 1.0
    backbone_rate: float = 1.0
    positions_rate: float | None = None
    drop_path: float = 0.0
    test_short: int | None
    test_long: int = UNBOUNDED
    window: tuple[int, int] | None
    stride: tuple[int, int] = (1, 1)
    flip: bool = False
    autocast: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1 or min(self.crop) < 1 or min(self.stride) < 1:
            raise InputError(f"{self.name}: iterations, batch, crop and stride are at least 1")
        sizes = [size for size in (self.short, self.long, self.test_short, self.test_long) if size is not None]
        if self.lr <= 0 or min(sizes) < 1 or not 0 < self.ratio_range[0] <= self.ratio_range[1]:
            raise InputError(f"{self.name}: lr, the sizes and ratio_range (smallest, largest) are above 0")
        if not 0 <= self.warmup < self.iterations:
            raise InputError(
                f"{self.name}: a warm-up of {self.warmup} steps in a run of {self.iterations}; shorten it too"
            )
        if self.window is not None and (self.stride[0] > self.window[0] or self.stride[1] > self.window[1]):
            raise InputError(f"{self.name}: stride {self.stride} steps over pixels that no window {self.window} covers")


@dataclass(frozen=True, kw_only=True)
class SegmentationPreset(Preset):
    """head: "bn" (BatchNorm, 1 x 1 convolution), "plain" (the convolution alone) or "upernet".

    cat_max_ratio: a crop of which one class has this share or more is drawn again, ten times at most.
    ratios:        scales of the test image; several, or a flip, average the softmax.
    """

    head: Literal["bn", "plain", "upernet"]
    cat_max_ratio: float = 0.75
    ratios: tuple[float, ...] = (1.0,)
    dropout: float = 0.0
    auxiliary: float = 0.0  # weight of the auxiliary head's loss


@dataclass(frozen=True, kw_only=True)
class DepthPreset(Preset):
    """head: "bins" (a 1 x 1 convolution to bins of depth), "dpt" (DINOv2's), or "dpt-bn" (Proteus's).

    box:             (left, top, right, bottom) that training images are cut to, in an image of 640 x 480; it scales.
    rotation:        degrees either way, half of the time.
    colour:          "bts" (gamma, brightness, one factor a channel) or "albumentations" (its defaults).
    depth_mix:       probability that a vertical strip of the image shows the depth instead. The original writes
                     millimetres into 8 bits, which wrap around; here 0 to max_depth is black to white.
    loss:            "sig" (DINOv2's) or "silog" (per image).
    sig_warmup:      steps that use the mean term of the sig loss alone.
    gradient_weight: of the corrected gradient loss. The original's weighs 0.5 but slices the wrong axes: it is 0 for
                     the two images it had on a GPU, so the faithful value is 0.
    clamp:           predictions are brought into [min_depth, max_depth] before they are resized and measured.
    crop_metric:     where pixels count; None: everywhere.
    """

    head: Literal["bins", "dpt", "dpt-bn"]
    min_depth: float = 1e-3
    max_depth: float = 10.0  # DINOv2's published hub heads say 80, which is not NYU's
    bins: int = 256
    upsample: int = 4  # of the bins head
    channels: int = 256  # of DPT
    dropout: float = 0.0
    box: tuple[int, int, int, int] | None
    rotation: float
    colour: Literal["bts", "albumentations"]
    depth_mix: float = 0.0
    loss: Literal["sig", "silog"]
    sig_warmup: int = 100
    gradient_weight: float = 0.0
    clamp: bool
    crop_metric: Crop | None = EIGEN_CROP

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_depth < self.max_depth or self.bins < 2 or self.channels < 1 or self.upsample < 1:
            raise InputError(
                f"{self.name}: 0 < min_depth < max_depth, bins at least 2, channels and upsample at least 1"
            )


_DINOV2_LIN = SegmentationPreset(
    name="dinov2-lin",
    layers="last",
    norm=True,
    head="bn",
    crop=(512, 512),
    short=512,
    long=2048,
    ratio_range=(0.5, 2.0),
    iterations=40_000,
    batch=16,  # 2 on each of 8 GPUs
    lr=1e-3,
    weight_decay=1e-4,
    warmup=1500,
    warmup_start=1e-6,
    shifted=False,
    test_short=512,
    test_long=2048,
    window=(512, 512),
    stride=(341, 341),
)
_PROTEUS_LIN = SegmentationPreset(
    name="proteus-lin",
    layers="proteus",
    norm=False,
    head="plain",
    crop=(518, 518),
    short=518,
    long=2072,
    ratio_range=(0.5, 2.0),
    iterations=60_000,
    batch=32,  # 8 a GPU; 4 GPUs in the script, 8 x 2 in the file names: uncertain
    lr=8e-4,
    weight_decay=0.05,
    warmup=1500,
    warmup_start=1e-6,
    shifted=True,
    test_short=518,
    test_long=2072,
    window=(518, 518),
    stride=(345, 345),
    autocast=False,  # the config asks for fp16 in a way that is ignored
)
_DINOV2_DEPTH = DepthPreset(
    name="dinov2-lin4",
    layers="quarters",
    norm=False,
    head="bins",
    crop=(416, 544),
    short=None,
    long=UNBOUNDED,
    iterations=38_400,
    batch=16,  # 2 on each of (probably) 8 GPUs
    lr=1e-4,
    weight_decay=0.01,
    warmup=12_800,
    warmup_start=1e-3,
    shape="cosine",
    final=1e-8,
    shifted=False,
    clip_grad=35.0,
    test_short=None,
    window=None,
    flip=True,
    box=(43, 45, 608, 472),
    rotation=2.5,
    colour="bts",
    loss="sig",
    clamp=True,
)
_PROTEUS_DPT = DepthPreset(
    name="proteus-dpt",
    frozen=False,
    layers="proteus",
    norm=False,
    head="dpt-bn",
    crop=(518, 518),
    short=512,
    long=770,
    ratio_range=(0.8, 1.5),
    iterations=25_000,
    batch=16,  # 4 a GPU; 4 GPUs probably
    lr=4e-4,
    weight_decay=0.01,
    warmup=1500,
    warmup_start=1e-6,
    shifted=True,
    backbone_rate=0.1,
    positions_rate=1.0,  # they match a rule of their own before the backbone's
    drop_path=0.1,
    test_short=518,
    test_long=2044,
    window=(518, 518),
    stride=(129, 129),
    flip=True,
    autocast=False,
    mean=HALF,
    std=HALF,
    dropout=0.1,
    box=None,
    rotation=0.0,
    colour="albumentations",
    depth_mix=0.25,
    loss="silog",
    clamp=False,
)

SEGMENTATION: dict[str, SegmentationPreset] = {
    preset.name: preset
    for preset in (
        _DINOV2_LIN,
        replace(
            _DINOV2_LIN,
            name="dinov2-ms",
            layers="last4",
            crop=(640, 640),
            short=640,
            long=UNBOUNDED,
            ratio_range=(1.0, 3.0),
            test_short=640,
            test_long=UNBOUNDED,
            window=(640, 640),
            stride=(320, 320),
            ratios=(1.0, 1.32, 1.73, 2.28, 3.0),
            flip=True,
        ),
        _PROTEUS_LIN,
        replace(
            _PROTEUS_LIN,
            name="proteus-upernet",
            frozen=False,
            head="upernet",
            lr=1e-4,
            decay_vectors=False,
            layer_decay=0.65,
            drop_path=0.1,
            dropout=0.1,
            auxiliary=0.4,
        ),
    )
}
DEPTH: dict[str, DepthPreset] = {
    preset.name: preset
    for preset in (
        replace(_DINOV2_DEPTH, name="dinov2-lin1", layers="last"),
        _DINOV2_DEPTH,
        replace(_DINOV2_DEPTH, name="dinov2-dpt", head="dpt"),
        replace(
            _PROTEUS_DPT, name="proteus-dpt-frozen", frozen=True, backbone_rate=1.0, positions_rate=None, drop_path=0.0
        ),
        _PROTEUS_DPT,
    )
}


def segmentation_preset(name: str, encoder: Encoder) -> SegmentationPreset:
    """A preset with what it says for an encoder of that size; InputError for an unknown name."""
    preset = _named(SEGMENTATION, name)
    if name == "proteus-upernet" and _size(encoder) != "small":
        large = _size(encoder) == "large"
        return replace(
            preset,
            batch=8 if large else 16,
            iterations=160_000 if large else 60_000,
            drop_path=0.2 if large else 0.1,
        )
    return preset


def depth_preset(name: str, encoder: Encoder) -> DepthPreset:
    """A preset with what it says for an encoder of that size; InputError for an unknown name."""
    preset = _named(DEPTH, name)
    return replace(preset, lr=1e-4) if name.startswith("proteus") and _size(encoder) != "small" else preset


def layers_of(preset: Preset, depth: int) -> list[int]:
    """Indices of the blocks whose tokens the head sees, in a network of that many blocks.

    Where the protocol does not know the depth, the ends of its quarters; a network of fewer than four blocks repeats
    some, which a pyramid (UperNet, DPT) needs and a concatenation leaves out.
    """
    if preset.layers == "last":
        return [depth - 1]
    if preset.layers == "last4":
        return list(range(max(0, depth - 4), depth))
    known = LAYERS[preset.layers].get(depth)
    layers = list(known) if known else [max(0, quarter * depth // 4 - 1) for quarter in (1, 2, 3, 4)]
    return layers if preset.head in ("upernet", "dpt", "dpt-bn") else sorted(set(layers))


P = TypeVar("P", bound=Preset)


def _named(presets: dict[str, P], name: str) -> P:
    if name not in presets:
        raise InputError(f"no dense preset {name!r}{nearest(name, presets)}")
    return presets[name]


def _size(encoder: Encoder) -> Literal["small", "base", "large"]:
    if encoder.num_blocks >= 24:
        return "large"
    return "small" if encoder.embed_dim <= 384 else "base"
