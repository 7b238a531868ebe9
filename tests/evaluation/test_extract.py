"""Class tokens of a set: the same whoever computes them, kept on disk, and nothing stale."""

import contextlib
import copy
import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from proteus.data.sources import DigitsSource, FolderSource, Subset
from proteus.data.transforms import EvalTransform
from proteus.errors import InputError
from proteus.evaluation import extract as module
from proteus.evaluation.extract import View, extract
from proteus.models import create_model

VIEW = View(16, 1.0, batch_size=7)


@functools.cache
def encoder(seed=0):
    torch.manual_seed(seed)
    return create_model("timm/vit_tiny_patch16_224", patch_size=4, embed_dim=32, depth=1, num_heads=2, image_size=16)


def process(rank, count):
    """What `extract` sees of an Accelerator. A real one would settle the precision of all tests that come after."""
    return SimpleNamespace(
        device=torch.device("cpu"), process_index=rank, num_processes=count, is_main_process=rank == 0
    )


def digits(count=50):
    return Subset(DigitsSource("test"), np.arange(count))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)


@pytest.fixture
def seen(monkeypatch):
    """The images that are encoded while the test runs, counted."""
    counted = []
    forward = module.Encoder.__call__

    def count(self, images):
        if images.dtype == torch.uint8:  # not the trial of a network that is built
            counted.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(module.Encoder, "__call__", count)
    return counted


def test_tokens_are_those_of_the_encoder_in_order(small_chunks):
    network, source = encoder(), digits()
    tokens = extract(network, source, VIEW, process(0, 1))
    transform = EvalTransform(16, 1.0)
    with torch.no_grad():
        expected = torch.cat([network(transform(source.load(i))[None]).cls for i in range(50)])
    assert tokens.shape == (50, 32)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_a_finished_set_is_read_and_an_interrupted_one_goes_on(tmp_path, small_chunks, seen):
    first = extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path)
    assert sum(seen) == 50
    seen.clear()
    assert torch.equal(extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path), first)
    assert not seen
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == [f"{start:08d}.npy" for start in (0, 16, 32, 48)]
    (folder / "00000016.npy").unlink()
    (folder / ".pending-00000016.npy").write_bytes(b"half a file")
    assert torch.equal(extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path), first)
    assert sum(seen) == 16


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("weights", {"encoder": lambda: encoder(seed=1)}),
        ("view", {"view": VIEW._replace(crop=0.5)}),
        ("identity", {"identity": "another folder"}),
        ("images", {"source": lambda: Subset(DigitsSource("test"), np.arange(1, 51))}),
        ("count", {"source": lambda: digits(49)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_changes_the_tokens_is_computed_again(tmp_path, seen, what, change):
    extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path)
    before = sum(seen)
    extract(
        change.get("encoder", encoder)(),
        change.get("source", digits)(),
        change.get("view", VIEW),
        process(0, 1),
        cache=tmp_path,
        identity=change.get("identity", ""),
    )
    assert sum(seen) > before


def test_input_statistics_are_part_of_the_key_and_the_batch_size_is_not(tmp_path, seen):
    extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path)
    extract(encoder(), digits(), VIEW._replace(batch_size=50), process(0, 1), cache=tmp_path)
    assert sum(seen) == 50
    other = copy.deepcopy(encoder())
    other.set_convention((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    extract(other, digits(), VIEW, process(0, 1), cache=tmp_path)
    assert sum(seen) == 100


def test_processes_share_the_chunks_and_agree(tmp_path, small_chunks, seen, monkeypatch):
    alone = extract(encoder(), digits(), VIEW, process(0, 1))
    seen.clear()
    monkeypatch.setattr(module, "gather_object", lambda items: items)
    # The first process to finish would wait for the other; by hand, it comes again.
    with pytest.raises(InputError, match="No such file"):
        extract(encoder(), digits(), VIEW, process(1, 2), cache=tmp_path)
    assert sum(seen) == 16 + 2  # chunks 1 and 3
    both = extract(encoder(), digits(), VIEW, process(0, 2), cache=tmp_path)
    assert sum(seen) == 50
    torch.testing.assert_close(both, alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("images", [50, 48, 17])  # 4 chunks, 3, and 2: three processes have 2, 1 or 0 of them
def test_three_processes_are_one(small_chunks, seen, monkeypatch, images):
    alone = extract(encoder(), digits(images), VIEW, process(0, 1))
    assert len(alone) == images
    seen.clear()
    sent, answers = [], {}

    def gather(items):  # called twice by each: for what cannot be read, and for the tokens
        sent.append(items)
        if len(sent) % 2:
            return items
        if len(sent) <= 6:  # the others have not been here yet
            raise InterruptedError
        return [part for parts in sent[1:6:2] for part in parts]

    monkeypatch.setattr(module, "gather_object", gather)
    for turn in range(6):
        with contextlib.suppress(InterruptedError):
            answers[turn % 3] = extract(encoder(), digits(images), VIEW, process(turn % 3, 3))
    assert sum(seen) == 2 * images  # none by two processes, in either round
    assert sorted(start for parts in sent[1:6:2] for start, _ in parts) == list(range(0, images, 16))
    for tokens in answers.values():
        torch.testing.assert_close(tokens, alone, atol=1e-6, rtol=1e-6)
    assert len(answers) == 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_and_what_was_finished_stays(tmp_path, small_chunks, workers):
    for number in range(20):
        (tmp_path / "set/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"set/a/{number:02d}.png")
    (tmp_path / "set/a/17.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"a/17\.png cannot be read \(.*\): replace the file") as error:
        extract(
            encoder(),
            FolderSource(tmp_path / "set"),
            VIEW._replace(workers=workers),
            process(0, 1),
            cache=tmp_path / "cache",
        )
    assert len(error.value.lines) == 1
    (folder,) = (tmp_path / "cache").iterdir()
    assert [file.name for file in folder.iterdir()] == ["00000000.npy"]


def test_an_empty_set_has_no_tokens():
    assert extract(encoder(), digits(0), VIEW, process(0, 1)).shape == (0, 32)


def test_a_damaged_part_is_named(tmp_path):
    extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path)
    (part,) = tmp_path.glob("*/*.npy")
    part.write_bytes(part.read_bytes()[:90])
    with pytest.raises(InputError, match=r"00000000\.npy is damaged .*: delete it"):
        extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path)
    part.unlink()
    assert len(extract(encoder(), digits(), VIEW, process(0, 1), cache=tmp_path)) == 50


def test_an_image_that_is_exchanged_for_another_is_seen(tmp_path, seen):
    (tmp_path / "set/a").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"set/a/{number}.png")
    source = FolderSource(tmp_path / "set")
    source.name = lambda index: str(tmp_path / f"set/a/{index}.png")
    extract(encoder(), source, VIEW, process(0, 1), cache=tmp_path / "cache")
    extract(encoder(), source, VIEW, process(0, 1), cache=tmp_path / "cache")
    assert sum(seen) == 3
    Image.effect_noise((16, 16), 50).save(tmp_path / "set/a/1.png")
    extract(encoder(), source, VIEW, process(0, 1), cache=tmp_path / "cache")
    assert sum(seen) == 6
