"""Options that make a run cheaper resume as any run does, and two processes are one under them too."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.training.conftest import read_log
from tools.cache import main as make_cache
from tools.pack import main as pack

VIT = "{name: timm/vit_tiny_patch16_224, arch: {patch_size: 4, embed_dim: %d, depth: 1, num_heads: 2}}"
STUDENTS = ("student=null", f"students=[{VIT % 16}, {VIT % 24}]")
OPTIONS = {
    "teacher in bfloat16": ("teacher.dtype=bfloat16",),
    "bf16": ("run.precision=bf16",),
    "all activations again": ("student.grad_checkpointing=true",),
    "cheap activations again": ("student.grad_checkpointing=selective",),
    "device": ("data.augment.device=true",),
    "packed unchanged": ("packed",),
    "packed": ("packed",),
    "cache of class tokens": ("losses={token: 1.0}", "teacher_cache.views=3"),
    "cache of all tokens": ("teacher_cache.tokens=all", "teacher_cache.components=16"),
    "several students": STUDENTS,
}
SOME = ["device", "packed", "cache of all tokens", "several students"]


@pytest.fixture
def settings(tiny, tmp_path):
    """The overrides of an option, with the packs and caches it reads."""

    def prepare(name):
        overrides = OPTIONS[name]
        if overrides == ("packed",):
            for index in range(24):
                pixels = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
                path = tmp_path / "images" / f"{index}.jpg"
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(path)
            how = ["--unchanged"] if name == "packed unchanged" else ["--size=24"]
            assert pack([f"--root={tmp_path / 'images'}", f"--out={tmp_path / 'packed'}", *how]) == 0
            return ("data.kind=packed", f"data.root={tmp_path / 'packed'}", "data.split=null", "run.batch_size=8")
        if name.startswith("cache"):
            overrides = (*overrides, "data.images_per_class=0.1", f"teacher_cache.dir={tmp_path / 'cache'}")
            assert make_cache([f"--cfg={tiny}", "--yes", *overrides]) == 0
        return overrides

    return prepare


def weights(directory):
    """All exported students of a run, by file."""
    return {
        str(path.relative_to(directory)): load_file(path) for path in sorted(directory.rglob("student*.safetensors"))
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_a_resumed_run_ends_bit_identical(run_here, settings, tmp_path, name):
    options = settings(name)
    assert run_here(*options, directory="whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in (10, 12):  # as if it had been killed after step 5
        shutil.rmtree(tmp_path / f"broken/checkpoints/step_{step}")
    assert run_here(*options, "data.workers=1", directory="broken") == 0
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert len(whole) == (4 if name == "several students" else 2)
    for file, tensors in whole.items():
        for key, value in tensors.items():
            assert torch.equal(broken[file][key], value), f"{file} {key}"


def test_packed_bytes_that_are_unchanged_give_the_run_of_the_folder(run_here, settings, tmp_path):
    packed = settings("packed unchanged")
    folder = ("data.kind=folder", f"data.root={tmp_path / 'images'}", *packed[2:])
    assert run_here(*packed, directory="packed") == 0
    assert run_here(*folder, directory="folder") == 0
    assert [row["loss"] for row in read_log(tmp_path / "packed")] == [
        row["loss"] for row in read_log(tmp_path / "folder")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_two_processes_lose_what_one_loses(run_here, run_together, settings, tmp_path, name):
    drop = () if name == "several students" else ("student.arch.drop_path=0.0",)
    options = (*settings(name), *drop, "schedule.steps=6")
    assert run_here(*options, "run.batch_size=8", directory="one") == 0
    rows = read_log(tmp_path / "one"), read_log(run_together("two", 2, *options, "run.batch_size=4"))
    assert len(rows[0]) == 6
    for a, b in zip(*rows, strict=True):
        numbers = [key for key in a if key.startswith(("loss", "grad_norm"))]
        assert len(numbers) == (9 if name == "several students" else 5)
        for key in numbers:
            assert b[key] == pytest.approx(a[key], rel=1e-4), f"step {a['step']}: {key}"
