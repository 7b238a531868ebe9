"""Embeddings: those of the encoder, in shards that survive, and none of them stale."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from proteus.data.transforms import EvalTransform
from proteus.errors import InputError
from proteus.evaluation.extract import View
from proteus.models import load_checkpoint
from proteus.transfer.retrieval import embed as module
from proteus.transfer.retrieval.embed import Embeddings, embed
from proteus.transfer.retrieval.gallery import Photos
from tests.transfer.retrieval.conftest import photograph

VIEW = View(16, 1.0, batch_size=7)


@pytest.fixture
def encoder(model):
    return load_checkpoint(str(model)).freeze()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 16)
    photograph(tmp_path / "photos", 40, seed=0)
    return Photos(tmp_path / "photos", "--gallery")


@pytest.fixture
def seen(monkeypatch):
    """The images that are encoded while the test runs."""
    counted = []
    tokens = module._tokens
    monkeypatch.setattr(module, "_tokens", lambda *args: counted.append(len(args[1])) or tokens(*args))
    return counted


def everything(embeddings):
    return embeddings.rows(np.arange(len(embeddings)))


@pytest.mark.parametrize("workers", [0, 1])
def test_vectors_are_class_tokens_of_length_one(tmp_path, encoder, photos, workers):
    embeddings = embed(encoder, photos, VIEW._replace(workers=workers), tmp_path / "e", "w")
    transform = EvalTransform(16, 1.0)
    with torch.no_grad():
        cls = torch.cat([encoder(transform(photos.load(i))[None]).cls for i in range(40)])
    expected = torch.nn.functional.normalize(cls, dim=1)
    assert abs(everything(embeddings) - expected.numpy()).max() < 6e-4  # half precision has 11 bits
    assert everything(embeddings).dtype == np.float16
    assert embeddings.readable.all()
    assert np.concatenate(list(embeddings.blocks())).tobytes() == everything(embeddings).tobytes()
    numbers = np.array([33, 2, 17, 2])
    assert (embeddings.rows(numbers) == everything(embeddings)[numbers]).all()


def test_shards_are_mapped_not_read(tmp_path, encoder, photos):
    assert all(isinstance(shard, np.memmap) for shard in embed(encoder, photos, VIEW, tmp_path / "e", "w")._shards)


def test_what_is_there_is_not_computed_again(tmp_path, encoder, photos, seen):
    first = everything(embed(encoder, photos, VIEW, tmp_path / "e", "w"))
    assert sum(seen) == 40
    (folder,) = (tmp_path / "e").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [f"{start:09d}.npy" for start in (0, 16, 32)]
    (folder / "000000016.npy").unlink()
    (folder / ".pending-000000016.npy").write_bytes(b"half a file")
    again = everything(embed(encoder, photos, VIEW, tmp_path / "e", "w"))
    assert sum(seen) == 56
    assert first.tobytes() == again.tobytes()


def exchange(photos):
    photograph(photos.root / "other", 1, seed=9)[0].replace(photos.root / "011.png")
    os.rmdir(photos.root / "other")


CHANGES = {
    "weights": lambda photos: (photos, VIEW, "others"),
    "view": lambda photos: (photos, VIEW._replace(crop=0.5), "w"),
    "an image": lambda photos: exchange(photos) or (Photos(photos.root, ""), VIEW, "w"),
    "a name": lambda photos: (
        (photos.root / "011.png").rename(photos.root / "011b.png") and (Photos(photos.root, ""), VIEW, "w")
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_the_vectors_is_computed_anew(tmp_path, encoder, photos, seen, what):
    embed(encoder, photos, VIEW, tmp_path / "e", "w")
    source, view, weights = CHANGES[what](photos)
    embed(encoder, source, view, tmp_path / "e", weights)
    assert sum(seen) == 80
    embed(encoder, source, view._replace(batch_size=16), tmp_path / "e", weights)
    assert sum(seen) == 80


def test_an_unreadable_image_of_a_gallery_has_no_vector(tmp_path, encoder, photos):
    whole = everything(embed(encoder, photos, VIEW, tmp_path / "e", "w"))
    for number in (0, 21, 39):
        Path(photos.name(number)).write_bytes(b"no picture")
    photos = Photos(photos.root, "--gallery")
    embeddings = embed(encoder, photos, VIEW, tmp_path / "e", "w", gallery=True)
    assert np.flatnonzero(~embeddings.readable).tolist() == [0, 21, 39]
    rows = everything(embeddings)
    assert np.isnan(rows[[0, 21, 39]]).all()
    assert abs(rows - whole)[embeddings.readable].max() < 1e-3
    assert len(np.concatenate(list(embeddings.blocks()))) == 37
    with pytest.raises(InputError, match=r"photos/000\.png cannot be read: replace"):
        embed(encoder, photos, VIEW, tmp_path / "other", "w")


def test_half_a_gallery_may_be_unreadable_and_no_more(tmp_path, encoder, photos):
    for number in range(20):
        Path(photos.name(number)).write_bytes(b"no picture")
    assert embed(encoder, photos, VIEW, tmp_path / "e", "w", gallery=True).readable.sum() == 20
    Path(photos.name(20)).unlink()
    photos.__dict__.pop("contents")  # or it would be that of the run before
    with pytest.raises(InputError, match=r"^--gallery: 21 of 40 images cannot be read, the first is .*/000\.png: see"):
        embed(encoder, photos, VIEW, tmp_path / "e", "w", gallery=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0])
def test_a_token_that_is_no_direction_is_named(tmp_path, encoder, photos, monkeypatch, value):
    def broken(images):
        cls = torch.ones(len(images), encoder.embed_dim)
        cls[3:4] = value
        return type("Features", (), {"cls": cls})

    monkeypatch.setattr(encoder, "forward", broken)
    with pytest.raises(InputError, match=r"003\.png: the model gives no finite class token"):
        embed(encoder, photos, VIEW, tmp_path / "e", "w", gallery=True)


def test_a_damaged_shard_is_named(tmp_path, encoder, photos):
    folder = embed(encoder, photos, VIEW, tmp_path / "e", "w").folder
    content = (folder / "000000016.npy").read_bytes()
    (folder / "000000016.npy").write_bytes(content[:200])
    with pytest.raises(InputError, match=r"000000016\.npy is damaged .*: delete it"):
        Embeddings(folder, 40)
    (folder / "000000016.npy").unlink()
    np.save(folder / "000000016.npy", np.zeros((3, 32), np.float16))
    with pytest.raises(InputError, match=r"000000016\.npy is damaged \(shape \(3, 32\)\)"):
        Embeddings(folder, 40)


# Runs the tool and is killed in the middle of its second shard of the gallery.
KILLED = """
import os, signal, sys
from proteus.transfer.retrieval import embed
from tools.retrieve import main
embed.SHARD = 16
save = embed.save_shard
def dying(folder, start, vectors):
    if start == 16:
        (folder / ".pending-000000016.npy").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, start, vectors)
