"""Publishers' files under timm's names, and position embeddings resized as their publishers resize them."""

import math
import re
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.eva import checkpoint_filter_fn
from timm.models.vision_transformer import _convert_radio

from proteus.errors import InputError
from proteus.models import create_model
from proteus.models.layouts import to_timm_layout
from proteus.models.position import (
    DINOV2,
    DINOV2_REGISTERS,
    RADIO,
    RADIO_ALIGNED,
    resize_position_embedding,
)
from tests.networks import assert_same_network

WIDTH, HIDDEN, DEPTH = 48, 64, 2
REDUCED = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "mlp_ratio": (HIDDEN + 0.5) / WIDTH}
SINGLE, GATED = "vit_base_patch16_dinov3", "vit_small_plus_patch16_dinov3"


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


# ---------------------------------------------------------------------------------------------------------- DINOv3


def dinov3(gated=False, bias=1.0):
    """Random weights under the names of DINOv3's own files."""
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "storage_tokens": (1, 4, WIDTH),
        "mask_token": (1, WIDTH),
        "rope_embed.periods": (3,),
        "patch_embed.proj.weight": (WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
        "local_cls_norm.weight": (WIDTH,),
        "local_cls_norm.bias": (WIDTH,),
    }
    up, down = (HIDDEN, WIDTH), (WIDTH, HIDDEN)
    mlp = {"w1": up, "w2": up, "w3": down} if gated else {"fc1": up, "fc2": down}
    for block in (f"blocks.{index}." for index in range(DEPTH)):
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        linear |= {f"mlp.{name}": shape for name, shape in mlp.items()}
        for name, shape in linear.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"{block}{name}"] = (WIDTH,)
    state = {key: random(*shape, seed=1000 * index) for index, (key, shape) in enumerate(shapes.items())}
    for block in (f"blocks.{index}." for index in range(DEPTH)):
        mask = torch.ones(3 * WIDTH)
        mask[WIDTH : 2 * WIDTH] = 0
        state[f"{block}attn.qkv.bias_mask"] = mask
        state[f"{block}attn.qkv.bias"] = state[f"{block}attn.qkv.bias"] * mask * bias
    return state


@pytest.mark.parametrize("bias", [0.0, 1.0], ids=["zero bias", "bias"])
@pytest.mark.parametrize("name", [SINGLE, GATED], ids=["mlp", "swiglu"])
def test_dinov3s_names_are_read_as_timm_reads_them(tmp_path, name, bias, capsys):
    state, name = dinov3(name == GATED, bias), f"{name}{'_qkvb' if bias else ''}"
    network = timm.create_model(name, num_classes=0, **REDUCED)
    timms = checkpoint_filter_fn(dict(state), network)
    ours = to_timm_layout(state)
    ours.pop("mask_token")  # timm has no use for it; an encoder has
    if not bias:
        zeros = [ours.pop(key) for key in list(ours) if key.endswith(("q_bias", "v_bias"))]
        assert len(zeros) == 2 * DEPTH
        assert not any(zero.any() for zero in zeros)
    assert ours.keys() == timms.keys() == network.state_dict().keys()
    assert all(torch.equal(ours[key], timms[key]) for key in timms)

    torch.save(state, tmp_path / "dinov3.pth")
    encoder = create_model(f"timm/{name}", checkpoint=str(tmp_path / "dinov3.pth"), **REDUCED)
    loaded = encoder.network.state_dict()
    assert all(torch.equal(loaded[key], timms[key]) for key in timms)
    assert torch.equal(encoder.mask_token, state["mask_token"])


@pytest.mark.parametrize("part", ["query", "value"])
def test_a_bias_without_a_place_is_refused_by_name(tmp_path, part):
    path, state = str(tmp_path / "dinov3.pth"), dinov3(bias=0.0)
    state["blocks.1.attn.qkv.bias"][3 if part == "query" else 2 * WIDTH + 3] = 1e-3
    torch.save(state, path)
    with pytest.raises(InputError, match=rf"unexpected: blocks\.1\.attn\.{part[0]}_bias$"):
        create_model(f"timm/{SINGLE}", checkpoint=path, **REDUCED)


def test_a_zero_bias_is_read_by_a_network_with_one(tmp_path):
    path = str(tmp_path / "dinov3.pth")
    torch.save(dinov3(bias=0.0), path)
    encoder = create_model(f"timm/{SINGLE}_qkvb", checkpoint=path, **REDUCED)
    assert torch.equal(encoder.network.blocks[1].attn.q_bias, torch.zeros(WIDTH))


def test_eva02s_biases_are_read_as_timm_reads_them(tmp_path):
    """Its files hold the same names for another layout, in which the projections are apart."""
    name, reduced = "timm/eva02_base_patch14_224", {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4}
    own = create_model(name, **reduced).network.state_dict()
    own = {key: random(*value.shape, seed=1000 * index) for index, (key, value) in enumerate(own.items())}
    theirs = {re.sub(r"\.([qv])_proj\.bias$", r".\1_bias", key): value for key, value in own.items()}
    assert "blocks.1.attn.q_bias" in theirs
    assert "blocks.1.attn.v_bias" in theirs
    torch.save(theirs, tmp_path / "eva02.pt")
    loaded = create_model(name, checkpoint=str(tmp_path / "eva02.pt"), **reduced).network.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.items())


