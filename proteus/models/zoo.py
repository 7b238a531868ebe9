"""Names, and the networks behind them: the zoo's own, timm's, the hub's, and a user's.

What is known of each network of the zoo stands in `entries`.
"""

import fnmatch
import importlib
import json
import os
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id
from torch import nn

from proteus.errors import InputError, nearest
from proteus.models.attention import use_attention
from proteus.models.encoder import Encoder
from proteus.models.entries import ENTRIES, Entry
from proteus.models.opaque import OpaqueEncoder
from proteus.models.position import PE, TIMM, PositionRule
from proteus.models.vit import VitEncoder

TIMM_PREFIX, HUB_PREFIX = "timm/", "hf-hub:"

# What makes timm's builder read or fetch weights; an argument may come from a file, and none of that is its to ask.
NOT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")

Size = int | tuple[int, int]


def list_models(pattern: str = "*") -> list[str]:
    """Names of the zoo that match a shell pattern.

    Besides them there are `timm/<any name of timm>`, `hf-hub:<repository of a timm model>` and
    `package.module:function`.
    """
    return sorted(fnmatch.filter(ENTRIES, pattern))


def check_name(name: str) -> None:
    """Raise InputError, with the nearest valid name, where no network of that name can be built."""
    if name in ENTRIES:
        return
    if name.startswith(HUB_PREFIX):
        try:
            validate_repo_id(hub_repository(name)[0])
        except ValueError as error:
            raise InputError(f"model {name!r}: {' '.join(str(error).split())}") from None
    elif name.startswith(TIMM_PREFIX):
        timm_name = name.removeprefix(TIMM_PREFIX)
        if not timm.is_model(timm_name):
            known = [TIMM_PREFIX + architecture for architecture in timm.list_models()]
            raise InputError(f"unknown model {name!r}{nearest(name, known)}")
        architecture, _, tag = timm_name.partition(".")
        tags = [model.partition(".")[2] for model in timm.list_pretrained(f"{architecture}.*")]
        if tag and tag not in tags:
            raise InputError(f"unknown model {name!r}: timm has no weights {tag!r} for it{nearest(tag, tags)}")
        _refuse_wrong_activation(name, architecture, tag)
    elif is_own(name):
        _own_function(name)
    else:
        raise InputError(f"unknown model {name!r}{nearest(name, ENTRIES)}")


def is_known(name: str) -> bool:
    """Whether a network of that name can be built without a user's own code, which is not imported to find out."""
    if is_own(name):
        return False
    try:
        check_name(name)
    except InputError:
        return False
    return True


def is_own(name: str) -> bool:
    """Whether a name is that of a user's function, `package.module:function`."""
    return ":" in name and not name.startswith(HUB_PREFIX)


def entry_of(name: str) -> Entry | None:
    """The zoo's entry of a name, be it its own or that of the same weights in timm or on the hub; None for others."""
    if name in ENTRIES or is_own(name):
        return ENTRIES.get(name)
    if name.startswith(HUB_PREFIX):
        try:
            config = read_hub_config(name)
        except InputError:  # not fetched yet
            return None
        architecture, tag = config["architecture"], config["pretrained_cfg"].get("tag")
    else:
        architecture, _, tag = name.removeprefix(TIMM_PREFIX).partition(".")
        cfg = timm.get_pretrained_cfg(architecture)
        tag = tag or (cfg.tag if cfg else None)
    return next((entry for entry in ENTRIES.values() if (entry.timm, entry.tag) == (architecture, tag)), None)


def build(name: str, image_size: Size | None = None, arch: dict[str, Any] | None = None) -> Encoder:
    """The named network with random weights.

    arch: `drop_path`, `norm_eps`, `patch_norm`, `attention`, and any argument of timm's builder; of a user's function,
    its own arguments.
    """
    check_name(name)
    arch = arch or {}
    sides = image_size if isinstance(image_size, tuple | list) else () if image_size is None else (image_size,)
    if not all(type(side) is int and side > 0 for side in sides):
        raise InputError(f"{name}: an image size is a number of pixels above 0, or two, not {image_size!r}")
    try:
        if is_own(name):
            return _build_own(name, image_size, arch)
        if arch:  # nobody has tried them yet, and shapes cost nothing
            with torch.device("meta"):
                trial = _build_timm(name, image_size, arch)
                trial.check() if isinstance(trial, VitEncoder) else None
        return _build_timm(name, image_size, arch)
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever a network may say to arguments it does not take
        given = ", ".join(f"{key}={value!r}" for key, value in {"image_size": image_size, **arch}.items())
        raise InputError(f"{name} cannot be built with {given}: {' '.join(str(error).split())[:300]}") from error


