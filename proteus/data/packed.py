"""Images packed into a few large files by tools/pack.py: what is in such a folder, and the source that reads it.

index.json:       version, classes, how it was packed, and each shard's rows, bytes and SHA-256.
shard_00000.arrow an Arrow IPC file of columns image (a file's bytes), label (or null) and name, in batches of `ROWS`.
unfinished.json:  in place of index.json while the packing goes on.
"""

import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pydantic import BaseModel, Field, ValidationError

from proteus.data.decode import decode
from proteus.engine.checksums import file_hash
from proteus.errors import InputError

VERSION = 1
INDEX, UNFINISHED = "index.json", "unfinished.json"
ROWS = 64  # of a batch of a shard; its last may have fewer
SCHEMA = pa.schema([("image", pa.large_binary()), ("label", pa.int64()), ("name", pa.string())])


class Shard(BaseModel):
    """A file of a packed folder."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+\.arrow$")]  # in the folder itself, wherever that came from
    rows: Annotated[int, Field(gt=0)]
    bytes: int
    sha256: str


class Index(BaseModel):
    """What index.json says, as far as readers need it."""

    version: int
    classes: list[str]
    shards: Annotated[list[Shard], Field(min_length=1)]


class PackedSource:
    """A folder that tools/pack.py wrote. Shards are mapped into memory, by each process for itself.

    Opening checks that every shard is there whole: its size and its footer. `verify` reads all that is in them.
    """

    def __init__(self, root: Path, use_labels: bool = True):
        self.root = root
        index = read_index(root)
        self._shards = [root / shard.file for shard in index.shards]
        self._ends = np.cumsum([shard.rows for shard in index.shards])
        self._readers: dict[int, pa.ipc.RecordBatchFileReader] = {}
        columns = []
        for path, shard in zip(self._shards, index.shards, strict=True):
            _check_size(path, shard.bytes)
            columns.append(_labels(path, shard.rows))
        labels = pa.chunked_array(columns)
        labelled = use_labels and not labels.null_count
        self.labels: np.ndarray | None = labels.to_numpy() if labelled else None
        self.classes: list[str] = index.classes if labelled else []
        if self.labels is not None and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise _damaged(root / INDEX, f"{len(self.classes)} classes for labels up to {self.labels.max()}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def load(self, index: int) -> Image.Image:
        return decode(io.BytesIO(self._cell("image", index).as_buffer()))

    def name(self, index: int) -> str:
        return self._cell("name", index).as_py()

    def _cell(self, column: str, index: int) -> Any:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        if shard not in self._readers:
            self._readers[shard] = open_shard(self._shards[shard])
        row = int(index) - (int(self._ends[shard - 1]) if shard else 0)
        return self._readers[shard].get_batch(row // ROWS).column(column)[row % ROWS]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}


def read_index(root: Path) -> Index:
    """What index.json says; InputError where there is none that can be used."""
    if (root / UNFINISHED).is_file():
        raise InputError(f"{root} is not packed to its end: run the same tools/pack.py command again, it goes on")
    try:
        index = Index.model_validate_json((root / INDEX).read_bytes())
    except OSError as error:
        raise InputError(f"{root / INDEX}: {error.strerror}; tools/pack.py makes such a folder") from None
    except ValidationError:
        raise InputError(f"{root / INDEX} is damaged: pack the images again (tools/pack.py)") from None
    if index.version != VERSION:
        raise InputError(f"{root / INDEX}: version {index.version}, {VERSION} is read here: pack the images again")
    return index


def open_shard(path: Path, columns: list[int] | None = None) -> pa.ipc.RecordBatchFileReader:
    """A shard mapped into memory, with all columns or some; InputError where its footer is damaged."""
    # Without threads: a worker that was forked has none of the pool it believes in.
    options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=columns)
    try:
        return pa.ipc.open_file(pa.memory_map(str(path)), options=options)
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, str(error)) from None


def verify(root: Path) -> int:
    """Read every shard of a packed folder; returns how many images there are, InputError for the first damaged one."""
    index = read_index(root)
    for shard in index.shards:
        path = root / shard.file
        _check_size(path, shard.bytes)
        if file_hash(path) != shard.sha256:
            raise _damaged(path, "its checksum")
    return sum(shard.rows for shard in index.shards)


def _labels(path: Path, rows: int) -> pa.Array:
    reader = open_shard(path, [SCHEMA.get_field_index("label")])
    try:
        column = reader.read_all().column("label").combine_chunks()
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise _damaged(path, str(error)) from None
    if len(column) != rows:
        raise _damaged(path, f"{len(column)} rows, not {rows}")
    return column


def _check_size(path: Path, size: int) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file; copy the folder again, or pack the images again (tools/pack.py)")
    if path.stat().st_size != size:
        raise _damaged(path, f"{path.stat().st_size} bytes, not {size}")


def _damaged(path: Path, how: str) -> InputError:
    return InputError(f"{path} is damaged ({how}): copy the folder again, or pack the images again (tools/pack.py)")
