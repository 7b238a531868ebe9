"""Weights in transformers' layout, and OpenAI's CLIP, give what those libraries' networks give.

The golden files hold tiny networks with random weights, written by transformers itself, and what it returns for an
image. Their metadata has the configuration.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from proteus.errors import InputError
from proteus.models import create_model, load_checkpoint
from proteus.models.layouts import to_timm_layout
from proteus.models.position import DINOV2, DINOV2_REGISTERS, TIMM, PositionRule
from tests.networks import assert_same_network

GOLDEN = Path(__file__).parents[1] / "golden"
IDENTITY = {"mean": (0, 0, 0), "std": (1, 1, 1)}
REDUCED = {"embed_dim": 48, "depth": 2, "num_heads": 4}
ONE, TWO = {"mlp_ratio": 1, **REDUCED}, {"mlp_ratio": 2, **REDUCED}
SWIGLU = {"mlp_ratio": 128.5 / 48, **REDUCED}  # 64 wide, gate and value in one

# golden file -> a name to load it by, what makes that network as small, how many tokens stand before the patches
NETWORKS = {
    "dinov2": ("dinov2_vitb14", TWO, 1),
    "dinov2_reg": ("dinov2_vitg14_reg", SWIGLU, 5),
    "clip": ("clip_vitl14", TWO, 1),
    "siglip": ("siglip2_vitb16_224", {"act_layer": "gelu_tanh", **ONE}, 0),
    "dinov3": ("timm/vit_base_patch16_dinov3_qkvb", ONE, 5),
    "dinov3_swiglu": ("timm/vit_small_plus_patch16_dinov3_qkvb", ONE, 5),
    "mae": ("mae_vitb16", ONE, 1),
}
NAMES = list(NETWORKS)


def difference(a, b) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def read(name):
    """(state in the original keys, the other tensors, the configuration)."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
    return state, {key: value for key, value in tensors.items() if not key.startswith("state.")}, facts


@pytest.fixture
def load(tmp_path):
    """Loads a state in transformers' layout by the name that goes with it."""

    def load(name, state, **arch):
        save_file(state, tmp_path / "model.safetensors")
        network, reduced, _ = NETWORKS[name]
        path = str(tmp_path / "model.safetensors")
        return create_model(network, checkpoint=path, **IDENTITY, **{**reduced, **arch}).eval()

    return load


def tokens(features, prefix):
    """Features in the order of transformers' last_hidden_state, without registers."""
    return torch.cat([features.cls[:, None], features.patch], dim=1) if prefix else features.patch


def without_registers(hidden, prefix):
    """A last_hidden_state without its registers."""
    return torch.cat([hidden[:, :1], hidden[:, prefix:]], dim=1) if prefix else hidden


def test_the_golden_networks_are_not_trivial():
    for name in NAMES:
        state, golden, facts = read(f"transformers_{name}")
        assert facts["config"]["num_attention_heads"] == REDUCED["num_heads"]
        assert golden["tokens"].std() > 0.5
        for key, value in state.items():
            if key.endswith("bias") or "lambda1" in key:
                assert value.abs().mean() > 0.05, key


# --------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("name", [name for name in NAMES if name != "clip"])
@torch.no_grad()
def test_tokens_agree(load, name):
    state, golden, _ = read(f"transformers_{name}")
    encoder, prefix = load(name, state), NETWORKS[name][2]
    features = encoder(golden["image"])
    assert features.grid == (4, 4)
    assert difference(tokens(features, prefix), without_registers(golden["tokens"], prefix)) < 1e-5
    if "pooled" in golden:
        assert difference(features.cls, golden["pooled"]) < 1e-5
    if prefix == 5:
        seen = []
        encoder.network.norm.register_forward_hook(lambda module, args, output: seen.append(output))
        encoder(golden["image"])
        assert difference(seen[0], golden["tokens"]) < 1e-5  # the registers' too


