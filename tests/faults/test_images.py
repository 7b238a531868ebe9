"""Whatever files a folder holds, a run uses them correctly, or replaces, counts and names them."""

import os
import resource
import sys
import tempfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import Dataset

from proteus.config import Augment
from proteus.data.loader import TrainingSet
from proteus.data.packed import PackedSource
from proteus.data.sampler import Draw
from proteus.data.sources import FolderSource, one_line
from proteus.data.transforms import EvalTransform, TrainTransform
from proteus.data.workers import load_batches, note
from tests.faults import fuzz
from tests.faults.runs import SLOW_STEP, assert_same_end, resumed_from
from tests.training.conftest import read_log
from tools import pack

SIZE = 16


class Readings(Dataset):
    """What becomes of each file: (its pixels, or None), (views, images that took its place), gigabytes at most."""

    def __init__(self, source: FolderSource):
        self.source = source
        self.training = TrainingSet(source, TrainTransform(SIZE, Augment()), 0, patches=16, mask_ratio=0.5)
        self.plain = EvalTransform(SIZE, 0.875)

    def __getitems__(self, indices: list[int]):
        readings = []
        for index in indices:
            note(index)
            try:
                image = self.source.load(index)
                assert image.mode == "RGB"
                pixels = np.array(image)
                assert self.plain(image).shape == (3, SIZE, SIZE)
            except AssertionError:
                raise
            except Exception:
                pixels = None
            batch = self.training.batch([Draw(index, 0, index, False)])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            readings.append((index, pixels, batch.images, batch.bad, peak))
        return readings


