"""What an Encoder adds to timm's network, each against a second way to the same numbers."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import proteus.models.vit as vit_module
from proteus.models import create_model

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 4}
IDENTITY = {"mean": (0, 0, 0), "std": (1, 1, 1)}
PLAIN = "timm/vit_tiny_patch16_224"
NETWORKS = {
    "class token": (PLAIN, {}),
    "registers": (PLAIN, {"reg_tokens": 2}),
    "registers without positions": ("timm/vit_small_patch14_reg4_dinov2", {}),
    "norm before the blocks": ("timm/vit_base_patch16_clip_224", {}),
    "attention pooling": ("timm/vit_base_patch16_siglip_224", {}),
    "average pooling": ("timm/vit_base_patch16_siglip_gap_224", {}),
    "average pooling and a register": ("timm/vit_little_patch16_reg1_gap_256", {}),
}
each_network = pytest.mark.parametrize(("name", "options"), NETWORKS.values(), ids=NETWORKS.keys())


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights of a size that lets every one of them be seen; timm starts some near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def build(name=PLAIN, image_size=64, seed=0, **options):
    encoder = create_model(name, image_size=image_size, **{**TINY, **options}).eval()
    randomise(encoder, seed)
    return encoder


def images(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def some_mask(rows, patches, seed=2):
    return torch.rand(rows, patches, generator=torch.Generator().manual_seed(seed)) < 0.5


def normalised(encoder, x):
    return (x - torch.tensor(encoder.mean).view(3, 1, 1)) / torch.tensor(encoder.std).view(3, 1, 1)


def uncached(encoder):
    """The same weights in a network that has seen no image yet."""
    fresh = build(**{"name": encoder.name, "image_size": encoder.image_size})
    fresh.load_state_dict(encoder.state_dict())
    return fresh.to(encoder.network.patch_embed.proj.weight.dtype)


def assert_same(a, b, atol=0.0):
    assert a.grid == b.grid
    torch.testing.assert_close(a.cls, b.cls, atol=atol, rtol=0)
    torch.testing.assert_close(a.patch, b.patch, atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (6, 4)], ids=str)
@each_network
@torch.no_grad()
def test_tokens_are_those_of_timm(name, options, size):
    patch = 14 if "patch14" in name else 16
    encoder = build(name, 4 * patch, dynamic_img_size=True, **options)
    x = images(2, 3, size[0] * patch, size[1] * patch)
    features = encoder(x)
    tokens = encoder.network.forward_features(normalised(encoder, x))
    prefix = encoder.network.num_prefix_tokens
    assert features.grid == size
    # timm leaves the norm of networks pooled by averaging for after the pool; here tokens come after the final norm.
    normed = encoder.network.fc_norm(tokens) if isinstance(encoder.network.norm, nn.Identity) else tokens
    torch.testing.assert_close(features.patch, normed[:, prefix:], atol=1e-5, rtol=0)
    if encoder.network.has_class_token:
        torch.testing.assert_close(features.cls, tokens[:, 0], atol=1e-5, rtol=0)
    else:
        pooled = encoder.network.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(features.cls, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "timm/deit_tiny_distilled_patch16_224",  # a second class token
        "timm/vit_small_patch16_18x2_224",  # two attentions to a block
        "timm/vit_pwee_patch16_reg1_gap_256",  # attention and MLP side by side
    ],
)
@torch.no_grad()
def test_an_unusual_transformer_is_understood(name):
    encoder = create_model(name, image_size=32, **TINY).eval()
    x = images(1, 3, 32, 32)
    tokens = encoder.network.forward_features(normalised(encoder, x))
    if isinstance(encoder.network.norm, nn.Identity):
        tokens = encoder.network.fc_norm(tokens)
    torch.testing.assert_close(encoder(x).patch, tokens[:, encoder.network.num_prefix_tokens :])


@torch.no_grad()
def test_uint8_is_float_over_255():
    encoder = build()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert_same(encoder(pixels), encoder(pixels.float() / 255))
    mask = some_mask(2, 16)
    assert_same(encoder(pixels, mask), encoder(pixels.float() / 255, mask))


@torch.no_grad()
def test_the_encoder_normalises_and_does_not_clamp():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    own, identity = build(mean=mean, std=std), build(**IDENTITY)
    assert own.mean == mean
    assert own.std == std
    x = images(2, 3, 64, 64) * 8 - 3  # far outside [0, 1]
    by_hand = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert_same(own(x), identity(by_hand), atol=1e-5)
    assert (own(x).cls - identity(x).cls).abs().max() > 1e-2


@torch.no_grad()
def test_a_change_of_precision_leaves_the_convention_alone():
    encoder = build(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    x, state = images(1, 3, 64, 64), copy.deepcopy(encoder.state_dict())
    before = encoder(x)
    encoder.to(torch.bfloat16).to(torch.float32).load_state_dict(state)
    assert_same(encoder(x), before)


# --------------------------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("masked", [0, 1, 3, 4])
@torch.no_grad()
def test_a_pair_is_two_passes(masked):
    encoder = build()
    x, mask = images(4, 3, 64, 48), some_mask(masked, 12)
    plain, seen_masked = encoder.forward_pair(x, mask)
    assert_same(plain, encoder(x), atol=1e-5)
    assert seen_masked.patch.shape == (masked, 12, 32)
    if masked:
        assert_same(seen_masked, encoder(x[:masked], mask), atol=1e-5)


@torch.no_grad()
def test_a_mask_of_nothing_changes_nothing():
    encoder = build()
    x = images(2, 3, 64, 64)
    assert_same(encoder(x, torch.zeros(2, 16, dtype=torch.bool)), encoder(x))


@torch.no_grad()
def test_masked_patches_are_not_seen_and_the_others_are():
    encoder = build()
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 6] = True  # row 1, column 2
    x = images(1, 3, 64, 64)
    changed = x.clone()
    changed[..., 16:32, 32:48] = 0
    assert_same(encoder(x, mask), encoder(changed, mask))
    changed[..., 16:32, 48:64] = 0  # column 3 is not masked
    assert (encoder(x, mask).patch - encoder(changed, mask).patch).abs().max() > 1e-3


@torch.no_grad()
def test_the_mask_token_stands_in_before_the_positions():
    encoder = build()
    everything = torch.ones(1, 16, dtype=torch.bool)
    patch = encoder(images(1, 3, 64, 64), everything).patch[0]
    # All patches hold the same token; what tells them apart is their position.
    assert (patch[0] - patch[5]).abs().max() > 1e-2
    encoder.mask_token.mul_(2)
    assert (encoder(images(1, 3, 64, 64), everything).patch[0] - patch).abs().max() > 1e-2


def test_the_mask_token_learns():
    encoder = build()
    encoder(images(2, 3, 64, 64), some_mask(2, 16)).patch.square().mean().backward()
    assert encoder.mask_token.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------- intermediate


@torch.no_grad()
def test_intermediate_indices():
    encoder = build()
    x = images(2, 3, 64, 64)
    first, second, third = encoder.intermediate(x, 3)
    assert_same(third, encoder(x))
    assert_same(encoder.intermediate(x, [1])[0], second)
    backwards = encoder.intermediate(x, [-1, 0])
    assert_same(backwards[0], third)
    assert_same(backwards[1], first)
    assert (first.patch - second.patch).abs().max() > 1e-2
    raw = encoder.intermediate(x, 1, norm=False)[0]
    torch.testing.assert_close(encoder.network.norm(raw.patch), third.patch)
    assert (raw.patch - third.patch).abs().max() > 1e-2


@torch.no_grad()
def test_intermediate_takes_a_block_by_hand():
    encoder = build()
    inputs = []
    hook = encoder.network.blocks[2].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    encoder(images(1, 3, 64, 64))
    hook.remove()
    after_second = encoder.intermediate(images(1, 3, 64, 64), [1], norm=False)[0]
    torch.testing.assert_close(inputs[0][:, 1:], after_second.patch, atol=0, rtol=0)


@torch.no_grad()
def test_intermediate_has_no_class_token_where_there_is_none():
    encoder = build("timm/vit_base_patch16_siglip_224")
    features = encoder.intermediate(images(1, 3, 64, 64), 2)
    assert [part.cls for part in features] == [None, None]
    torch.testing.assert_close(features[-1].patch, encoder(images(1, 3, 64, 64)).patch)


@pytest.mark.parametrize("layers", [4, 6, [3], [-4], [0, 7]], ids=str)
def test_blocks_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match="blocks 0 to 2"):
        build().intermediate(images(1, 3, 64, 64), layers)


# ------------------------------------------------------------------------------------------------------ positions


@pytest.fixture
def resizes(monkeypatch):
    """Grids a position embedding was resized to, in order; the resizing itself is untouched."""
    calls = []
    resize = vit_module.resize_position_embedding

    def counted(embedding, native, grid, rule):
        calls.append(grid)
        return resize(embedding, native, grid, rule)

    monkeypatch.setattr(vit_module, "resize_position_embedding", counted)
    return calls


@torch.no_grad()
def test_a_frozen_encoder_resizes_once_per_grid(resizes):
    encoder = build().freeze()
    resizes.clear()  # building tried it
    wide, tall = images(1, 3, 48, 80), images(1, 3, 80, 48)
    first = encoder(wide)
    assert_same(encoder(wide), first)
    encoder(tall)
    assert_same(encoder(wide), first)
    assert resizes == [(3, 5), (5, 3)]


@torch.no_grad()
def test_a_trainable_encoder_resizes_every_time(resizes):
    encoder = build()
    resizes.clear()
    encoder(images(1, 3, 48, 80))
    encoder(images(1, 3, 48, 80))
    assert resizes == [(3, 5), (3, 5)]


def _multiplied(encoder):
    encoder.network.pos_embed.mul_(-3)


def _loaded(encoder):
    encoder.load_state_dict(build(seed=5).state_dict())


def _assigned_twice(encoder):
    encoder.load_state_dict(copy.deepcopy(build(seed=5).state_dict()), assign=True)
    encoder.requires_grad_(False)(images(1, 3, 48, 80))
    encoder.load_state_dict(copy.deepcopy(build(seed=6).state_dict()), assign=True)
    encoder.requires_grad_(False)


def _to_float64(encoder):
    encoder.to(torch.float64)


def _to_bfloat16_and_back(encoder):
    encoder.to(torch.bfloat16)
    encoder(images(1, 3, 48, 80))
    encoder.to(torch.float32)


CHANGES = [_multiplied, _loaded, _assigned_twice, _to_float64, _to_bfloat16_and_back]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@torch.no_grad()
def test_a_change_of_the_weights_is_seen(change):
    encoder = build().freeze()
    x = images(1, 3, 48, 80)
    before = encoder(x)
    change(encoder)
    after = encoder(x)
    assert_same(after, uncached(encoder)(x))
    assert (after.patch.to(before.patch.dtype) - before.patch).abs().max() > 0


@torch.no_grad()
def test_an_average_of_weights_is_seen_at_every_update():
    student = build()
    ema = ModelEmaV3(student, decay=0.5)
    ema.module.requires_grad_(False)
    x = images(1, 3, 48, 80)
    for _ in range(3):
        before = ema.module(x)
        for parameter in student.parameters():
            parameter.add_(0.1)
        ema.update(student)
        assert_same(ema.module(x), uncached(ema.module)(x))
        assert (ema.module(x).patch - before.patch).abs().max() > 0


def test_positions_learn_at_another_grid():
    encoder = build()
    for _ in range(2):  # the second pass must not find the graph of the first
        encoder.zero_grad()
        encoder(images(1, 3, 48, 80)).patch.square().mean().backward()
        gradient = encoder.network.pos_embed.grad
        assert gradient.isfinite().all()
        assert (gradient.abs().amax(dim=-1) > 0).all()  # class token and all 4 x 4 native places


def test_positions_learn_after_an_encoder_was_frozen():
    encoder = build().requires_grad_(False)
    x = images(1, 3, 48, 80)
    encoder(x)
    encoder.requires_grad_(True)
    encoder(x).patch.square().mean().backward()
    assert encoder.network.pos_embed.grad is not None
    assert encoder.network.pos_embed.grad.abs().max() > 0


@pytest.mark.parametrize(("height", "width"), [(60, 64), (64, 50)])
def test_a_size_the_patch_does_not_divide_is_named(height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width}.*16"):
        build()(images(1, 3, height, width))


# --------------------------------------------------------------------------------------- parameters and freezing


@each_network
def test_rates_by_depth(name, options):
    encoder = build(name, None, **options)
    groups = encoder.param_groups(0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(scale) == len(list(encoder.parameters()))
    seen = {}
    for key, parameter in encoder.named_parameters():
        place = key.removeprefix("network.").split(".")
        seen.setdefault(".".join(place[:2]) if place[0] == "blocks" else place[0], set()).add(scale[id(parameter)])
    expected = {"blocks.0": {1 / 8}, "blocks.1": {1 / 4}, "blocks.2": {1 / 2}}
    before = {"mask_token", "cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre"}
    assert seen == {key: expected.get(key, {1 / 16} if key in before else {1.0}) for key in seen}
    assert {"blocks.0", "blocks.2", "patch_embed", "pos_embed", "mask_token"} < set(seen)


def test_without_decay_every_rate_is_the_same():
    assert {group["lr_scale"] for group in build().param_groups()} == {1.0}


class Parent(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.head = encoder, nn.Dropout(0.5)


@torch.no_grad()
def test_freeze_survives_the_parents_train():
    encoder = build(drop_path=0.5, proj_drop_rate=0.5)
    assert encoder.freeze() is encoder
    parent = Parent(encoder).train()
    assert parent.head.training
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    x = images(2, 3, 64, 64)
    assert_same(encoder(x), encoder(x))


@torch.no_grad()
def test_without_freeze_the_parents_train_is_felt():
    encoder = build(drop_path=0.5, proj_drop_rate=0.5)
    Parent(encoder).train()
    x = images(2, 3, 64, 64)
    assert (encoder(x).patch - encoder(x).patch).abs().max() > 1e-3


def test_a_copy_of_a_frozen_encoder_is_its_own():
    encoder = build().freeze()
    duplicate = copy.deepcopy(encoder)
    assert duplicate.train() is duplicate
    assert duplicate.eval() is duplicate
    assert not duplicate.training