@pytest.mark.parametrize("name", ["dinov2", "dinov2_reg", "dinov3", "dinov3_swiglu"])
@torch.no_grad()
def test_masked_tokens_agree(load, name):
    state, golden, _ = read(f"transformers_{name}")
    encoder, prefix = load(name, state), NETWORKS[name][2]
    features = encoder(golden["image"], golden["mask"])
    assert difference(tokens(features, prefix), without_registers(golden["masked.tokens"], prefix)) < 1e-5


@pytest.mark.parametrize("name", ["dinov2_reg", "dinov3", "dinov3_swiglu"])
@torch.no_grad()
def test_tokens_agree_at_another_size(load, name):
    state, golden, _ = read(f"transformers_{name}")
    features = load(name, state)(golden["rect.image"])
    assert features.grid == (3, 5)
    hidden = golden["rect.tokens"]
    assert difference(features.cls, hidden[:, 0]) < 1e-5
    assert difference(features.patch, hidden[:, 5:]) < 1e-5


@torch.no_grad()
def test_dinov2_without_registers_keeps_its_authors_positions_at_another_size(load):
    # transformers asks for the target size; the authors sample at (grid + 0.1) / native, and so does this library.
    state, golden, _ = read("transformers_dinov2")
    encoder = load("dinov2", state)
    assert encoder.position == DINOV2
    assert difference(encoder(golden["rect.image"]).patch, golden["rect.tokens"][:, 1:]) > 1e-2
    encoder = load("dinov2", state)
    encoder.position = PositionRule(offset=0.0, antialias=False)
    assert difference(encoder(golden["rect.image"]).patch, golden["rect.tokens"][:, 1:]) < 1e-5


@torch.no_grad()
def test_clip_norms_the_class_token_alone(load):
    state, golden, _ = read("transformers_clip")
    features = load("clip", state)(golden["image"])
    assert difference(features.cls, golden["pooled"]) < 1e-5  # pooled is after the norm,
    assert difference(features.patch, golden["tokens"][:, 1:]) < 1e-5  # last_hidden_state before it
    assert difference(features.cls @ state["visual_projection.weight"].T, golden["image_embedding"]) < 1e-5
    assert difference(load("clip", state, patch_norm=True)(golden["image"]).patch, golden["tokens"][:, 1:]) > 0.1


@torch.no_grad()
def test_clips_activation_follows_the_name(tmp_path):
    state, golden, _ = read("transformers_clip")
    save_file(state, tmp_path / "clip.safetensors")

    def classes(name):
        encoder = create_model(name, checkpoint=str(tmp_path / "clip.safetensors"), **TWO, **IDENTITY).eval()
        return encoder(golden["image"]).cls

    assert difference(classes("clip_vitl14"), golden["pooled"]) < 1e-5
    assert difference(classes("clip_vitl14"), golden["gelu.pooled"]) > 1e-3
    assert difference(classes("openclip_vitl14_datacompxl"), golden["gelu.pooled"]) < 1e-5


@torch.no_grad()
def test_siglips_activation_follows_the_name(load):
    # transformers' configurations say tanh for every SigLIP; timm builds the exact GELU for most.
    state, golden, _ = read("transformers_siglip")
    exact = load("siglip", state, act_layer="gelu")(golden["image"])
    assert difference(exact.patch, golden["gelu.tokens"]) < 1e-5
    assert difference(exact.cls, golden["gelu.pooled"]) < 1e-5
    assert difference(exact.patch, golden["tokens"]) > 1e-4


# -------------------------------------------------------------------------------------------- files of other models


def _renamed(old, new):
    return lambda state: {new + key.removeprefix(old): value for key, value in state.items() if key.startswith(old)}


