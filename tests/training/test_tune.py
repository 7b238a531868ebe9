"""What of an encoder learns, and adapters."""

import copy
import sys

import pytest
import torch
from torch import nn

from proteus.errors import InputError
from proteus.models import create_model, load_checkpoint
from proteus.models.attention import use_attention
from proteus.models.weights import save_encoder
from proteus.training.tune import merged, tune
from tests.networks import assert_same_network, images

VIT = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
EVA = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
SIZE, RANK = 16, 3


def encoder_of(name="timm/vit_tiny_patch16_224", arch=VIT):
    torch.manual_seed(0)
    encoder = create_model(name, image_size=SIZE, **arch).eval()
    for key, parameter in encoder.network.named_parameters():
        if "gamma" in key:  # LayerScale starts at 1e-5, under which nothing that an adapter does would be seen
            nn.init.ones_(parameter)
    return encoder


def step(encoder, rate=0.5):
    """A step of gradient descent on whatever takes a gradient, large enough to be seen."""
    features = encoder(images(SIZE, SIZE))
    (features.cls.square().sum() + features.patch[:, 0].sum()).backward()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad / (parameter.grad.norm() + 1e-6)
                parameter.grad = None


def distance(one, other):
    return max((one.cls - other.cls).abs().max().item(), (one.patch - other.patch).abs().max().item())


@torch.no_grad()
def features_of(encoder):
    return encoder.eval()(images(SIZE, SIZE))


def test_all_is_the_encoder_as_it_is():
    encoder, untouched = encoder_of().train(), encoder_of()
    tune(encoder, "all", RANK)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert encoder.training
    assert_same_network(encoder, untouched)
    assert merged(encoder) is encoder


def test_a_frozen_encoder_builds_no_graph_and_keeps_its_statistics():
    encoder = encoder_of("timm/test_resnet", {})
    tune(encoder, "head", RANK)
    head = nn.Linear(encoder.embed_dim, 2)
    task = nn.ModuleList([encoder, head]).train()
    before = copy.deepcopy(encoder.state_dict())
    features = encoder(images(SIZE, SIZE))
    assert not features.cls.requires_grad
    assert not features.patch.requires_grad
    head(features.cls).sum().backward()
    assert head.weight.grad is not None
    assert task.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert merged(encoder) is encoder


NETWORKS = {
    "vit": ("timm/vit_tiny_patch16_224", VIT),
    "rope": ("timm/vit_small_patch16_dinov3_qkvb", EVA),
    "q_bias": ("timm/beit_base_patch16_224", EVA),  # timm adds this bias in a product without the layer
}


@pytest.mark.parametrize(
    ("network", "attention"), [("vit", "auto"), ("vit", "sdpa"), ("rope", "auto"), ("q_bias", "sdpa")]
)
def test_adapters_start_at_nothing_and_alone_learn(network, attention):
    encoder, untouched = encoder_of(*NETWORKS[network]), encoder_of(*NETWORKS[network])
    use_attention(encoder.network, attention)
    tune(encoder, "lora", RANK)
    assert not encoder.training
    assert distance(features_of(encoder), features_of(untouched)) < 1e-6
    learn = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    layers = 4 * NETWORKS[network][1]["depth"]  # qkv, proj, fc1, fc2
    assert len(learn) == 2 * layers
    assert all("lora_" in name for name in learn)
    for name, parameter in learn.items():
        assert parameter.shape[0 if "lora_A" in name else 1] == RANK
    step(encoder.train())
    assert distance(features_of(encoder), features_of(untouched)) > 1e-3
    state = encoder.network.state_dict()
    for key, value in untouched.network.state_dict().items():  # the weights beside the adapters have not moved
        parent, _, last = key.rpartition(".")
        assert torch.equal(state.get(key, state.get(f"{parent}.base_layer.{last}")), value), key
    features = encoder(images(SIZE, SIZE))
    (features.cls.square().sum() + features.patch.sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in learn.values())  # every one is on the way
    assert all(parameter.grad is None for name, parameter in encoder.named_parameters() if name not in learn)


@pytest.mark.parametrize("network", NETWORKS)
def test_merged_adapters_are_an_ordinary_network(network, tmp_path):
    encoder, untouched = encoder_of(*NETWORKS[network]), encoder_of(*NETWORKS[network])
    tune(encoder, "lora", RANK)
    step(encoder)
    adapted = features_of(encoder)
    state = copy.deepcopy(encoder.state_dict())
    plain = merged(encoder)
    assert plain is not encoder
    assert list(plain.network.state_dict()) == list(untouched.network.state_dict())
    assert distance(features_of(plain), adapted) < 1e-5
    assert distance(features_of(plain), features_of(untouched)) > 1e-3
    assert features_of(encoder).cls.equal(adapted.cls)  # the encoder itself goes on learning
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, state[key]), key
    save_encoder(plain, tmp_path / "adapted.safetensors")
    loaded = load_checkpoint(str(tmp_path / "adapted.safetensors"))
    assert distance(features_of(loaded), adapted) < 1e-5


def test_an_adapter_is_scaled_by_two():
    encoder = encoder_of()
    tune(encoder, "lora", RANK)
    layer = encoder.network.blocks[0].mlp.fc1
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    nn.init.normal_(b)
    x = torch.randn(5, a.shape[1])
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 2 * x @ a.T @ b.T, atol=1e-4, rtol=1e-4)


def test_adapters_of_one_seed_are_the_same():
    drawn = []
    for seed in (1, 1, 2):
        encoder = encoder_of()
        torch.manual_seed(seed)
        tune(encoder, "lora", RANK)
        drawn.append(encoder.network.blocks[0].attn.qkv.lora_A["default"].weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_adapters_learn_beside_batch_statistics_that_stay():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.mix = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Linear(8, 8)
            self.unused = nn.Linear(8, 8)

        def forward(self, x):
            return self.mix(self.norm(self.stem(x)).movedim(1, -1)).movedim(-1, 1)

    from proteus.models.opaque import OpaqueEncoder

    encoder = OpaqueEncoder(Mixed(), name="mixed", mean=(0, 0, 0), std=(1, 1, 1), image_size=SIZE, own=True).train()
    tune(encoder, "lora", RANK)
    assert not encoder.train().training
    encoder(torch.rand(4, 3, SIZE, SIZE))
    assert encoder.network.norm.num_batches_tracked == 0
    assert torch.equal(encoder.network.norm.running_mean, torch.zeros(8))
    assert hasattr(encoder.network.mix, "lora_A")
    assert not hasattr(encoder.network.unused, "lora_A")


def test_a_network_without_linear_layers_is_refused():
    with pytest.raises(InputError, match=r"timm/test_resnet has no linear layers .* use all or head") as caught:
        tune(encoder_of("timm/test_resnet", {}), "lora", RANK)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    encoder = encoder_of()
    with pytest.raises(InputError, match=r"pip install 'proteus-distill\[lora\]'"):
        tune(encoder, "lora", RANK)
    assert merged(encoder) is encoder
