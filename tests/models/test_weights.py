"""Weight files of others: what is inferred, what is refused, and how it is said."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from proteus.errors import InputError
from proteus.models import create_model, load_checkpoint
from proteus.models.weights import read_checkpoint
from tests.networks import assert_same_network

GOLDEN = Path(__file__).parents[1] / "golden"
PLAIN = "timm/vit_tiny_patch16_224"


def golden(name, prefix):
    """The tensors of a golden file under a prefix, which is taken off."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def said(function, *args, **kwargs) -> str:
    """The one line of the InputError that a call ends in."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------------------------------------- layouts


@pytest.fixture
def dinov2():
    return golden("dinov2_mlp", "state.")


def chunked(state):
    """As DINOv2 saves a network whose blocks were wrapped in chunks: block 2 of chunk 1 is `blocks.1.2`."""
    return {
        ".".join(["blocks", str(int(key.split(".")[1]) // 2), *key.split(".")[1:]]) if key[:7] == "blocks." else key: x
        for key, x in state.items()
    }


WRAPPINGS = {
    "chunked": chunked,
    "model": lambda state: {"model": state, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state},
    "teacher of a pretraining run": lambda state: {"teacher": {f"backbone.{key}": x for key, x in state.items()}},
    "parallel": lambda state: {"model": {f"module.{key}": x for key, x in state.items()}},
    "with a classifier": lambda state: {**state, "head.weight": torch.zeros(10, 48), "head.bias": torch.zeros(10)},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS.keys())
def test_a_wrapped_file_is_the_same_network(tmp_path, dinov2, wrap):
    torch.save(dinov2, tmp_path / "plain.pth")
    torch.save(wrap(dinov2), tmp_path / "wrapped.pth")
    plain, wrapped = (load_checkpoint(str(tmp_path / f"{kind}.pth"), num_heads=4) for kind in ("plain", "wrapped"))
    assert_same_network(plain, wrapped, (56, 70))
    assert torch.equal(plain.mask_token, dinov2["mask_token"])
    assert torch.equal(wrapped.mask_token, dinov2["mask_token"])


@pytest.mark.parametrize("ddp", ["", "module."])
def test_the_authors_training_file_gives_the_student(tmp_path, ddp):
    student, teacher = golden("proteus_losses", "student."), golden("proteus_losses", "teacher.")
    heads = {f"{kind}_head.0.weight": torch.zeros(24) for kind in ("token", "patch", "feature")}
    parts = {
        **{f"teacher.backbone.{key}": value for key, value in teacher.items()},
        **{f"student.backbone.{key}": value for key, value in student.items()},
        **heads,
    }
    model = {ddp + key: value for key, value in parts.items()}
    torch.save({"model": model, "epoch": 299}, tmp_path / "checkpoint.pth")
    torch.save(student, tmp_path / "student.pth")
    loaded = load_checkpoint(str(tmp_path / "checkpoint.pth"), num_heads=2)
    assert (loaded.embed_dim, loaded.num_blocks) == (24, 2)
    assert_same_network(loaded, load_checkpoint(str(tmp_path / "student.pth"), num_heads=2), (112, 112), (56, 84))
    assert torch.equal(loaded.mask_token, student["mask_token"])


def test_what_is_read_off_the_shapes(tmp_path):
    torch.save(golden("dinov2_reg_swiglu", "state."), tmp_path / "giant.pth")
    encoder = load_checkpoint(str(tmp_path / "giant.pth"), num_heads=4)
    assert (encoder.embed_dim, encoder.num_blocks, encoder.num_heads) == (48, 3, 4)
    assert (encoder.patch_size, encoder.image_size) == (14, 518)
    assert encoder.network.num_prefix_tokens == 5
    assert (encoder.mean, encoder.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_arguments_replace_what_the_file_says(tmp_path, dinov2):
    torch.save(dinov2, tmp_path / "dinov2.pth")
    encoder = load_checkpoint(
        str(tmp_path / "dinov2.pth"), num_heads=4, image_size=(56, 84), norm_eps=1e-3, mean=(0, 0.5, 1), std=(1, 2, 3)
    )
    assert encoder.image_size == (56, 84)
    assert (encoder.mean, encoder.std) == ((0, 0.5, 1), (1, 2, 3))
    assert {norm.eps for norm in encoder.modules() if isinstance(norm, nn.LayerNorm)} == {1e-3}


# --------------------------------------------------------------------------------------------------- head count


def test_an_unknown_head_count_is_asked_for(tmp_path, dinov2):
    path = str(tmp_path / "dinov2.pth")
    torch.save(dinov2, path)
    line = said(load_checkpoint, path)
    assert path in line
    assert "num_heads" in line
    assert "48" in line  # width
    assert "3 blocks" in line


def test_a_known_shape_has_its_head_count_from_the_zoo(tmp_path):
    student = create_model("proteus_vitt14", image_size=28)
    save_file(student.network.state_dict(), tmp_path / "bare.safetensors")  # no metadata
    loaded = load_checkpoint(str(tmp_path / "bare.safetensors"))
    assert loaded.num_heads == 3
    assert_same_network(loaded, student, (28, 28))


def test_a_head_count_that_does_not_divide_the_width_is_an_input_error(tmp_path, dinov2):
    torch.save(dinov2, tmp_path / "dinov2.pth")
    assert "num_heads" in said(load_checkpoint, str(tmp_path / "dinov2.pth"), num_heads=5)


# ------------------------------------------------------------------------------------------------------ misfits


def without(key):
    return lambda state: {name: value for name, value in state.items() if name != key}


def shaped(key, *shape):
    return lambda state: {**state, key: torch.zeros(shape)}


MISFITS = {
    "missing": (without("blocks.1.attn.proj.bias"), ["missing: blocks.1.attn.proj.bias"]),
    "unexpected": (lambda state: {**state, "blocks.1.extra": torch.zeros(2)}, ["unexpected: blocks.1.extra"]),
    "wrong shape": (shaped("blocks.0.norm1.weight", 47), ["wrong shape", "blocks.0.norm1.weight is [47], not [48]"]),
    "one colour": (shaped("patch_embed.proj.weight", 48, 1, 14, 14), ["[48, 1, 14, 14]"]),
    "no blocks": (without("blocks.0.mlp.fc1.weight"), ["blocks.0.mlp.fc1.weight"]),
    "no positions": (without("pos_embed"), ["pos_embed"]),
    "no patches": (without("patch_embed.proj.weight"), ["patch_embed.proj.weight"]),
    "not square": (shaped("pos_embed", 1, 1 + 37 * 36, 48), ["1333", "square"]),
    "video": (shaped("patch_embed.proj.weight", 48, 3, 2, 14, 14), ["[48, 3, 2, 14, 14]"]),
}


@pytest.mark.parametrize(("change", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_a_file_that_does_not_fit_is_told_why(tmp_path, dinov2, change, words):
    path = str(tmp_path / "dinov2.pth")
    torch.save(change(dinov2), path)
    line = said(load_checkpoint, path, num_heads=4)
    assert all(word in line for word in [path, *words]), line


def test_the_first_misfits_are_named_and_the_others_counted(tmp_path, dinov2):
    path = str(tmp_path / "dinov2.pth")
    torch.save({key: value for key, value in dinov2.items() if not key.startswith("blocks.1.")}, path)
    line = said(load_checkpoint, path, num_heads=4)
    assert "missing: blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.attn.qkv.weight and 11 more" in line


def test_a_named_network_takes_no_other_networks_file(tmp_path, dinov2):
    path = str(tmp_path / "dinov2.pth")
    torch.save(dinov2, path)
    line = said(create_model, "proteus_vitt14", checkpoint=path)
    assert "proteus_vitt14" in line
    assert "[1, 1, 48], not [1, 1, 192]" in line


# -------------------------------------------------------------------------------------------------- broken files


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def _saved(thing, zipped=True) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


TENSORS = {"a": torch.zeros(3), "b": torch.ones(4)}
BROKEN = {
    "empty.pth": b"",
    "empty.safetensors": b"",
    "text.pth": b"hello",
    "text.safetensors": b"hello",
    "lines.pth": b"an address that moved\nhas nothing here\n",
    "page.pth": b"<html>404 not found</html>",
    "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n",
    "zip.pth": b"PK\x03\x04 and no more",
    "random.pth": bytes((37 * i * i + 11 * i) % 256 for i in range(500)),
    "cut.safetensors": save(TENSORS)[:-3],
    "header.safetensors": b"\xff" * 8 + save(TENSORS)[8:],
    "renamed.pth": save(TENSORS),
    "renamed.safetensors": _saved(TENSORS),
    "code.pth": pickle.dumps(Evil(), protocol=2),
    "list.pth": _saved([torch.zeros(2)]),
    "number.pth": _saved(3),
    "tensor.pth": _saved(torch.zeros(2)),
    "no_tensors.pth": _saved({"epoch": 3, "args": {"lr": 0.1}}),
    "no_weights.pth": _saved({"model": {}}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, name, capsys):
    (tmp_path / name).write_bytes(BROKEN[name])
    assert str(tmp_path / name) in said(load_checkpoint, str(tmp_path / name))
    assert capsys.readouterr().out == ""  # a pickle runs nothing


@pytest.mark.parametrize("zipped", [True, False], ids=["new format", "old format"])
def test_a_file_cut_anywhere_is_one_line(tmp_path, zipped):
    whole = _saved(TENSORS, zipped)
    path, escaped = tmp_path / "cut.pth", {}
    for length in range(0, len(whole) - 1, 5):
        path.write_bytes(whole[:length])
        try:
            read_checkpoint(path)
        except InputError:
            continue
        except Exception as error:  # which ones is what the message is to say
            escaped[type(error).__name__] = length
    assert escaped == {}


@pytest.mark.parametrize("name", ["nowhere.pth", "nowhere.safetensors", "."])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    assert str(tmp_path / name) in said(load_checkpoint, str(tmp_path / name))
    assert str(tmp_path / name) in said(create_model, PLAIN, checkpoint=str(tmp_path / name))


def test_a_file_of_another_network_is_said_to_be_one(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "linear.pth")
    assert "not a vision transformer" in said(load_checkpoint, str(tmp_path / "linear.pth"))


@pytest.mark.parametrize("family", ["clip", "openclip", "synclr", "dino", "nonsense"])
def test_a_family_that_the_file_cannot_be_of_is_refused(tmp_path, dinov2, family):
    torch.save(dinov2, tmp_path / "a.pth")
    words = "unknown family 'nonsense'" if family == "nonsense" else f"is not of the family {family}"
    with pytest.raises(InputError, match=words):
        load_checkpoint(str(tmp_path / "a.pth"), family, num_heads=4)


@pytest.mark.parametrize(
    "change",
    [
        {1: torch.zeros(2)},
        {"pos_embed": torch.zeros(1, 0, 48)},
        {"pos_embed": torch.zeros(5)},
        {"reg_token": torch.zeros(4)},
        {"blocks.x.y": torch.zeros(4)},
        {"blocks.0.mlp.fc1.weight": torch.zeros(())},
        {"cls_token": torch.zeros(4, 4).to_sparse()},
    ],
    ids=str,
)
def test_odd_tensors_are_one_line(tmp_path, dinov2, change):
    torch.save({**dinov2, **change}, tmp_path / "a.pth")
    for load in (
        lambda path: load_checkpoint(path, num_heads=4),
        lambda path: create_model("dinov2_vits14", checkpoint=path),
    ):
        with pytest.raises(InputError) as caught:
            load(str(tmp_path / "a.pth"))
        assert len(caught.value.lines) == 1