POSITION_IDS = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
DECODER = {"decoder.mask_token": torch.zeros(1, 1, 8), "decoder.decoder_pred.weight": torch.zeros(3, 3)}
FILES = {
    "DINOv2 with a classifier": (
        "dinov2",
        lambda state: {"classifier.weight": torch.zeros(2, 96), **_renamed("", "dinov2.")(state)},
    ),
    "DINOv2 in parallel": ("dinov2", _renamed("", "module.")),
    "CLIP's vision model": ("clip", _renamed("vision_model.", "vision_model.")),
    "CLIP's vision model, newer": ("clip", _renamed("vision_model.", "")),
    "CLIP, older": ("clip", lambda state: {**state, **POSITION_IDS}),
    "CLIP in a language model": ("clip", _renamed("vision_model.", "vision_tower.vision_model.")),
    "SigLIP's vision model": ("siglip", _renamed("vision_model.", "vision_model.")),
    "SigLIP's vision model, newer": ("siglip", _renamed("vision_model.", "")),
    "MAE with its decoder": ("mae", lambda state: {**state, **DECODER}),
    "MAE's encoder": ("mae", _renamed("vit.", "")),
}


@pytest.mark.parametrize(("name", "change"), FILES.values(), ids=FILES.keys())
def test_the_vision_tower_is_found_wherever_it_stands(load, name, change):
    state, golden, _ = read(f"transformers_{name}")
    plain = load(name, state)
    changed = change(state)
    assert changed.keys() != state.keys()
    assert_same_network(plain, load(name, changed), tuple(golden["image"].shape[-2:]))


OUTSIDE = ("mask_token", "text_", "logit_", "visual_projection", "decoder")  # of what an encoder has to be given


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_needed(load, name):
    state, _, _ = read(f"transformers_{name}")
    for key in state:
        if not any(word in key for word in OUTSIDE) and ".0." not in key:
            with pytest.raises(InputError, match=r"does not fit|not of a square grid"):
                load(name, {other: value for other, value in state.items() if other != key})
            with pytest.raises(InputError, match=r"does not fit|not of a square grid"):
                load(name, {**state, key: torch.cat([state[key], state[key]], dim=-1)})
    norm = next(key for key in state if re.search(r"layers?\.1\.(layer_?)?norm(1|_before)\.weight", key))
    with pytest.raises(InputError, match=r"missing: blocks\.1\.norm1\.weight"):
        load(name, {key: value for key, value in state.items() if key != norm})
    with pytest.raises(InputError, match=r"unexpected: .*extra"):
        load(name, {**state, norm.replace("weight", "extra"): torch.zeros(3)})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", [("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")], ids=str)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_a_missing_part_of_the_attention_is_missed(load, name, part, kind):
    state, _, _ = read(f"transformers_{name}")
    gone = [key for key in state if ".1." in key and key.endswith(tuple(f"{word}.{kind}" for word in part))]
    gone = [key for key in gone if not key.startswith("text_model.")]
    if name.startswith("dinov3") and (part[1], kind) == ("key", "bias"):
        assert gone == []  # it has none
        key = next(key for key in state if ".1." in key and key.endswith("k_proj.weight"))
        with pytest.raises(InputError, match=r"unexpected: blocks\.1\.attn\.k\.bias"):
            load(name, {**state, key.replace("weight", "bias"): torch.ones(48)})
        return
    assert len(gone) == 1
    with pytest.raises(InputError, match=r"blocks\.1\.attn\.(qkv|q_bias|in_proj)"):
        load(name, {key: value for key, value in state.items() if key not in gone})


@torch.no_grad()
def test_dinov3s_biases_are_kept_or_refused(tmp_path):
    state, golden, _ = read("transformers_dinov3")
    path = str(tmp_path / "model.safetensors")
    save_file(state, path)
    with pytest.raises(InputError, match=r"unexpected: blocks\.0\.attn\.q_bias"):
        create_model("dinov3_vitb16", checkpoint=path, **ONE)
    biases = [key for key in state if key.endswith(("q_proj.bias", "v_proj.bias"))]
    assert len(biases) == 4
    save_file({**state, **{key: torch.zeros(48) for key in biases}}, path)  # as some of the published ones are
    without = create_model("dinov3_vitb16", checkpoint=path, **ONE, **IDENTITY).eval()(golden["image"])
    with_zero = create_model("timm/vit_base_patch16_dinov3_qkvb", checkpoint=path, **ONE, **IDENTITY).eval()
    assert difference(without.patch, with_zero(golden["image"]).patch) < 1e-5
    assert difference(without.cls, golden["pooled"]) > 1e-2


