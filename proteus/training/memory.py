"""What a step needs in memory, and the largest batch that fits."""

import contextlib
import math
import weakref
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from proteus.config import Config
from proteus.config_files import read_mapping
from proteus.data.dense import DenseSource
from proteus.data.loader import Batch
from proteus.data.sources import Source
from proteus.engine.shard import own_share
from proteus.errors import InputError
from proteus.training.learner import Learner
from proteus.training.start import Parts, build_parts
from proteus.training.state import list_checkpoints, read_progress

SMALL, LARGE = 2, 4  # images of the two steps that are tried
USED = {"cuda": 0.9, "cpu": 0.5}  # share of what is free that a batch may take: other programs live on a CPU's memory


class Memory(NamedTuple):
    """Bytes of one process: what stays between steps, and what a step adds, for any batch and for each image.

    teachers: their weights. students: weights, AdamW's moments, the averages.
    """

    teachers: int
    students: int
    step: int
    image: int

    def total(self, images: int) -> int:
        """At the peak of a step on so many images."""
        return self.teachers + self.students + self.step + images * self.image


class PeakMemory(TorchDispatchMode):
    """Inside, tensors are counted from their making to their end; `peak` is the most bytes that were there at once.

    Counted is what operators return, on any device; what a kernel uses inside of itself is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in given or key in self._counted:  # a view, or what was there before
            return
        self._counted.add(key)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._now -= size


def measure_memory(parts: Parts, device: torch.device) -> Memory:
    """The memory of a process, from two steps on a few images. They enter running statistics: the parts are spent."""
    draws = parts.sampler.micro_batch(0, 0, 0)
    peaks = []
    for images in (SMALL, LARGE):
        chosen = [
            draws[i % len(draws)]._replace(masked=i < images * parts.sampler.mask_probability) for i in range(images)
        ]
        batch = parts.dataset.batch(chosen).to(device)
        with torch.compiler.set_stance("force_eager"), PeakMemory() as counter:
            _try_step(parts, batch)
        peaks.append(counter.peak)
        for learner in parts.learners:
            learner.optimizer.zero_grad()
    image = max(1, (peaks[1] - peaks[0]) // (LARGE - SMALL))
    return Memory(
        teachers=sum(_bytes(t.encoder) for t in parts.teachers if next(t.encoder.parameters()).device == device),
        students=sum(_state_bytes(learner) for learner in parts.learners),
        step=max(0, peaks[0] - SMALL * image),
        image=image,
    )


def _try_step(parts: Parts, batch: Batch) -> None:
    answers = [teacher.answer(batch) for teacher in parts.answering]
    for learner in parts.learners:
        sum(learner.task(batch.images, batch.mask, answers, batch.labels).values()).backward()


def _state_bytes(learner: Learner) -> int:
    """Weights and buffers, the average, and AdamW's two moments; gradients are the step's."""
    moments = 2 * sum(p.numel() * p.element_size() for p in learner.task.parameters() if p.requires_grad)
    return _bytes(learner.task) + moments + (_bytes(learner.ema.module) if learner.ema is not None else 0)


def _bytes(module: nn.Module) -> int:
    shares = [own_share(tensor) for tensor in (*module.parameters(), *module.buffers())]
    return sum(share.numel() * share.element_size() for share in shares)


def settle_batch_size(cfg: Config, source: Source | DenseSource, accelerator: Accelerator, directory: Path) -> Config:
    """The config with a number for `run.batch_size: auto`: the most images that fit, on every process.

    With `run.global_batch` it is the largest that micro-batches of one size make up, and `run.accumulate` their number;
    the learning rate scales with the images of an update, as ever. A run that goes on keeps the images of an update it
    began with, in micro-batches that are no larger. InputError where not even one image fits.
    """
    if cfg.run.batch_size != "auto":
        return cfg
    processes = accelerator.num_processes
    (kept,) = broadcast_object_list([_begun_with(directory, processes)])  # not all machines need see the directory
    if kept is not None:
        images = processes * kept[0] * kept[1]
        if cfg.run.global_batch not in (None, images):
            raise InputError(
                f"run.global_batch={cfg.run.global_batch}: the run has begun with {images} images an update; "
                "leave it, or start another run.dir"
            )
        return _with_batch(cfg, *kept)
    if cfg.run.global_batch and cfg.run.global_batch % processes:
        raise InputError(f"run.global_batch={cfg.run.global_batch} is not divided by {processes} processes")
    free, memory = min(gather_object([_room(cfg, source, accelerator, directory)]), key=_fitting)
    most = _fitting((free, memory))
    if most < 1:
        raise InputError(
            f"run.batch_size=auto: one image needs {memory.total(1) / 1e9:.1f} GB and {free / 1e9:.1f} GB may be used; "
            "try student.grad_checkpointing=true, or smaller networks"
        )
    if not cfg.run.global_batch:
        return _with_batch(cfg, max(1, min(most // 8 * 8 or most, len(source) // processes)), 1)
    share = cfg.run.global_batch // processes
    return _with_batch(cfg, *_in_micro_batches(share, most))


def _room(cfg: Config, source: Source | DenseSource, accelerator: Accelerator, directory: Path) -> tuple[int, Memory]:
    """Bytes that this process may use, and what it needs."""
    free = free_memory(accelerator)
    parts = build_parts(_with_batch(cfg, LARGE, 1), source, accelerator, directory)
    memory = measure_memory(parts, accelerator.device)
    accelerator.free_memory()
    return free, memory


def _fitting(room: tuple[int, Memory]) -> int:
    """How many images of a micro-batch fit."""
    free, memory = room
    return (free - memory.total(0)) // memory.image


def free_memory(accelerator: Accelerator) -> int:
    """Bytes that this process may use: its share of what is free."""
    if accelerator.device.type == "cuda":
        return int(USED["cuda"] * torch.cuda.mem_get_info(accelerator.device)[0])
    return int(USED["cpu"] * min(psutil.virtual_memory().available, _container_memory())) // accelerator.num_processes


def _container_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that the container has left; infinite where nothing limits it."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            return int((group / limit).read_text()) - int((group / used).read_text())
    return math.inf


def _with_batch(cfg: Config, batch_size: int, accumulate: int) -> Config:
    run = cfg.run.model_copy(update={"batch_size": batch_size, "accumulate": accumulate, "global_batch": None})
    return cfg.model_copy(update={"run": run})


def _in_micro_batches(share: int, most: int) -> tuple[int, int]:
    """(batch size, accumulation) of a process's images of an update, at most so many at once."""
    size = next(size for size in range(min(most, share), 0, -1) if share % size == 0)
    return size, share // size


def _begun_with(directory: Path, processes: int) -> tuple[int, int] | None:
    """(batch size, accumulation) that a run with checkpoints goes on with: what it has in its config.yaml.

    With another number of processes the largest batch, up to that one, that gives the same images an update; None where
    there is none.
    """
    found = list_checkpoints(directory / "checkpoints")
    try:
        most = int(read_mapping(directory / "config.yaml")["run"]["batch_size"]) if found else 0
        share, rest = divmod(read_progress(found[-1]).images_per_step, processes) if found else (0, 0)
    except (InputError, OSError, ValueError, KeyError, TypeError):
        return None
    return _in_micro_batches(share, most) if most and not rest else None
