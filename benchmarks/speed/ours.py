"""Our step, as `tools/train.py` makes it, on one prepared batch, and the config and batch that it is made of."""

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

from benchmarks.speed.published import RATE
from proteus.config import Config
from proteus.config_files import load_config
from proteus.data.loader import Batch, training_batches
from proteus.data.sampler import Sampler
from proteus.data.sources import Source
from proteus.models import Encoder, create_model
from proteus.models.attention import use_attention
from proteus.training import start
from proteus.training.learner import build_learners
from proteus.training.teacher import Answer, Teacher

STEPS = 100_000  # a run long enough that the average decays as in the paper


class Noise:
    """As many images of smooth noise as wanted, 500 x 375 pixels; what is in them changes no time measured here."""

    def __init__(self, count: int):
        self.count = count
        self.labels: np.ndarray | None = None
        self.classes: list[str] = []

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Image.Image:
        pixels = np.random.default_rng(index).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC)

    def name(self, index: int) -> str:
        return f"noise {index}"


def recipe(teacher: str, student: str | Sequence[str], batch: int, image_size: int, overrides: Sequence[str]) -> Config:
    """The paper's recipe for these networks, the teacher's weights random, in float32; `overrides` as tools/train.py's.

    Of several students each gets what is asked of `student`.
    """
    networks = [f"teacher.name={teacher}", "teacher.checkpoint=random"]
    if isinstance(student, str):
        networks.append(f"student.name={student}")
    else:
        asked = [key.removeprefix("student.") for key in overrides if key.startswith("student.")]
        overrides = [key for key in overrides if not key.startswith("student.")]
        facts = "".join(f", {key.replace('=', ': ', 1)}" for key in asked)
        networks += ["student=null", f"students=[{', '.join(f'{{name: {name}{facts}}}' for name in student)}]"]
    settings = [f"data.image_size={image_size}", "data.workers=0", "data.repeats=1", f"run.batch_size={batch}"]
    return load_config("proteus_s14.yaml", [*networks, *settings, "run.precision=no", *overrides])


def write_noise(folder: Path, count: int) -> None:
    """So many of the images of `Noise` as JPEGs."""
    noise = Noise(count)
    for index in range(count):
        noise.load(index).save(folder / f"{index:05d}.jpg", quality=90)


def build_teacher(cfg: Config) -> Encoder:
    """The config's teacher with weights that are the same at each call."""
    assert cfg.teacher is not None
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = create_model(cfg.teacher.name, image_size=cfg.data.image_size, **cfg.teacher.arch).freeze()
    use_attention(teacher.network, cfg.run.attention)
    return teacher


class OurStep:
    """The step on one batch, called as often as wanted; its stages one by one for timing them.

    cfg:     one student, or several that learn from the same answers. Its weights are the same for each step built.
    teacher: copied, as its dtype is the config's.
    source:  whose first images make the batch; without one they are noise.
    batch:   of another step with the same sizes, instead of one of its own.
    """

    def __init__(self, cfg: Config, teacher: Encoder, source: Source | None = None, batch: Batch | None = None):
        # Accelerate keeps one precision for a process. With a state of its own each step has its own.
        AcceleratorState._shared_state = {}
        self.folder = tempfile.TemporaryDirectory()
        self.accelerator = start.build_accelerator(cfg, Path(self.folder.name))
        self.state = AcceleratorState._shared_state
        self.device = self.accelerator.device
        assert cfg.teacher is not None
        assert isinstance(cfg.run.batch_size, int)
        images: Source = source or Noise(cfg.run.batch_size)
        masked = cfg.data.mask.probability if "patch" in cfg.computed_losses else 0.0
        sampler = Sampler(len(images), cfg.run.batch_size, mask_probability=masked)
        teacher = copy.deepcopy(teacher)
        use_attention(teacher.network, cfg.run.attention)
        size = cfg.teacher.image_size or cfg.data.image_size
        self.teacher = Teacher(teacher, None, [], self.accelerator, cfg.teacher.dtype, size, teacher.name)
        if cfg.teacher.compile:
            self.teacher.encoder.compile(dynamic=False)
        torch.manual_seed(cfg.run.seed)
        self.learners = build_learners(
            cfg, images, [self.teacher], sampler, STEPS, self.accelerator, Path(self.folder.name)
        )
        if batch is None:
            dataset = start.build_dataset(cfg, images, self.learners[0].sizes.crop, self.learners[0].patches)
            batch = next(training_batches(dataset, sampler, 0, 1, 0, workers=0))
        self.batch = batch
        if self.device.type == "cuda":
            self.batch = self.batch._replace(images=self.batch.images.pin_memory(), mask=self.batch.mask.pin_memory())
        self.step = 0

    def __call__(self) -> dict[str, Tensor]:
        """A whole step; the losses of its students, which nobody has waited for."""
        AcceleratorState._shared_state = self.state
        self.step += 1
        batch = self.data()
        answers = self.teach(batch)
        losses: dict[str, Tensor] = {}
        for learner in self.learners:
            learner.learn(batch, answers, self.step, 0)
        for learner in self.learners:
            prefix = f"{learner.name}: " if len(self.learners) > 1 else ""
            losses |= {prefix + name: loss for name, loss in learner.update(RATE).losses[0].items()}
        return losses

    def data(self) -> Batch:
        """The batch on the device."""
        return self.batch.to(self.device)

    def teach(self, batch: Batch) -> list[Answer]:
        """What the teacher says of the batch."""
        return [self.teacher.answer(batch)]

    def forward(self, batch: Batch, answers: list[Answer]) -> dict[str, Tensor]:
        """The losses of the first student, weighted."""
        AcceleratorState._shared_state = self.state
        model = self.learners[0].model
        model.train()
        return model(batch.images, batch.mask, answers, batch.labels)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Gradients of their sum."""
        self.accelerator.backward(torch.stack(list(losses.values())).sum())

    def update(self, _losses: dict[str, Tensor]) -> None:
        """The first student's optimiser and average."""
        self.learners[0].update(RATE)
