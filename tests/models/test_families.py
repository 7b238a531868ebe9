"""Each family's encoder against timm's own forward, its masked pass, and its gradient checkpointing, in small."""

import pytest
import torch
from torch import nn

from proteus.errors import InputError
from proteus.models import create_model
from proteus.models.vit import VitEncoder

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
VITS = {
    "DINOv2": ("dinov2_vits14", {**SMALL, "init_values": 0.5}, 56),
    "DINOv2, registers": ("dinov2_vits14_reg", {**SMALL, "init_values": 0.5}, 56),
    "DINOv2 g": ("dinov2_vitg14", {**SMALL, "init_values": 0.5}, 56),
    "OpenAI CLIP": ("clip_vitb16", SMALL, 64),
    "OpenCLIP": ("openclip_vitl14_laion2b", SMALL, 56),
    "SynCLR": ("synclr_vitl14", SMALL, 56),
    "DINOv3": ("dinov3_vits16", {**SMALL, "init_values": 0.5}, 64),
    "DINOv3, SwiGLU": ("dinov3_vits16plus", {**SMALL, "init_values": 0.5}, 64),
    "SigLIP 2": ("siglip2_vitb16_224", SMALL, 64),
    "EVA-02": ("eva02_vitt14", SMALL, 56),
    "EVA-02 L": ("eva02_vitl14", SMALL, 56),
    "EVA-02 CLIP": ("eva02_clip_vitl14", SMALL, 56),
    "MAE": ("mae_vitb16", SMALL, 64),
    "DINO": ("dino_vits8", SMALL, 32),
    "C-RADIO": ("cradio_v3_vitl16", {**SMALL, "init_values": 0.5}, 64),
    "PE core": ("pe_core_vitl14", SMALL, 56),
    "PE core without class token": ("pe_core_vitg14", {**SMALL, "attn_pool_num_heads": 3}, 56),
    "PE spatial": ("pe_spatial_vitb16", SMALL, 64),
    "rotary positions for each block": ("timm/vit_small_patch16_rope_mixed_224", SMALL, 64),
    "a convnet before it": ("timm/vit_tiny_r_s16_p8_224", {"depth": 2}, 64),
}
OPAQUE = {
    "DINOv3 ConvNeXt": ("dinov3_convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64),
    "ConvNeXt": ("timm/convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, 64),
    "ResNet": ("timm/resnet18", {}, 64),
    "FastViT": ("timm/fastvit_t8", {}, 64),
    "MobileNetV4": ("timm/mobilenetv4_conv_small_050", {}, 64),
    "EfficientViT": ("timm/efficientvit_b0", {}, 64),
    "EfficientViT-M": ("timm/efficientvit_m0", {}, 224),
    "MobileViT-V2": ("timm/mobilevitv2_050", {}, 64),
    "Swin": ("timm/swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1)}, 224),
    "Hiera": ("timm/hiera_tiny_224", {"embed_dim": 12, "num_heads": 1, "stages": (1, 1, 1, 1)}, 224),
    "XCiT": ("timm/xcit_nano_12_p16_224", {"depth": 2}, 64),
    "two class tokens": ("timm/deit_tiny_distilled_patch16_224", SMALL, 64),
    "CAFormer": ("timm/caformer_s18", {}, 64),
    "BEiT": ("timm/beit_base_patch16_224", SMALL, 64),
    "SAM": ("sam_vitb16", {**SMALL, "global_attn_indexes": (1,)}, 64),
}
each_vit = pytest.mark.parametrize(("name", "arch", "size"), VITS.values(), ids=VITS)
each_opaque = pytest.mark.parametrize(("name", "arch", "size"), OPAQUE.values(), ids=OPAQUE)
each = pytest.mark.parametrize(("name", "arch", "size"), (VITS | OPAQUE).values(), ids=VITS | OPAQUE)


def build(name, size, arch):
    torch.manual_seed(0)
    encoder = create_model(name, image_size=size, mean=(0, 0, 0), std=(1, 1, 1), **arch)
    for parameter in encoder.parameters():  # none is zero or one by its initialisation
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return encoder.eval()


def images(count, size):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def half_masked(encoder, count, size):
    h, w = encoder.grid_of(size, size)
    return torch.rand(count, h * w, generator=torch.Generator().manual_seed(2)) < 0.5


@each_vit
@torch.no_grad()
def test_tokens_are_timms(name, arch, size):
    encoder = build(name, size, arch)
    assert isinstance(encoder, VitEncoder)
    network = encoder.network
    if getattr(network, "dynamic_img_size", False):
        network.patch_embed.strict_img_size = False
    features = encoder(images(2, size))
    tokens = network.forward_features(images(2, size))
    if isinstance(network.norm, nn.Identity):
        tokens = network.fc_norm(tokens)
    prefix = network.num_prefix_tokens
    if encoder.patch_norm:
        assert torch.equal(features.patch, tokens[:, prefix:])
    else:  # timm norms all tokens, OpenAI the class token alone
        assert torch.equal(network.norm(features.patch), tokens[:, prefix:])
        assert (features.patch - tokens[:, prefix:]).abs().max() > 0.1
    pooled = network.forward_head(network.forward_features(images(2, size)), pre_logits=True)
    assert torch.equal(features.cls, tokens[:, 0] if encoder.cls == "token" else pooled)
    assert features.grid == (size // encoder.patch_size,) * 2


@each_opaque
@torch.no_grad()
def test_cells_are_timms(name, arch, size):
    encoder = build(name, size, arch)
    assert not isinstance(encoder, VitEncoder)
    features = encoder(images(2, size))
    out = encoder.network.forward_features(images(2, size))
    if out.ndim == 4:
        cells = out if name.startswith("timm/swin") else out.permute(0, 2, 3, 1)  # [B, h, w, D]
        assert features.grid == tuple(cells.shape[1:3])
        if "convnext" in name or "caformer" in name:  # its norm stands behind the pool, in the head
            assert torch.equal(features.cls, encoder.network.forward_head(out, pre_logits=True))
            cells = encoder.network.head.norm(out).permute(0, 2, 3, 1)
        else:
            torch.testing.assert_close(features.cls, cells.mean(dim=(1, 2)))
        assert torch.equal(features.patch, cells.flatten(1, 2))
    else:
        prefix = {"timm/deit_tiny_distilled_patch16_224": 2}.get(name, 1 if "xcit" in name or "beit" in name else 0)
        tokens = encoder.network.head.norm(out) if "hiera" in name else out
        tokens = encoder.network.fc_norm(out) if "beit" in name else tokens
        assert torch.equal(features.patch, tokens[:, prefix:])
        assert torch.equal(features.cls, encoder.network.forward_head(out, pre_logits=True))
    assert encoder.embed_dim == features.cls.shape[1] == features.patch.shape[2]


@each
@torch.no_grad()
def test_a_masked_and_a_plain_view_together_are_two_passes(name, arch, size):
    encoder = build(name, size, arch)
    encoder.mask_token.data.normal_(generator=torch.Generator().manual_seed(3))
    x = images(3, size)
    mask = half_masked(encoder, 2, size)
    plain, masked = encoder.forward_pair(x, mask)
    for got, expected in ((plain, encoder(x)), (masked, encoder(x[:2], mask))):
        torch.testing.assert_close(got.cls, expected.cls, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(got.patch, expected.patch, atol=2e-5, rtol=1e-5)
    assert (masked.patch - plain.patch[:2]).abs().max() > 1e-6  # untrained, some see little of their input


@each
def test_what_is_under_the_mask_is_not_seen(name, arch, size):
    if name == "timm/vit_tiny_r_s16_p8_224":
        pytest.skip("the convnet before the mask sees beyond its patch")
    encoder = build(name, size, arch)
    x = images(1, size).requires_grad_()
    mask = half_masked(encoder, 1, size)
    encoder(x, mask).cls.sum().backward()
    h, w = encoder.grid_of(size, size)
    seen = nn.functional.interpolate(x.grad.abs().sum(1, keepdim=True), (size, size)).unfold(2, size // h, size // h)
    seen = seen.unfold(3, size // w, size // w).amax(dim=(-1, -2)).flatten(1)  # [1, h * w]
    assert (seen[mask] == 0).all()
    assert (seen[~mask] > 0).any()


@each
def test_gradient_checkpointing_changes_nothing(name, arch, size):
    gradients = []
    for checkpointing in (False, True):
        encoder = build(name, size, arch)
        try:
            encoder.set_grad_checkpointing(checkpointing)
        except Exception as error:
            assert "has no gradient checkpointing" in str(error)  # noqa: PT017 - some of timm's have none
            assert name not in {entry[0] for entry in VITS.values()}
            return
        plain, masked = encoder.train().forward_pair(images(2, size), half_masked(encoder, 1, size))
        (plain.cls.square().mean() + plain.patch.square().mean() + masked.patch.square().mean()).backward()
        gradients.append({key: p.grad for key, p in encoder.named_parameters() if p.requires_grad})
    for key, gradient in gradients[0].items():
        assert gradient is not None, f"{key} has no part in the features, and takes gradients"
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-6, rtol=1e-4)


@each_vit
@torch.no_grad()
def test_blocks_one_by_one(name, arch, size):
    encoder = build(name, size, arch)
    first, last = encoder.intermediate(images(2, size), [0, 1])
    torch.testing.assert_close(last.patch, encoder(images(2, size)).patch)
    assert (first.patch - last.patch).abs().max() > 1e-3
    raw = encoder.intermediate(images(2, size), 1, norm=False)[0].patch
    maps = encoder.network.forward_intermediates(images(2, size), 1, norm=False, intermediates_only=True)[0]
    torch.testing.assert_close(raw, maps.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("prefix", [0, 1])
def test_pe_counts_its_rotary_positions_on_and_resizes_bilinearly(prefix):
    """As its authors' code: row and column numbers at any grid, from 1 where there is a class token."""
    name, arch = ("pe_core_vitl14", SMALL) if prefix else ("pe_core_vitg14", {**SMALL, "attn_pool_num_heads": 3})
    encoder = build(name, 112, arch)  # native 8 x 8
    rotary = encoder._rope((4, 4)), encoder._rope((8, 8))
    assert torch.equal(rotary[0].unflatten(0, (4, 4)), rotary[1].unflatten(0, (8, 8))[:4, :4])
    native = encoder.network.pos_embed[:, prefix:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(native, size=(4, 4), mode="bilinear", align_corners=False)
    assert torch.equal(encoder._positions((4, 4))[:, prefix:], resized.flatten(2).transpose(1, 2))


@torch.no_grad()
@pytest.mark.parametrize("name", ["DINOv2", "DINOv3", "SigLIP 2"])
def test_a_frozen_encoder_is_one_graph_to_a_compiler(name):
    name, arch, size = VITS[name]
    encoder = build(name, size, arch).freeze()
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    for pixels in (size, size // 2, size // 2):  # the last would find cached positions
        x = images(1, pixels)
        torch.testing.assert_close(compiled(x).patch, encoder(x).patch)


@torch.inference_mode()
def test_an_encoder_can_be_built_and_used_under_inference_mode():
    encoder = build("dinov2_vits14", 56, VITS["DINOv2"][1]).freeze()
    assert torch.equal(encoder(images(1, 28)).patch, encoder(images(1, 28)).patch)


@pytest.mark.parametrize(
    ("name", "arch", "words"),
    [
        ("proteus_vitt14", {"depth": 0}, "has no blocks"),
        ("proteus_vitt14", {"patch_drop_rate": 0.5}, "patch_drop_rate is not for an encoder"),
        ("proteus_vitt14", {"in_chans": 1}, "cannot be built with .*in_chans=1"),
        ("proteus_vitt14", {"norm_eps": "x"}, "cannot be built with .*norm_eps='x'"),
        ("timm/vit_tiny_patch16_224", {"class_token": False, "global_pool": ""}, r"gives cls \[1, 196, 192\]"),
        ("timm/pit_ti_224", {}, "no grid of patches"),
        ("timm/resnet18.nonsense", {}, r"timm has no weights 'nonsense' for it"),
        ("hf-hub:a/b/c", {}, "hf-hub:a/b/c"),
        ("timm/", {}, "unknown model"),
    ],
)
def test_what_makes_no_encoder_is_one_line(name, arch, words):
    with pytest.raises(InputError, match=words) as caught:
        create_model(name, **arch)
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("size", [0, -14, 1.5, (28, 0), True])
def test_an_image_size_is_a_number_of_pixels(size):
    with pytest.raises(InputError, match="an image size is a number of pixels above 0"):
        create_model("proteus_vitt14", image_size=size)


def test_a_network_that_takes_one_size_is_built_without_a_word(capfd):
    create_model("timm/hiera_tiny_224", stages=(1, 1, 1, 1))
    assert capfd.readouterr() == ("", "")
