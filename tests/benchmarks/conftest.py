"""A tiny model, tiny sets of images, and the command as a function."""

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from benchmarks import run
from proteus.models import create_model
from proteus.models.weights import save_encoder

TINY = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A checkpoint of random weights, for images of 16 x 16 pixels."""
    path = tmp_path_factory.mktemp("model") / "student.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_encoder(create_model("timm/vit_tiny_patch16_224", image_size=16, **TINY), path)
    return path


@pytest.fixture
def command():
    """`run.main`, as a process of its own would run it."""

    def call(*words):
        PartialState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return run.main([str(word) for word in words])

    yield call
    PartialState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def colours(tmp_path):
    """photos/{train,test}/{red,green}/*.png, eight images a class, and the task file `mine.yaml` that is about them."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for channel, name in enumerate(("red", "green")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 60, (16, 16, 3))
                pixels[..., channel] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    write_task(tmp_path / "mine.yaml")
    return tmp_path


def write_task(path, kind="knn", **changes):
    """A task file about the folder `photos` beside it."""
    task = {
        "title": "My photos",
        "kind": kind,
        "metric": "top-1",
        "direction": "higher",
        "data": {"set": "folder", "root": "photos", "splits": {"train": "train", "test": "test"}},
    }
    path.write_text(yaml.safe_dump(task | changes))
    return path