def test_siglip_of_any_resolution_is_another_network(load):
    state, _, _ = read("transformers_siglip")
    key = "vision_model.embeddings.patch_embedding.weight"
    with pytest.raises(InputError, match=r"wrong shape: patch_embed\.proj\.weight is \[48, 768\]"):
        load("siglip", {**state, key: state[key].permute(0, 2, 3, 1).reshape(48, 768)})


# ---------------------------------------------------------------------------------------------- by the file alone


@pytest.mark.parametrize(("name", "rule"), [("dinov2", DINOV2), ("dinov2_reg", DINOV2_REGISTERS)])
@torch.no_grad()
def test_dinov2_is_known_from_its_file(tmp_path, name, rule):
    state, golden, _ = read(f"transformers_{name}")
    save_file(state, tmp_path / "model.safetensors")
    encoder = load_checkpoint(str(tmp_path / "model.safetensors"), num_heads=4, **IDENTITY).eval()
    assert encoder.position == rule
    assert encoder.native_grid == (4, 4)
    assert difference(encoder(golden["image"]).cls, golden["pooled"]) < 1e-5
    del state["embeddings.mask_token"]  # an option of theirs
    save_file(state, tmp_path / "model.safetensors")
    assert load_checkpoint(str(tmp_path / "model.safetensors"), num_heads=4).position == rule


@torch.no_grad()
def test_clips_family_has_to_be_said(tmp_path):
    state, golden, _ = read("transformers_clip")
    path = str(tmp_path / "model.safetensors")
    save_file(state, path)
    with pytest.raises(InputError, match=r"family='clip'.*family='openclip'"):
        load_checkpoint(path, num_heads=4)
    features = load_checkpoint(path, "clip", num_heads=4, **IDENTITY).eval()(golden["image"])
    assert difference(features.cls, golden["pooled"]) < 1e-5
    assert difference(features.patch, golden["tokens"][:, 1:]) < 1e-5
    features = load_checkpoint(path, "openclip", num_heads=4, **IDENTITY).eval()(golden["image"])
    assert difference(features.cls, golden["gelu.pooled"]) < 1e-5


@torch.no_grad()
def test_mae_is_a_plain_transformer(tmp_path):
    state, golden, _ = read("transformers_mae")
    save_file(state, tmp_path / "model.safetensors")
    encoder = load_checkpoint(str(tmp_path / "model.safetensors"), num_heads=4, **IDENTITY).eval()
    assert encoder.position == TIMM
    assert difference(encoder(golden["image"]).patch, golden["tokens"][:, 1:]) < 1e-5


@pytest.mark.parametrize("name", ["siglip", "dinov3"])
def test_others_are_asked_for_by_name(tmp_path, name):
    state, _, _ = read(f"transformers_{name}")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="give its name to create_model"):
        load_checkpoint(str(tmp_path / "model.safetensors"), num_heads=4)


# ---------------------------------------------------------------------------------------------------- OpenAI's CLIP


@pytest.fixture
def openai():
    state, golden, _ = read("clip_openai")
    return state, golden


def clip(path, family="clip"):
    return load_checkpoint(str(path), family=family, num_heads=4, **IDENTITY).eval()


def assert_openais(encoder, state, golden, bound=1e-5):
    with torch.no_grad():
        features = encoder(golden["image"])
    assert features.grid == (8, 8)
    assert difference(features.cls, golden["cls_ln_post"]) < bound
    assert difference(features.patch, golden["tokens_prenorm"][:, 1:]) < bound
    assert difference(features.cls @ state["visual.proj"].float(), golden["image_embedding"]) < bound


