"""Pack a folder of images into a few large files, small enough to be decoded fast: data.kind=packed reads them.

python tools/pack.py --root IMAGES --out DIR [--split train] [--size 256] [--quality 95] [--workers 2]
python tools/pack.py --root IMAGES --out DIR --unchanged
python tools/pack.py --check DIR

An image whose short side is above --size is resized to it (bicubic, antialiased) and encoded as JPEG; all others, and
with --unchanged all, keep their bytes. The same input gives the same bytes. A packing that was interrupted goes on from
its last whole shard when the command is given again.
"""

import argparse
import hashlib
import io
import json
import signal
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from PIL import Image
from torch.utils.data import Dataset
from tqdm import tqdm

from proteus.config import Source as SourceConfig
from proteus.config import Sources
from proteus.data.packed import INDEX, ROWS, SCHEMA, UNFINISHED, VERSION, verify
from proteus.data.sources import FolderSource, build_source, one_line
from proteus.data.workers import load_batches, note
from proteus.engine.atomic import PENDING, write_file
from proteus.engine.checksums import file_hash
from proteus.engine.lock import RunLock
from proteus.errors import FAILURES, InputError, say

TOGETHER = 16  # images that a worker hands over at once
LONGEST = 65_500  # pixels of a JPEG's side
SHARD_BYTES = 10**9  # of images, after which a shard is closed
MAX_BAD_SHARE, MAX_BAD_FILES = 0.01, 10  # of images that cannot be read: more than the one, at least the other


class Row(NamedTuple):
    """An image as it is packed: its number, its bytes, and how many its file had."""

    number: int
    image: bytes
    before: int


class Encoded(Dataset):
    """The files of a source as they are packed; None where one cannot be read."""

    def __init__(self, source: FolderSource, size: int | None, quality: int):
        self.source, self.size, self.quality = source, size, quality

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Row | None:
        note(index)
        try:
            smaller = shrunk(self.source.load(index), self.size, self.quality)
            data = Path(self.source.file(index)).read_bytes()  # after it has been found to be of bounded size
        except Exception:  # a decoder of a broken file may raise anything
            return None
        return Row(index, smaller or data, len(data))


