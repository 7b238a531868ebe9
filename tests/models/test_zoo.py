"""The zoo's facts against what is published of each network."""

import subprocess
import sys

import pytest
import torch

from proteus.errors import InputError
from proteus.models import create_model, list_models
from proteus.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from proteus.models.zoo import check_name

DINOV2 = [f"dinov2_vit{size}14{registers}" for size in "bgls" for registers in ("", "_reg")]
PROTEUS = [f"proteus_vit{size}14" for size in "blst"]

# width, depth, heads (DINOv2: table 17 of the paper; Proteus: the same shapes and ViT-Ti)
SHAPES = {"t": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "g": (1536, 40, 24)}
# Parameters of the official backbones, in millions: torch.hub's, and those of the Proteus paper.
MILLIONS = {"dinov2_vits14": 22.06, "dinov2_vitb14": 86.58, "dinov2_vitl14": 304.37, "dinov2_vitg14": 1136.48}
PAPER = {"proteus_vitt14": 5.5, "proteus_vits14": 22, "proteus_vitb14": 86, "proteus_vitl14": 304}


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **options)


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("dinov2_*", DINOV2),
        ("*_reg", [name for name in DINOV2 if name.endswith("_reg")]),
        ("proteus_*", PROTEUS),
        ("[dp]*_vits14", ["dinov2_vits14", "proteus_vits14"]),
        ("dinov2_vit[sb]14", ["dinov2_vitb14", "dinov2_vits14"]),
        ("no_such_*", []),
    ],
)
def test_names_by_pattern(pattern, names):
    assert list_models(pattern) == names


def test_every_name_is_listed_without_a_pattern():
    assert set(DINOV2) | set(PROTEUS) <= set(list_models())


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts_of_dinov2(name, millions):
    assert count(on_meta(name)) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(("name", "millions"), PAPER.items())
def test_parameter_counts_of_the_students(name, millions):
    assert count(on_meta(name)) / 1e6 == pytest.approx(millions, rel=0.02)


@pytest.mark.parametrize("name", [name for name in DINOV2 + PROTEUS if "vitg" not in name])
def test_parameter_counts_part_by_part(name):
    width, depth, _ = SHAPES[name.split("_vit")[1][0]]
    registers = 4 if name.endswith("_reg") else 0
    positions = (16 if name.startswith("proteus") else 37) ** 2 + (0 if registers else 1)
    embedding = 3 * 14 * 14 * width + width + (1 + registers + positions) * width + width  # the last: mask token
    block = 12 * width**2 + 13 * width + 2 * width  # attention and MLP, norms and biases, LayerScale
    assert count(on_meta(name)) == embedding + depth * block + 2 * width


@pytest.mark.parametrize("name", DINOV2 + PROTEUS)
def test_shapes(name):
    encoder = on_meta(name)
    size = name.split("_vit")[1][0]
    native = 224 if name.startswith("proteus") else 518
    assert (encoder.embed_dim, encoder.num_blocks, encoder.num_heads) == SHAPES[size]
    assert (encoder.patch_size, encoder.image_size) == (14, native)
    assert encoder.native_grid == (native // 14, native // 14)
    assert encoder.network.num_prefix_tokens == (5 if name.endswith("_reg") else 1)
    assert (encoder.mean, encoder.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert {norm.eps for norm in encoder.modules() if isinstance(norm, torch.nn.LayerNorm)} == {1e-6}
    assert encoder.name == name


def test_the_giant_has_swiglu():
    mlp = on_meta("dinov2_vitg14").network.blocks[0].mlp
    assert list(mlp.fc1.weight.shape) == [8192, 1536]
    assert list(mlp.fc2.weight.shape) == [1536, 4096]
    assert isinstance(mlp.act, torch.nn.SiLU)


@pytest.fixture(scope="module")
def student():
    return create_model("proteus_vitt14")


def test_a_students_layer_scale_starts_at_one(student):
    gammas = [value for key, value in student.named_parameters() if key.endswith(".gamma")]
    assert len(gammas) == 24
    assert all((gamma == 1).all() for gamma in gammas)


@torch.no_grad()
def test_a_student_sees_16_by_16_patches(student):
    features = student.eval()(torch.rand(1, 3, 224, 224))
    assert features.grid == (16, 16)
    assert features.cls.shape == (1, 192)
    assert features.patch.shape == (1, 256, 192)


@pytest.mark.parametrize(("size", "grid"), [(56, (4, 4)), ((28, 70), (2, 5))], ids=str)
def test_the_image_size_sets_the_native_grid(size, grid):
    encoder = on_meta("proteus_vitt14", image_size=size)
    assert encoder.native_grid == grid
    assert encoder.image_size == size
    assert encoder.network.pos_embed.shape[1] == 1 + grid[0] * grid[1]


def test_drop_path_grows_with_depth():
    blocks = on_meta("proteus_vits14", drop_path=0.11).network.blocks
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.01 * i for i in range(12)])


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("dinov2_vits15", "dinov2_vits14"),
        ("dinov2_vitg14_regs", "dinov2_vitg14_reg"),
        ("proteus-vitb14", "proteus_vitb14"),
        ("timm/vit_tny_patch16_224", "timm/vit_tiny_patch16_224"),
    ],
)
@pytest.mark.parametrize("how", ["check", "create", "create with official weights"])
def test_an_unknown_name_is_told_the_nearest(wrong, near, how):
    with pytest.raises(InputError) as caught:
        check_name(wrong) if how == "check" else create_model(wrong, pretrained=how != "create")
    assert repr(wrong) in str(caught.value)
    assert repr(near) in str(caught.value)
    assert len(caught.value.lines) == 1


def test_a_name_like_no_other_is_still_an_input_error():
    with pytest.raises(InputError, match="unknown model 'xyzzy'"):
        create_model("xyzzy")


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("proteus_vitt14", {"dropp_ath": 0.1}, "dropp_ath"),
        ("timm/vit_tiny_patch16_224", {"embed_dimm": 64}, "embed_dimm"),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 64, "num_heads": 5}, "num_heads=5"),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 32, "num_heads": 2, "mean": (0.5,)}, "mean"),
        ("timm/vit_tiny_patch16_224", {"embed_dim": 32, "num_heads": 2, "std": (0.5, 0.5)}, "std"),
    ],
)
def test_impossible_options_are_named(name, options, word):
    with pytest.raises(InputError, match=word):
        create_model(name, **options)


def test_importing_is_quiet_and_lean():
    """What a script pays for that only wants an encoder. (Its seconds are no test: benchmarks measure.)"""
    script = """
import sys
from proteus.models import create_model
create_model("proteus_vits14")
heavy = ("datasets", "tensorboard", "xformers", "sklearn", "torchmetrics", "accelerate", "onnx", "matplotlib")
sys.exit(", ".join(name for name in heavy if name in sys.modules) or 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
