"""The encoder in a dense task: padded, frozen or a copy that trains, its parameters in their groups."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from timm.layers import DropPath
from torch import nn

from proteus.errors import InputError
from proteus.evaluation.dense.backbone import build_backbone
from proteus.evaluation.dense.depth import build_head as depth_head
from proteus.evaluation.dense.presets import DEPTH, SEGMENTATION
from proteus.evaluation.dense.segmentation import build_head
from proteus.evaluation.dense.train import Network, parameter_groups, rate_of, share_of
from proteus.models import create_model
from tests.evaluation.dense.scenes import tiny

CPU = torch.device("cpu")
LIN = replace(SEGMENTATION["dinov2-lin"], crop=(30, 30))
UPERNET = replace(SEGMENTATION["proteus-upernet"], crop=(30, 30))
DPT = replace(DEPTH["proteus-dpt"], crop=(30, 30), channels=8)


def images(*size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("size", "top", "left"), [((30, 33), 1, 1), ((29, 32), 1, 0), ((31, 35), 0, 0)])
def test_padding_is_around_and_zero_to_the_network(size, top, left):
    backbone = build_backbone(tiny(), LIN, CPU)
    padded = backbone.pad(images(*size))
    assert padded.shape == (2, 3, 32, 36 if size[1] > 32 else 32)
    seen = backbone.encoder.normalise(padded)
    inside = torch.zeros(seen.shape[-2:], dtype=torch.bool)
    inside[top : top + size[0], left : left + size[1]] = True
    assert (seen[..., ~inside] == 0).all()
    assert torch.equal(padded[..., inside].view(2, 3, *size), images(*size))


def test_the_patch_may_divide_the_image_already():
    backbone = build_backbone(tiny(), LIN, CPU)
    x = images(32, 24)
    assert backbone.pad(x) is x


def test_what_a_head_sees_is_the_encoders():
    encoder = tiny(depth=4).eval()
    with torch.no_grad():
        (last,) = build_backbone(encoder, LIN, CPU)(images(32, 32))
        assert torch.equal(last.patch, encoder(images(32, 32)).patch)  # the final norm applied
        four = build_backbone(encoder, replace(DEPTH["dinov2-lin4"], crop=(32, 32)), CPU)(images(32, 32))
        for one, other in zip(four, encoder.intermediate(images(32, 32), [0, 1, 2, 3], norm=False), strict=True):
            assert torch.equal(one.patch, other.patch)
            assert torch.equal(one.cls, other.cls)


def test_without_a_class_token_the_mean_of_the_patches_stands_in():
    encoder = tiny(class_token=False, global_pool="avg")
    (last,) = build_backbone(encoder, replace(DEPTH["dinov2-lin1"], crop=(16, 16)), CPU)(images(16, 16))
    torch.testing.assert_close(last.cls, last.patch.mean(1))


def test_a_pyramid_is_refused():
    encoder = create_model("timm/test_resnet", image_size=64)
    with pytest.raises(InputError, match="test_resnet is a pyramid"):
        build_backbone(encoder, replace(SEGMENTATION["dinov2-ms"], crop=(64, 64)), CPU)


# -------------------------------------------------------------------------------------------------------- fine-tuning


def tuned(preset, encoder):
    backbone = build_backbone(encoder, preset, CPU)
    head = build_head(preset, 32, 4, 3) if preset is UPERNET else depth_head(preset, 32, 4)
    return Network(backbone, head, preset, Accelerator(cpu=True))


@pytest.mark.parametrize("preset", [UPERNET, DPT], ids=lambda preset: preset.name)
def test_a_copy_trains_and_every_part_of_it_that_matters(preset):
    encoder = tiny().freeze()
    before = copy.deepcopy(encoder.state_dict())
    network = tuned(preset, encoder)
    copied = network.backbone.encoder
    assert copied is not encoder
    assert copied.native_grid == (8, 8)  # of the padded crop
    frozen = {name for name, p in copied.named_parameters() if not p.requires_grad}
    assert frozen == {"mask_token", "network.norm.weight", "network.norm.bias"}
    assert not any(p.requires_grad for p in encoder.parameters())

    output = network.trained.train()(images(30, 30))
    total = sum(part.square().mean() for part in output) if preset is UPERNET else output.square().mean()
    total.backward()
    trained = [p for p in network.trained.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)  # as DDP wants it
    torch.optim.SGD(trained, lr=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.native_grid == (4, 4)


def test_drop_path_grows_with_depth():
    encoder = tiny(depth=3, drop_path=0.5)
    blocks = build_backbone(encoder, replace(UPERNET, drop_path=0.2), CPU).encoder.network.blocks
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    rates = [(b.drop_path1.drop_prob, b.drop_path2.drop_prob) for b in blocks[1:]]
    assert rates == [(0.1, 0.1), (0.2, 0.2)]
    off = build_backbone(encoder, replace(UPERNET, drop_path=0.0), CPU).encoder
    assert not any(isinstance(module, DropPath) for module in off.modules())
    assert [b.drop_path1.drop_prob for b in encoder.network.blocks[1:]] == [0.25, 0.5]  # the caller's stay


def rates_and_decays(network, preset):
    names = {id(p): name for name, p in network.trained.named_parameters()}
    groups = parameter_groups(network, preset)
    found = {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    assert found.keys() == {name for name, p in network.trained.named_parameters() if p.requires_grad}
    return found


def test_layer_decay():
    """L = 2 blocks: 0.65 ** 3 before them, 0.65 ** 2 and 0.65, and 1 for the head; vectors are not decayed."""
    found = rates_and_decays(tuned(UPERNET, tiny()), UPERNET)
    at = "0.encoder.network."
    expected = {
        at + "pos_embed": (0.65**3, 0.05),  # decayed, as in the original, whose rule misses its name
        at + "cls_token": (0.65**3, 0.05),
        at + "patch_embed.proj.weight": (0.65**3, 0.05),
        at + "patch_embed.proj.bias": (0.65**3, 0.0),
        at + "blocks.0.attn.qkv.weight": (0.65**2, 0.05),
        at + "blocks.1.mlp.fc1.weight": (0.65, 0.05),
        at + "blocks.1.norm1.weight": (0.65, 0.0),
        "1.classify.1.weight": (1.0, 0.05),
        "1.classify.1.bias": (1.0, 0.0),
        "1.neck.scales.0.1.weight": (1.0, 0.0),
    }
    for name, (scale, decay) in expected.items():
        assert found[name] == (pytest.approx(scale), decay), name


def test_proteus_depth_trains_the_backbone_at_a_tenth_but_for_its_positions():
    found = rates_and_decays(tuned(DPT, tiny()), DPT)
    for name, (scale, decay) in found.items():
        own = name.endswith(("pos_embed", "cls_token")) or name.startswith("1.")
        assert scale == pytest.approx(1.0 if own else 0.1), name
        assert decay == (0.0 if name.endswith(("pos_embed", "cls_token")) else 0.01), name


def test_a_frozen_encoder_has_no_group_and_no_gradient():
    encoder = tiny()
    backbone = build_backbone(encoder, LIN, CPU)
    assert backbone.encoder is encoder
    network = Network(backbone, build_head(LIN, 32, 1, 3), LIN, Accelerator(cpu=True))
    found = rates_and_decays(network, LIN)
    assert set(found) == {"norm.weight", "norm.bias", "classify.weight", "classify.bias"}
    assert set(found.values()) == {(1.0, 1e-4)}
    network.trained(network.inputs(images(30, 30))).sum().backward()
    assert all(p.grad is None for p in encoder.parameters())


def test_rates_of_the_protocols():
    lin, proteus, depth = SEGMENTATION["dinov2-lin"], SEGMENTATION["proteus-lin"], DEPTH["dinov2-lin4"]
    assert rate_of(0, lin) == pytest.approx(1e-9)
    assert rate_of(1500, lin) == pytest.approx(1e-3 * (1 - 1500 / 40_000))  # mmcv's line starts with the run
    assert rate_of(1500, proteus) == pytest.approx(8e-4)  # mmengine's at the end of the warm-up
    assert rate_of(30_750, proteus) == pytest.approx(4e-4)
    assert rate_of(0, depth) == pytest.approx(1e-7)
    assert rate_of(19_200, depth) == pytest.approx(0.5e-4, rel=1e-6)


def test_processes_share_a_batch_evenly():
    backbone = build_backbone(tiny(), LIN, CPU)
    network = Network(backbone, build_head(LIN, 32, 1, 3), LIN, Accelerator(cpu=True))
    assert share_of(LIN, network, SimpleNamespace(num_processes=4)) == 4
    with pytest.raises(InputError, match="a batch of 16 cannot be shared by 3 processes evenly"):
        share_of(LIN, network, SimpleNamespace(num_processes=3))


def test_upernet_needs_two_images_a_process():
    preset = replace(UPERNET, batch=2)
    network = tuned(UPERNET, tiny())
    assert share_of(preset, network, SimpleNamespace(num_processes=1)) == 2
    with pytest.raises(InputError, match="no batch statistics"):
        share_of(preset, network, SimpleNamespace(num_processes=2))