def test_openais_clip_agrees(tmp_path, openai):
    state, golden = openai
    torch.save(state, tmp_path / "clip.pt")
    save_file(state, tmp_path / "clip.safetensors")
    for file in ("clip.pt", "clip.safetensors"):
        encoder = clip(tmp_path / file)
        assert_openais(encoder, state, golden)
        assert encoder.image_size == 112


@torch.no_grad()
def test_openais_clip_is_not_an_openclip(tmp_path, openai):
    state, golden = openai
    save_file(state, tmp_path / "clip.safetensors")
    features = clip(tmp_path / "clip.safetensors", "openclip")(golden["image"])
    assert difference(features.cls, golden["cls_ln_post"]) > 1e-3
    assert difference(features.patch, golden["tokens_prenorm"][:, 1:]) > 0.1  # normed, for one
    with pytest.raises(InputError, match=r"family='clip'.*family='openclip'"):
        load_checkpoint(str(tmp_path / "clip.safetensors"), num_heads=4)


class Node(nn.Module):
    """A module for every dot in a state's names; its forward touches all of them, so that a trace keeps them."""

    def __init__(self, state):
        super().__init__()
        for name in dict.fromkeys(key.partition(".")[0] for key in state):
            if name in state:
                setattr(self, name, nn.Parameter(state[name]))
            else:
                within = {key[len(name) + 1 :]: x for key, x in state.items() if key.startswith(f"{name}.")}
                self.add_module(name, Node(within))

    def forward(self, x):
        return x + sum(p.float().sum() for p in self.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_openais_archive_is_the_same_network(tmp_path, openai, dtype):
    state, golden = openai
    state = {key: value.to(dtype) for key, value in state.items()}
    torch.jit.save(torch.jit.trace(Node(state), torch.zeros(2)), str(tmp_path / "archive.pt"))
    save_file(state, tmp_path / "clip.safetensors")
    archive, plain = clip(tmp_path / "archive.pt"), clip(tmp_path / "clip.safetensors")
    assert_same_network(archive, plain, (112, 112))
    assert archive.mask_token.dtype == torch.float32
    assert_openais(archive, state, golden, 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_weights_are_rounded_once(tmp_path, openai, dtype):
    state, _ = openai
    save_file({key: value.to(dtype) for key, value in state.items()}, tmp_path / "half.safetensors")
    save_file({key: value.to(dtype).float() for key, value in state.items()}, tmp_path / "float.safetensors")
    half, full = clip(tmp_path / "half.safetensors"), clip(tmp_path / "float.safetensors")
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    assert_same_network(half, full, (112, 112))


def test_both_layouts_of_a_clip_are_one_network(openai):
    """OpenAI's names written as transformers writes them come back the same."""
    state, _ = openai
    names = {
        "visual.class_embedding": "embeddings.class_embedding",
        "visual.positional_embedding": "embeddings.position_embedding.weight",
        "visual.conv1.": "embeddings.patch_embedding.",
        "visual.ln_pre.": "pre_layrnorm.",
        "visual.ln_post.": "post_layernorm.",
        "visual.transformer.resblocks.": "encoder.layers.",
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "attn.out_proj.": "self_attn.out_proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }
    theirs = {}
    for key, value in state.items():
        name = key
        for old, new in names.items():
            name = name.replace(old, new)
        if "attn.in_proj_" in name:
            for part, chunk in zip("qkv", value.chunk(3), strict=True):
                theirs["vision_model." + name.replace("attn.in_proj_", f"self_attn.{part}_proj.")] = chunk
        elif key == "visual.proj":
            theirs["visual_projection.weight"] = value.T
        else:
            theirs["vision_model." + name] = value
    ours, back = to_timm_layout(state), to_timm_layout(theirs)
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[key], back[key]) for key in ours)