embed.save_shard = dying
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_that_is_killed_goes_on_and_selects_the_same(run, task, model, monkeypatch, seen):
    monkeypatch.setattr(module, "SHARD", 16)
    options = ["--per-query=3", f"--model={model}", f"--queries={task / 'queries'}", f"--gallery={task / 'gallery'}"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *options, f"--out={task / 'out'}", "--near-duplicate=0.999"],
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (task / "out/manifest.csv").exists()
    assert run()[0] == 0
    assert sum(seen) == 40 - 16  # the queries and the first shard are kept
    assert run(out=task / "undisturbed")[0] == 0
    for name in ("manifest.csv", "contact_sheet.png", "summary.json"):
        assert (task / "out" / name).read_bytes() == (task / "undisturbed" / name).read_bytes()


def test_an_interrupt_keeps_what_is_finished(run, task, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 16)
    save = module.save_shard

    def interrupted(folder, start, vectors):
        if start == 32:
            raise KeyboardInterrupt
        save(folder, start, vectors)

    monkeypatch.setattr(module, "save_shard", interrupted)
    status, out, error = run()
    assert status == 130
    assert "the same command goes on" in error
    assert "selected" not in out
    assert len(list(task.glob("out/embeddings/*/0000000??.npy"))) == 1 + 2
