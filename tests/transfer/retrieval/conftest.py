"""Vectors on disk, photos that an untrained network tells apart, and the command line."""

import numpy as np
import pytest
import torch
from PIL import Image

from proteus.models import create_model
from proteus.models.weights import save_encoder
from proteus.transfer.retrieval import embed
from proteus.transfer.retrieval.embed import Embeddings, save_shard
from tools import retrieve


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A function from vectors [n, D] to Embeddings in shards of 64; rows of NaN have none."""
    monkeypatch.setattr(embed, "SHARD", 64)

    def write(vectors):
        folder = tmp_path / f"vectors{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for start in range(0, len(vectors), 64):
            save_shard(folder, start, vectors[start : start + 64])
        return Embeddings(folder, len(vectors))

    return write


def unit(vectors):
    """Float16 of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def crowded(count, seed, dim=24):
    """[count, dim] in clusters, every tenth a near copy and every fifteenth an exact copy of an earlier one."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(12, dim))[rng.integers(12, size=count)] + 0.8 * rng.normal(size=(count, dim))
    for i in range(10, count, 10):
        vectors[i] = vectors[rng.integers(i)] + 0.1 * rng.normal(size=dim)
    for i in range(15, count, 15):
        vectors[i] = vectors[rng.integers(i)]
    return unit(vectors)


def tied(count, seed):
    """[count, 6] whose inner products are multiples of 1/4: hundreds of equal similarities, and of equal vectors."""
    rng = np.random.default_rng(seed)
    vectors = np.zeros((count, 6), np.float16)
    for row in vectors:
        row[rng.permutation(6)[:4]] = rng.choice([-0.5, 0.5], 4)
    return vectors


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The file of an untrained network of width 32 for images of 16 x 16."""
    path = tmp_path_factory.mktemp("model") / "encoder.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_encoder(
            create_model("timm/vit_tiny_patch16_224", patch_size=4, embed_dim=32, depth=1, num_heads=2, image_size=16),
            path,
        )
    return path


def photograph(folder, count, seed, *, size=20):
    """Write `count` pictures of smooth random colours; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = [folder / f"{number:03d}.png" for number in range(count)]
    for path in paths:
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        small.resize((size, size), Image.Resampling.BICUBIC).save(path)
    return paths


@pytest.fixture
def task(tmp_path):
    """Four queries in two classes, a gallery of 40 in two folders, and a test split of three."""
    photograph(tmp_path / "queries/a", 2, seed=1)
    photograph(tmp_path / "queries/b", 2, seed=2)
    photograph(tmp_path / "gallery/a", 20, seed=3)
    photograph(tmp_path / "gallery/b", 20, seed=4)
    photograph(tmp_path / "test", 3, seed=5)
    return tmp_path


@pytest.fixture
def run(task, model, capsys):
    """Runs the tool on the task, options as `per_query=2`, a list where one is repeated: (status, stdout, stderr)."""

    def call(**options):
        given = {
            "queries": task / "queries",
            "gallery": task / "gallery",
            "model": model,
            "per_query": 3,
            "out": task / "out",
            "near_duplicate": 0.999,  # to an untrained network much looks alike
            **options,
        }
        argv = []
        for key, value in given.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    argv += [f"--{key.replace('_', '-')}"] + ([] if one is True else [str(one)])
        status = retrieve.main(argv)
        return status, *capsys.readouterr()

    return call
