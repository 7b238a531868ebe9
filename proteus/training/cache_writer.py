"""Making a teacher cache: the views, the components of patch tokens, the records, and their error."""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from proteus.config import Config
from proteus.data.loader import Batch, readable
from proteus.data.sources import Source, one_line
from proteus.data.transforms import Crop, TrainTransform, seeded
from proteus.data.view_cache import chunk_file, chunks, pixels_crc, record_dtype, seal, view_key
from proteus.data.workers import load_batches
from proteus.engine.atomic import PENDING, write_file
from proteus.engine.lock import RunLock
from proteus.errors import InputError, UnreadableError
from proteus.training import cache
from proteus.training.cache import COMPONENTS, IDENTITY, Code, Components
from proteus.training.cache_error import describe_error, measure_error
from proteus.training.networks import build_student
from proteus.training.probe import split_source
from proteus.training.sizes import Sizes
from proteus.training.start import build_accelerator
from proteus.training.teacher import Teacher, build_teachers

PASS = 64  # views that a teacher sees at once; fixed, so that a cache is the same to the bit however it was interrupted
FIT = 512  # views whose patch tokens the components are fitted to
SPREAD = 8  # standard deviations of a component that its codes reach to; what is beyond is cut off
CHECKED = 256  # views on which the error is measured


def make_cache(cfg: Config, yes: bool = False, check: int | None = None) -> None:
    """Write what is missing of the cache of a config, then measure its error; prints what it does.

    yes:   write without asking.
    check: measure the error of a finished cache on so many views. InputError where it is not finished.
    """
    directory = cache.cache_directory(cfg)
    accelerator = build_accelerator(cfg, directory)
    source, _ = split_source(cfg)
    torch.manual_seed(cfg.run.seed)
    teachers = build_teachers(cfg, accelerator)
    student, sizes = build_student(cfg.alone(next(iter(cfg.all_students.values()))), teachers, accelerator)
    if check is None:
        writer = _Writer(cfg, accelerator, source, teachers, sizes)
        if not writer.begin(yes):
            return
        writer.write()
    else:
        cache.open_cache(cfg, teachers, source, sizes)
    identity = cache.read_identity(directory)
    assert identity is not None
    views, cached = cache.open_records(cfg, teachers, source, sizes, identity)
    count = check or CHECKED
    error = measure_error(cfg, accelerator, source, teachers, (views, cached), (student, sizes), count)
    if accelerator.is_main_process:
        _write_identity(directory, identity | {"error": error})
        print(*describe_error(error), f"{directory} is finished", sep="\n")
    accelerator.wait_for_everyone()


