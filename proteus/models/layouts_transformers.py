"""Files in the layout of Hugging Face's transformers, brought to the names of the networks' own publishers.

The published files of DINOv2, DINOv3 and CLIP are of PyTorch, and `layouts` knows them; SigLIP's and MAE's get timm's
names, which need no other step. transformers keeps query, key and value apart.
"""

import re
from typing import Literal

import torch
from torch import Tensor

State = dict[str, Tensor]
Kind = Literal["dinov2", "dinov3", "clip", "siglip", "vit"]

# In order: a name that ends another comes after it.
DINOV2 = {
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.": "",  # cls_token, mask_token, register_tokens
    "encoder.layer.": "blocks.",
    "attention.attention.query.": "attn.q.",
    "attention.attention.key.": "attn.k.",
    "attention.attention.value.": "attn.v.",
    "attention.output.dense.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in.": "mlp.w12.",
    "mlp.weights_out.": "mlp.w3.",
    "layernorm.": "norm.",
}
VIT = {  # MAE's encoder, and others of the same blocks
    "layernorm_before.": "norm1.",
    "layernorm_after.": "norm2.",
    "intermediate.dense.": "mlp.fc1.",
    **DINOV2,
    "output.dense.": "mlp.fc2.",
}
DINOV3 = {
    "embeddings.patch_embeddings.": "patch_embed.proj.",
    "embeddings.register_tokens": "storage_tokens",
    "embeddings.": "",
    "layer.": "blocks.",
    "attention.q_proj.": "attn.q.",
    "attention.k_proj.": "attn.k.",
    "attention.v_proj.": "attn.v.",
    "attention.o_proj.": "attn.proj.",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
DINOV3_MLP = {"up_proj.": "fc1.", "down_proj.": "fc2."}
DINOV3_SWIGLU = {"gate_proj.": "w1.", "up_proj.": "w2.", "down_proj.": "w3."}
CLIP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.patch_embedding.": "conv1.",
    "pre_layrnorm.": "ln_pre.",  # sic
    "post_layernorm.": "ln_post.",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.q_proj.": "attn.q.",
    "self_attn.k_proj.": "attn.k.",
    "self_attn.v_proj.": "attn.v.",
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
SIGLIP = {
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "head.probe": "attn_pool.latent",
    "head.attention.out_proj.": "attn_pool.proj.",
    "head.layernorm.": "attn_pool.norm.",
    "head.mlp.": "attn_pool.mlp.",
    "post_layernorm.": "norm.",
    "encoder.layers.": "blocks.",
    "self_attn.q_proj.": "attn.q.",
    "self_attn.k_proj.": "attn.k.",
    "self_attn.v_proj.": "attn.v.",
    "self_attn.out_proj.": "attn.proj.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
}
TABLES: dict[Kind, dict[str, str]] = {"dinov2": DINOV2, "dinov3": DINOV3, "clip": CLIP, "siglip": SIGLIP, "vit": VIT}


def kind_in_transformers(state: State) -> Kind | None:
    """Which of transformers' vision transformers has these keys; None where it is none of them."""
    prefix = _prefix(state)
    if prefix is None:
        return None
    if f"{prefix}embeddings.patch_embedding.weight" in state:
        return "clip" if f"{prefix}embeddings.class_embedding" in state else "siglip"
    if f"{prefix}embeddings.patch_embeddings.weight" in state:
        return "dinov3"
    return "dinov2" if f"{prefix}encoder.layer.0.layer_scale1.lambda1" in state else "vit"


def from_transformers(state: State) -> State:
    """The vision tower of a file, under its publisher's names (timm's for SigLIP and ViT); others as they are.

    What stands beside the tower (a text tower, projections, a classifier, MAE's decoder) is left out.
    """
    kind, prefix = kind_in_transformers(state), _prefix(state)
    if kind is None or prefix is None:
        return state
    names = TABLES[kind]
    if kind == "dinov3":
        names = names | (DINOV3_SWIGLU if any("mlp.gate_proj." in key for key in state) else DINOV3_MLP)
    out = {}
    for key, value in state.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name == "embeddings.position_ids":  # 0, 1, 2, ...; older files hold it
            continue
        for theirs, publishers in names.items():
            # The whole of a name's part: `layernorm.` is not in `post_layernorm.`
            name = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{publishers}", name)
        out[name] = value
    _fuse(out, "attn.in_proj_" if kind == "clip" else "attn.qkv.", key_bias=kind != "dinov3")
    if kind == "siglip":
        _split_pooling(out)
        out |= {key: out[key].unsqueeze(0) for key in ("pos_embed",) if key in out}
    return out


def _prefix(state: State) -> str | None:
    """What stands before the vision tower's names; None where there are none."""
    for key in state:
        found = re.match(r"(.*?)embeddings\.patch_embeddings?\.", key)
        if found and found[1][-1:] in ("", "."):
            return found[1]
    return None


def _fuse(state: State, fused: str, key_bias: bool) -> None:
    """Put query, key and value together, block for block. A part that does not fit leaves all, to be named."""
    for query in [key for key in state if key.endswith(("attn.q.weight", "attn.q.bias"))]:
        block, _, kind = query.rpartition("attn.q.")
        names = [f"{block}attn.{part}.{kind}" for part in "qkv"]
        if kind == "bias" and not key_bias:
            names[1] = f"{block}attn.no_bias"
            state[names[1]] = torch.zeros_like(state[query])
        if all(name in state for name in names) and len({state[name].shape for name in names}) == 1:
            state[f"{block}{fused}{kind}"] = torch.cat([state.pop(name) for name in names])


def _split_pooling(state: State) -> None:
    """The pooling's one projection as timm has it: the probe's query apart from the tokens' key and value."""
    for kind in ("weight", "bias"):
        fused = state.pop(f"head.attention.in_proj_{kind}", None)
        if fused is not None:
            width = len(fused) // 3
            state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = fused[:width], fused[width:]
