"""A cached epoch against a live one, for `benchmarks.speed.step --compare cache`."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import timing
from benchmarks.speed.ours import recipe, write_noise
from benchmarks.speed.published import RATE
from proteus.config import Config
from proteus.data.dense import DenseSource
from proteus.data.loader import TrainingSet, training_batches
from proteus.data.sources import Source, build_source
from proteus.data.transforms import TrainTransform
from proteus.training import start
from proteus.training.cache import CachedTeacher, open_cache
from proteus.training.cache_writer import make_cache
from proteus.training.dense import DenseTrainingSet
from proteus.training.teacher import Teacher

LIVE, CACHED = "live", "cached"


def config(teacher: str, student: str, batch: int, image_size: int, folder: Path, overrides: Sequence[str]) -> Config:
    """A run on the images of `folder`, its teacher's class tokens cached beside them."""
    data = [f"data.root={folder / 'images'}", "data.split=null", "probe.split=null", "probe.every_epochs=0"]
    losses = ["losses.feature=0", "losses.patch=0"]
    cache = [f"teacher_cache={{dir: {folder / 'cache'}, tokens: cls, views: 2}}", f"run.dir={folder / 'run'}"]
    return recipe(teacher, student, batch, image_size, [*data, *losses, *cache, *overrides])


class Epochs:
    """Epochs of one student, with the teacher live or its answers from the cache; loading included, without workers."""

    def __init__(self, cfg: Config):
        accelerator = start.build_accelerator(cfg, Path(str(cfg.run.dir)))
        self.device = accelerator.device
        live = cfg.model_copy(update={"teacher_cache": None})
        self.source: Source | DenseSource = build_source(cfg.data, cfg.run.seed)
        self.parts = start.build_parts(live, self.source, accelerator, Path(str(cfg.run.dir)))
        self.learner = self.parts.learners[0]
        views, self.cached = open_cache(cfg, self.parts.teachers, self.source, self.learner.sizes)
        transform = TrainTransform(self.learner.sizes.crop, cfg.data.augment)
        self.replayed = TrainingSet(
            self.source, transform, cfg.run.seed, self.learner.patches, cfg.data.mask.ratio, views
        )
        self._step = 0

    def live(self) -> None:
        """An epoch in which the teacher answers."""
        self._epoch(self.parts.dataset, self.parts.teachers)

    def replay(self) -> None:
        """An epoch of the cache's views and answers."""
        self._epoch(self.replayed, self.cached)

    def losses(self) -> dict[str, float]:
        """The token loss of the first cached batch, by what the teacher says now and by what the cache holds."""
        steps = self.parts.sampler.steps_per_epoch
        batch = next(training_batches(self.replayed, self.parts.sampler, 0, steps, 0, workers=0)).to(self.device)
        found = {}
        for name, teachers in ((LIVE, self.parts.teachers), (CACHED, self.cached)):
            with torch.no_grad():
                answers = [teacher.answer(batch) for teacher in teachers]
                mask = batch.mask.new_zeros(0, self.learner.patches)
                found[name] = self.learner.task(batch.images, mask, answers, None)["token"].item()
        return found

    def _epoch(self, dataset: TrainingSet | DenseTrainingSet, teachers: Sequence[Teacher | CachedTeacher]) -> None:
        sampler = self.parts.sampler
        for batch in training_batches(dataset, sampler, 0, sampler.steps_per_epoch, 0, workers=0):
            batch = batch.to(self.device)
            self._step += 1
            self.learner.learn(batch, [teacher.answer(batch) for teacher in teachers], self._step, 0)
            self.learner.update(RATE)


def compare_cache(
    teacher: str, student: str, batch: int, image_size: int, images: int, rounds: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Write a cache of class tokens, measure epochs of the token loss with and without it, and print the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        write_noise(folder / "images", images)
        cfg = config(teacher, student, batch, image_size, folder, overrides)
        make_cache(cfg, yes=True)
        epochs = Epochs(cfg)
        losses = epochs.losses()
        times = timing.in_turn({LIVE: epochs.live, CACHED: epochs.replay}, rounds, epochs.device)
    summary = timing.summarise(times, LIVE)
    cost = 1 / summary[CACHED].speedup
    rows = [
        [f"{kind}, token loss", f"{summary[kind].seconds:.2f}", f"{share:.2f}", f"{losses[kind]:.6f}"]
        for kind, share in ((LIVE, 1.0), (CACHED, cost))
    ]
    print(f"\n{timing.table(['epoch', 's', 'of a live one', 'loss of the first batch'], rows)}")
    print(f"\n{images} images in batches of {batch}, loading included; the losses are of the same views")
    return {"times": times, "cost": cost, "losses": losses}
