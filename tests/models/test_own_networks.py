"""Networks that are not the zoo's: a user's function, and repositories of the hub."""

import json
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import save_file

from proteus.errors import InputError
from proteus.models import create_model, load_checkpoint
from proteus.models.position import DINOV2, TIMM
from proteus.models.weights import save_encoder
from proteus.models.zoo import check_name, is_known

MODULE = """
import torch
from torch import nn
from proteus.models import Features

class Tokens(nn.Module):
    def __init__(self, width=8, cell=16):
        super().__init__()
        self.embed = nn.Conv2d(3, width, cell, cell)
        self.cls = nn.Parameter(torch.ones(1, 1, width))
        self.unused = nn.Linear(width, 3)
    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.cls.expand(len(x), -1, -1), x], 1)

class Map(Tokens):
    def forward(self, x):
        return self.embed(x)

class Whole(Tokens):
    def forward(self, x):
        x = self.embed(x)
        return Features(x.amax((2, 3)), x.flatten(2).transpose(1, 2), tuple(x.shape[2:]))

class Logits(Tokens):
    def forward(self, x):
        return self.embed(x).mean((2, 3))

def tokens(**options): return Tokens(**options)
def map(**options): return Map(**options)
def whole(**options): return Whole(**options)
def logits(): return Logits()
def nothing(): return 3
number = 5
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Names of functions in a module of the current directory."""
    (tmp_path / "mynets.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "mynets"
    sys.modules.pop("mynets", None)


@pytest.mark.parametrize("kind", ["tokens", "map", "whole"])
def test_what_a_network_returns_is_understood(module, kind):
    torch.manual_seed(0)
    encoder = create_model(f"{module}:{kind}", width=12).eval()
    x = torch.rand(2, 3, 32, 64)
    features = encoder(x)
    cells = encoder.network.embed(x)  # images come as they are, in [0, 1]
    assert (encoder.embed_dim, encoder.patch_size, features.grid) == (12, 16, (2, 4))
    assert torch.equal(features.patch, cells.flatten(2).transpose(1, 2))
    expected = {"tokens": torch.ones(2, 12), "map": cells.mean((2, 3)), "whole": cells.amax((2, 3))}[kind]
    torch.testing.assert_close(features.cls, expected)
    assert not encoder.network.unused.weight.requires_grad  # it cannot learn
    assert encoder.network.embed.weight.requires_grad


def test_a_file_cannot_say_whose_code_runs(tmp_path):
    usual = {"image_size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    facts = {"name": "os:mkdir", "arch": {"path": str(tmp_path / "made")}, **usual}
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"proteus": json.dumps(facts)})
    with pytest.raises(InputError, match=r"is of a network of your own: create_model\('os:mkdir'"):
        load_checkpoint(str(tmp_path / "a.safetensors"))
    facts = {"name": "timm/vit_tiny_patch16_224", "arch": {"pretrained": True}, **usual}
    save_file({"a": torch.zeros(1)}, tmp_path / "b.safetensors", metadata={"proteus": json.dumps(facts)})
    with pytest.raises(InputError, match="pretrained is not an argument of the network"):
        load_checkpoint(str(tmp_path / "b.safetensors"))
    assert not (tmp_path / "made").exists()


def test_a_convention_can_be_given(module):
    encoder = create_model(f"{module}:map", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).eval()
    x = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(encoder(x).patch, encoder.network.embed((x - 0.5) / 0.25).flatten(2).transpose(1, 2))


def test_masked_cells_take_the_learned_colour(module):
    encoder = create_model(f"{module}:map")
    mask = torch.tensor([[True, False, False, True]])
    x = torch.rand(1, 3, 32, 32)
    seen = []
    encoder.network.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder.mask_token.data.copy_(torch.tensor([[0.1, 0.2, 0.3]]))
    encoder(x, mask).patch.sum().backward()
    colour = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(3, 16, 16)
    assert torch.equal(seen[-1][0, :, :16, :16], colour)
    assert torch.equal(seen[-1][0, :, 16:, 16:], colour)
    assert torch.equal(seen[-1][0, :, :16, 16:], x[0, :, :16, 16:])
    assert encoder.mask_token.grad.abs().min() > 0


def test_its_weights_are_saved_and_found_again(module, tmp_path):
    encoder = create_model(f"{module}:tokens", width=12, image_size=48)
    save_encoder(encoder, tmp_path / "own.safetensors")
    again = create_model(f"{module}:tokens", checkpoint=str(tmp_path / "own.safetensors"), width=12)
    assert (again.name, again.arch, again.image_size) == (f"{module}:tokens", {"width": 12}, 48)
    x = torch.rand(1, 3, 48, 48)
    assert torch.equal(encoder.eval()(x).patch, again.eval()(x).patch)
    with pytest.raises(InputError, match=r"own.safetensors is of mynets:tokens, not mynets:map"):
        create_model(f"{module}:map", checkpoint=str(tmp_path / "own.safetensors"))
    with pytest.raises(InputError, match=r"is of a network with width=12, not 16"):
        create_model(f"{module}:tokens", checkpoint=str(tmp_path / "own.safetensors"), width=16)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mynets:tokns", "mynets has no function 'tokns'"),
        ("mynets:number", "mynets has no function 'number'"),
        ("no_such_module:build", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("broken:build", "broken cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("mynets:nothing", "returns a int, not an nn.Module"),
        ("mynets:logits", r"returns \[1, 8\]: not Features, tokens \[B, 1 \+ N, D\] or a map"),
    ],
)
def test_what_cannot_be_used_is_one_line(module, name, words):
    with pytest.raises(InputError, match=words) as caught:
        create_model(name)
    assert len(caught.value.lines) == 1