def _build_timm(name: str, image_size: Size | None, arch: dict[str, Any]) -> Encoder:
    entry = entry_of(name)
    architecture, defaults, cfg = in_timm(name)
    options = {**defaults, **arch}
    for key in NOT_ARGUMENTS:
        if key in options:
            raise InputError(f"{name}: {key} is not an argument of the network")
    patch_norm = options.pop("patch_norm", entry is None or entry.final_norm != "cls")
    attention = options.pop("attention", "auto")
    arch = {key: value for key, value in arch.items() if key != "attention"}  # a choice of the machine, not saved
    if "drop_path" in options:
        options["drop_path_rate"] = options.pop("drop_path")
    if "norm_eps" in options:
        options["norm_layer"] = partial(nn.LayerNorm, eps=options.pop("norm_eps"))
    native = entry.image_size if entry else cfg["input_size"][-1]
    size = image_size or options.pop("img_size", None) or native
    if cfg.get("fixed_input_size", False):
        options["img_size"] = size
    if timm.models.is_model_in_modules(architecture, "eva"):
        options["dynamic_img_size"] = True  # or the rotary embedding is kept for one size
    network = timm.create_model(architecture, num_classes=0, **options)
    use_attention(network, attention)
    mean, std = (entry.mean, entry.std) if entry else (cfg["mean"], cfg["std"])
    if not VitEncoder.wraps(network):
        return OpaqueEncoder(network, name=name, mean=mean, std=std, image_size=size, arch=arch)
    position = (entry.position if entry else _usual_position(architecture)) or TIMM
    if position == PE:  # positions that count on at other sizes; the argument None does not reach timm's builder
        network.rope.ref_feat_shape = None
    return VitEncoder(network, name=name, mean=mean, std=std, position=position, patch_norm=patch_norm, arch=arch)


def _usual_position(architecture: str) -> PositionRule | None:
    """The position rule that an architecture has whatever its weights: the zoo does not know tuned ones, say."""
    if not any(family in architecture for family in ("dinov2", "radio", "_pe_")):
        return None  # a name that anybody's weights may have
    return next((entry.position for entry in ENTRIES.values() if entry.timm == architecture), None)


def in_timm(name: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, arguments and pretrained configuration in timm of a name that is not a user's function."""
    entry = entry_of(name)
    if name.startswith(HUB_PREFIX):
        config = read_hub_config(name)
        _refuse_wrong_activation(name, config["architecture"], config["pretrained_cfg"].get("tag") or "")
        args = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        return config["architecture"], (entry.args if entry else {}) | args, config["pretrained_cfg"]
    architecture = entry.timm if name in ENTRIES and entry else name.removeprefix(TIMM_PREFIX)
    cfg = timm.get_pretrained_cfg(architecture)
    return architecture, entry.args if entry else {}, cfg.to_dict() if cfg else {}


def _build_own(name: str, image_size: Size | None, arch: dict[str, Any]) -> Encoder:
    network = _own_function(name)(**arch)
    if not isinstance(network, nn.Module):
        raise InputError(f"{name} returns a {type(network).__name__}, not an nn.Module")
    # Images come as they are, in [0, 1], unless a convention is given: nobody knows the network's own.
    return OpaqueEncoder(
        network, name=name, mean=(0, 0, 0), std=(1, 1, 1), image_size=image_size or 224, arch=arch, own=True
    )


def _own_function(name: str):
    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` would have it
    try:
        function = getattr(importlib.import_module(module_name), attribute, None)
    except (Exception, SystemExit) as error:  # an import runs the user's code
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"model {name!r}: {module_name} cannot be imported: {reason}") from None
    if not callable(function):
        raise InputError(f"model {name!r}: {module_name} has no function {attribute!r}")
    return function


def _refuse_wrong_activation(name: str, architecture: str, tag: str) -> None:
    """timm lists CLIP weights that were trained with QuickGELU under names that build GELU, too."""
    right = architecture.replace("_clip_", "_clip_quickgelu_")
    if tag and "_clip_" in architecture and "quickgelu" not in architecture and f"{right}.{tag}" in _with_weights():
        raise InputError(f"{name} builds GELU for weights that were trained with QuickGELU: use timm/{right}.{tag}")


@lru_cache(maxsize=1)
def _with_weights() -> frozenset[str]:
    return frozenset(timm.list_models("*_clip_quickgelu_*", pretrained=True))


def hub_repository(name: str) -> tuple[str, str | None]:
    """Repository and revision of `hf-hub:owner/name[@revision]`."""
    repository, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    return repository, revision or None


def read_hub_config(name: str) -> dict[str, Any]:
    """config.json of a hub repository, from the hub's cache; InputError where it is not there or not of timm."""
    repository, revision = hub_repository(name)
    try:
        # Not hf_hub_download(local_files_only=True), which still asks the hub who is calling.
        path = try_to_load_from_cache(repository, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except ValueError as error:
        raise InputError(f"{name}: {' '.join(str(error).split())}") from None
    if not isinstance(path, str):
        raise InputError(f"{name}: its config.json is not in the hub's cache; fetch it")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        # Older files keep the pretrained configuration at the top.
        config.setdefault("pretrained_cfg", config)
        for key in ("mean", "std", "input_size"):
            config["pretrained_cfg"][key]
        known = timm.is_model(config["architecture"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{name}: its config.json is not that of a timm model") from None
    if not known:
        raise InputError(f"{name}: timm has no architecture {config['architecture']!r}")
    return config
