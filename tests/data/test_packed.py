"""Packing: the same images in fewer files, the same bytes each time, whole after a kill; damage is found and named."""

import io
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from proteus import config
from proteus.data import packed
from proteus.data.packed import INDEX, ROWS, UNFINISHED, PackedSource, verify
from proteus.data.sources import FolderSource, build_source, check_roots
from proteus.errors import InputError
from tests.data.test_loader import assert_same, batches
from tools import pack

REPOSITORY = Path(__file__).resolve().parents[2]
COUNT = 3 * ROWS + 5  # images: more than a batch of Arrow's, and not a whole number of them


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """JPEGs of 60 x 40 and a PNG of 20 x 12 in two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        side = (12, 20) if number == 7 else (40, 60)
        image = Image.fromarray(rng.integers(0, 256, (*side, 3), dtype=np.uint8))
        path = root / "ab"[number % 2] / f"{number:04d}.{'png' if number == 7 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        image.save(path, **({} if number == 7 else {"quality": 90}))
    return root


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack, "SHARD_BYTES", 150_000)  # about 70 images


def packed_from(root: Path, out: Path, *options: str) -> Path:
    assert pack.main(["--root", str(root), "--out", str(out), "--workers", "0", *options]) == 0
    return out


@pytest.fixture(scope="module")
def unchanged(images, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "SHARD_BYTES", 150_000)
        return packed_from(images, tmp_path_factory.mktemp("packed") / "out", "--unchanged")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(*arguments, capsys) -> str:
    """The one line of an error with status 2."""
    assert pack.main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# The source


def test_the_source_is_that_of_the_folder(images, unchanged):
    folder, source = FolderSource(images), PackedSource(unchanged)
    assert len(json.loads((unchanged / INDEX).read_text())["shards"]) >= 3
    assert len(source) == len(folder) == COUNT
    assert source.classes == folder.classes == ["a", "b"]
    assert np.array_equal(source.labels, folder.labels)
    for index in range(COUNT):
        assert source.name(index) == folder.name(index)
        assert np.array_equal(np.asarray(source.load(index)), np.asarray(folder.load(index)))
    assert PackedSource(unchanged, use_labels=False).labels is None


def test_batches_are_those_of_the_folder_bit_for_bit(images, unchanged):
    settings = {"start": 0, "stop": 12, "batch": 6}
    expected = batches(FolderSource(images), **settings)
    source = PackedSource(unchanged)
    for workers in (0, 2):
        for one, other in zip(expected, batches(source, workers=workers, **settings), strict=True):
            assert_same(one, other)
    resumed = batches(pickle.loads(pickle.dumps(source)), **(settings | {"start": 7}))
    for one, other in zip(expected[7:], resumed, strict=True):
        assert_same(one, other)


def test_images_without_classes_have_no_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "flat" / "x.png")
    source = PackedSource(packed_from(tmp_path / "flat", tmp_path / "out"))
    assert (len(source), source.labels, source.classes) == (1, None, [])


def test_a_config_opens_it(unchanged):
    cfg = config.Sources(kind="packed", root=str(unchanged))
    check_roots(cfg)
    assert isinstance(build_source(cfg, 0), PackedSource)
    with pytest.raises(InputError, match=r"data.root is not set.*a folder that tools/pack.py wrote"):
        check_roots(config.Sources(kind="packed"))
    with pytest.raises(InputError, match="no such folder"):
        check_roots(config.Sources(kind="packed", root=str(unchanged / "gone")))


# What is packed


def test_large_images_are_resized_and_small_ones_keep_their_bytes(images, tmp_path):
    source = PackedSource(packed_from(images, tmp_path / "out", "--size", "20", "--quality", "80"))
    folder = FolderSource(images)
    kinds = set()
    for index in range(COUNT):
        before, after = folder.load(index), source.load(index)
        if before.size == (20, 12):
            assert np.array_equal(np.asarray(after), np.asarray(before))
            kinds.add("small")
        else:
            buffer = io.BytesIO()
            before.resize((30, 20), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
            assert np.array_equal(np.asarray(after), np.asarray(Image.open(buffer)))
            kinds.add("large")
    assert kinds == {"small", "large"}
    assert pack.shrunk(Image.new("RGB", (60, 40)), 40, 80) is None  # not above it
    assert pack.shrunk(Image.new("RGB", (60, 40)), 39, 80) is not None


def test_the_same_input_gives_the_same_bytes(images, unchanged, tmp_path):
    for workers in ("0", "2"):
        assert contents(packed_from(images, tmp_path / workers, "--unchanged", "--workers", workers)) == contents(
            unchanged
        )


def test_sizes_are_printed(images, tmp_path, capsys):
    packed_from(images, tmp_path / "out", "--unchanged")
    said = capsys.readouterr().out
    before = sum(path.stat().st_size for path in images.rglob("*.*")) / 1e9
    assert f"{COUNT} images in" in said
    assert f"{before:.3f} GB before" in said


def test_unreadable_images_are_named_and_left_out(images, tmp_path, capsys):
    root = tmp_path / "images"
    for path in images.rglob("*.*"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    whole = sorted(root.rglob("*.jpg"))
    for path in whole[:9]:
        path.write_bytes(path.read_bytes()[:200])
    source = PackedSource(packed_from(root, tmp_path / "out"))
    said = capsys.readouterr().err
    left = {str(path.relative_to(root)) for path in whole[:9]}
    assert all(f"unreadable, left out: {name}" in said for name in left)
    names = [source.name(index) for index in range(len(source))]
    assert names == [name for name in map(FolderSource(root).name, range(COUNT)) if name not in left]
    assert source.labels.tolist() == ["ab".index(name[0]) for name in names]
    whole[9].write_bytes(b"")  # the tenth, of 197
    line = refused("--root", root, "--out", tmp_path / "more", "--workers", "0", capsys=capsys)
    assert "10 of 197 images" in line
    assert "more than 1%" in line


# Interrupted


def test_a_killed_packing_goes_on_from_its_whole_shards(images, unchanged, tmp_path):
    out = tmp_path / "out"
    script = (
        "import sys, time\nfrom tools import pack\npack.SHARD_BYTES = 150_000\nload = pack.Encoded.__getitem__\n"
        "pack.Encoded.__getitem__ = lambda self, index: (time.sleep(0.02), load(self, index))[1]\n"
        f"sys.exit(pack.main(['--root', {str(images)!r}, '--out', {str(out)!r}, '--unchanged', '--workers', '0']))"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (out / "shard_00001.arrow").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert (out / UNFINISHED).exists()
    assert not (out / INDEX).exists()
    with pytest.raises(InputError, match=r"not packed to its end: run the same tools/pack.py command"):
        PackedSource(out)
    first = (out / "shard_00000.arrow").stat().st_mtime_ns
    packed_from(images, out, "--unchanged")
    assert (out / "shard_00000.arrow").stat().st_mtime_ns == first
    assert contents(out) == contents(unchanged)


def test_other_work_is_not_written_over(images, unchanged, tmp_path, capsys):
    common = ("--root", images, "--workers", "0", "--out")
    assert "is not empty" in refused(*common, unchanged, capsys=capsys)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine")
    assert "is not empty" in refused(*common, tmp_path / "notes", capsys=capsys)
    out = tmp_path / "out"
    packing = pack.Packing(FolderSource(images), out, 256, 95)
    packing.resume()
    assert "another size" in refused(*common, out, "--size", "128", capsys=capsys)
    assert "another size" in refused(*common, out, "--unchanged", capsys=capsys)
    packed_from(images, out)


def test_command_lines_that_make_no_sense(tmp_path, capsys):
    assert "no such folder" in refused("--root", tmp_path / "gone", "--out", tmp_path / "out", capsys=capsys)
    for arguments in (
        [],
        ["--root", "x"],
        ["--root", "x", "--check", "y"],
        ["--root", "x", "--out", "y", "--size", "0"],
    ):
        with pytest.raises(SystemExit) as caught:
            pack.main(arguments)
        assert caught.value.code == 2


# Damaged


@pytest.fixture
def copy(unchanged, tmp_path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, content in contents(unchanged).items():
        (folder / name).write_bytes(content)
    return folder


def told(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        PackedSource(folder)
    (line,) = caught.value.lines
    return line


def test_damage_is_named_when_it_is_opened(copy):
    shard, index = copy / "shard_00001.arrow", copy / INDEX
    whole, listed = shard.read_bytes(), index.read_text()
    shard.write_bytes(whole[:-1])
    assert f"{shard} is damaged ({len(whole) - 1} bytes, not {len(whole)})" in told(copy)
    shard.write_bytes(whole[:-6] + b"XXXXXX")  # its footer
    assert f"{shard} is damaged" in told(copy)
    shard.unlink()
    assert f"{shard}: no such file" in told(copy)
    shard.write_bytes(whole)
    assert len(PackedSource(copy)) == COUNT
    index.write_text(listed[:-9])
    assert f"{index} is damaged" in told(copy)
    index.write_text(listed.replace('"version": 1', '"version": 2'))
    assert "version 2" in told(copy)
    index.unlink()
    assert "tools/pack.py makes such a folder" in told(copy)


def test_a_flipped_bit_is_found_by_checking(copy, capsys):
    assert verify(copy) == COUNT
    assert pack.main(["--check", str(copy)]) == 0
    assert f"{COUNT} images, every checksum is right" in capsys.readouterr().out
    shard = copy / "shard_00000.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert len(PackedSource(copy)) == COUNT  # opening does not read it all
    assert f"{shard} is damaged (its checksum)" in refused("--check", copy, capsys=capsys)


def test_shards_are_mapped_once_and_by_each_process_for_itself(unchanged, monkeypatch):
    source = PackedSource(unchanged)
    opened, real = [], packed.open_shard
    monkeypatch.setattr(packed, "open_shard", lambda path: opened.append(path) or real(path))
    for index in (0, 1, COUNT - 1, 0, np.int64(1)):
        source.load(index)
    assert [path.name for path in opened] == [source._shards[0].name, source._shards[-1].name]
    assert pickle.loads(pickle.dumps(source))._readers == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index | {"shards": []},
        lambda index: index | {"shards": [{}]},
        lambda index: index | {"shards": 5},
        lambda index: index | {"classes": None},
        lambda index: index | {"classes": []},
        lambda index: [],
    ],
    ids=["no shards", "empty shard", "a number", "no classes", "too few classes", "a list"],
)
def test_an_index_that_is_json_but_wrong_is_damaged(copy, change):
    path = copy / INDEX
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert "is damaged" in told(copy)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_note_of_unfinished_work_is_named(images, tmp_path, capsys, text):
    out = tmp_path / "out"
    out.mkdir()
    (out / UNFINISHED).write_text(text)
    assert "unfinished.json is damaged" in refused("--root", images, "--out", out, capsys=capsys)


def test_a_shard_whose_middle_is_damaged_is_named(copy):
    shard = copy / "shard_00000.arrow"
    data = bytearray(shard.read_bytes())
    data[8:700] = bytes(b ^ 0xFF for b in data[8:700])
    shard.write_bytes(data)
    assert "shard_00000.arrow is damaged" in told(copy)


def test_an_image_too_long_for_a_jpeg_keeps_its_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (66_000, 257)).save(tmp_path / "in" / "long.png")
    source = PackedSource(packed_from(tmp_path / "in", tmp_path / "out", "--size", "256"))
    assert source.load(0).size == (66_000, 257)


def test_two_packings_do_not_share_a_folder(images, tmp_path, capsys):
    command = [sys.executable, "-c", "import sys; from proteus.engine.lock import RunLock; from pathlib import Path; "
               f"lock = RunLock(Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"]  # fmt: skip
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert "is in use by process" in refused("--root", images, "--out", tmp_path, capsys=capsys)
        holder.stdin.close()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has it")
def test_workers_end_with_a_killed_packing(tmp_path):
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8))
    for number in range(400):
        noise.save(tmp_path / "in" / f"{number}.jpg", quality=95)
    command = [sys.executable, "-m", "tools.pack", "--root", tmp_path / "in", "--out", tmp_path / "out"]
    process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 120
    while len(workers := children.read_text().split()) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
    time.sleep(0.2)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers):
        assert time.monotonic() < end, "a worker outlives its packing"
        time.sleep(0.05)
