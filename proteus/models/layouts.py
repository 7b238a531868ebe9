"""Whose file is it: the key names of each publisher, brought to timm's."""

import re
from typing import Literal

from proteus.models.layouts_transformers import State, from_transformers, kind_in_transformers

Layout = Literal["dinov2", "dinov3", "clip", "synclr", "timm"]

# Where a backbone sits in files that hold more than a backbone; the first that occurs is taken.
PREFIXES = (
    "module.student.backbone.",
    "student.backbone.",
    "teacher.backbone.",
    "module.visual.",
    "visual.trunk.",
    "visual.",
    "module.",
    "backbone.",
    "student.network.",
    "network.",
)


def layout_of(state: State) -> Layout:
    """Whose names a file's keys are; `timm` where they are nobody else's. In transformers' layout: whose network's."""
    kind = kind_in_transformers(state)
    if kind is not None:
        return kind if kind in ("dinov2", "dinov3", "clip") else "timm"
    if any(key.startswith("module.visual.blocks.") for key in state):
        return "synclr"  # timm's names, where its authors keep them
    state = _without_prefix(state)
    if "class_embedding" in state and "conv1.weight" in state:
        return "clip"
    if "storage_tokens" in state:
        return "dinov3"
    return "dinov2" if "mask_token" in state or "register_tokens" in state else "timm"


def to_timm_layout(state: State) -> State:
    """The keys of a CLIP, DINOv2, DINOv3, SynCLR, Proteus or transformers file as timm names them."""
    layout = layout_of(state)
    state = _without_prefix(state) if kind_in_transformers(state) is None else from_transformers(state)
    convert = {"clip": _from_clip, "dinov2": _from_dinov2, "dinov3": _from_dinov3}.get(layout)
    return convert(state) if convert else state


def _without_prefix(state: State) -> State:
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return state


def _from_dinov2(state: State) -> State:
    out = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # saved in chunks of blocks, for FSDP
        out[key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = value
    needed = ("register_tokens", "cls_token", "pos_embed")
    if len({out[key].shape[-1] for key in needed if key in out}) == 1 and all(key in out for key in needed):
        # DINOv2 adds a position to the class token and none to the registers; timm has neither, so it is folded in.
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def _from_dinov3(state: State) -> State:
    names = {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2", "mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x."}
    names |= {"mlp.w3.": "mlp.fc2.", "storage_tokens": "reg_token"}
    out = {}
    for key, value in state.items():
        if key.endswith((".periods", ".bias_mask")) or key.startswith("local_cls_norm."):
            continue  # computed, fixed, and of the pretraining's small crops
        for theirs, timms in names.items():
            key = key.replace(theirs, timms)
        if key.endswith("attn.qkv.bias"):
            out[key.replace("qkv.bias", "q_bias")] = value.chunk(3)[0]
            out[key.replace("qkv.bias", "v_bias")] = value.chunk(3)[2]  # between them the keys', masked to zero
            continue
        out[key] = value
    return out


def _from_clip(state: State) -> State:
    names = {
        "class_embedding": "cls_token",
        "positional_embedding": "pos_embed",
        "conv1.": "patch_embed.proj.",
        "ln_pre.": "norm_pre.",
        "ln_post.": "norm.",
        "transformer.resblocks.": "blocks.",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj.": "attn.proj.",
        ".ln_1.": ".norm1.",
        ".ln_2.": ".norm2.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
    }
    out = {}
    for key, value in state.items():
        for theirs, timms in names.items():
            key = key.replace(theirs, timms)
        if key != "proj":  # to the space shared with text, behind what an encoder returns
            out[key] = value
    out["cls_token"] = out["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in out:
        out["pos_embed"] = out["pos_embed"].unsqueeze(0)
    return out
