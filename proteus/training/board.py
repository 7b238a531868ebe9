"""What a run shows: a line on screen, a row in log.jsonl, scalars and pictures in TensorBoard."""

import json
import math
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from proteus.engine.atomic import write_file
from proteus.training.learner import Outcome
from proteus.training.nonfinite import Skipped


class Board:
    """Collects what the steps of an interval produced, on the device, and shows it at the interval's end.

    `show` is the only place of the loop that waits for the device.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        directory: Path,
        done_steps: int,
        total_steps: int,
        images_per_step: int,
        students: Sequence[str] = ("",),
    ):
        self._accelerator = accelerator
        self._students = [name if len(students) > 1 else "" for name in students]
        self._total, self._images_per_step = total_steps, images_per_step
        self._main = accelerator.is_main_process
        self._live = self._main and sys.stderr.isatty()
        self._names: list[list[str]] = []
        self._scale_told = False
        self._path = directory / "log.jsonl"
        if self._main:
            _cut_log(self._path, done_steps)
        self._log = open(self._path, "a") if self._main else None  # noqa: SIM115
        purge = done_steps + 1 if done_steps else 0  # 0: what was killed before its first checkpoint left rows too
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": purge}})
        self._hook = threading.excepthook
        threading.excepthook = self._hush
        self.restart_clock()

    def _hush(self, failure: threading.ExceptHookArgs) -> None:
        # TensorBoard writes in a thread. What it meets (a full disk) is raised again where we write: once is enough.
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._hook(failure)

    def restart_clock(self) -> None:
        """Start a new interval: what went on since the last one (a probe, a checkpoint) is nobody's throughput."""
        self._rows: list[Tensor] = []
        self._since, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in here is time waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Note a step, as each student made it. No host sync."""
        self._names = [list(outcome.losses[0]) for outcome in outcomes]
        values: list[Tensor] = []
        for (losses, norm, skipped), names in zip(outcomes, self._names, strict=True):
            values += [torch.stack([micro[name].float() for micro in losses]).mean() for name in names]
            values += [norm.float(), skipped.float()]
        self._rows.append(torch.stack(values))

    def show(self, step: int, rate: float, bad_images: int) -> list[Skipped]:
        """End the interval at `step` updates: show means over steps and processes. Returns the steps skipped in it."""
        if not self._rows:
            return []
        own = torch.stack(self._rows)  # [steps, (parts + 2) a student]
        table = self._accelerator.reduce(own, reduction="mean").double().cpu()
        elapsed, waited, steps = time.perf_counter() - self._since, self._waited, len(table)
        losses: dict[str, float] = {}
        norms: dict[str, float] = {}
        missed = torch.zeros(steps, dtype=torch.bool)
        for rows, names, norm in self._by_student(table):
            applied = rows[rows[:, -1] == 0]
            means = applied.mean(dim=0).tolist() if len(applied) else [math.nan] * rows.shape[1]
            losses |= dict(zip(names, means[:-2], strict=True))
            norms[norm] = means[-2]
            missed |= rows[:, -1] != 0
        row = {
            "step": step,
            "loss": sum(losses.values()),
            **{f"loss_{name}": value for name, value in losses.items()},
            **norms,
            "lr": rate,
            "images_per_s": steps * self._images_per_step / elapsed,
            "data_wait": waited / elapsed,
            "memory_gb": peak_memory_gb(self._accelerator.device),
            "skipped_steps": int(missed.sum()),
            "bad_images": bad_images,
        }
        if self._accelerator.scaler is not None:
            row["loss_scale"] = self._accelerator.scaler.get_scale()
            self._warn_of_scale(step, row["loss_scale"])
        self.write(row)
        self._print_progress(row, losses, elapsed / steps)
        self.restart_clock()
        return self._skipped(own, missed.nonzero().flatten().tolist(), step - steps + 1)

    def _by_student(self, table: Tensor) -> Iterator[tuple[Tensor, list[str], str]]:
        """Of each student its columns [steps, parts + 2], and what its losses and its gradient norm are called."""
        own = table.split([len(names) + 2 for names in self._names], dim=1)
        for student, names, rows in zip(self._students, self._names, own, strict=True):
            below, behind = (f"{student}/", f"_{student}") if student else ("", "")
            yield rows, [below + name for name in names], "grad_norm" + behind

    def _skipped(self, table: Tensor, missed: list[int], first: int) -> list[Skipped]:
        """The steps in some rows of this process's table, whose first row is step `first`."""
        table = table.cpu() if missed else table
        skipped = []
        for row in missed:
            losses: dict[str, float] = {}
            norms: dict[str, float] = {}
            for rows, names, norm in self._by_student(table):
                *parts, norms[norm], _ = rows[row].tolist()
                losses |= dict(zip(names, parts, strict=True))
            skipped.append(Skipped(first + row, losses, norms))
        return skipped

    def _warn_of_scale(self, step: int, scale: float) -> None:
        if scale < 1 and not self._scale_told:
            self._scale_told = True
            self.say(
                f"warning: fp16's loss scale has fallen to {scale:g} at step {step}: gradients overflow without being "
                "scaled up at all; lower optimizer.lr or use run.precision=bf16"
            )

    def has_probe(self, step: int) -> bool:
        """Whether log.jsonl has a probe's numbers at a step: neither losses nor a validation's score."""
        rows = map(json.loads, self._path.read_text().splitlines())
        return any(row["step"] == step and not {"loss", "score"} & row.keys() for row in rows)

    def write(self, row: dict[str, Any], prefix: str = "train") -> None:
        """A row into log.jsonl (what is not finite as null) and its numbers into TensorBoard."""
        if not self._log:
            return
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._log.write(json.dumps(clean) + "\n")
        self._log.flush()
        scalars = {f"{prefix}/{key}": v for key, v in clean.items() if isinstance(v, int | float) and key != "step"}
        self._accelerator.log(scalars, step=row["step"])

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """An image [H, W, 3] uint8 into TensorBoard."""
        if self._main:
            tracker = self._accelerator.get_tracker("tensorboard")
            tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")

    def say(self, text: str) -> None:
        """A line that stays on screen, once, from the main process."""
        if self._main:
            print(("\r\x1b[K" if self._live else "") + text, file=sys.stderr, flush=True)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            print(file=sys.stderr, flush=True)
        if self._log:
            self._log.close()
        try:  # not end_training: the processes may have another run before them
            for tracker in self._accelerator.trackers:
                tracker.finish()
        finally:
            threading.excepthook = self._hook

    def _print_progress(self, row: dict[str, Any], losses: dict[str, float], seconds_per_step: float) -> None:
        # What is cut off a narrow terminal is the least wanted: the parts of the loss, several to a teacher.
        text = (
            f"step {row['step']}/{self._total}  loss {row['loss']:.4f}  "
            f"left {_duration(seconds_per_step * (self._total - row['step']))}  {row['images_per_s']:.0f} img/s  "
            f"wait {row['data_wait']:.0%}  {row['memory_gb']:.1f} GB  lr {row['lr']:.2e}"
        )
        text += f"  skipped {row['skipped_steps']}" if row["skipped_steps"] else ""
        text += f"  bad images {row['bad_images']}" if row["bad_images"] else ""
        text += "  (" + " ".join(f"{name} {value:.4f}" for name, value in losses.items()) + ")"
        if self._live:
            width = shutil.get_terminal_size().columns
            print("\r\x1b[K" + text[: width - 1], end="", file=sys.stderr, flush=True)
        else:
            self.say(text)


def _cut_log(path: Path, done_steps: int) -> None:
    """Leave out what a killed run logged after its last checkpoint, half a row perhaps: those steps come again."""
    if path.is_file():
        lines = path.read_bytes().splitlines(keepends=True) if done_steps else []
        kept = b"".join(line for line in lines if 0 <= _step_of(line) <= done_steps)
        write_file(path, lambda pending: pending.write_bytes(kept))


def _step_of(line: bytes) -> int:
    """The step of a whole row; -1 for what a machine that lost its power left in place of one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"}\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: the device's allocator, or the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
