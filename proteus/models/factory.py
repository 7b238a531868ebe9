"""`create_model` by name and `load_checkpoint` by file: every network comes through here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from proteus.errors import InputError
from proteus.models import weights
from proteus.models.encoder import Encoder, square_or_pair
from proteus.models.position import DINOV2, DINOV2_REGISTERS, TIMM, PositionRule
from proteus.models.zoo import ENTRIES, Entry, build, is_known

Family = Literal["auto", "dinov2", "timm", "proteus"]
Size = int | tuple[int, int]


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | None = None,
    image_size: Size | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **arch: Any,
) -> Encoder:
    """An encoder of the zoo (`list_models()`) or `timm/<any plain vision transformer of timm>`.

    pretrained:  load the official weights; fetched from their publisher where they are not on disk.
    checkpoint:  load this local file instead (DINOv2, timm or Proteus layout).
    image_size:  pixels, int or (h, w). Without weights it sets the native grid; with weights, whose grid is the
                 file's, it is the size the encoder says it wants.
    mean, std:   replace the entry's input convention; 0 and 1 let floats through as they are.
    arch:        `drop_path`; for `timm/...` also timm's arguments (`embed_dim`, `depth`, `patch_size`, ...).

    InputError where the name is unknown or the weights are missing or do not fit.
    """
    if pretrained and checkpoint is None:
        checkpoint = str(weights.find_official(name, download=True))
    if checkpoint is None:
        return _declare(build(name, image_size, **arch), {}, None, mean, std)
    state, metadata = weights.read_checkpoint(checkpoint)
    state = weights.to_timm_layout(state)
    facts = weights.metadata_facts(metadata)
    encoder = build(name, _native_size(state, facts, checkpoint) or image_size, **arch)
    weights.load_into(encoder, state, checkpoint)
    return _declare(encoder, facts, image_size, mean, std)


def load_checkpoint(
    path: str,
    family: Family = "auto",
    *,
    image_size: Size | None = None,
    num_heads: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    norm_eps: float | None = None,
) -> Encoder:
    """An encoder from a file alone: what it is follows from its metadata, or from the shapes of its tensors.

    family:     whose conventions hold where the file does not say: `dinov2` (position rule, norm epsilon 1e-6,
                ImageNet statistics), `timm` (timm's position rule), `proteus` (a student: DINOv2's). `auto` reads it
                off the file: a mask token, registers or a 37 x 37 grid with LayerScale are DINOv2's.
    num_heads:  cannot be seen in a state dict. It comes from the metadata, else from the zoo entry of the same
                width and depth, else it must be given: a guess would load without complaint and be wrong.

    InputError where the file is no vision transformer, does not fit, or leaves the head count open.
    """
    state, metadata = weights.read_checkpoint(path)
    facts = weights.metadata_facts(metadata)
    if is_known(facts.get("name", "")) and num_heads is None and norm_eps is None:
        return create_model(facts["name"], checkpoint=path, image_size=image_size, mean=mean, std=std, **facts["arch"])
    state = weights.to_timm_layout(state)
    entry = _infer(state, facts, family, num_heads or facts.get("num_heads"), path)
    if norm_eps is not None:
        entry = replace(entry, norm_eps=norm_eps)
    encoder = weights.load_into(entry.build(f"vit of {path}"), state, path)
    return _declare(encoder, facts, image_size, mean, std)


def _infer(state: weights.State, facts: dict[str, Any], family: Family, num_heads: int | None, path: str) -> Entry:
    """The entry a state in timm's layout belongs to: what its file says, else what its shapes say."""
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in state]
    if missing or state[needed[0]].ndim != 4:
        what = f"{missing[0]} is missing" if missing else f"{needed[0]} is {list(state[needed[0]].shape)}"
        raise InputError(f"{path} is not a vision transformer in DINOv2, timm or Proteus layout: {what}")
    width, _, _, patch_size = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    native = _native_size(state, facts, path)
    assert native is not None
    layer_scale = "blocks.0.ls1.gamma" in state
    if family == "auto":
        is_dinov2 = "mask_token" in state or registers or (layer_scale and native == 518 and patch_size == 14)
        family = "dinov2" if is_dinov2 else "timm"
    hidden_in, hidden_out = state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]
    if num_heads is None:
        known = {entry.heads for entry in ENTRIES.values() if (entry.width, entry.depth) == (width, depth)}
        if len(known) != 1:
            raise InputError(
                f"{path}: the head count of a network {width} wide with {depth} blocks is not known; give num_heads"
            )
        (num_heads,) = known
    if num_heads < 1 or width % num_heads:
        raise InputError(f"{path}: num_heads={num_heads} does not divide the width {width}")
    family_position = TIMM if family == "timm" else DINOV2_REGISTERS if registers else DINOV2
    return Entry(
        width=width,
        depth=depth,
        heads=num_heads,
        patch_size=patch_size,
        image_size=native,
        mlp_hidden=hidden_in,
        swiglu=hidden_in == 2 * hidden_out,
        registers=registers,
        embed_prefix=_prefix(state) > 0,
        layer_scale=1.0 if layer_scale else None,
        norm_eps=facts.get("norm_eps") or 1e-6,
        position=PositionRule(*facts["position"]) if "position" in facts else family_position,
    )


def _prefix(state: weights.State) -> int:
    """How many prefix tokens have a position: what is left of the embedding when a square grid is taken away."""
    count = state["pos_embed"].shape[1]
    tokens = ("cls_token" in state) + (state["reg_token"].shape[1] if "reg_token" in state else 0)
    return tokens if round((count - tokens) ** 0.5) ** 2 == count - tokens else 0


def _native_size(state: weights.State, facts: dict[str, Any], path: str) -> Size | None:
    """Image size (pixels) at which a state's position embedding lives; a square grid where the file does not say."""
    if "pos_embed" not in state or "patch_embed.proj.weight" not in state:
        return None
    patch = state["patch_embed.proj.weight"].shape[-1]
    if "native_grid" in facts:
        height, width = facts["native_grid"]
        return square_or_pair((height * patch, width * patch))
    patches = state["pos_embed"].shape[1] - _prefix(state)
    side = round(patches**0.5)
    if side * side != patches:
        raise InputError(f"{path}: a position embedding for {patches} patches is not of a square grid")
    return side * patch


def _declare(
    encoder: Encoder,
    facts: dict[str, Any],
    image_size: Size | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Encoder:
    """Set the image size and input convention: as the caller says, else the file, else as the network was built."""
    told = facts.get("image_size")
    encoder.image_size = image_size or (tuple(told) if isinstance(told, list) else told) or encoder.image_size
    encoder.set_convention(
        facts.get("mean", encoder.mean) if mean is None else mean, facts.get("std", encoder.std) if std is None else std
    )
    return encoder
