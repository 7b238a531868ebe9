"""What is exported computes, in the library it is exported to, what the encoder does; where not, it is removed."""

import json
import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from torch import nn

from proteus.errors import InputError
from proteus.models import create_model, export, load_checkpoint
from proteus.models.vit import VitEncoder
from proteus.models.weights import save_encoder
from tests.networks import assert_same_network, images
from tools.export import main

TINY = {"embed_dim": 64, "depth": 2, "num_heads": 4}
PLAIN = "timm/vit_tiny_patch16_224"
# name, arguments, image size, another image size
VITS = {
    "student": ("proteus_vitt14", {**TINY, "drop_path": 0.1}, 56, 84),
    "registers": ("timm/vit_small_patch14_reg4_dinov2", TINY, 56, 42),
    "norm epsilon": (PLAIN, {**TINY, "norm_eps": 1e-3, "patch_size": 8}, 32, 48),
    "class token alone normed": ("clip_vitb16", TINY, 64, 48),
    "attention pooling": ("timm/vit_base_patch16_siglip_224", TINY, 64, 80),
    "average pooling": ("timm/vit_base_patch16_siglip_gap_224", TINY, 64, 48),
    "rotary": ("dinov3_vits16", TINY, 64, 96),
    "rotary and learned": ("eva02_vitt14", TINY, 56, 70),
}
SMALL_SWIN = {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}
OTHERS = {
    "resnet": ("timm/resnet18", {}, 64, 96),
    "mobilenet": ("timm/mobilenetv4_conv_small", {}, 64, 96),
    "fastvit": ("timm/fastvit_t8", {}, 64, 96),
    "convnext": ("timm/convnext_atto", {}, 64, 96),
    "windows": ("timm/swin_tiny_patch4_window7_224", SMALL_SWIN, 224, 224),
}


def small_network():
    """A network of one's own, for the zoo."""
    return nn.Conv2d(3, 8, 8, stride=8)


def write(path, name=PLAIN, arch=TINY, image_size=64, **convention):
    """A student of random weights, written to `path`: the encoder."""
    encoder = create_model(name, image_size=image_size, **convention, **arch).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if "embed_dim" in arch else 0.05))
    save_encoder(encoder, path)
    return encoder


@pytest.fixture
def student(tmp_path):
    path = tmp_path / "student.safetensors"
    write(path)
    return str(path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Puts a folder into the hub's cache, under a repository's name."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def publish(folder, repository):
        place = cache / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)

    return publish


def outputs_of(printed, pixels):
    """The names that the printed lines of Python leave, given images."""
    names = {"images": pixels}
    exec(printed.rpartition("\n\n")[0], names)
    return names


