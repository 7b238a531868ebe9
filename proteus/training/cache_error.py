"""How far a teacher cache is from the teachers it stands for: in tokens, and in the losses of a run."""

import math
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from proteus.config import Config
from proteus.data.loader import TrainingSet
from proteus.data.sampler import Draw
from proteus.data.sources import Source
from proteus.data.transforms import TrainTransform
from proteus.data.view_cache import ViewCache
from proteus.models import Encoder
from proteus.models.features import Features
from proteus.training.cache import CachedTeacher, Code
from proteus.training.networks import build_classifier
from proteus.training.sizes import Sizes
from proteus.training.task import build_task
from proteus.training.teacher import Teacher

BATCH = 16


@torch.no_grad()
def measure_error(
    cfg: Config,
    accelerator: Accelerator,
    source: Source,
    teachers: list[Teacher],
    cached: tuple[ViewCache, list[CachedTeacher]],
    student: tuple[Encoder, Sizes],
    count: int,
) -> dict[str, Any]:
    """The cache beside its teachers on at least `count` views, a seeded sample; the same on every process.

    tokens: by teacher, `cls` and `patch` (where kept): relative error, the root of sum |cached - live|^2 / |live|^2;
            `patch_variance`: the share of the patch tokens' variance that the cache explains.
    losses: by name, of the untrained student, weighted: `live`, `cached`, and `error`, their relative difference.
    """
    encoder, sizes = student
    torch.manual_seed(cfg.run.seed)  # heads are the same ones whatever was drawn before
    classifier, _ = build_classifier(cfg, source, teachers, encoder)
    task = build_task(cfg, encoder, teachers, sizes, classifier, 0.0).to(accelerator.device).eval()
    transform, patches = TrainTransform(sizes.crop, cfg.data.augment), sizes.mask[0] * sizes.mask[1]
    views = cached[0]
    dataset = TrainingSet(source, transform, cfg.run.seed, patches, cfg.data.mask.ratio, views)
    rng = np.random.default_rng((cfg.run.seed, 41))
    processes = accelerator.num_processes
    batches = math.ceil(count / (BATCH * processes))  # of each process: a loss may gather over all of them
    masked = BATCH // 2 if "patch" in cfg.computed_losses else 0
    sums: dict[tuple[str, ...], float] = defaultdict(float)
    for batch_number in range(batches * processes):
        draws = [
            Draw(
                int(rng.integers(len(source))),
                int(rng.integers(views.views)),
                int(rng.integers(len(source) * cfg.data.repeats)),
                row < masked,
            )
            for row in range(BATCH)
        ]
        if batch_number % processes != accelerator.process_index:
            continue
        batch = dataset.batch(draws).to(accelerator.device)
        live = [teacher.answer(batch) for teacher in teachers]
        known = [teacher.answer(batch) for teacher in cached[1]]
        for teacher, one, other in zip(cached[1], live, known, strict=True):
            for name, value in _squares(one.features, other.features, teacher.code).items():
                sums["tokens", teacher.name, name] += value
        for kind, answers in (("live", live), ("cached", known)):
            with accelerator.autocast():
                parts = task(batch.images, batch.mask, answers, batch.labels)
            for name, loss in parts.items():
                sums["losses", name, kind] += loss.item() / (batches * processes)
    total: dict[tuple[str, ...], float] = defaultdict(float)
    for share in gather_object([dict(sums)]):
        for place, value in share.items():
            total[place] += value
    return {"views": batches * processes * BATCH} | _ratios(total)


def describe_error(error: dict[str, Any]) -> list[str]:
    """What was measured, in a few lines."""
    lines = []
    for name, tokens in error["tokens"].items():
        said = f"class token {tokens['cls']:.2e}"
        if "patch" in tokens:
            said += f", patch tokens {tokens['patch']:.2e} ({tokens['patch_variance']:.2%} of their variance explained)"
        lines.append(f"error    {name}: {said}, relative, on {error['views']} views")
    for name, loss in error["losses"].items():
        lines.append(
            f"loss     {name}: {loss['live']:.6g} live, {loss['cached']:.6g} cached ({loss['error']:+.2e}), "
            "of the untrained student"
        )
    return lines


def _squares(live: Features, cached: Features, code: Code) -> dict[str, float]:
    """Sums of squares over a batch."""
    cls = live.cls.float()
    sums = {"cls_off": (cached.cls - cls).square().sum().item(), "cls": cls.square().sum().item()}
    if code.components is not None:
        patch = live.patch.float()
        sums["patch_off"] = (cached.patch - patch).square().sum().item()
        sums["patch"] = patch.square().sum().item()
        sums["patch_spread"] = (patch - code.components.mean).square().sum().item()
    return sums


def _ratios(total: dict[tuple[str, ...], float]) -> dict[str, Any]:
    tokens: dict[str, dict[str, float]] = defaultdict(dict)
    losses: dict[str, dict[str, float]] = defaultdict(dict)
    for kind, name, what in total:
        if kind == "losses":
            losses[name][what] = total[kind, name, what]
        elif what in ("cls", "patch"):
            off = total[kind, name, f"{what}_off"]
            tokens[name][what] = math.sqrt(off / max(total[kind, name, what], 1e-30))
            if what == "patch":
                tokens[name]["patch_variance"] = 1 - off / max(total[kind, name, "patch_spread"], 1e-30)
    for loss in losses.values():
        loss["error"] = (loss["cached"] - loss["live"]) / max(abs(loss["live"]), 1e-30)
    return {"tokens": dict(tokens), "losses": dict(losses)}
