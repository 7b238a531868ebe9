"""What trains: the student, and for each teacher the heads and losses through which it learns from it."""

from collections.abc import Sequence

from torch import Tensor, nn

from proteus.config import LABEL_CE, Config
from proteus.losses import LOSSES, Projected, Target
from proteus.models import Encoder
from proteus.models.features import Features, resize_map, resize_patches
from proteus.models.heads import DualClassifier, ProjectionHead
from proteus.training.resize import Grid, resize_images, resize_mask
from proteus.training.sizes import Sizes
from proteus.training.standardize import Standardizer
from proteus.training.teacher import Answer, Teacher

LOGIT_STRIDE = 4  # pixels of a crop to one at which the predictions for its pixels are compared


class Adaptor(nn.Module):
    """Where the student meets one teacher: heads to its width, and the losses it teaches.

    losses:             name -> weight, all above 0.
    grid:               (h, w) on which patch tokens are compared.
    standardize:        bring the teacher's tokens to mean 0 and variance 1 before they are compared.
    temperature:        of both sides' logits, in logits_kl.
    masked_per_process: masked images of a micro-batch, averaged over the processes. Processes that hold more of them
                        weigh more, so that the mean over processes is the mean over the global batch.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        losses: dict[str, float],
        grid: Grid,
        *,
        standardize: bool = False,
        temperature: float = 1.0,
        masked_per_process: float = 0.0,
    ):
        super().__init__()
        self.losses, self.grid = losses, grid
        self.temperature, self.masked_per_process = temperature, masked_per_process
        needed = sorted({head for name in losses for head in LOSSES[name].heads} - {"logits"})
        self.heads = nn.ModuleDict({head: ProjectionHead(student_dim, teacher_dim) for head in needed})
        self.reaches_patches = "feature" in needed or "patch" in needed
        tokens = ["cls"] * ("token" in needed) + ["patch"] * self.reaches_patches
        self.standardizers = nn.ModuleDict({name: Standardizer(teacher_dim) for name in tokens if standardize})

    def forward(
        self, plain: Features, masked: Features, logits: Tensor | None, answer: Answer, mask: Tensor
    ) -> dict[str, Tensor]:
        """Weighted losses by name.

        plain:  the student's Features of all B images; logits: of its head, [B, K] or [B, K, h, w].
        masked: its Features of the first M images, masked by `mask` [M, N] on the grid of this adaptor.
        answer: what the teacher says about the B images, unmasked.
        """
        projected = Projected(
            self._on_grid(self._project(plain, "feature")),
            self._on_grid(self._project(masked, "patch")) if "patch" in self.losses else masked,
            logits,  # type: ignore[arg-type]
        )
        features = self._on_grid(self.teacher_space(answer.features))
        said = answer.logits
        if said is not None and logits is not None and said.ndim == 4:
            said = resize_map(said, (logits.shape[-2], logits.shape[-1]))
        target = Target(features, mask, said, temperature=self.temperature)  # type: ignore[arg-type]
        losses = {name: weight * LOSSES[name].function(projected, target) for name, weight in self.losses.items()}
        if "patch" in losses and self.masked_per_process:
            losses["patch"] = losses["patch"] * (len(mask) / self.masked_per_process)
        return losses

    def student_space(self, plain: Features) -> Features:
        """The student's Features of unmasked images in the teacher's space, as far as heads reach; for probes.

        Patch tokens go through the feature head, else the patch head.
        """
        return self._project(plain, "feature" if "feature" in self.heads else "patch")

    def teacher_space(self, features: Features) -> Features:
        """The teacher's Features as the student is to match them. In training mode they enter the statistics."""
        cls, patch = features.cls, features.patch
        if "cls" in self.standardizers:
            cls = self.standardizers["cls"](cls)
        if "patch" in self.standardizers:
            patch = self.standardizers["patch"](patch)
        return Features(cls, patch, features.grid)

    def compared(self, plain: Features, features: Features) -> tuple[Features, Features]:
        """Student's and teacher's Features of unmasked images in one space, on one grid; for probes."""
        return self._on_grid(self.student_space(plain)), self._on_grid(self.teacher_space(features))

    def _project(self, features: Features, patch_head: str) -> Features:
        return Features(self._head("token", features.cls), self._head(patch_head, features.patch), features.grid)

    def _head(self, name: str, tokens: Tensor) -> Tensor:
        return self.heads[name](tokens) if name in self.heads else tokens

    def _on_grid(self, features: Features) -> Features:
        return resize_patches(features, self.grid) if self.reaches_patches else features


