"""What is on disk of a teacher cache: for K fixed views of every image, the crop, and the target made from it.

A record has a fixed size, so its place follows from its number. `training.cache` knows what the bytes of a target are.
"""

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from proteus.data.transforms import Box, Crop, View
from proteus.errors import InputError, UnreadableError

CHUNK = 256  # images of a file, whatever the number of processes: what an interruption loses at most
OPEN = 4096  # files mapped at once; the kernel has a limit


class Record(NamedTuple):
    """What is kept of a view.

    crop:   where it was cut out of the image.
    pixels: `pixels_crc` of the view.
    target: R bytes, what the teachers said.
    """

    crop: Crop
    pixels: int
    target: bytes


def record_dtype(target_bytes: int) -> np.dtype:
    """A record whose target has R = `target_bytes` bytes."""
    crop = [("crop", "<i4", (4,)), ("flip", "u1"), ("pixels", "<u4")]
    return np.dtype([*crop, ("target", "u1", (target_bytes,)), ("crc", "<u4")])


def view_key(seed: int, image: int, view: int) -> tuple[int, ...]:
    """What a view's augmentation and erasing are seeded by; no place of a live run has a key of four numbers."""
    return seed, image, view, 2


def pixels_crc(pixels: Tensor, box: Box | None) -> int:
    """CRC-32 of a view: uint8 [3, S, S], and the box to erase."""
    drawn = b"" if box is None else np.array(box, "<i8").tobytes()
    return zlib.crc32(drawn, zlib.crc32(pixels.permute(1, 2, 0).contiguous().numpy().data))


def chunks(images: int) -> list[range]:
    """The images of each file of the cache."""
    return [range(start, min(start + CHUNK, images)) for start in range(0, images, CHUNK)]


def chunk_file(directory: Path, image: int) -> Path:
    """The file that holds the records of an image."""
    return directory / f"chunk_{image // CHUNK * CHUNK:08d}.bin"


def seal(records: np.ndarray, first: int) -> None:
    """Fill in the checksums of records, the first of which is the cache's number `first`."""
    bodies = records.view(np.uint8).reshape(len(records), -1)[:, :-4]
    records["crc"] = [_crc(body, first + place) for place, body in enumerate(bodies)]


class ViewCache:
    """The records of a finished cache, mapped into memory, each checked when it is read.

    images, views: of the cache; the record of (image, view) is its number image * views + view.
    repeats:       views of an image that follow each other in a run's order, its `data.repeats`.
    """

    def __init__(self, directory: Path, images: int, views: int, target_bytes: int, seed: int, repeats: int):
        self.directory, self.images, self.views, self.seed, self.repeats = directory, images, views, seed, repeats
        self.dtype = record_dtype(target_bytes)
        self._open: dict[Path, np.ndarray] = {}
        for chunk in chunks(images):
            self._check_size(chunk_file(directory, chunk.start), len(chunk))

    def view(self, image: int, epoch: int, position: int) -> int:
        """Which view of an image is shown at its place in the data order (`Sampler`).

        An image goes through its views in turn: the repeats of an epoch are different ones as far as there are enough,
        and over the epochs each is shown as often as any other.
        """
        turn, repeat = divmod(position, self.repeats)
        seen = turn // self.images * self.repeats + repeat  # how often the image came before in this epoch
        return (image + epoch * self.repeats + seen) % self.views

    def key(self, image: int, view: int) -> tuple[int, ...]:
        """As `view_key`."""
        return view_key(self.seed, image, view)

    def read(self, image: int, view: int) -> Record:
        """The record of a view; UnreadableError names the file where it is damaged."""
        path, number = chunk_file(self.directory, image), image * self.views + view
        raw = self._map(path)[image % CHUNK * self.views + view]
        record = raw.view(self.dtype)[0]
        if _crc(raw[:-4], number) != record["crc"]:
            raise UnreadableError(
                f"{path} is damaged (checksum of image {image}, view {view}): delete it and run tools/cache.py again"
            )
        top, left, height, width = record["crop"].tolist()
        crop = Crop(top, left, height, width, bool(record["flip"]))
        return Record(crop, int(record["pixels"]), record["target"].tobytes())

    def check(self, record: Record, view: View, name: str) -> None:
        """UnreadableError where the view that was rendered is not the one that the teachers saw."""
        if pixels_crc(view.pixels, view.box) != record.pixels:
            raise UnreadableError(
                f"{name} does not look as it did when {self.directory} was made: the image, its decoder or a library "
                "has changed; give another teacher_cache.dir and run tools/cache.py"
            )

    def _map(self, path: Path) -> np.ndarray:
        """The records of a file, uint8 [n, bytes of a record]."""
        if path not in self._open:
            if len(self._open) >= OPEN:
                self._open.clear()
            try:
                self._open[path] = np.asarray(np.memmap(path, np.uint8, "r")).reshape(-1, self.dtype.itemsize)
            except (OSError, ValueError) as error:
                raise UnreadableError(f"{path} cannot be read ({error}): run tools/cache.py again") from None
        return self._open[path]

    def _check_size(self, path: Path, images: int) -> None:
        if not path.is_file():
            raise InputError(f"{self.directory} is not finished ({path.name} is missing): run tools/cache.py again")
        if path.stat().st_size != images * self.views * self.dtype.itemsize:
            raise InputError(f"{path} is damaged (its size): delete it and run tools/cache.py again")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # each worker maps for itself, however it starts


def _crc(body: np.ndarray, number: int) -> int:
    # Begun with the record's number: one that stands in another's place is damaged too.
    return zlib.crc32(np.ascontiguousarray(body).data, number & 0xFFFFFFFF)
