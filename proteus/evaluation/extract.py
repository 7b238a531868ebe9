"""Frozen class tokens of a whole set: shared out over the processes, kept on disk, safe to interrupt."""

import contextlib
import hashlib
import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from proteus.data.sources import Source, file_of, one_line
from proteus.data.transforms import EvalTransform
from proteus.data.workers import load_batches, note
from proteus.engine.atomic import write_file
from proteus.errors import InputError
from proteus.models.encoder import Encoder
from proteus.models.weights import weights_hash

CHUNK = 512  # images of a file in the cache, whatever the number of processes: what an interruption loses at most
Precision = Literal["no", "fp16", "bf16"]


class View(NamedTuple):
    """How a set is looked at: short side to size / crop (bicubic), centre crop; so many images a pass and workers.

    crop 1 shows images of size x size, such as ImageNet-C's, as they are.
    """

    size: int = 224
    crop: float = 0.875
    batch_size: int = 256
    workers: int = 0


def extract(
    encoder: Encoder,
    source: Source,
    view: View,
    accelerator: Accelerator,
    *,
    cache: Path | None = None,
    identity: str = "",
    weights: str | None = None,
    precision: Precision = "no",
) -> Tensor:
    """Class tokens [n, D] float32, on the CPU, of all images of a source in its order; the same on every process.

    cache:     a folder (one that all processes see) in which finished chunks are kept and found again. Its key is
               the encoder's weights and input convention, the view, the precision, `identity`, and the source's
               `fingerprint`.
    identity:  what the set is, such as its root and split: two sets of equal names and labels differ in it.
    weights:   the encoder's `weights_hash`, where it is known already.
    precision: of the autocast on a GPU; on a CPU tokens are always computed in float32.

    InputError, on every process, where an image cannot be read: it names the image.
    """
    device = accelerator.device
    encoder = encoder.to(device).eval()
    dtype = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision] if device.type == "cuda" else None
    folder = None
    if cache is not None:
        folder = cache / _key(weights or weights_hash(encoder), source, view, str(dtype), identity)
        folder.mkdir(parents=True, exist_ok=True)
    chunks = [range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK)]
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    missing = [chunk for chunk in mine if folder is None or not _file(folder, chunk).is_file()]
    found: dict[int, Tensor] = {}
    unreadable: list[str] = []
    batches = image_batches(source, view, list(_batches(missing, view.batch_size)), device)
    silent = None if missing and accelerator.is_main_process else True  # None: where nobody looks on
    with tqdm(total=sum(map(len, missing)), unit="image", leave=False, disable=silent) as bar:
        for chunk in missing:
            parts = []
            for _ in range(0, len(chunk), view.batch_size):
                images = next(batches)
                if isinstance(images, InputError):
                    unreadable.append(str(images))
                    break
                with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not None):
                    parts.append(encoder(images.to(device, non_blocking=True)).cls.float())
                bar.update(len(images))
            if unreadable:
                break
            found[chunk.start] = torch.cat(parts).cpu()  # the one wait for the device
            if folder is not None:
                _save(_file(folder, chunk), found[chunk.start])
    del batches  # with the workers, which an unreadable image leaves in the middle of their work
    unreadable = _gathered(accelerator, unreadable)  # a barrier too: after it every chunk is on disk
    if unreadable:
        raise InputError(unreadable[0])
    if folder is None and accelerator.num_processes > 1:
        found = dict(_gathered(accelerator, list(found.items())))
    tokens = torch.empty(len(source), encoder.embed_dim)
    for chunk in chunks:
        part = found.pop(chunk.start, None)
        tokens[chunk.start : chunk.stop] = _load(_file(folder, chunk)) if part is None else part
    return tokens


def image_batches(
    source: Source, view: View, batches: list[list[int]], device: torch.device
) -> Generator[Tensor | InputError, None, None]:
    """For each list of numbers its images, uint8 [b, 3, S, S], or the InputError that names a broken one.

    WorkerError where the workers hang, or die again and again.
    """
    images = _Images(source, EvalTransform(view.size, view.crop))
    return load_batches(images, lambda done: batches[done:], view.workers, pin=device.type == "cuda")


class _Images(Dataset):
    def __init__(self, source: Source, transform: EvalTransform):
        self.source, self.transform = source, transform

    def __getitems__(self, indices: list[int]) -> Tensor | InputError:
        images = []
        for index in indices:
            note(index)
            try:
                images.append(self.transform(self.source.load(index)))
            except Exception as error:  # a decoder of a broken file may raise anything
                # Handed over, not raised: a worker would wrap it in its traceback.
                return unreadable_image(self.source.name(index), error)
        return torch.stack(images)


def unreadable_image(name: str, error: Exception) -> InputError:
    """What to say of an image of a benchmark that cannot be read: its score would be one of another set."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return InputError(
        f"{one_line(name)} cannot be read ({reason}): replace the file, a score needs every image of its set"
    )


def _batches(chunks: list[range], size: int) -> Iterator[list[int]]:
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            yield list(chunk[start : start + size])


def _gathered(accelerator: Accelerator, items: list) -> list:
    """The items of all processes, on every one of them."""
    return gather_object(items) if accelerator.num_processes > 1 else items


def fingerprint(source: Any) -> str:
    """A hash of a source's size, labels and classes, and of the names, sizes and times of up to 256 of its images."""
    labels = getattr(source, "labels", None)
    digest = hashlib.sha256(f"{len(source)} {source.classes}".encode("utf-8", "surrogateescape"))
    digest.update(b"" if labels is None else np.ascontiguousarray(labels).tobytes())
    for index in np.unique(np.linspace(0, len(source) - 1, min(256, len(source))).astype(int)):
        name = file_of(source, int(index))
        digest.update(name.encode("utf-8", "surrogateescape"))
        with contextlib.suppress(OSError, ValueError):  # not every name is a path
            found = os.stat(name)
            digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def _key(weights: str, source: Source, view: View, dtype: str, identity: str) -> str:
    facts = [weights, view.size, view.crop, dtype, identity, fingerprint(source)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _file(folder: Path | None, chunk: range) -> Path:
    assert folder is not None
    return folder / f"{chunk.start:08d}.npy"


def _save(path: Path, tokens: Tensor) -> None:
    def write(pending: Path) -> None:
        with open(pending, "wb") as file:  # np.save would add a suffix of its own
            np.save(file, tokens.numpy())

    write_file(path, write)


def _load(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.load(path))
    except Exception as error:  # a file of another kind may be anything, an archive of several arrays among it
        raise InputError(f"{path} is damaged ({error}): delete it, and it is computed again") from None
