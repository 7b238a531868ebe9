"""Caltech-UCSD Birds, from its folder or straight from its archive."""

import io
import os
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from proteus.data.decode import decode
from proteus.data.sets.files import ListedImages, choose, find_top, one_line
from proteus.errors import InputError, MissingDataError

TOP = "CUB_200_2011"
CHUNK = 1 << 18  # compressed bytes read at a time
STEP = 2 << 20  # inflated bytes between two points where reading can start: 24 MB of memory for CUB's 1.1 GB


def cub(root: Path, split: str) -> "ListedImages | ArchivedImages":
    """CUB-200-2011, 200 species: CUB_200_2011/ or, where only the archive is there, CUB_200_2011.tgz.

    Splits train, test. The archive is never unpacked: opening it reads it once (seconds), and an image costs some
    milliseconds more.
    """
    flag = choose("cub", split, {"train": "1", "test": "0"})
    try:
        top = find_top("cub", root, [TOP], "images.txt")
    except MissingDataError:
        places = [Path(root).expanduser() / folder / f"{TOP}.tgz" for folder in ("", "cub")]
        archive = next((place for place in places if place.is_file()), None)
        if archive is None:
            raise MissingDataError(
                f"cub: no {TOP} and no {TOP}.tgz under {places[0].parent} or {places[1].parent}"
            ) from None
        return _from_archive(archive, flag)
    lists = [_parse(_bytes(top / name), top / name) for name in LISTS]
    paths, labels, classes = _chosen(lists, [top / name for name in LISTS], flag)
    return ListedImages(top / "images", paths, labels, classes, top / LISTS[0])


LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def _from_archive(archive: Path, flag: str) -> "ArchivedImages":
    files = _indexed(archive, archive.stat().st_mtime_ns)
    where = [Path(f"{archive}:{TOP}/{name}") for name in LISTS]
    for name, place in zip(LISTS, where, strict=True):
        if f"{TOP}/{name}" not in files:
            raise InputError(f"{place}: not in the archive; fetch it again")
    lists = [_parse(files.read(f"{TOP}/{name}"), place) for name, place in zip(LISTS, where, strict=True)]
    paths, labels, classes = _chosen(lists, where, flag)
    members = [f"{TOP}/images/{path}" for path in paths]
    for member in members:
        if member not in files:
            raise InputError(f"{archive}:{member}: not there, though {LISTS[0]} lists it; fetch the archive again")
    return ArchivedImages(files, members, labels, classes)


@lru_cache(maxsize=1)
def _indexed(archive: Path, changed: int) -> "GzipTar":
    """One index for both splits; `changed` is when the archive was written, so that a new one is read anew."""
    return GzipTar(archive)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; the set is incomplete, unpack it again") from None


def _parse(content: bytes, where: Path) -> dict[str, str]:
    """Lines of `<number> <value>`, by number."""
    rows = {}
    for line, text in enumerate(content.decode("utf-8", "surrogateescape").splitlines(), 1):
        fields = text.split(None, 1)
        if len(fields) != 2:
            raise InputError(f"{where}:{line}: {text!r} is not of the form '1 value'")
        rows[fields[0]] = fields[1].strip()
    return rows


def _chosen(lists: list[dict[str, str]], where: list[Path], flag: str) -> tuple[list[str], np.ndarray, list[str]]:
    """Paths, labels [n] int64 from 0, and class names of the images whose split is `flag`."""
    images, species, splits, classes = lists
    number = {key: label for label, key in enumerate(classes)}
    for table, place in ((species, where[1]), (splits, where[2])):
        if table.keys() != images.keys():
            raise InputError(f"{place}: is not about the {len(images)} images of {where[0].name}")
    for key, value in species.items():
        if value not in number:
            raise InputError(f"{where[1]}: image {key} has class {value}, which {where[3].name} does not list")
    chosen = [key for key in images if splits[key] == flag]
    labels = np.array([number[species[key]] for key in chosen], dtype=np.int64)
    return [images[key] for key in chosen], labels, list(classes.values())


class ArchivedImages:
    """Images inside an archive, with their labels."""

    def __init__(self, files: "GzipTar", members: list[str], labels: np.ndarray, classes: list[str]):
        self._files, self._members = files, np.array([os.fsencode(member) for member in members])
        self.labels: np.ndarray | None = labels
        self.classes = classes

    def __len__(self) -> int:
        return len(self._members)

    def load(self, index: int) -> Image.Image:
        return decode(io.BytesIO(self._files.read(os.fsdecode(self._members[index]))))

    def name(self, index: int) -> str:
        return f"{self._files.path}:{os.fsdecode(self._members[index])}"


class GzipTar:
    """The files of a .tar.gz by name, read in any order by any number of processes or threads.

    Reading it once leaves copies of the decompressor every STEP bytes, from which any place is near.
    """

    def __init__(self, path: Path):
        self.path = path
        self._starts: list[tuple[int, int, zlib._Decompress]] = []  # (inflated, compressed bytes before, decompressor)
        self._ends: list[int] = []
        self._members: dict[str, tuple[int, int]] = {}  # name: (offset, size)
        try:
            self._file = open(path, "rb")  # noqa: SIM115  # it lives as long as this object
            stream = io.BufferedReader(_Forward(self._inflate(0, 0, zlib.decompressobj(wbits=31), remember=True)))
            with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar:
                self._members = {info.name: (info.offset_data, info.size) for info in tar if info.isfile()}
        except Exception as error:  # zlib, tarfile and the disk have errors of their own
            raise InputError(f"{path}: not readable as a .tgz archive ({one_line(error)}); fetch it again") from None

    def __reduce__(self):
        return GzipTar, (self.path,)  # decompressors cannot be pickled: a spawned worker reads the archive once itself

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def read(self, name: str) -> bytes:
        """The content of a file."""
        offset, size = self._members[name]
        inflated, compressed, state = self._starts[bisect_right(self._ends, offset) - 1]
        pieces, skip = [], offset - inflated
        for piece in self._inflate(inflated, compressed, state.copy(), remember=False):
            pieces.append(piece[skip : skip + size])
            size -= len(pieces[-1])
            skip = max(0, skip - len(piece))
            if not size:
                break
        return b"".join(pieces)

    def _inflate(self, inflated: int, compressed: int, state: "zlib._Decompress", remember: bool) -> Iterator[bytes]:
        """The inflated bytes from a place on, in pieces."""
        while not state.eof:
            if remember and (not self._ends or inflated >= self._ends[-1] + STEP):
                self._starts.append((inflated, compressed, state.copy()))
                self._ends.append(inflated)
            # pread leaves no position behind that forked workers would share.
            chunk = os.pread(self._file.fileno(), CHUNK, compressed)
            if not chunk:
                raise EOFError("the archive ends early")
            piece = state.decompress(chunk)
            inflated, compressed = inflated + len(piece), compressed + len(chunk)
            yield piece


class _Forward(io.RawIOBase):
    """Pieces of bytes as a file that is read from front to back."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._rest = pieces, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count