def shrunk(image: Image.Image, size: int | None, quality: int) -> bytes | None:
    """An image with its short side resized to `size`, as JPEG; None where it is no larger, or too long for a JPEG."""
    short = min(image.size)
    if size is None or short <= size:
        return None
    width, height = (round(side * size / short) for side in image.size)
    if max(width, height) > LONGEST:
        return None
    buffer = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Packing:
    """A packing under way. `done` is what unfinished.json keeps of it: shards, and what they were made from."""

    def __init__(self, source: FolderSource, out: Path, size: int | None, quality: int):
        self.source, self.out = source, out
        self.encoded = Encoded(source, size, quality)
        names = hashlib.sha256("\0".join(source.name(index) for index in range(len(source))).encode(errors="replace"))
        made = {"size": size, "quality": quality, "files": len(source), "names": names.hexdigest()}
        self.done: dict[str, Any] = {"made": made, "next": 0, "before": 0, "bad": [], "shards": []}

    def resume(self) -> None:
        """Take up what `out` holds; InputError where that is anything but this packing, unfinished."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(self.out)
        if (self.out / UNFINISHED).is_file():
            try:
                done = json.loads((self.out / UNFINISHED).read_text())
                made = done["made"]
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.out / UNFINISHED} is damaged: delete {self.out} and start again") from None
            if made != self.done["made"]:
                raise InputError(f"--out {self.out} holds an unfinished packing of other images or another size")
            self.done = done
        elif any(path.name != "lock" and not path.name.startswith(PENDING) for path in self.out.iterdir()):
            raise InputError(f"--out {self.out} is not empty: give a folder that is, or is not there yet")
        else:
            self._keep()

    def run(self, workers: int) -> None:
        """Write the shards that are missing, then the index."""
        rows = self._rows(workers)
        for first in rows:  # and a shard takes as many more
            self._write_shard(chain([first], rows))
        if not self.done["shards"]:
            raise InputError(f"no image under {self.source.root} can be read")
        index = {"version": VERSION, "classes": self.source.classes, **self.done}
        write_file(self.out / INDEX, lambda path: path.write_text(json.dumps(index, indent=1)))
        (self.out / UNFINISHED).unlink()

    def _rows(self, workers: int) -> Iterator[Row]:
        numbers = range(self.done["next"], len(self.source))
        loaded = load_batches(self.encoded, lambda done: islice(_batches(numbers), done, None), workers)
        progress = tqdm(chain.from_iterable(loaded), "packing", len(self.source), initial=numbers.start, unit=" images")
        for number, row in zip(numbers, progress, strict=True):
            if row is not None:
                yield row
                continue
            bad = self.done["bad"]
            bad.append(self.source.name(number))
            progress.write(f"unreadable, left out: {one_line(bad[-1])}", file=sys.stderr)
            if len(bad) > MAX_BAD_SHARE * len(self.source) and len(bad) >= MAX_BAD_FILES:
                raise InputError(
                    f"{len(bad)} of {len(self.source)} images under {self.source.root} cannot be read, more than "
                    f"{MAX_BAD_SHARE:.0%}; the last is {one_line(bad[-1])}"
                )

    def _write_shard(self, rows: Iterator[Row]) -> None:
        path = self.out / f"shard_{len(self.done['shards']):05d}.arrow"
        written, size = 0, 0

        def write(pending: Path) -> None:
            nonlocal written, size
            with pa.OSFile(str(pending), "wb") as stream, pa.ipc.new_file(stream, SCHEMA) as shard:
                batch: list[Row] = []
                for row in rows:
                    batch.append(row)
                    size += len(row.image)
                    written += 1
                    if len(batch) == ROWS or size >= SHARD_BYTES:
                        shard.write_batch(self._arrow(batch))
                        batch = []
                    self.done["next"] = row.number + 1
                    self.done["before"] += row.before
                    if size >= SHARD_BYTES:
                        return
                if batch:
                    shard.write_batch(self._arrow(batch))

        write_file(path, write)
        facts = {"file": path.name, "rows": written, "bytes": path.stat().st_size, "sha256": file_hash(path)}
        self.done["shards"].append(facts)
        self._keep()

    def _arrow(self, rows: list[Row]) -> pa.RecordBatch:
        labels = self.source.labels
        columns = {
            "image": [row.image for row in rows],
            "label": [None if labels is None else int(labels[row.number]) for row in rows],
            # A name need not be UTF-8, and a column of text must.
            "name": [self.source.name(row.number).encode(errors="replace").decode() for row in rows],
        }
        return pa.RecordBatch.from_pydict(columns, SCHEMA)

    def _keep(self) -> None:
        write_file(self.out / UNFINISHED, lambda path: path.write_text(json.dumps(self.done, indent=1)))


def _batches(numbers: range) -> Iterator[range]:
    return (numbers[start : start + TOGETHER] for start in range(0, len(numbers), TOGETHER))


def pack(args: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    cfg = Sources(**SourceConfig(root=args.root, split=args.split).model_dump())
    source = build_source(cfg, seed=0)
    assert isinstance(source, FolderSource)
    packing = Packing(source, args.out, None if args.unchanged else args.size, args.quality)
    packing.resume()
    packing.run(args.workers)
    shards = packing.done["shards"]
    images, after = (sum(shard[key] for shard in shards) for key in ("rows", "bytes"))
    before = packing.done["before"]
    print(f"{images} images in {len(shards)} shards, {before / 1e9:.3f} GB before and {after / 1e9:.3f} GB after")
    print(f"read them with data.kind=packed data.root={args.out} data.split=null")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; ends the process with status 2 where it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--root", help="the folder of images")
    what.add_argument("--check", type=Path, metavar="DIR", help="read a packed folder and compare its checksums")
    parser.add_argument("--split", help="a subfolder of --root")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write, empty or not there yet")
    parser.add_argument("--size", type=int, default=256, help="pixels of the short side, of images that have more")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs that are resized, 1 to 95")
    parser.add_argument("--unchanged", action="store_true", help="keep every file's bytes")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode and encode; 0: this one")
    args = parser.parse_args(argv)
    if args.root and not args.out:
        parser.error("--root needs --out DIR")
    if args.size < 1 or args.workers < 0 or not 1 <= args.quality <= 95:
        parser.error("--size is 1 or more, --workers 0 or more, --quality 1 to 95")
    return args


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a disk failed, 2 bad input, 130 interrupted."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.check:
            print(f"{args.check}: {verify(args.check)} images, every checksum is right")
        else:
            pack(args)
    except FAILURES as error:
        return say(error, about=str(args.out or args.check))
    except KeyboardInterrupt:
        print("\nstopped; whole shards are kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