class _Writer:
    """Writes the records that are missing, shared out over the processes chunk by chunk."""

    def __init__(self, cfg: Config, accelerator: Accelerator, source: Source, teachers: list[Teacher], sizes: Sizes):
        assert cfg.teacher_cache is not None
        self.cfg, self.section, self.accelerator = cfg, cfg.teacher_cache, accelerator
        self.source, self.teachers, self.sizes = source, teachers, sizes
        self.directory = cache.cache_directory(cfg)
        self.facts = cache.cache_facts(cfg, teachers, source, sizes)
        self.lock: RunLock | None = None
        size = 0
        for teacher, grid in zip(teachers, sizes.teacher_grids, strict=True):
            dim = teacher.encoder.embed_dim
            kept = min(self.section.components, dim) if self.section.tokens == "all" else 0
            size += Code.size(dim, grid, kept)
        self.dtype = record_dtype(size)

    def begin(self, yes: bool) -> bool:
        """Ask, and lay the folder out; False where the cache is finished already. By the main process for all."""
        complaint, goes_on, fits = None, True, False
        if self.accelerator.is_main_process:
            try:
                goes_on, fits = self._begin(yes)
            except InputError as error:
                complaint = str(error)
            except OSError as error:
                complaint = f"teacher_cache.dir={self.directory} cannot be used: {error}"
        complaint, goes_on, fits = broadcast_object_list([complaint, goes_on, fits])
        if complaint is not None:
            raise InputError(complaint)
        if fits and (self.accelerator.is_main_process or self._together):
            self._fit()
        self.accelerator.wait_for_everyone()
        return goes_on

    def _begin(self, yes: bool) -> tuple[bool, bool]:
        """(whether there is something to write, whether the components are to be fitted before)."""
        identity = cache.read_identity(self.directory)
        if identity is not None:
            cache.check_facts(identity, self.facts, self.directory)
        elif self.directory.is_dir() and any(map(_foreign, self.directory.iterdir())):
            raise InputError(f"teacher_cache.dir={self.directory} holds other things: give an empty or a new folder")
        missing = self._missing()
        if identity is not None and "error" in identity and not missing:
            print(*describe_error(identity["error"]), f"{self.directory} is finished", sep="\n")
            return False, False
        self._confirm(yes, sum(map(len, missing)) * self.section.views * self.dtype.itemsize)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock = RunLock(self.directory)
        if identity is None:
            identity = {"made_with": self.facts, "components": None}
            _write_identity(self.directory, identity)
        return True, self.section.tokens == "all" and not identity["components"]

    def _confirm(self, yes: bool, needed: int) -> None:
        size, count = self.dtype.itemsize, len(self.source) * self.section.views
        place = next(path for path in (self.directory, *self.directory.resolve().parents) if path.exists())
        free = shutil.disk_usage(place).free
        print(f"cache    {len(self.source):,} images x {self.section.views} views, {size:,} bytes a record")
        there = f" ({_gb(count * size - needed)} are there)" if needed < count * size else ""
        print(f"disk     {_gb(count * size)} in {self.directory}{there}, {_gb(free)} free", flush=True)
        if needed > free:
            raise InputError(
                f"teacher_cache.dir={self.directory}: {_gb(free)} are free for the {_gb(needed)} to be written"
            )
        if yes:
            return
        if not sys.stdin.isatty():
            raise InputError(f"{_gb(needed)} are to be written, and there is no terminal to ask: give --yes")
        if input("write it? [y/N] ").strip().lower() not in ("y", "yes"):
            raise InputError("nothing was written")

    def _missing(self) -> list[range]:
        found = []
        for chunk in chunks(len(self.source)):
            path, size = chunk_file(self.directory, chunk.start), len(chunk) * self.section.views * self.dtype.itemsize
            if not path.is_file() or path.stat().st_size != size:
                found.append(chunk)
        return found

    def write(self) -> None:
        """Write this process's share of what is missing, and wait for the others'."""
        identity = cache.read_identity(self.directory)
        assert identity is not None
        codes = cache.build_codes(self.cfg, self.teachers, self.sizes, identity)
        missing = self._missing()
        self.accelerator.wait_for_everyone()  # all have looked before the first one writes
        mine = missing[self.accelerator.process_index :: self.accelerator.num_processes]
        bad: set[int] = set()
        silent = None if self.accelerator.is_main_process else True  # None: where nobody looks on
        total = sum(map(len, mine)) * self.section.views
        with tqdm(total=total, unit="view", leave=False, disable=silent) as bar:
            rendered = self._rendered(_Passes(mine, self.section.views))
            for chunk in mine:
                records = np.zeros(len(chunk) * self.section.views, self.dtype)
                for start in range(0, len(records), PASS):
                    part = next(rendered)
                    rows = slice(start, start + len(part.crops))
                    records["crop"][rows] = [crop[:4] for crop in part.crops]
                    records["flip"][rows] = [crop.flip for crop in part.crops]
                    records["pixels"][rows] = part.pixels
                    records["target"][rows] = self._targets(part.batch, codes)
                    bad.update(part.batch.bad)
                    self._check_bad(bad)
                    bar.update(len(part.crops))
                seal(records, chunk.start * self.section.views)
                write_file(chunk_file(self.directory, chunk.start), records.tofile)
        self._stand_by(missing)
        bad = set().union(*gather_object([sorted(bad)]))  # a barrier too: after it every chunk is on disk
        if bad and self.accelerator.is_main_process:
            named = [one_line(self.source.name(index)) for index in sorted(bad)[:3]] + ["..."] * (len(bad) > 3)
            text = f"bad      {len(bad)} images cannot be read and have another's views: {', '.join(named)}"
            print(text.encode(errors="backslashreplace").decode())  # not all names are UTF-8

    @property
    def _together(self) -> bool:
        """Whether a teacher answers only when all processes ask."""
        return any(teacher.sharded for teacher in self.teachers)

    def _stand_by(self, missing: list[range]) -> None:
        """Ask sharded teachers as often as the process with the most passes does: it needs all for their weights."""
        count, rank = self.accelerator.num_processes, self.accelerator.process_index
        passes = [sum(-(-len(chunk) * self.section.views // PASS) for chunk in missing[i::count]) for i in range(count)]
        sharded = [teacher for teacher in self.teachers if teacher.sharded]
        for _ in range(max(passes) - passes[rank]):
            for teacher in sharded:
                teacher(torch.zeros(1, 3, self.sizes.crop, self.sizes.crop, device=self.accelerator.device))

    @torch.no_grad()
    def _targets(self, batch: Batch, codes: list[Code]) -> np.ndarray:
        """What the teachers say about a batch, uint8 [B, R]."""
        batch = batch.to(self.accelerator.device)
        rows = []
        for teacher, code in zip(self.teachers, codes, strict=True):
            features = teacher(batch.images)
            if not features.cls.half().isfinite().all():
                raise UnreadableError(f"{teacher.name}: a class token is not finite, or too large for float16")
            rows.append(code.encode(features))
        return torch.cat(rows, dim=1).cpu().numpy()

    def _check_bad(self, bad: set[int]) -> None:
        data = self.cfg.data
        if len(bad) > data.max_bad_share * len(self.source) and len(bad) >= data.max_bad_files:
            raise UnreadableError(
                f"{len(bad)} of {len(self.source)} images cannot be read, more than data.max_bad_share="
                f"{data.max_bad_share} allows; the first is {one_line(self.source.name(min(bad)))}"
            )

    def _rendered(self, passes: Iterable[list[tuple[int, int]]]) -> "Iterator[_Rendered]":
        transform = TrainTransform(self.sizes.crop, self.cfg.data.augment)
        views = _Views(self.source, transform, self.cfg.run.seed)
        on_gpu = self.accelerator.device.type == "cuda"
        data = self.cfg.data
        remaining = lambda done: islice(passes, done, None)  # noqa: E731
        for part in load_batches(views, remaining, data.workers, timeout=data.timeout, pin=on_gpu):
            if isinstance(part, UnreadableError):
                raise part
            yield part

    def _fit(self) -> None:
        """Fit the components of every teacher's patch tokens to a sample of views, and write them."""
        rng = np.random.default_rng((self.cfg.run.seed, 40))
        total = len(self.source) * self.section.views
        sample = np.sort(rng.permutation(total)[:FIT]).tolist()
        wanted = [divmod(number, self.section.views) for number in sample]
        passes = [wanted[start : start + PASS] for start in range(0, len(wanted), PASS)]
        moments = [_Moments(teacher.encoder.embed_dim) for teacher in self.teachers]
        for part in self._rendered(passes):
            batch = part.batch.to(self.accelerator.device)
            for teacher, moment in zip(self.teachers, moments, strict=True):
                moment.add(teacher(batch.images).patch)
        tensors = {
            f"{place}.{name}": tensor.float().contiguous()
            for place, moment in enumerate(moments)
            for name, tensor in moment.components(self.section.components)._asdict().items()
        }
        if self.accelerator.is_main_process:
            data = save(tensors)
            write_file(self.directory / COMPONENTS, lambda path: path.write_bytes(data))
            identity = {"made_with": self.facts, "components": hashlib.sha256(data).hexdigest()}
            _write_identity(self.directory, identity)


class _Moments:
    """Sums over tokens of width D, in float64."""

    def __init__(self, dim: int):
        self.count, self.first = 0, torch.zeros(dim, dtype=torch.float64)
        self.second = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """Tokens [B, N, D]."""
        rows = tokens.flatten(0, 1).double()
        self.count += len(rows)
        self.first += rows.sum(dim=0).cpu()
        self.second += (rows.T @ rows).cpu()

    def components(self, count: int) -> Components:
        """The principal components, at most D of them, the largest first."""
        mean = self.first / self.count
        variances, vectors = torch.linalg.eigh(self.second / self.count - mean[:, None] * mean)  # ascending
        basis = vectors.flip(1).T[:count]
        # A component's sign is free: the same one wherever it is computed.
        basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
        deviations = variances.flip(0)[:count].clamp(min=1e-12).sqrt()
        return Components(mean, basis, SPREAD * deviations / 127)


class _Rendered(NamedTuple):
    """Views on their way to the teachers: their batch, where they were cut out, and their `pixels_crc`."""

    batch: Batch
    crops: list[Crop]
    pixels: list[int]


class _Passes:
    """What the teachers see at once, as lists of (image, view): made when asked for, as there may be millions."""

    def __init__(self, chunks: list[range], views: int):
        self.chunks, self.views = chunks, views

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for chunk in self.chunks:
            wanted = [(image, view) for image in chunk for view in range(self.views)]
            for start in range(0, len(wanted), PASS):
                yield wanted[start : start + PASS]


class _Views(Dataset):
    """Renders lists of (image, view)."""

    def __init__(self, source: Source, transform: TrainTransform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __getitems__(self, wanted: list[tuple[int, int]]) -> _Rendered | UnreadableError:
        pixels, boxes, crops, checksums = [], [], [], []
        bad: list[int] = []
        decoded: tuple[int, Image.Image, int] | None = None  # the views of an image follow each other
        for row, (asked, number) in enumerate(wanted):
            if decoded is None or decoded[0] != asked:
                try:
                    decoded = (asked, *readable(self.source, asked, bad))
                except UnreadableError as error:  # handed over, not raised: a worker would wrap it in its traceback
                    return error
            _, image, index = decoded
            # An image that cannot be read has the views of the one that takes its place, as in training.
            with seeded(*view_key(self.seed, index, number)):
                view = self.transform(image)
            pixels.append(view.pixels.permute(1, 2, 0))
            crops.append(view.crop)
            checksums.append(pixels_crc(view.pixels, view.box))
            if view.box is not None:
                boxes.append((row, view.box))
        mask = torch.zeros(0, 0, dtype=torch.bool)
        images = torch.stack(pixels).permute(0, 3, 1, 2)  # in memory as a training batch
        return _Rendered(Batch(images, mask, None, boxes, bad), crops, checksums)


def _write_identity(directory: Path, identity: dict[str, Any]) -> None:
    write_file(directory / IDENTITY, lambda path: path.write_text(json.dumps(identity, indent=1) + "\n"))


def _foreign(path: Path) -> bool:
    return path.name != "lock" and not path.name.startswith(PENDING)  # what an early kill leaves


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
