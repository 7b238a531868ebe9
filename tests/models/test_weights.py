"""Weight files: what is inferred, what is refused and how it is said, and what comes back from our own files."""

import http.server
import io
import json
import pickle
import socket
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from proteus.config import Config
from proteus.errors import InputError
from proteus.models import create_model, load_checkpoint
from proteus.models.weights import find_official, read_checkpoint, save_encoder
from proteus.models.zoo import ENTRIES
from proteus.training.preflight import check_inputs

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4}
PLAIN = "timm/vit_tiny_patch16_224"
IDENTITY = {"mean": (0, 0, 0), "std": (1, 1, 1)}


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


def images(*size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def said(function, *args, **kwargs) -> str:
    """The one line of the InputError that a call ends in."""
    with pytest.raises(InputError) as caught:
        function(*args, **kwargs)
    assert len(caught.value.lines) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def assert_same_network(a, b, *sizes):
    own, other = a.vit.state_dict(), b.vit.state_dict()
    assert own.keys() == other.keys()
    for key, value in own.items():
        assert torch.equal(value, other[key]), key
    for size in sizes:
        for one, two in zip(a.eval()(images(*size)), b.eval()(images(*size)), strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


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
    assert encoder.vit.num_prefix_tokens == 5
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
    save_file(student.vit.state_dict(), tmp_path / "bare.safetensors")  # no metadata
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
    "code.pth": pickle.dumps(Evil()),
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


# ------------------------------------------------------------------------------------------------- our own files

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
    assert_same_network(loaded, student, (56, 56), (70, 28))


def test_half_precision_on_disk(tmp_path):
    encoder = tiny()
    save_encoder(encoder, tmp_path / "half.safetensors", torch.float16)
    stored = load_file(tmp_path / "half.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = load_checkpoint(str(tmp_path / "half.safetensors"))
    for key, value in encoder.vit.state_dict().items():
        assert torch.equal(loaded.vit.state_dict()[key], value.half().float()), key
        assert loaded.vit.state_dict()[key].dtype == torch.float32
    assert {value.dtype for value in encoder.vit.state_dict().values()} == {torch.float32}


# ----------------------------------------------------------------------------------------------- official files


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty folders where torch and the hub keep files, and a machine whose names resolve nowhere but here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(tmp_path / "no_such"), raising=False)
    monkeypatch.setattr(
        "huggingface_hub.utils._detect_agent._registry", None, raising=False
    )  # asked for once a process
    monkeypatch.setenv("no_proxy", "*")
    asked = []

    def resolve(host, *args, **kwargs):
        if host == "127.0.0.1":
            return original(host, *args, **kwargs)
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return tmp_path, asked


def files_under(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitg14_reg"])
def test_official_weights_that_are_not_there_are_described(caches, name):
    folder, asked = caches
    with pytest.raises(InputError) as caught:
        find_official(name, download=False)
    text = str(caught.value)
    file = f"{name.replace('_reg', '_reg4')}_pretrain.pth"
    assert f"https://dl.fbaipublicfiles.com/dinov2/{name.removesuffix('_reg')}/{file}" in text
    assert str(folder / "torch" / "hub" / "checkpoints" / file) in text
    assert asked == []
    assert files_under(folder) == []


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dinov2_vits14", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors of timm/vit_tiny_patch16_224.augreg_in21k"),
    ],
)
def test_a_teacher_that_is_not_there_is_told_with_its_options(caches, name, file):
    folder, asked = caches
    config = Config(
        teacher={"name": name},
        student={"name": "proteus_vitt14"},
        losses={"token": 1},
        data={"kind": "digits"},
        schedule={"steps": 1},
    )
    line = said(check_inputs, config, "auto")
    assert name in line
    assert file in line
    for hint in ("teacher.checkpoint=PATH", "teacher.download=true", "give its path"):
        assert line.count(hint) == 1, line
    assert asked == []
    assert files_under(folder) == []


def test_official_weights_on_the_disk_are_found(caches):
    folder, _ = caches
    path = folder / "torch" / "hub" / "checkpoints" / "dinov2_vitb14_pretrain.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert find_official("dinov2_vitb14", download=False) == path


def test_weights_in_the_hubs_cache_are_found(caches):
    folder, _ = caches
    repository = folder / "hub" / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    path = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert find_official("timm/vit_tiny_patch16_224", download=False) == path


def test_without_a_network_a_download_is_an_input_error(caches):
    folder, asked = caches
    with pytest.raises(InputError, match=r"https://dl.fbaipublicfiles.com/.*checkpoint"):
        create_model("dinov2_vits14", pretrained=True)
    assert asked == ["dl.fbaipublicfiles.com"]
    assert files_under(folder) == []


@pytest.mark.parametrize("name", ["proteus_vits14", "dinov2_vits15", "timm/vit_tny_patch16_224", "xyzzy"])
def test_names_without_official_weights_are_input_errors(caches, name):
    _, asked = caches
    with pytest.raises(InputError, match=name):
        find_official(name, download=False)
    assert asked == []


@pytest.fixture
def publisher(monkeypatch):
    """A web server on this machine that publishes 1,000 bytes as DINOv2-S and breaks off after `sends` of them."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"w" * server.sends)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sends = 1000
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/dinov2_vits14_pretrain.pth"
    monkeypatch.setitem(ENTRIES, "dinov2_vits14", replace(ENTRIES["dinov2_vits14"], url=url))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_lands_where_it_is_looked_for(caches, publisher):
    path = find_official("dinov2_vits14", download=True)
    assert path.read_bytes() == b"w" * 1000
    publisher.shutdown()
    assert find_official("dinov2_vits14", download=False) == path


def test_a_download_that_breaks_off_leaves_no_file(caches, publisher):
    publisher.sends = 400
    with pytest.raises(InputError, match="checkpoint"):
        find_official("dinov2_vits14", download=True)
    assert files_under(caches[0]) == []