def test_arguments_it_does_not_take_are_an_input_error(module):
    with pytest.raises(InputError, match=r"mynets:tokens cannot be built with .*colour='red'"):
        create_model(f"{module}:tokens", colour="red")
    with pytest.raises(ValueError, match=r"mynets:tokens does not show what is between"):
        create_model(f"{module}:tokens").intermediate(torch.rand(1, 3, 32, 32), 1)


# ---------------------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache with one repository, lab/net, of a small timm network; returns that network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    args = {"depth": 2, "embed_dim": 24, "num_heads": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **args)
    snapshot = tmp_path / "models--lab--net" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--lab--net" / "refs").mkdir()
    (tmp_path / "models--lab--net" / "refs" / "main").write_text("1" * 40)
    save_file(network.state_dict(), snapshot / "model.safetensors")
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 64, 64], "fixed_input_size": True}
    told = {**args, "num_classes": 0}  # as timm writes them
    config = {"architecture": "vit_tiny_patch16_224", "model_args": told, "pretrained_cfg": cfg}
    (snapshot / "config.json").write_text(json.dumps(config))
    return network


@torch.no_grad()
def test_a_repository_of_the_hub_is_an_encoder(hub):
    encoder = create_model("hf-hub:lab/net", pretrained=True).eval()
    assert (encoder.mean, encoder.std, encoder.image_size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 64)
    x = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (encoder.mean, encoder.std))
    assert torch.equal(encoder(x).patch, hub.eval().forward_features((x - mean) / std)[:, 1:])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not that of a timm model"),
        ("[]", "is not that of a timm model"),
        ('{"architecture": "vit_tiny_patch16_224"}', "is not that of a timm model"),
        (
            '{"architecture": "no_such", "mean": [0, 0, 0], "std": [1, 1, 1], "input_size": [3, 64, 64]}',
            "timm has no architecture 'no_such'",
        ),
    ],
)
def test_a_repository_of_something_else_is_one_line(hub, tmp_path, content, words):
    next(tmp_path.rglob("config.json")).write_text(content)
    with pytest.raises(InputError, match=words):
        create_model("hf-hub:lab/net", pretrained=True)


def test_a_repository_that_is_not_there_is_one_line(hub):
    with pytest.raises(InputError, match=r"hf-hub:lab/other: its config.json is not in the hub's cache"):
        create_model("hf-hub:lab/other")
    with pytest.raises(InputError, match="hf-hub:"):
        create_model("hf-hub:")
    assert is_known("hf-hub:lab/other")


@pytest.mark.parametrize(
    ("architecture", "tag", "facts"),
    [
        ("vit_small_patch14_dinov2", "lvd142m", {"position": DINOV2}),
        ("vit_small_patch14_dinov2", "tuned_by_somebody", {"position": DINOV2}),
        ("vit_small_patch16_224", "dino", {"position": DINOV2}),
        ("vit_small_patch16_224", "augreg_in21k", {"position": TIMM}),
        ("vit_base_patch16_clip_quickgelu_224", "openai", {"patch_norm": False}),
    ],
)
def test_a_copy_of_the_zoos_weights_on_the_hub_has_the_zoos_facts(hub, tmp_path, architecture, tag, facts):
    path = next(tmp_path.rglob("config.json"))
    config = json.loads(path.read_text())
    config["architecture"], config["pretrained_cfg"]["tag"] = architecture, tag
    path.write_text(json.dumps(config))
    encoder = create_model("hf-hub:lab/net")
    assert {key: getattr(encoder, key) for key in facts} == facts


def test_weights_on_the_hub_with_another_activation_are_refused(hub, tmp_path):
    path = next(tmp_path.rglob("config.json"))
    config = json.loads(path.read_text())
    config["architecture"], config["pretrained_cfg"]["tag"] = "vit_base_patch16_clip_224", "openai"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"hf-hub:lab/net builds GELU .* timm/vit_base_patch16_clip_quickgelu_224"):
        create_model("hf-hub:lab/net")


def test_weights_with_another_activation_are_refused():
    with pytest.raises(InputError, match=r"QuickGELU: use timm/vit_base_patch16_clip_quickgelu_224\.openai"):
        check_name("timm/vit_base_patch16_clip_224.openai")
    for name in ("timm/vit_base_patch16_clip_quickgelu_224.openai", "timm/vit_base_patch16_clip_224.laion2b"):
        check_name(name)