@torch.no_grad()
@pytest.mark.parametrize("other_size", [False, True], ids=["own size", "other size"])
@pytest.mark.parametrize("case", VITS.values(), ids=VITS.keys())
def test_timm_computes_a_vits_features_with_the_printed_lines(tmp_path, capsys, case, other_size):
    name, arch, *sizes = case
    encoder = write(tmp_path / "s.safetensors", name, arch, sizes[0], mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    size = sizes[other_size]
    wish = ["--image-size", str(size)] if other_size else []
    assert main(["timm", str(tmp_path / "s.safetensors"), "--out", str(tmp_path / "t.safetensors"), *wish]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "largest difference 0.0e+00" in said.out
    found, wanted = outputs_of(said.out, images(size, size)), encoder(images(size, size))
    assert torch.equal(found["cls"], wanted.cls)
    patch = wanted.patch if name != "clip_vitb16" else encoder.network.norm(wanted.patch)
    assert torch.equal(found["patch"], patch)
    assert_same_network(load_checkpoint(str(tmp_path / "t.safetensors")), _moved(encoder, size), (size, size))


def _moved(encoder, size):
    if isinstance(encoder, VitEncoder):
        encoder.move_to_grid(encoder.grid_of(size, size))
    return encoder


@torch.no_grad()
@pytest.mark.parametrize("case", OTHERS.values(), ids=OTHERS.keys())
def test_timm_computes_what_other_networks_give(tmp_path, capsys, case):
    name, arch, native, size = case
    encoder = write(tmp_path / "s.safetensors", name, arch, native)
    out = tmp_path / "t.safetensors"
    assert main(["timm", str(tmp_path / "s.safetensors"), "--out", str(out), "--image-size", str(size)]) == 0
    found = outputs_of(capsys.readouterr().out, images(size, size))["features"]
    assert torch.equal(found, encoder.network.forward_features(encoder.normalise(images(size, size))))
    assert_same_network(load_checkpoint(str(out)), encoder, (size, size))


@torch.no_grad()
def test_plain_timm_would_resize_a_students_positions_otherwise(tmp_path):
    """Why positions are moved: the student's own file, at another size, is not what timm makes of it."""
    encoder = write(tmp_path / "s.safetensors", "proteus_vitt14", TINY, 56)
    options = {"num_classes": 0, "img_size": 84, "init_values": 1.0, **TINY}
    overlay = {"file": str(tmp_path / "s.safetensors"), "num_classes": 0}
    network = timm.create_model("vit_small_patch14_dinov2", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    x = encoder.normalise(images(84, 84))
    wanted = encoder(images(84, 84)).cls
    off = (network.eval().forward_features(x)[:, 0] - wanted).abs().max() / wanted.abs().max()
    assert off > 10 * export.FORMATS["timm"].tolerance


@torch.no_grad()
@pytest.mark.parametrize("case", ["student", "rotary", "resnet"])
def test_a_hub_folder_loads_in_timm_and_here(tmp_path, capsys, hub, case):
    name, arch, native, size = (VITS | OTHERS)[case]
    encoder = write(tmp_path / "s.safetensors", name, arch, native, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    folder = tmp_path / "student"
    assert main(["hf", str(tmp_path / "s.safetensors"), "--out", str(folder), "--image-size", str(size)]) == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}

    found = outputs_of(capsys.readouterr().out, images(size, size))
    wanted = encoder(images(size, size))
    patch = found["features"].flatten(2).transpose(1, 2) if case == "resnet" else found["patch"]
    assert torch.equal(patch, wanted.patch)
    data = timm.data.resolve_model_data_config(found["model"])
    assert [list(data[key]) for key in ("input_size", "mean", "std")] == [
        [3, size, size],
        [0.1, 0.2, 0.3],
        [0.4, 0.5, 0.6],
    ]
    assert found["model"].pretrained_cfg["fixed_input_size"] == (case != "resnet")

    hub(folder, "me/student")
    encoder = _moved(encoder, size)
    for loaded in (
        create_model("hf-hub:me/student", pretrained=True),
        load_checkpoint(str(folder / "model.safetensors")),
    ):
        assert (loaded.mean, loaded.std, loaded.image_size) == (encoder.mean, encoder.std, size)
        assert getattr(loaded, "position", None) == getattr(encoder, "position", None)
        assert_same_network(loaded, encoder, (size, size), (size // 2, size))


def test_a_student_built_from_the_hub_leaves_it_behind(tmp_path, hub, monkeypatch):
    write(tmp_path / "s.safetensors", "proteus_vitt14", TINY, 56)
    assert main(["hf", str(tmp_path / "s.safetensors"), "--out", str(tmp_path / "first")]) == 0
    hub(tmp_path / "first", "me/first")
    encoder = create_model("hf-hub:me/first", pretrained=True, drop_path=0.1, patch_norm=False)
    save_encoder(encoder, tmp_path / "second.safetensors")
    for format, out in (("hf", "second"), ("timm", "third.safetensors")):
        assert main([format, str(tmp_path / "second.safetensors"), "--out", str(tmp_path / out)]) == 0
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    for file in ("second/model.safetensors", "third.safetensors"):
        loaded = load_checkpoint(str(tmp_path / file))
        assert not loaded.patch_norm
        assert_same_network(loaded, encoder, (56, 56), (70, 28))


QUICK = [("student", "onnx"), ("student", "torch"), ("attention pooling", "torch"), ("resnet", "torch")]


@torch.no_grad()
@pytest.mark.parametrize(
    ("case", "format"),
    [
        *QUICK,
        *[
            pytest.param(case, format, marks=pytest.mark.slow)
            for case in (VITS | OTHERS)
            for format in ("onnx", "torch")
            if (case, format) not in QUICK
        ],
    ],
)
def test_a_graph_computes_the_features_of_any_number_of_images(tmp_path, capfd, caplog, case, format):
    name, arch, native, size = (VITS | OTHERS)[case]
    encoder = write(tmp_path / "s.safetensors", name, arch, native, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    out = tmp_path / {"onnx": "graph.onnx", "torch": "graph.pt2"}[format]
    assert main([format, str(tmp_path / "s.safetensors"), "--out", str(out), "--image-size", str(size)]) == 0
    said = capfd.readouterr()
    assert (said.err, said.out.count("\n")) == ("", 1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert sorted(os.listdir(tmp_path)) == sorted([out.name, "s.safetensors"])
    run = run_onnx(out) if format == "onnx" else torch.export.load(out).module()
    for batch in (1, 2, 5):
        pixels = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
        found, wanted = run(pixels), encoder(pixels)
        for key in ("cls", "patch"):
            scale = getattr(wanted, key).abs().max().item()
            torch.testing.assert_close(found[key], getattr(wanted, key), rtol=0, atol=1e-4 * scale)


def run_onnx(path):
    import onnx
    import onnxruntime

    graph = onnx.load(path).graph
    assert "Resize" not in {node.op_type for node in graph.node}  # positions are constants
    session = onnxruntime.InferenceSession(path)
    assert [(one.name, one.type, one.shape[:2]) for one in session.get_inputs()] == [
        ("images", "tensor(float)", ["batch", 3])
    ]
    assert [one.name for one in session.get_outputs()] == ["cls", "patch"]
    return lambda pixels: dict(
        zip(("cls", "patch"), map(torch.from_numpy, session.run(None, {"images": pixels.numpy()})), strict=True)
    )


OWN = "tests.models.test_export:small_network"


def test_a_network_of_ones_own_becomes_a_graph_and_nothing_of_timms(tmp_path):
    encoder = create_model(OWN, image_size=32)
    assert export.export(encoder, "torch", tmp_path / "graph.pt2").scale > 0
    for format in ("timm", "hf"):
        with pytest.raises(InputError, match="a network of your own: export to onnx or torch"):
            export.export(encoder, format, tmp_path / "out")


def test_the_keys_of_a_file_do_not_become_code(tmp_path):
    encoder = create_model(PLAIN, image_size=64, **TINY)
    encoder.arch = {**TINY, "x=print('here'),y": 1}
    with pytest.raises(InputError, match="not all names of arguments"):
        export.export(encoder, "timm", tmp_path / "t.safetensors")


def test_what_is_off_is_removed(tmp_path, student, monkeypatch, capsys):
    def write_wrongly(encoder, path):
        encoder.network.norm.bias[0] += 1e-3
        save_encoder(encoder, path)

    monkeypatch.setitem(export.FORMATS, "timm", export.FORMATS["timm"]._replace(write=write_wrongly))
    assert main(["timm", student, "--out", str(tmp_path / "t.safetensors")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "off by 1.0e-03" in said.err
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_what_is_not_a_number_matches_nothing(tmp_path, student, monkeypatch, capsys):
    def read(encoder, path):
        right = partial(export.FORMATS["torch"].expect, encoder)
        return lambda pixels: {**right(pixels), "patch": torch.full_like(right(pixels)["patch"], float("nan"))}

    monkeypatch.setitem(export.FORMATS, "timm", export.FORMATS["timm"]._replace(read=read))
    assert main(["timm", student, "--out", str(tmp_path / "t.safetensors")]) == 1
    assert "off by nan" in capsys.readouterr().err


def test_a_network_that_cannot_be_traced_is_one_line(tmp_path, student, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such\noperation")

    monkeypatch.setattr(torch.export, "export", fail)
    assert main(["torch", student, "--out", str(tmp_path / "t.pt2")]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {PLAIN} cannot be exported to torch: RuntimeError: no such operation\n"
    assert os.listdir(tmp_path) == ["student.safetensors"]


def test_bad_input_is_one_line(tmp_path, student, monkeypatch, capsys):
    def refused(format, checkpoint, out, *options):
        assert main([format, checkpoint, "--out", str(tmp_path / out), *options]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        return said.err

    assert "do not exist" in refused("timm", str(tmp_path / "none.safetensors"), "a.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    assert "cannot be read" in refused("timm", str(tmp_path / "broken.safetensors"), "a.safetensors")
    assert "did you mean 'onnx'" in refused("onx", student, "a.onnx")
    assert "ends in .onnx" in refused("onnx", student, "a.bin")
    assert "exists already" in refused("timm", student, "student.safetensors")
    assert "exists already" in refused("hf", student, ".")
    assert "40 x 40 pixels is not divided by its patch of 16" in refused(
        "onnx", student, "a.onnx", "--image-size", "40"
    )
    assert "above 0" in refused("onnx", student, "a.onnx", "--image-size", "0")
    assert "cannot be written" in refused("timm", student, "broken.safetensors/a.safetensors")
    assert "for the format hf" in refused("timm", student, "a.safetensors", "--push", "me/x")
    assert "OWNER/NAME" in refused("hf", student, "a", "--push", "x")
    write(tmp_path / "eps.safetensors", arch={**TINY, "norm_eps": 1e-3})
    assert "no place for norm_eps=0.001" in refused("hf", str(tmp_path / "eps.safetensors"), "a")
    write(tmp_path / "own.safetensors", OWN, {}, 32)
    assert "a network of your own" in refused("timm", str(tmp_path / "own.safetensors"), "a.safetensors")
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    assert "at most 2 GB" in refused("onnx", student, "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refused("onnx", student, "a.onnx").endswith('onnxruntime: pip install "proteus-distill[export]"\n')
    assert sorted(os.listdir(tmp_path)) == sorted(f"{name}.safetensors" for name in ("student", "broken", "eps", "own"))


CONFIG = """
teachers: [{name: dinov2_vitb14}, {name: clip_vitb16, checkpoint: /secret/clip.pt, losses: {feature: 0.5}}]
student: {name: proteus_vitt14}
losses: {token: 1, patch: 1}
data: {root: /secret/imagenet, split: train}
schedule: {epochs: 30, warmup_epochs: 5}
probe: {split: val}
run: {batch_size: 96, accumulate: 2}
"""
LOG = [
    {"step": 5, "cosine_cls/dinov2_vitb14": 0.1, "knn_student": 0.25},
    {"step": 9, "loss": 1.0},
    {"step": 10, "cosine_cls/dinov2_vitb14": 0.875, "knn_student": 0.5, "knn_teacher/clip_vitb16": None},
    {"step": 11, "loss": 0.5},
]


def card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_tells_the_run(tmp_path, capsys):
    write(tmp_path / "student.safetensors", "proteus_vitt14", TINY, 56)
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG) + '{"step": 12, "cosi')
    out = tmp_path / "small"
    assert main(["hf", str(tmp_path / "student.safetensors"), "--out", str(out), "--licence", "mit"]) == 0
    text = card(out)
    assert text.startswith("---\nlibrary_name: timm\n")
    assert "\nlicense: mit\n" in text.partition("\n---\n")[0]
    assert "hf-hub:OWNER/small" in text
    for fact in (
        "distilled from `dinov2_vitb14` and `clip_vitb16`",
        "- Teacher: `dinov2_vitb14` (weights under apache-2.0)\n",
        "- Teacher: `clip_vitb16` from `clip.pt`, with losses of its own: feature 0.5\n",
        "- Losses: token 1, patch 1\n",
        "- Data: imagenet (train); crops of 224 pixels\n",
        "- Batch: 96 images to a process, 2 to an update\n",
        "learning rate 0.0005 for a batch of 512",
        "- Schedule: 30 epochs, 5 epochs of warm-up, cosine to 1e-05\n",
        "at step 10,",
        "the teacher's (dinov2_vitb14) | 0.875 |",
        "by the student's class token | 0.500 |",
        "@inproceedings{zhang2025proteus,",
    ):
        assert fact in text, fact
    for absent in ("secret", "0.250", "0.100", "None", str(tmp_path)):
        assert absent not in text, absent


def test_the_card_of_a_lone_file_claims_nothing(tmp_path, student):
    assert main(["hf", student, "--out", str(tmp_path / "hf")]) == 0
    text = card(tmp_path / "hf")
    assert "license" not in text
    assert "## Recipe" not in text
    assert "## Scores" not in text


@pytest.fixture
def uploads(monkeypatch):
    """What is asked of the hub, in order; set `error` to let it refuse."""

    class Api:
        def __init__(self):
            self.calls, self.error = [], None

        def create_repo(self, repo_id, exist_ok):
            self.calls.append(("create", repo_id, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            if self.error:
                raise self.error

    api = Api()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    return api


def test_the_hub_is_asked_only_when_told_to(tmp_path, student, uploads, capsys):
    assert main(["hf", student, "--out", str(tmp_path / "a")]) == 0
    assert uploads.calls == []
    assert main(["hf", student, "--out", str(tmp_path / "b"), "--push", "me/small"]) == 0
    files = ["README.md", "config.json", "model.safetensors"]
    assert uploads.calls == [("create", "me/small", True), ("upload", "me/small", files)]
    assert "hf-hub:me/small" in card(tmp_path / "b")
    uploads.error = OSError("no\nnetwork")
    capsys.readouterr()
    assert main(["hf", student, "--out", str(tmp_path / "c"), "--push", "me/small"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: --push me/small: OSError: no network; ")
    assert said.endswith(f"later: hf upload me/small {tmp_path / 'c'}\n")
    assert said.count("\n") == 1
    assert (tmp_path / "c" / "model.safetensors").is_file()
