"""Steps that were skipped because a number was not finite: too many of them end the run, which leaves the last behind.

nonfinite/step_N/ in the run directory then holds report.json and, of each process, batch_<rank>.safetensors: the images
as the networks got them. Nothing is kept for it while all is well, as the data of a step follows from its number.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save
from torch import Tensor

from proteus.config import Config
from proteus.data.dense import DenseSource
from proteus.data.device_augment import apply_ops
from proteus.data.loader import Batch, TrainingSet
from proteus.data.sampler import Draw, Sampler
from proteus.data.sources import Source, one_line
from proteus.engine.atomic import write_file
from proteus.errors import RunError
from proteus.training.dense import DenseTrainingSet
from proteus.training.state import Progress

WINDOW = 1000  # steps; fp16 tries a larger loss scale every 2,000, and skips a step to find it too large
NAMED = 3  # files on screen; all of them are in the report


class Skipped(NamedTuple):
    """A step that was not applied, as this process saw it.

    losses: weighted, by name, means over its own micro-batches.
    norms:  of the gradients, which are those of all processes.
    """

    step: int
    losses: dict[str, float]
    norms: dict[str, float]


def too_many(progress: Progress, limit: int) -> bool:
    """Whether more than `limit` of the last 1,000 steps were skipped. Those before are forgotten."""
    progress.skipped_steps = [step for step in progress.skipped_steps if step > progress.step - WINDOW]
    return len(progress.skipped_steps) > limit


def check_learnt(progress: Progress, directory: Path) -> None:
    """RunError where most of the steps of late were skipped: what such a run leaves is hardly what it began with."""
    skipped, steps = len(progress.skipped_steps), min(progress.step, WINDOW)
    if 2 * skipped > steps:
        raise RunError(
            f"{directory}: {skipped} of the last {steps} steps had a loss or gradient that was not finite and were "
            "left out: no student is written. Look at the teacher's weights or lower optimizer.lr; the last checkpoint "
            "stands"
        )


def diverged(
    cfg: Config,
    progress: Progress,
    last: Skipped,
    dataset: TrainingSet | DenseTrainingSet,
    sampler: Sampler,
    source: Source | DenseSource,
    accelerator: Accelerator,
) -> RunError:
    """What to stop a run with that skipped too many steps; leaves the last one's report and batch on disk.

    All processes have to call it.
    """
    folder = Path(str(cfg.run.dir)) / "nonfinite" / f"step_{last.step}"
    own = {"process": accelerator.process_index, "losses": _readable(last.losses)}
    own |= _leave_batch(folder, last.step, dataset, sampler, source, accelerator)
    report: dict[str, Any] = {
        "step": last.step,
        "epoch": (last.step - 1) // sampler.steps_per_epoch,
        "skipped_steps": progress.skipped_steps,
        "gradient_norms": _readable(last.norms),
        "loss_scale": None if accelerator.scaler is None else accelerator.scaler.get_scale(),
        "processes": gather_object([own]),
    }
    where = f"its batch and a report are in {folder}"
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report, indent=1) + "\n"
            write_file(folder / "report.json", lambda path: path.write_text(text))
        except OSError as error:
            where = f"no report of it could be written ({error.strerror or error})"
    steps = ", ".join(map(str, progress.skipped_steps[-10:]))
    return RunError(
        f"{len(progress.skipped_steps)} steps of the last {WINDOW:,} had a loss or gradient that was not finite, more "
        f"than run.max_nonfinite={cfg.run.max_nonfinite}; the last were steps {steps}. {_told(report)}; {where}. The "
        "last checkpoint stands. Lower optimizer.lr, set optimizer.clip_grad, or use run.precision=bf16"
    )


def _told(report: dict[str, Any]) -> str:
    """What the screen says of the step that a report is about."""
    processes = report["processes"]
    # A process whose loss was not finite; where there is none, it was the gradient of all of them together.
    odd = [one for one in processes if any(isinstance(loss, str) for loss in one["losses"].values())]
    seen = (odd or processes)[0]
    scale = report["loss_scale"]
    numbers = report["gradient_norms"] | ({} if scale is None else {"loss scale": scale})
    losses, others = (
        ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in part.items())
        for part in (seen["losses"], numbers)
    )
    files, of = seen["files"], f" of process {seen['process']}" if len(processes) > 1 else ""
    names = ", ".join(map(one_line, files[:NAMED])) + (f" and {len(files) - NAMED} more" if len(files) > NAMED else "")
    return f"In step {report['step']} the losses{of} were {losses} ({others}), and its images {names}"


def _leave_batch(
    folder: Path,
    step: int,
    dataset: TrainingSet | DenseTrainingSet,
    sampler: Sampler,
    source: Source | DenseSource,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """Draw this process's batch of a step again and write it to `folder`; what the report says of it."""
    rank = accelerator.process_index
    draws = [sampler.micro_batch(step - 1, micro, rank) for micro in range(sampler.accumulate)]
    facts: dict[str, Any] = {"files": [source.name(draw.image) for part in draws for draw in part]}
    try:
        batches = [dataset.batch(part) for part in draws]
        facts["files"] = [
            source.name(_shown(draw, batch, len(source)))
            for part, batch in zip(draws, batches, strict=True)
            for draw in part
        ]
        data = save(_tensors(batches, accelerator.device))
        folder.mkdir(parents=True, exist_ok=True)
        file = f"batch_{rank}.safetensors"
        write_file(folder / file, lambda path: path.write_bytes(data))
    except Exception as error:  # storage that is gone or full must not hide why the run stops
        return facts | {"batch": None, "error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return facts | {"batch": file}


def _tensors(batches: list[Batch], device: torch.device) -> dict[str, Tensor]:
    """The micro-batches of a step, [A, ...] each: images [A, B, 3, S, S] uint8, mask [A, M, N], labels and targets.

    boxes: [n, 7] int64, (micro-batch, row, top, left, height, width, seed) of what is erased after normalisation.
    """
    images = [
        apply_ops(batch.images.to(device).contiguous(), batch.ops).cpu() if batch.ops else batch.images
        for batch in batches
    ]
    boxes = [(micro, row, *box) for micro, batch in enumerate(batches) for row, box in batch.boxes]
    tensors = {"images": torch.stack(images), "mask": torch.stack([batch.mask for batch in batches])}
    for name in ("labels", "targets"):  # of the teacher cache
        if getattr(batches[0], name) is not None:
            tensors[name] = torch.stack([getattr(batch, name) for batch in batches])
    tensors["boxes"] = torch.tensor(boxes, dtype=torch.int64).reshape(-1, 7)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _shown(draw: Draw, batch: Batch, images: int) -> int:
    """The image that was shown for a draw: the next one where it could not be read."""
    index = draw.image
    while index in batch.bad:
        index = (index + 1) % images
    return index


def _readable(numbers: dict[str, float]) -> dict[str, float | str]:
    """What is not finite as a word: JSON has no number for it."""
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