# ---------------------------------------------------------------------------------------------------------- SynCLR


def test_synclrs_file_is_the_plain_network(tmp_path):
    reduced = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4}
    torch.manual_seed(0)
    plain = create_model("synclr_vitb16", **reduced).network.state_dict()
    plain = {key: random(*value.shape, seed=1000 * index) for index, (key, value) in enumerate(plain.items())}
    state = {f"module.visual.{key}": value for key, value in plain.items()}
    state["module.image_mlp.weight"] = torch.zeros(3)  # what its authors train beside it
    torch.save({"model": state, "epoch": 3}, tmp_path / "synclr.pth")
    save_file(plain, tmp_path / "plain.safetensors")
    theirs, ours = (
        create_model("synclr_vitb16", checkpoint=str(tmp_path / file), **reduced)
        for file in ("synclr.pth", "plain.safetensors")
    )
    assert all(torch.equal(value, plain[key]) for key, value in theirs.network.state_dict().items())
    assert_same_network(theirs, ours, (224, 224), (128, 96))
    del state["module.visual.blocks.1.norm1.weight"]
    torch.save({"model": state}, tmp_path / "short.pth")
    with pytest.raises(InputError, match=r"missing: blocks\.1\.norm1\.weight"):
        create_model("synclr_vitb16", checkpoint=str(tmp_path / "short.pth"), **reduced)


# ------------------------------------------------------------------------------------------------------- positions

NATIVE = 37


def embedding(*native, width=6):
    return random(1, math.prod(native), width)


@pytest.mark.parametrize("grid", [7, 16, 24, 32, 37])
def test_dinov2s_positions_are_the_authors(grid):
    positions = embedding(NATIVE, NATIVE)
    image = positions.reshape(1, NATIVE, NATIVE, -1).permute(0, 3, 1, 2)
    expected = image
    if grid != NATIVE:
        scale = (grid + 0.1) / NATIVE
        expected = F.interpolate(image, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    expected = expected.permute(0, 2, 3, 1).flatten(1, 2)
    assert expected.shape == (1, grid * grid, 6)
    resized = resize_position_embedding(positions, (NATIVE, NATIVE), (grid, grid), DINOV2)
    assert (resized - expected).abs().max() == 0.0
    if grid != NATIVE:  # the rule of the other networks is another one
        other = resize_position_embedding(positions, (NATIVE, NATIVE), (grid, grid), DINOV2_REGISTERS)
        assert (other - expected).abs().max() > 0.1


@pytest.mark.parametrize("grid", [(7, 7), (16, 16), (24, 24), (32, 32), (37, 37), (16, 23)], ids=str)
def test_positions_beside_registers_are_the_authors(grid):
    positions = embedding(NATIVE, NATIVE)
    image = positions.reshape(1, NATIVE, NATIVE, -1).permute(0, 3, 1, 2)
    expected = image
    if grid != (NATIVE, NATIVE):
        expected = F.interpolate(image, size=grid, mode="bicubic", antialias=True)
    resized = resize_position_embedding(positions, (NATIVE, NATIVE), grid, DINOV2_REGISTERS)
    assert (resized - expected.permute(0, 2, 3, 1).flatten(1, 2)).abs().max() == 0.0


@pytest.mark.parametrize("grid", [(16, 23), (23, 16), (40, 12)], ids=str)
def test_dinov2s_positions_of_a_rectangle_are_the_authors(grid):
    positions = embedding(NATIVE, NATIVE)
    image = positions.reshape(1, NATIVE, NATIVE, -1).permute(0, 3, 1, 2)
    scale = tuple((side + 0.1) / NATIVE for side in grid)
    expected = F.interpolate(image, scale_factor=scale, mode="bicubic", antialias=False).permute(0, 2, 3, 1)
    resized = resize_position_embedding(positions, (NATIVE, NATIVE), grid, DINOV2)
    assert (resized - expected.flatten(1, 2)).abs().max() == 0.0


@pytest.mark.parametrize("grid", [(16, 16), (8, 12), (12, 8), (33, 20), (40, 40)], ids=str)
@pytest.mark.parametrize(("rule", "aligned"), [(RADIO, False), (RADIO_ALIGNED, True)], ids=["plain", "aligned"])
def test_radios_positions_are_timms(grid, rule, aligned):
    positions = embedding(32, 32)
    network = SimpleNamespace(pos_embed=0, patch_embed=SimpleNamespace(grid_size=grid))
    state = {"radio_model.model.patch_generator.pos_embed": positions}
    expected = _convert_radio(state, network, align_corners=aligned)["pos_embed"]
    resized = resize_position_embedding(positions, (32, 32), grid, rule)
    assert resized.shape == (1, math.prod(grid), 6)
    assert (resized - expected).abs().max() == 0.0
    other = resize_position_embedding(positions, (32, 32), grid, RADIO if aligned else RADIO_ALIGNED)
    assert (resized - other).abs().max() > 0.1
