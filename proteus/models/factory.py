"""`create_model` by name and `load_checkpoint` by file: every network comes through here."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch

from proteus.errors import InputError, nearest
from proteus.models import weights
from proteus.models.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Encoder, square_or_pair
from proteus.models.entries import ENTRIES
from proteus.models.facts import Facts, read_facts
from proteus.models.layouts import State, layout_of, to_timm_layout
from proteus.models.position import DINOV2, DINOV2_REGISTERS, TIMM
from proteus.models.vit import VitEncoder
from proteus.models.zoo import HUB_PREFIX, build, is_known, is_own

Family = Literal["auto", "proteus", "dinov2", "dino", "synclr", "clip", "openclip", "timm"]
Size = int | tuple[int, int]

# Arguments that leave the function of a trained network as it is, or are asked for to change it.
FREE = ("drop_path", "drop_path_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate", "patch_norm")


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
    """An encoder: a name of the zoo (`list_models()`), `timm/<any name of timm>`, `hf-hub:<repository of a timm
    model>`, or `package.module:function`, a function that returns an nn.Module.

    Such a module takes images [B, 3, H, W] in [0, 1] and returns Features, tokens [B, 1 + N, D] with the class token
    first, or a map [B, D, h, w].

    pretrained:  load the published weights; fetched from their publisher where they are not on disk.
    checkpoint:  load this local file instead, in the publisher's layout, timm's or Proteus's.
    image_size:  pixels, int or (h, w). Without weights it sets the native grid; with weights, whose grid is the
                 file's, it is the size the encoder says it wants.
    mean, std:   replace the entry's input convention; 0 and 1 let floats through as they are.
    arch:        `drop_path`, `norm_eps`; `patch_norm` (whether patch tokens go through the final norm, which OpenAI's
                 CLIP gives to the class token alone); `attention` (auto, xformers, sdpa); timm's own arguments
                 (`embed_dim`, `depth`, `patch_size`, ...); the arguments of a user's function.

    InputError where the name is unknown or the weights are missing or do not fit.
    """
    if pretrained and checkpoint is None:
        checkpoint = str(weights.find_official(name, download=True))
    if checkpoint is None:
        return _declare(build(name, image_size, arch), None, None, mean, std)
    state, metadata = weights.read_checkpoint(checkpoint)
    facts = read_facts(metadata, checkpoint)
    if facts:
        if name.startswith(HUB_PREFIX):
            name = facts.name if not is_own(facts.name) else name  # a repository that `export` has written
        arch = _agreed(name, arch, facts, checkpoint)
    return _load(name, arch, state, facts, checkpoint, image_size, mean, std)


def _agreed(name: str, arch: dict[str, Any], facts: Facts, path: str) -> dict[str, Any]:
    """The file's arguments and the caller's; InputError where they are of two networks."""
    if name != facts.name:
        raise InputError(f"{path} is of {facts.name}, not {name}: give that name, or load_checkpoint only the file")
    for key, value in json.loads(json.dumps(arch, default=str)).items():  # as a file would have them
        if key in facts.arch and key not in FREE and facts.arch[key] != value:
            raise InputError(f"{path} is of a network with {key}={facts.arch[key]!r}, not {value!r}")
    return facts.arch | arch


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

    A file without metadata has to be a plain vision transformer; for others give `create_model` the name as well.

    family:     whose conventions (position rule, activation, norm epsilon, statistics) hold where the file does not
                say. `auto` reads it off the keys and shapes: a mask token, registers or a 37 x 37 grid with
                LayerScale are DINOv2's. `clip` is OpenAI's (QuickGELU, final norm on the class token alone),
                `openclip` has the same keys and neither, so one of the two has to be given.
    num_heads:  cannot be seen in a state dict. It comes from the metadata, else from the zoo's entries of the same
                width, depth and patch size, else it must be given: a guess would load without complaint and be wrong.

    InputError where the file is no vision transformer, does not fit, or leaves open what it is.
    """
    if family not in get_args(Family):
        raise InputError(f"unknown family {family!r}{nearest(family, get_args(Family))}")
    state, metadata = weights.read_checkpoint(path)
    facts = read_facts(metadata, path)
    if facts and is_own(facts.name):
        # A file could name any function there is: only a caller may say whose code runs.
        raise InputError(f"{path} is of a network of your own: create_model({facts.name!r}, checkpoint={path!r})")
    if facts and is_known(facts.name) and num_heads is None and norm_eps is None:
        return _load(facts.name, facts.arch, state, facts, path, image_size, mean, std)
    with _tensors_of(path):
        layout, state = layout_of(state), to_timm_layout(state)
        family = _family(family, layout, state, path)
        name, arch = _infer(state, family, num_heads or (facts.num_heads if facts else None), path)
    if norm_eps is not None:
        arch["norm_eps"] = norm_eps
    encoder = _load(name, arch, state, facts, path, image_size, mean, std)
    return encoder if facts else _by_family(encoder, family, mean, std)


