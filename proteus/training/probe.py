"""Seeing progress: on a fixed held-out set, how near the student is to its teacher and what its features are worth."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from proteus.config import Config
from proteus.data.sources import Source, Subset, build_source, hold_out
from proteus.errors import InputError
from proteus.evaluation.features import PlainImages, class_tokens, load_images
from proteus.evaluation.knn import knn_accuracy
from proteus.models.features import Features
from proteus.training.pictures import components_picture
from proteus.training.task import Distillation
from proteus.training.teacher import Teacher


def split_source(cfg: Config) -> tuple[Source, Source | None]:
    """(training set, held-out set): the probe's split, or images cut out of the training set; None without a probe."""
    source = build_source(cfg.data, cfg.run.seed)
    if not cfg.probe.every_epochs:
        return source, None
    if cfg.probe.split is None:
        return hold_out(source, cfg.probe.images, cfg.run.seed)
    whole = {"split": cfg.probe.split, "classes": 1.0, "images_per_class": 1.0, "merge": []}
    try:
        held_out = build_source(cfg.data.model_copy(update=whole), cfg.run.seed)
    except InputError as error:
        hint = "probe.split=null cuts the held-out images from the training set"
        raise InputError(f"probe.split: {error}; {hint}") from None
    return source, _choice(held_out, cfg.probe.images, cfg.run.seed)


class Probe:
    """Cosine similarity of student and teacher tokens, k-NN accuracy where there are labels, and a picture.

    writes: the picture's file; of processes that share weights all measure, and one writes.
    """

    def __init__(
        self,
        cfg: Config,
        source: Source,
        held_out: Source,
        size: int,
        teachers: list[Teacher],
        device: torch.device,
        writes: bool = True,
    ):
        self._cfg, self._teachers, self._device, self._writes = cfg, teachers, device, writes
        view = size, cfg.probe.crop, cfg.data.workers, cfg.data.timeout
        self._held_out = load_images(held_out, *view)
        if not len(self._held_out.images):
            raise InputError("probe: none of the held-out images can be read")
        self._bank: PlainImages | None = None
        if source.labels is not None and self._held_out.labels is not None:
            # Each set numbers its classes by itself; what they share are the names.
            number = {name: label for label, name in reversed(list(enumerate(source.classes)))}
            numbers = np.array([number.get(name, -1) for name in held_out.classes])
            self._held_out = self._held_out._replace(labels=numbers[self._held_out.labels])
            self._bank = load_images(_choice(source, cfg.probe.bank, cfg.run.seed), *view)
        self._teacher_knn: dict[str, float] = {}
        self.pictures = min(cfg.probe.pictures, len(self._held_out.images))
        # Spread over the set: a sorted one starts with many images of one class.
        spread = torch.linspace(0, len(self._held_out.images) - 1, self.pictures).long()
        self._drawn = self._held_out.images[spread]

    def measure(self, task: Distillation) -> dict[str, float]:
        """What a student's task is worth, by name: cosine_cls, cosine_patch, knn_student, knn_teacher.

        Each is there where it exists. With several teachers, the teacher's name follows: cosine_cls/dinov2_vits14.
        """
        task.eval()
        numbers = self._similarity(task)
        if self._bank is not None:
            numbers["knn_student"] = self._knn(task.encode, self._bank)
            for suffix, teacher in zip(task.suffixes, self._teachers, strict=True):
                if teacher.name not in self._teacher_knn:
                    self._teacher_knn[teacher.name] = self._knn(teacher, self._bank)
                numbers["knn_teacher" + suffix] = self._teacher_knn[teacher.name]
        task.train()
        return numbers

    @torch.no_grad()
    def picture(self, task: Distillation, path: Path) -> np.ndarray:
        """Principal components of a few fixed images, written to `path`; its pixels [H, W, 3]. Of the first teacher."""
        task.eval()
        pixels = self._drawn.to(self._device)
        student, teacher, shared = task.encode(pixels), None, False
        if self._teachers:
            adaptor = task.adaptors[0]
            teacher = _to_cpu(adaptor.teacher_space(self._teachers[0](pixels)))
            if shared := adaptor.reaches_patches:
                student = adaptor.student_space(student)
        task.train()
        return components_picture(self._drawn, teacher, _to_cpu(student), shared, path if self._writes else None)

    @torch.no_grad()
    def _similarity(self, task: Distillation) -> dict[str, float]:
        sums: dict[str, float] = defaultdict(float)
        for images in self._held_out.images.split(64) if self._teachers else ():
            pixels = images.to(self._device)
            plain = task.encode(pixels)
            for suffix, adaptor, teacher in zip(task.suffixes, task.adaptors, self._teachers, strict=True):
                student, wanted = adaptor.compared(plain, teacher(pixels))
                if "token" in adaptor.heads:
                    sums["cosine_cls" + suffix] += _cosine(student.cls, wanted.cls).sum().item()
                if adaptor.reaches_patches:
                    sums["cosine_patch" + suffix] += _cosine(student.patch, wanted.patch).mean(dim=1).sum().item()
        return {name: total / len(self._held_out.images) for name, total in sums.items()}

    def _knn(self, encode: Callable[[Tensor], Features], bank: PlainImages) -> float:
        assert bank.labels is not None
        assert self._held_out.labels is not None
        known = np.isin(self._held_out.labels, bank.labels)  # no one can vote for a class the bank has no image of
        if not known.any():
            return float("nan")
        return knn_accuracy(
            class_tokens(encode, bank.images, self._device),
            torch.from_numpy(bank.labels),
            class_tokens(encode, self._held_out.images[torch.from_numpy(known)], self._device),
            torch.from_numpy(self._held_out.labels[known]),
            self._cfg.probe.neighbours,
        )


def _choice(source: Source, count: int, seed: int) -> Source:
    if len(source) <= count:
        return source
    chosen = np.random.default_rng((seed, len(source), 1)).permutation(len(source))[:count]
    return Subset(source, np.sort(chosen))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a.float(), b.float(), dim=-1)


def _to_cpu(features: Features) -> Features:
    return Features(features.cls.float().cpu(), features.patch.float().cpu(), features.grid)