def test_files_of_every_kind_are_used_correctly_or_replaced(tmp_path, thorough, capfd):
    count, seed = (10_000, int.from_bytes(os.urandom(4))) if thorough else (300, 1)
    print(f"seed {seed}")
    files = fuzz.write_files(tmp_path / "images", count, seed)
    source = FolderSource(tmp_path / "images")
    assert {os.fsencode(source.name(index)) for index in range(len(source))} == set(files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    capfd.readouterr()
    numbers = [range(start, min(start + 16, count)) for start in range(0, count, 16)]
    broken = set()
    wrong = []
    views = {}
    for readings in load_batches(Readings(source), lambda done: islice(numbers, done, None), 2, timeout=60):
        for index, pixels, images, bad, peak in readings:
            file, name = files[os.fsencode(source.name(index))], source.name(index)
            # Pillow allows 179 million pixels, in two copies here, of 4 bytes; workers begin with what we have.
            assert peak < before + 1.6, f"{name!r}: {peak} GB"
            if pixels is None:
                broken.add(index)
            if file.valid is not None and file.valid != (pixels is not None):
                wrong.append((name, "refused" if pixels is None else "taken"))
            if pixels is not None and file.pixels is not None:
                same = pixels.shape == file.pixels.shape
                if not same or np.abs(pixels.astype(int) - file.pixels).max() > file.within:
                    wrong.append((name, pixels.shape, file.pixels.shape))
            assert images.shape == (1, 3, SIZE, SIZE)
            views[index] = (images, bad)
    assert not wrong, f"seed {seed}: {len(wrong)} files: {wrong[:9]}"
    assert 0.2 * count < len(broken) < 0.5 * count
    for index, (_, bad) in views.items():  # the next that can be read takes its place
        there = next(step for step in range(count) if (index + step) % count not in broken)
        assert bad == [(index + step) % count for step in range(there)], f"seed {seed}: {source.name(index)!r}"
    assert capfd.readouterr().err == "", f"seed {seed}"


def unprivileged(function) -> bool:
    """Whether `function` is true in a process that may not read everything, as root may."""
    child = os.fork()
    if not child:
        status = 1
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            status = 0 if function() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_links_pipes_devices_and_what_may_not_be_read():
    with tempfile.TemporaryDirectory() as folder:  # that of pytest only its owner may enter
        os.chmod(folder, 0o755)
        expected = fuzz.write_links(Path(folder) / "images")

        def readable() -> bool:
            source = FolderSource(Path(folder) / "images")
            found = {}
            for index in range(len(source)):
                try:
                    found[os.fsencode(source.name(index))] = np.asarray(source.load(index))[0, 0].tolist() == [1, 2, 3]
                except OSError:
                    found[os.fsencode(source.name(index))] = False
            if found != expected:
                print(found, file=sys.stderr)
            return found == expected

        assert unprivileged(readable)


@pytest.mark.parametrize(
    "maker",
    [lambda: fuzz.png(60_000, 60_000, b""), lambda: fuzz.bomb(np.random.default_rng(2)).data]
    + [lambda seed=seed: fuzz.bomb(np.random.default_rng(seed)).data for seed in range(6)],
)
def test_a_bomb_takes_no_memory(tmp_path, maker):
    (tmp_path / "bomb.jpg").write_bytes(maker())
    assert (tmp_path / "bomb.jpg").stat().st_size < 10_000

    def refused() -> bool:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            FolderSource(tmp_path).load(0)
        except Exception:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
        return False

    child = os.fork()
    if not child:
        os._exit(0 if refused() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def lines_of(directory: Path) -> list[bytes]:
    path = directory / "skipped_images.txt"
    return path.read_bytes().split(b"\n")[:-1] if path.is_file() else []


def test_a_run_names_what_it_replaced_and_chooses_the_same_when_it_goes_on(tmp_path, run_here, forked, capfd):
    files = fuzz.write_files(tmp_path / "images", 80, 3)
    settings = ("data.kind=folder", f"data.root={tmp_path / 'images'}", "data.split=null", "data.max_bad_share=1")
    settings += ("data.repeats=1", "data.timeout=60")
    assert run_here(*settings, "data.workers=0", directory="whole") == 0
    run = forked("killed", *settings, "data.workers=2", prelude=SLOW_STEP.format(0.1))
    assert run.wait_until(lambda: run.steps() >= 7)
    run.kill()
    assert run.wait() == -9
    run = forked("killed", *settings, "data.workers=2")
    assert run.wait() == 0
    assert resumed_from(run.output()) == 5
    assert_same_end(tmp_path / "whole", tmp_path / "killed", 12)
    said = capfd.readouterr().err + run.output()
    assert not [word for word in ("Traceback", "Warning", "Corrupt", "libpng", "TIFF") if word in said], said
    # In each of two epochs of five steps all 80 are asked for.
    named = lines_of(tmp_path / "whole")
    assert named == lines_of(tmp_path / "killed")
    assert len(set(named)) == len(named) == read_log(tmp_path / "whole")[-1]["bad_images"]
    source = FolderSource(tmp_path / "images")
    names = {os.fsencode(one_line(source.name(i))): files[os.fsencode(source.name(i))] for i in range(len(source))}
    assert {name for name, file in names.items() if file.valid is False} <= set(named)
    assert not [name for name in named if names[name].valid]
    assert rb"line\nbreak" in b"".join(named)


def test_a_run_stops_at_the_limit_with_one_line(tmp_path, run_here, capfd):
    fuzz.write_files(tmp_path / "images", 80, 3)
    settings = ("data.kind=folder", f"data.root={tmp_path / 'images'}", "data.split=null", "data.repeats=1")
    assert run_here(*settings) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert "of 80 images cannot be read, more than max_bad_share=0.01 allows" in line
    assert len(lines_of(tmp_path / "run")) >= 10


@pytest.mark.parametrize("images", [0, 1, 15])
def test_fewer_images_than_a_batch(tmp_path, run_here, capfd, images):
    (tmp_path / "images").mkdir()
    for index in range(images):
        data = fuzz.encoded(fuzz.smooth(np.random.default_rng(index)), "PNG")
        (tmp_path / f"images/{index}.png").write_bytes(data)
    settings = ("data.kind=folder", f"data.root={tmp_path / 'images'}", "data.split=null", "schedule.steps=2")
    status = run_here(*settings, "schedule.warmup_steps=0")
    err = capfd.readouterr().err
    assert "Traceback" not in err
    if images:
        assert status == 0
        assert [row["step"] for row in read_log(tmp_path / "run")] == [1, 2]
    else:
        assert status == 2
        assert f"error: data: no images under {tmp_path / 'images'}" in err


def test_broken_rows_of_a_hugging_face_set(tmp_path):
    import datasets

    from proteus.data.huggingface import HuggingFaceSource

    files = list(fuzz.write_files(tmp_path / "images", 100, 5).values())
    (tmp_path / "gone.png").touch()
    rows = [{"bytes": file.data, "path": None} for file in files] + [
        {"bytes": None, "path": str(tmp_path / "gone.png")}
    ]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": [*rows, None]}, features=features).save_to_disk(tmp_path / "hf")
    (tmp_path / "gone.png").unlink()
    source = HuggingFaceSource(str(tmp_path / "hf"), None, False, False)
    training = TrainingSet(source, TrainTransform(SIZE, Augment()), 0, patches=16, mask_ratio=0.5)
    for index, valid in enumerate([*(file.valid for file in files), False, False]):
        bad = training.batch([Draw(index, 0, index, False)]).bad
        assert valid is None or (index not in bad) == valid, source.name(index)
        assert all(source.name(number) for number in bad)


def test_broken_rows_of_a_packed_set(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(40):
        data = fuzz.encoded(fuzz.smooth(np.random.default_rng(index)), "PNG")
        (tmp_path / f"images/{index:02d}.png").write_bytes(data)
    assert pack.main(["--root", str(tmp_path / "images"), "--out", str(tmp_path / "packed"), "--workers=0"]) == 0
    shard = tmp_path / "packed/shard_00000.arrow"
    parts = shard.read_bytes().split(b"IHDR")
    assert len(parts) == 41
    damaged = [3, 4, 39]
    shard.write_bytes(
        b"".join(part + (b"OOPS" if i in damaged else b"IHDR") for i, part in enumerate(parts[:-1])) + parts[-1]
    )
    source = PackedSource(tmp_path / "packed")
    training = TrainingSet(source, TrainTransform(SIZE, Augment()), 0, patches=16, mask_ratio=0.5)
    bad = training.batch([Draw(index, 0, index, False) for index in range(40)]).bad
    assert sorted(set(bad)) == damaged
    assert [source.name(index) for index in damaged] == ["03.png", "04.png", "39.png"]