def _load(
    name: str,
    arch: dict[str, Any],
    state: State,
    facts: Facts | None,
    path: str,
    image_size: Size | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Encoder:
    with _tensors_of(path):
        blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
        if facts and blocks and arch.get("depth", len(blocks)) != len(blocks):  # before a million of them are built
            raise InputError(f"{path} holds {len(blocks)} blocks and says depth={arch['depth']!r}")
        size = _native_size(name, state, facts, path, image_size, arch)
    encoder = build(name, size, arch)
    with _tensors_of(path):
        weights.load_into(encoder, state, path)
    return _declare(encoder, facts, image_size, mean, std)


@contextlib.contextmanager
def _tensors_of(path: str) -> Iterator[None]:
    """Whatever odd tensors of a file lead to is one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} does not hold the tensors of a network ({reason})") from None


def _family(family: Family, layout: str, state: State, path: str) -> Family:
    """The family of a file, off its keys and shapes where `auto` asks; InputError where it cannot be the one given."""
    if layout == "clip" and family == "auto":
        raise InputError(
            f"{path} has the keys of a CLIP, and whose it is cannot be seen: give family='clip' (OpenAI's, QuickGELU) "
            "or family='openclip' (GELU), or its name to create_model"
        )
    is_clip = "norm_pre.weight" in state
    possible: dict[str, tuple[Family, ...]] = {
        "synclr": ("synclr", "timm"),
        "dinov2": ("dinov2", "proteus", "timm"),
        "dinov3": ("dinov2",),
    }
    allowed = ("clip", "openclip") if is_clip else possible.get(layout, ("proteus", "dinov2", "dino", "synclr", "timm"))
    if family != "auto":
        if family not in allowed:
            raise InputError(f"{path} is not of the family {family}: its tensors are those of {' or '.join(allowed)}")
        return family
    if layout != "timm":
        return "synclr" if layout == "synclr" else "dinov2"
    patch_size = state["patch_embed.proj.weight"].shape[-1] if "patch_embed.proj.weight" in state else 0
    is_dinov2 = "blocks.0.ls1.gamma" in state and patch_size == 14 and state["pos_embed"].shape[1] == 1 + 37 * 37
    return "dinov2" if is_dinov2 or "reg_token" in state else "timm"


def _by_family(encoder: Encoder, family: Family, mean: Sequence[float] | None, std: Sequence[float] | None) -> Encoder:
    """Position rule and statistics of a family, for a file that says nothing of them."""
    assert isinstance(encoder, VitEncoder)
    if family in ("proteus", "dinov2"):
        encoder.position = DINOV2_REGISTERS if encoder.network.reg_token is not None else DINOV2
    else:
        encoder.position = DINOV2 if family in ("synclr", "dino") else TIMM
    of_clip = family in ("clip", "openclip", "synclr")
    usual = (CLIP_MEAN, CLIP_STD) if of_clip else (IMAGENET_MEAN, IMAGENET_STD)
    encoder.set_convention(usual[0] if mean is None else mean, usual[1] if std is None else std)
    return encoder


def _infer(state: State, family: Family, num_heads: int | None, path: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of the network that a state in timm's layout belongs to, from the shapes of its tensors."""
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token", "norm.weight", "blocks.0.mlp.fc1.weight")
    missing = [key for key in needed if key not in state]
    if missing or state[needed[0]].ndim != 4:
        what = f"{missing[0]} is missing" if missing else f"{needed[0]} is {list(state[needed[0]].shape)}"
        raise InputError(
            f"{path} is not a vision transformer in CLIP's, DINOv2's, SynCLR's, timm's or Proteus's layout: {what}; "
            "for another network give its name to create_model"
        )
    width, _, _, patch_size = state["patch_embed.proj.weight"].shape
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    if num_heads is None:
        shape = (width, depth, patch_size)
        known = {entry.heads for entry in ENTRIES.values() if (entry.width, entry.depth, entry.patch_size) == shape}
        if len(known) != 1:
            raise InputError(
                f"{path}: the head count of a network {width} wide with {depth} blocks is not known; give num_heads"
            )
        (num_heads,) = known
    if not num_heads or num_heads < 1 or width % num_heads:
        raise InputError(f"{path}: num_heads={num_heads} does not divide the width {width}")
    hidden_in, hidden_out = state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    swiglu, clip = hidden_in == 2 * hidden_out, "norm_pre.weight" in state
    if clip:
        name = f"timm/vit_base_patch16_clip_{'quickgelu_' if family == 'clip' else ''}224"
    else:
        name = f"timm/vit_{'giant' if swiglu else 'base'}_patch14_dinov2" if "dino" in family or swiglu else ""
        name = name or "timm/vit_base_patch16_224"
    arch = {
        "patch_size": patch_size,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        # int(width * ratio) must give the hidden width back, whatever the division rounds to.
        "mlp_ratio": (hidden_in + 0.5) / width,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None,
        "reg_tokens": registers,
        "no_embed_class": _prefix(state) == 0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }
    if family == "clip":
        arch["patch_norm"] = False
    return name, arch


def _prefix(state: State) -> int:
    """How many prefix tokens have a position: what is left of the embedding when a square grid is taken away."""
    count = state["pos_embed"].shape[1]
    tokens = ("cls_token" in state) + (state["reg_token"].shape[1] if "reg_token" in state else 0)
    return tokens if round((count - tokens) ** 0.5) ** 2 == count - tokens else 0


def _native_size(
    name: str, state: State, facts: Facts | None, path: str, image_size: Size | None, arch: dict[str, Any]
) -> Size | None:
    """Image size (pixels) at which a file's position embedding lives; a square grid where the file does not say."""
    wanted = image_size or (facts.image_size if facts else None)
    state = state if is_own(name) else to_timm_layout(state)
    if is_own(name) or "pos_embed" not in state:
        return wanted
    with torch.device("meta"):
        encoder = build(name, image_size, arch)
    shape = state["pos_embed"].shape
    if not isinstance(encoder, VitEncoder):
        is_map = len(shape) == 4 and shape[1] == shape[2]  # [1, h, w, D], as SAM has it
        return shape[1] * encoder.patch_size if is_map else wanted
    if facts and facts.native_grid:
        return square_or_pair([side * encoder.patch_size for side in facts.native_grid])
    patches = shape[1] - _prefix(state)
    side = round(patches**0.5)
    if side * side != patches:
        raise InputError(f"{path}: a position embedding for {patches} patches is not of a square grid")
    return side * encoder.patch_size


def _declare(
    encoder: Encoder,
    facts: Facts | None,
    image_size: Size | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Encoder:
    """Set the image size and conventions: as the caller says, else the file, else as the network was built."""
    encoder.image_size = image_size or (facts.image_size if facts else encoder.image_size)
    if facts and isinstance(encoder, VitEncoder):
        encoder.position = facts.position or encoder.position
        if facts.patch_norm is not None and "patch_norm" not in encoder.arch:
            encoder.patch_norm = facts.patch_norm
    said = facts or encoder
    encoder.set_convention(said.mean if mean is None else mean, said.std if std is None else std)
    return encoder