class Distillation(nn.Module):
    """The student and its adaptors, one for each teacher.

    adaptors:   by the teacher's name; with several of them it stands behind the names of its losses.
    label_ce:   weight of the cross-entropy with labels, which no teacher has a part in.
    classifier: the student's head, for the losses on logits.
    """

    def __init__(
        self,
        student: Encoder,
        adaptors: dict[str, Adaptor],
        sizes: Sizes,
        label_ce: float = 0.0,
        classifier: nn.Module | None = None,
    ):
        super().__init__()
        self.student, self.sizes, self.label_ce = student, sizes, label_ce
        self.adaptors: Sequence[Adaptor] = nn.ModuleList(adaptors.values())  # type: ignore[assignment]
        self.suffixes = [f"/{name}" if len(adaptors) > 1 else "" for name in adaptors]
        self.classifier = classifier

    def forward(
        self, images: Tensor, mask: Tensor, answers: list[Answer], labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what is minimised. One pass of the student, whatever the teachers.

        images:  [B, 3, S, S] in [0, 1].
        mask:    [M, N] bool, of the first M images, on the grid where masks are drawn.
        answers: what each teacher says about the images.
        labels:  [B] or [B, S, S] int64, where the data has them; -1 counts nowhere.
        """
        sizes = self.sizes
        images = resize_images(images, sizes.student)
        plain, masked = self.student.forward_pair(images, resize_mask(mask, sizes.mask, sizes.student_grid))
        labelled, distilled = self._logits(plain)
        losses: dict[str, Tensor] = {}
        for suffix, adaptor, answer in zip(self.suffixes, self.adaptors, answers, strict=True):
            own = adaptor(plain, masked, distilled, answer, resize_mask(mask, sizes.mask, adaptor.grid))
            losses |= {name + suffix: loss for name, loss in own.items()}
        if self.label_ce:
            assert labels is not None and labelled is not None  # noqa: PT018
            if labelled.ndim == 4:
                labelled = resize_map(labelled, (labels.shape[-2], labels.shape[-1]))
            student, target = Projected(plain, masked, label_logits=labelled), Target(labels=labels)
            losses[LABEL_CE] = self.label_ce * LOSSES[LABEL_CE].function(student, target)
        return losses

    def encode(self, images: Tensor) -> Features:
        """The student's own Features of images [B, 3, S, S], uint8 or float."""
        return self.student(resize_images(images, self.sizes.student))

    def predict(self, images: Tensor) -> Tensor:
        """What the student's head says of images [B, 3, S, S]: logits [B, K], or [B, K, h, w] on its patch grid."""
        assert self.classifier is not None
        return self.classifier(self.encode(images))

    def _logits(self, plain: Features) -> tuple[Tensor | None, Tensor | None]:
        """Logits that learn from labels and from a teacher: of one head, or of two. Maps at the size of comparison."""
        if self.classifier is None:
            return None, None
        if isinstance(self.classifier, DualClassifier):
            labelled, distilled = self.classifier.labelled(plain), self.classifier.distilled(plain)
        else:
            labelled = distilled = self.classifier(plain)
        if distilled.ndim == 4 and self.adaptors:
            distilled = resize_map(distilled, (self.sizes.crop // LOGIT_STRIDE, self.sizes.crop // LOGIT_STRIDE))
        return labelled, distilled


def build_task(
    cfg: Config,
    student: Encoder,
    teachers: list[Teacher],
    sizes: Sizes,
    classifier: nn.Module | None,
    masked_per_process: float,
) -> Distillation:
    """The task of a config: an adaptor for each teacher, in their order."""
    adaptors = {
        teacher.name: Adaptor(
            student.embed_dim,
            teacher.encoder.embed_dim,
            cfg.losses_of(section),
            grid,
            standardize=section.standardize,
            temperature=cfg.temperature,
            masked_per_process=masked_per_process,
        )
        for section, teacher, grid in zip(cfg.all_teachers.values(), teachers, sizes.compared, strict=True)
    }
    return Distillation(student, adaptors, sizes, cfg.active_losses.get(LABEL_CE, 0.0), classifier)
