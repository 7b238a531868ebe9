"""Class tokens of a gallery: normalised, in half precision, in shards on disk that are only mapped into memory."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tqdm import tqdm

from proteus.data.loader import PlainSet
from proteus.data.sources import Source
from proteus.data.transforms import EvalTransform
from proteus.data.workers import load_batches
from proteus.engine.atomic import write_file
from proteus.errors import InputError
from proteus.evaluation.extract import View
from proteus.models.encoder import Encoder

SHARD = 4096  # images of a file: what an interruption loses at most


class Contents(Source, Protocol):
    """A source that can say, as a hash, what exactly it holds."""

    @property
    def contents(self) -> str: ...


class Embeddings:
    """n vectors of width D and length 1, float16, mapped from the shards of a folder; NaN where there is none.

    readable: [n] bool, whether an image has one.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self._count = folder, count
        self._shards = [_open(_file(folder, shard), len(shard)) for shard in _shards(count)]
        self.dim = self._shards[0].shape[1]
        self.readable = np.concatenate([~np.isnan(shard[:, 0]) for shard in self._shards])
        self._size = len(self._shards[0])

    def __len__(self) -> int:
        return self._count

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """[k, D] float16: the vectors of some images, in the order given."""
        rows = np.empty((len(numbers), self.dim), np.float16)
        order = np.argsort(numbers, kind="stable")
        shards, starts = np.unique(numbers[order] // self._size, return_index=True)
        for shard, part in zip(shards, np.split(order, starts[1:]), strict=True):
            rows[part] = self._shards[shard][numbers[part] % self._size]
        return rows

    def blocks(self) -> Iterator[np.ndarray]:
        """The shards, [<= SHARD, D] float16 each, without the images that have no vector."""
        start = 0
        for shard in self._shards:
            yield np.asarray(shard)[self.readable[start : start + len(shard)]]
            start += len(shard)


def embed(
    encoder: Encoder, source: Contents, view: View, cache: Path, weights: str, *, gallery: bool = False
) -> Embeddings:
    """The class tokens of all images of a source, computed in float32, divided by their length, kept as float16.

    cache:   the folder of all embeddings; those of this encoder, view and set have a folder of their own in it, and
             shards that are there already are not computed again.
    weights: the encoder's `weights_hash`.
    gallery: an image that cannot be read has no vector; otherwise it is an InputError that names it. It is one as
             well where half a gallery cannot be read.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = encoder.to(device).eval()
    facts = [weights, view.size, view.crop, SHARD, source.contents]
    folder = cache / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    folder.mkdir(parents=True, exist_ok=True)
    missing = [shard for shard in _shards(len(source)) if not _file(folder, shard).is_file()]
    # A batch never crosses a shard: whether a run was interrupted must not show in the last bits.
    batches = [list(shard[i : i + view.batch_size]) for shard in missing for i in range(0, len(shard), view.batch_size)]
    plain = PlainSet(source, EvalTransform(view.size, view.crop))
    loaded = load_batches(plain, lambda done: batches[done:], view.workers)
    with tqdm(total=sum(map(len, missing)), unit="image", leave=False, disable=None if missing else True) as bar:
        for shard in missing:
            parts = []
            for start in range(shard.start, shard.stop, view.batch_size):
                images = next(loaded)
                parts.append(_tokens(encoder, images, device))
                broken = next((start + i for i, image in enumerate(images) if image is None), None)
                if broken is not None and not gallery:
                    raise InputError(f"{source.name(broken)} cannot be read: replace the file or take it out")
                bar.update(len(images))
            vectors = torch.cat(parts).cpu().numpy()  # the one wait for the device
            odd = np.flatnonzero(np.isinf(vectors[:, 0]))
            if len(odd):
                raise InputError(f"{source.name(shard.start + int(odd[0]))}: the model gives no finite class token")
            save_shard(folder, shard.start, vectors)
    embeddings = Embeddings(folder, len(source))
    unreadable = int((~embeddings.readable).sum())
    if 2 * unreadable > len(source):
        first = source.name(int(np.argmin(embeddings.readable)))
        raise InputError(
            f"--gallery: {unreadable} of {len(source)} images cannot be read, the first is {first}: see to the storage"
        )
    return embeddings


def save_shard(folder: Path, start: int, vectors: np.ndarray) -> None:
    """Write the vectors [<= SHARD, D] of the images from `start` on."""

    def write(pending: Path) -> None:
        with open(pending, "wb") as file:  # np.save would add a suffix of its own
            np.save(file, vectors.astype(np.float16, copy=False))

    write_file(_file(folder, range(start, start)), write)


@torch.no_grad()
def _tokens(encoder: Encoder, images: list[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """[b, D] float16, NaN where an image is None and infinite where the token is not finite or is zero."""
    there = [image for image in images if image is not None]
    vectors = torch.full((len(images), encoder.embed_dim), torch.nan, dtype=torch.float16, device=device)
    if there:
        cls = encoder(torch.stack(there).to(device, non_blocking=True)).cls.double()  # [b', D]
        length = cls.norm(dim=1, keepdim=True)
        unit = torch.where(length.isfinite() & (length > 0), cls / length, torch.inf)
        rows = torch.tensor([image is not None for image in images], device=device)
        vectors[rows] = unit.to(torch.float16)
    return vectors


def _shards(count: int) -> list[range]:
    return [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]


def _file(folder: Path, shard: range) -> Path:
    return folder / f"{shard.start:09d}.npy"


def _open(path: Path, count: int) -> np.ndarray:
    try:
        shard = np.load(path, mmap_mode="r")
        if shard.ndim != 2 or len(shard) != count:
            raise ValueError(f"shape {shard.shape}")
    except Exception as error:  # a file of another kind may be anything, an archive of several arrays among it
        raise InputError(f"{path} is damaged ({error}): delete it, and it is computed again") from None
    return shard
