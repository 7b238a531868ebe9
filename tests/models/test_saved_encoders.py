"""Our own weight files come back as they were, here and in plain timm."""

import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from proteus.errors import InputError
from proteus.models import create_model, load_checkpoint
from proteus.models.weights import save_encoder
from tests.networks import assert_same_network, images

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4}
PLAIN = "timm/vit_tiny_patch16_224"


def golden(name, prefix):
    """The tensors of a golden file under a prefix, which is taken off."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def tiny(name=PLAIN, image_size=64, **options):
    encoder = create_model(name, image_size=image_size, **{**TINY, **options}).eval()
    randomise(encoder)
    return encoder


ROUND_TRIPS = {
    "class token": (PLAIN, 16, {}),
    "widths and drop path": (PLAIN, 16, {"mlp_ratio": 3, "drop_path": 0.2, "init_values": 0.5}),
    "norm epsilon": (PLAIN, 16, {"norm_eps": 1e-2}),
    "another patch": (PLAIN, 8, {"patch_size": 8}),
    "norm before the blocks": ("timm/vit_base_patch16_clip_224", 16, {}),
    "attention pooling": ("timm/vit_base_patch16_siglip_224", 16, {}),
    "average pooling": ("timm/vit_base_patch16_siglip_gap_224", 16, {}),
    "registers": ("timm/vit_small_patch14_reg4_dinov2", 14, {}),
    "timm's DINOv2": ("timm/vit_small_patch14_dinov2", 14, {}),
}


@pytest.mark.parametrize("normalise", [{}, {"mean": (0.1, 0.2, 1 / 3), "std": (0.7, 0.8, 2 / 3)}], ids=["own", "given"])
@pytest.mark.parametrize(("name", "patch", "options"), ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_what_is_saved_comes_back_bit_for_bit(tmp_path, name, patch, options, normalise):
    path = str(tmp_path / "student.safetensors")
    encoder = tiny(name, 4 * patch, **options, **normalise)
    save_encoder(encoder, path)
    for loaded in (load_checkpoint(path), create_model(name, checkpoint=path, **{**TINY, **options})):
        assert_same_network(loaded, encoder, (4 * patch, 4 * patch), (3 * patch, 5 * patch))
        for fact in ("name", "arch", "mean", "std", "image_size", "num_heads", "patch_size", "native_grid", "position"):
            assert getattr(loaded, fact) == getattr(encoder, fact), fact


@pytest.mark.parametrize("size", [(32, 48), (32, 128)], ids=str)
def test_a_network_of_a_wide_native_size_comes_back(tmp_path, size):
    path = str(tmp_path / "student.safetensors")
    encoder = tiny(image_size=size)  # 2 x 3 and 2 x 8 patches: as many as 4 x 4
    save_encoder(encoder, path)
    for loaded in (load_checkpoint(path), create_model(PLAIN, checkpoint=path, **TINY)):
        assert loaded.native_grid == encoder.native_grid
        assert_same_network(loaded, encoder, size, (64, 48))


@pytest.mark.parametrize(
    ("family", "options"),
    [("auto", {"mean": (0.1, 0.2, 0.3)}), ("dinov2", {"std": (1, 2, 3)}), ("timm", {}), ("timm", {"norm_eps": 1e-2})],
    ids=str,
)
def test_a_network_without_a_name_comes_back(tmp_path, family, options):
    torch.save(golden("proteus_losses", "student."), tmp_path / "original.pth")
    encoder = load_checkpoint(str(tmp_path / "original.pth"), family, num_heads=2, **options)
    save_encoder(encoder, tmp_path / "ours.safetensors")
    loaded = load_checkpoint(str(tmp_path / "ours.safetensors"))
    assert (loaded.mean, loaded.std, loaded.num_heads) == (encoder.mean, encoder.std, 2)
    assert_same_network(loaded, encoder, (112, 112))
    assert_same_network(loaded, encoder, (56, 84))  # where the position rule is seen


def test_the_arguments_of_loading_win_over_the_files(tmp_path):
    path = str(tmp_path / "student.safetensors")
    save_encoder(tiny(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)), path)
    for load in (load_checkpoint, partial(create_model, PLAIN, **TINY)):
        source = {"checkpoint": path} if isinstance(load, partial) else {"path": path}
        loaded = load(**source, mean=(0, 0, 0), image_size=96)
        assert loaded.mean == (0, 0, 0)
        assert loaded.std == (0.4, 0.5, 0.6)
        assert loaded.image_size == 96
        assert loaded.native_grid == (4, 4)


@torch.no_grad()
def test_plain_timm_takes_the_file(tmp_path):
    encoder = tiny(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    save_encoder(encoder, tmp_path / "student.safetensors")
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64, **TINY).eval()
    vit.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    with safe_open(tmp_path / "student.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["proteus"])
    x = (images(64, 64) - torch.tensor(facts["mean"]).view(3, 1, 1)) / torch.tensor(facts["std"]).view(3, 1, 1)
    tokens, features = vit.forward_features(x), encoder(images(64, 64))
    torch.testing.assert_close(tokens[:, 0], features.cls)
    torch.testing.assert_close(tokens[:, 1:], features.patch)


@torch.no_grad()
def test_plain_timm_takes_a_students_file(tmp_path):
    student = create_model("proteus_vitt14", drop_path=0.1, image_size=56).eval()
    save_encoder(student, tmp_path / "student.safetensors")
    vit = VisionTransformer(
        img_size=56,
        patch_size=14,
        embed_dim=192,
        depth=12,
        num_heads=3,
        init_values=1.0,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    vit.load_state_dict(load_file(tmp_path / "student.safetensors"), strict=True)
    x = images(56, 56)
    normalised = (x - torch.tensor(student.mean).view(3, 1, 1)) / torch.tensor(student.std).view(3, 1, 1)
    torch.testing.assert_close(vit.forward_features(normalised)[:, 0], student(x).cls)
    loaded = load_checkpoint(str(tmp_path / "student.safetensors"))
    assert (loaded.name, loaded.arch, loaded.image_size) == ("proteus_vitt14", {"drop_path": 0.1}, 56)
    assert_same_network(loaded, student, (70, 28))


def test_half_precision_on_disk(tmp_path):
    encoder = tiny()
    save_encoder(encoder, tmp_path / "half.safetensors", torch.float16)
    stored = load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = load_checkpoint(str(tmp_path / "half.safetensors"))
    for key, value in encoder.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value.half().float()), key
        assert loaded.network.state_dict()[key].dtype == torch.float32
    assert {value.dtype for value in encoder.network.state_dict().values()} == {torch.float32}


SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2}


@torch.no_grad()
def test_whether_patches_are_normed_is_kept(tmp_path):
    encoder, path = create_model("clip_vitb16", image_size=32, **SMALL), str(tmp_path / "clip.safetensors")
    encoder.patch_norm = True
    save_encoder(encoder, path)
    for again in (load_checkpoint(path), create_model("clip_vitb16", checkpoint=path)):
        assert again.patch_norm
    assert not create_model("clip_vitb16", checkpoint=path, patch_norm=False).patch_norm


def test_a_saved_file_is_not_taken_for_another_network(tmp_path):
    path = str(tmp_path / "a.safetensors")
    save_encoder(create_model("clip_vitb16", image_size=32, norm_eps=0.1, **SMALL), path)
    again = create_model("clip_vitb16", checkpoint=path)  # its arguments are the file's
    assert (again.norm_eps, again.num_heads, again.arch) == (0.1, 2, {"norm_eps": 0.1, **SMALL})
    with pytest.raises(InputError, match="is of clip_vitb16, not openclip_vitb16_laion2b"):
        create_model("openclip_vitb16_laion2b", checkpoint=path, **SMALL)
    with pytest.raises(InputError, match="is of a network with num_heads=2, not 3"):
        create_model("clip_vitb16", checkpoint=path, num_heads=3)
    assert create_model("clip_vitb16", checkpoint=path, drop_path=0.1).arch["drop_path"] == 0.1


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "arch", "size"),
    [
        ("timm/swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1, 1, 1)}, 256),
        ("timm/beit_base_patch16_224", SMALL, 64),
        ("sam_vitb16", {**SMALL, "global_attn_indexes": (0,)}, 128),
        ("dinov3_vits16", SMALL, 64),
        ("pe_core_vitl14", SMALL, 56),
        ("timm/resnet18", {}, 96),
    ],
)
def test_a_network_of_any_size_comes_back(tmp_path, name, arch, size):
    encoder, path = create_model(name, image_size=size, **arch).eval(), str(tmp_path / "a.safetensors")
    save_encoder(encoder, path)
    x = torch.rand(1, 3, size, size)
    for again in (load_checkpoint(path), create_model(name, checkpoint=path, **arch)):
        assert again.image_size == size
        assert torch.equal(again.eval()(x).patch, encoder(x).patch)


@torch.no_grad()
def test_sam_takes_other_sizes_than_its_files(tmp_path):
    arch = {**SMALL, "global_attn_indexes": (0,)}
    save_encoder(create_model("sam_vitb16", image_size=128, **arch), tmp_path / "a.safetensors")
    half = create_model("sam_vitb16", checkpoint=str(tmp_path / "a.safetensors"), image_size=64)
    assert half.image_size == 64
    assert half.eval()(torch.rand(1, 3, 64, 64)).grid == (4, 4)


def test_a_file_that_claims_more_blocks_than_it_holds_is_refused_at_once(tmp_path):
    encoder = create_model("proteus_vitt14", depth=2)
    encoder.arch["depth"] = 10**7
    save_encoder(encoder, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="holds 2 blocks and says depth=10000000"):
        load_checkpoint(str(tmp_path / "a.safetensors"))


def test_the_bytes_of_a_file_depend_on_its_contents_alone(tmp_path):
    encoder = create_model("proteus_vitt14", depth=1)
    for index in range(8):
        save_encoder(encoder, tmp_path / f"{index}.safetensors")
    assert len({(tmp_path / f"{index}.safetensors").read_bytes() for index in range(8)}) == 1


def test_tied_weights_are_saved(tmp_path):
    encoder = create_model("proteus_vitt14", depth=2)
    encoder.network.blocks[1].norm1 = encoder.network.blocks[0].norm1
    save_encoder(encoder, tmp_path / "a.safetensors")
    assert_same_network(load_checkpoint(str(tmp_path / "a.safetensors")), encoder, (28, 28))


@pytest.mark.parametrize(
    "facts",
    [
        *("null", "0", '""', "[]", "{}", "{", "[" * 200_000, '"x"'),
        *({"mean": value} for value in (5, "abc", None, [0, 0], [0, 0, float("nan")])),
        *({"std": value} for value in ([0, 0, 0], [1, -1, 1])),
        *({"image_size": value} for value in (-5, 0, "x", {"a": 1}, [1, 2, 3], True)),
        *({"native_grid": value} for value in ("x", [8], [0, 1])),
        *({"position": value} for value in ([1], "x", 5)),
        *({"num_heads": "x"}, {"norm_eps": "x"}, {"patch_norm": "no"}, {"arch": []}, {"name": 5}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_metadata_that_makes_no_sense_is_one_line(tmp_path, facts):
    usual = {"name": "proteus_vitt14", "arch": {"depth": 1}, "image_size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    text = facts if isinstance(facts, str) else json.dumps({**usual, **facts})
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", metadata={"proteus": text})
    for load in (load_checkpoint, lambda path: create_model("proteus_vitt14", checkpoint=path)):
        with pytest.raises(InputError, match="what its metadata says of the network makes no sense") as caught:
            load(str(tmp_path / "a.safetensors"))
        assert len(caught.value.lines) == 1


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    save_encoder(create_model("proteus_vitt14", depth=1), tmp_path / "a.safetensors")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
