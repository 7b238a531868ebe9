"""Encoders from official DINOv2 files give what the original code gives (tests/golden, made by the authors' code)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus.models import load_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORKS = ("dinov2_mlp", "dinov2_reg_swiglu")
IDENTITY = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def difference(a, b) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", params=[(name, kind) for name in NETWORKS for kind in ("safetensors", "pth")], ids=str)
def network(request, tmp_path_factory):
    """(encoder from the original keys, golden tensors)."""
    name, kind = request.param
    golden = load_file(GOLDEN / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    path = tmp_path_factory.mktemp(name) / f"{name}.{kind}"
    if kind == "pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    return load_checkpoint(str(path), num_heads=4, **IDENTITY).eval(), golden


@pytest.mark.parametrize(("case", "grid"), [("square", (8, 8)), ("rect", (6, 9))])
@torch.no_grad()
def test_final_tokens_agree(network, case, grid):
    encoder, golden = network
    features = encoder(golden[f"{case}.image"])
    assert features.grid == grid
    assert difference(features.cls, golden[f"{case}.cls"]) < 1e-5
    assert difference(features.patch, golden[f"{case}.patch"]) < 1e-5


@pytest.mark.parametrize("case", ["square", "rect"])
@torch.no_grad()
def test_register_tokens_agree(network, case):
    encoder, golden = network
    if f"{case}.reg" not in golden:
        assert encoder.network.num_reg_tokens == 0
        return
    outputs = []
    hook = encoder.network.norm.register_forward_hook(lambda module, args, output: outputs.append(output))
    encoder(golden[f"{case}.image"])
    hook.remove()
    assert difference(outputs[0][:, 1:5], golden[f"{case}.reg"]) < 1e-5


@pytest.mark.parametrize("case", ["square", "rect"])
@torch.no_grad()
def test_the_last_two_blocks_agree(network, case):
    encoder, golden = network
    last = encoder.intermediate(golden[f"{case}.image"], 2)
    assert len(last) == 2
    for i, features in enumerate(last):
        assert difference(features.cls, golden[f"{case}.inter{i}.cls"]) < 1e-5
        assert difference(features.patch, golden[f"{case}.inter{i}.patch"]) < 1e-5


@torch.no_grad()
def test_the_native_size_agrees(network):
    encoder, golden = network
    assert encoder.image_size == 518
    assert encoder.native_grid == (37, 37)
    line = torch.linspace(-2, 2, 518)
    x, y = line.expand(518, 518), line[:, None].expand(518, 518)  # x runs along the width
    features = encoder(torch.stack([x, y, x * y])[None])
    assert difference(features.cls, golden["native.cls"]) < 1e-5
    assert difference(features.patch.mean(dim=1), golden["native.patch_mean"]) < 1e-5


@torch.no_grad()
def test_the_masked_forward_agrees(network):
    encoder, golden = network
    mask = golden["masked.mask"].bool()
    assert 0 < mask.sum() < mask.numel()
    features = encoder(golden["masked.image"], mask)
    assert difference(features.cls, golden["masked.cls"]) < 1e-5
    assert difference(features.patch, golden["masked.patch"]) < 1e-5
    plain, masked = encoder.forward_pair(golden["masked.image"], mask[:1])
    assert difference(masked.patch, golden["masked.patch"][:1]) < 1e-5
    assert difference(plain.patch, golden["masked.patch"]) > 1e-2


@torch.no_grad()
def test_the_family_decides_the_position_rule(tmp_path):
    golden = load_file(GOLDEN / "dinov2_mlp.safetensors")
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    save_file(state, tmp_path / "dinov2.safetensors")

    def off(family):
        encoder = load_checkpoint(str(tmp_path / "dinov2.safetensors"), family, num_heads=4, **IDENTITY).eval()
        return difference(encoder(golden["square.image"]).patch, golden["square.patch"])

    assert off("dinov2") < 1e-5
    assert off("proteus") < 1e-5
    assert off("timm") > 1e-2  # another rule, and the golden figures tell them apart
