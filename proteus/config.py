"""The typed tree behind every YAML file; `config_files` reads and writes them.

Nothing here imports torch: a typo is reported at once.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

LABEL_CE = "label_ce"  # the one loss that learns from labels, not from a teacher

Share = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Flag = Annotated[bool, Field(strict=True)]
NonNegative = Annotated[float, Field(ge=0)]
Attention = Literal["auto", "xformers", "sdpa"]


def _network_arguments(arch: dict[str, Any]) -> dict[str, Any]:
    for key in ("name", "checkpoint", "pretrained", "image_size", "img_size", "mean", "std"):
        if key in arch:
            raise ValueError(f"{key} is not an argument of the network; the image size is image_size, beside arch")
    if "attention" in arch:
        raise ValueError("attention is run.attention")
    return arch


def _pixels_or_auto(size: Any) -> Any:
    if size != "auto" and not (type(size) is int and size > 0):
        raise ValueError(f"a number of pixels above 0, or auto, not {size!r}")
    return size


def _images_or_auto(size: Any) -> Any:
    if size != "auto" and not (type(size) is int and size > 0):
        raise ValueError(f"a number of images above 0, or auto, not {size!r}")
    return size


def _named_students(students: Any) -> Any:
    if not isinstance(students, list):
        return students
    return [{"name": one} if isinstance(one, str) else one for one in students]


def _flag_or_selective(value: Any) -> Any:
    if value not in (True, False, "selective") or type(value) not in (bool, str):
        raise ValueError(f"true, false or selective, not {value!r}")
    return value


Arch = Annotated[dict[str, Any], AfterValidator(_network_arguments)]
PixelsOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_pixels_or_auto)]
ImagesOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_images_or_auto)]
FlagOrSelective = Annotated[bool | Literal["selective"], BeforeValidator(_flag_or_selective)]


class Section(BaseModel):
    """A mapping of the YAML file whose keys are all known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Teacher(Section):
    """The frozen network that teaches."""

    name: str
    checkpoint: str | None = None  # a local file; otherwise the official one, if it is on disk
    download: Flag = False  # fetch the official weights when they are not on disk
    image_size: Positive | None = None  # pixels it sees; null: data.image_size
    normalize: Literal["own", "imagenet", "clip", "none"] = "own"  # the authors give every teacher ImageNet's
    # auto: computes as autocast does in the run's precision; bfloat16: all of it in bfloat16, faster and less exact
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    losses: dict[str, NonNegative] | None = None  # its own weights; null: the run's
    standardize: Flag = False  # bring each dimension of its tokens to mean 0 and variance 1
    shard: Flag = False  # share its weights out among the processes, for one that no device holds whole
    head: str | None = None  # a linear classifier on the teacher's features, for the losses on logits
    compile: Flag = False
    arch: Arch = {}  # arguments of the network, for `timm/...` names


class Student(Section):
    """The network that learns; what remains of the run."""

    name: str
    checkpoint: str | None = None  # start from these weights instead of random ones
    head: str | None = None  # start its classifier from this file, head.safetensors of another run
    tune: Literal["all", "head", "lora"] = "all"  # what learns: all of it, heads alone, adapters beside linear layers
    rank: Positive = 8  # of lora's adapters
    image_size: PixelsOrAuto = "auto"  # auto: what gives the teacher's grid, for losses on patches
    # compute activations again in backward instead of keeping them; selective: but for products and attention
    grad_checkpointing: FlagOrSelective = False
    compile: Flag = False
    arch: Arch = {}

    @model_validator(mode="after")
    def _keeps_products(self) -> "Student":
        if self.grad_checkpointing == "selective" and self.compile:
            raise ValueError(
                "grad_checkpointing: selective cannot see the products of compiled blocks; true can be used"
            )
        return self


class Source(Section):
    """Where images come from."""

    kind: Literal["folder", "packed", "hf", "digits", "image"] = "folder"
    # a folder; for `packed` one that tools/pack.py wrote; for `hf` a local path or a hub id; for `image` one image file
    root: str | None = None
    split: str | None = None  # folder: a subfolder of root; hf, digits: the split's name
    labels: Literal["auto", "ignore"] = "auto"
    download: Flag = False  # hf: may fetch from the hub what is not on disk
    classes: Share = 1.0  # keep a seeded share of the classes
    images_per_class: Share = 1.0  # keep a seeded share of the images of each class
    crops: Positive = 1_281_167  # image: how many fixed crops of the one image stand for a set


class Sources(Source):
    """One source, or several one after the other."""

    merge: list[Source] = []  # further sources, appended to this one


class Augment(Section):
    """The recipe's augmentation, in its order. RandAugment is named as timm names it; null leaves it out."""

    scale: tuple[Share, Share] = (0.08, 1.0)
    hflip: Probability = 0.5
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: Probability = 0.25
    device: Flag = False  # RandAugment where the networks are, on whole batches, instead of in the workers

    @model_validator(mode="after")
    def _ordered(self) -> "Augment":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale: from the smaller share of the area to the larger, not {list(self.scale)}")
        return self


class Mask(Section):
    """Which images of a batch are seen masked as well, and how many of their patches are."""

    probability: Probability = 0.5
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Data(Sources):
    """The proxy set and how it is fed."""

    image_size: Positive = 224
    repeats: Positive = 3  # repeated augmentation: crops of one image in a batch
    augment: Augment = Augment()
    mask: Mask = Mask()
    workers: Annotated[int, Field(ge=0)] = 8
    timeout: Annotated[float, Field(gt=0)] = 600  # seconds without a batch from the workers at which the run stops
    max_bad_share: Probability = 0.01  # the run stops when more than this share of the files ...
    max_bad_files: Annotated[int, Field(ge=0)] = 10  # ... and at least this many cannot be read


class TeacherCache(Section):
    """Targets computed once, for fixed views of every image, by tools/cache.py."""

    dir: Annotated[str, Field(min_length=1)]
    tokens: Literal["cls", "all"] = "cls"  # class tokens in float16; all: patch tokens as well, reduced and in 8 bits
    views: Positive = 4  # fixed augmented views of an image
    components: Positive = 128  # of patch tokens: the principal ones that are kept


class Optimizer(Section):
    """AdamW."""

    lr: Annotated[float, Field(gt=0)] = 5e-4
    lr_batch: Positive | None = 512  # lr is for this global batch and scales linearly; null: lr is used as it is
    weight_decay: NonNegative = 0.05
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_grad: Annotated[float, Field(gt=0)] | None = None


class Schedule(Section):
    """Cosine with warm-up, as timm's (the cosine is not shifted by the warm-up)."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None  # instead of epochs
    warmup_epochs: NonNegative = 0
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # instead of warmup_epochs
    warmup_lr: NonNegative = 1e-6
    min_lr: NonNegative = 1e-5
    per: Literal["step", "epoch"] = "step"  # the authors change the rate once an epoch

    @model_validator(mode="after")
    def _one_length(self) -> "Schedule":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps (null takes one away)")
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError("give either warmup_epochs or warmup_steps")
        return self


class Ema(Section):
    """Exponential moving average of the student's weights."""

    decay: float | str | None = "auto"  # in [0, 1), or auto: min(0.99996, 1 - 10 / steps)

    @model_validator(mode="after")
    def _in_range(self) -> "Ema":
        if isinstance(self.decay, str):
            if self.decay != "auto":
                raise ValueError(f"decay: a number from 0 to below 1, auto or null, not {self.decay!r}")
        elif self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(f"decay: a number from 0 to below 1, auto or null, not {self.decay!r}")
        return self


class Probe(Section):
    """What is measured on the way, on a fixed held-out set."""

    every_epochs: Annotated[int, Field(ge=0)] = 1  # 0: never
    split: str | None = None  # held-out images come from this split; null: they are cut from the training set
    images: Positive = 512  # held out at most
    bank: Positive = 4096  # training images the k-NN probe votes with, where labels exist
    neighbours: Positive = 20
    pictures: Annotated[int, Field(ge=0)] = 4  # rows of the picture of principal components
    crop: Share = 0.875  # centre crop: image_size / crop is the short side it is cut from


class RunBase(Section):
    """Everything about a run that is not the method."""

    dir: Annotated[str, Field(min_length=1)] | None = None  # default: runs/<name of the config>
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["no", "bf16", "fp16"] = "bf16"
    log_every: Positive = 50  # steps
    save_every: Positive = 1000  # steps
    keep: Positive = 3  # checkpoints
    max_nonfinite: Annotated[int, Field(ge=0)] = 100  # skipped steps among the last 1,000 at which the run stops
    attention: Attention = "auto"  # auto: xformers' kernels where they are installed and work
    deterministic: Flag = False  # bit-identical runs on a GPU too, for some speed


class Run(RunBase):
    """A run of the trainer, and the batch it takes its steps on."""

    # images a process sees at once; the paper: 8 processes of 128. auto: as many as fit
    batch_size: ImagesOrAuto = 128
    accumulate: Positive = 1  # micro-batches to an update
    global_batch: Positive | None = None  # with batch_size=auto: images of an update, which accumulate makes up


class Config(Section):
    """A run of `tools/train.py`."""

    teacher: Teacher | None = None
    teachers: list[Teacher] = []  # instead of teacher: several of them
    student: Student | None = None
    # instead of student: several that learn from one pass of the teacher; a name, or as student
    students: Annotated[list[Student], BeforeValidator(_named_students)] = []
    losses: dict[str, NonNegative]  # name: weight; 0 leaves one out
    temperature: Annotated[float, Field(gt=0)] = 1.0  # of the logits, in logits_kl
    # label_ce and logits_kl on heads of their own (DHO); this is the first one's share of the prediction
    head_mix: Probability | None = None
    data: Data
    teacher_cache: TeacherCache | None = None
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    ema: Ema = Ema()
    probe: Probe = Probe()
    run: Run = Run()

    @model_validator(mode="after")
    def _possible(self) -> "Config":
        if (
            self.probe.split
            and self.data.kind in ("folder", "packed", "digits")
            and self.data.split in (None, self.probe.split)
        ):
            raise ValueError(
                f"probe.split={self.probe.split}: give data.split another split, or held-out images are trained on "
                "(probe.split=null cuts them from the training set)"
            )
        if self.teacher and self.teachers:
            raise ValueError("teacher and teachers are both given: take one away (teacher=null, or teachers=[])")
        needs_teacher = set(self.active_losses) - {LABEL_CE}
        if needs_teacher and not self.all_teachers:
            raise ValueError(f"losses.{min(needs_teacher)} needs a teacher, and teacher is null (several: teachers)")
        if not self.computed_losses:
            raise ValueError("losses: at least one needs a weight above 0")
        if "patch" in self.computed_losses and not (self.data.mask.probability and self.data.mask.ratio):
            raise ValueError("losses.patch needs masked images: set data.mask.probability and data.mask.ratio above 0")
        for key, teacher in self.all_teachers.items():
            if teacher.losses and teacher.losses.get(LABEL_CE):
                raise ValueError(f"{key}.losses.{LABEL_CE} has nothing to do with a teacher: give it in losses")
            if not self.losses_of(teacher):
                raise ValueError(f"{key} teaches nothing: give a loss that needs it a weight above 0, or take it away")
            if "logits_kl" in self.losses_of(teacher) and not teacher.head:
                raise ValueError(f"losses.logits_kl needs {key}.head: the file of a linear classifier on the teacher")
        if self.head_mix is not None and not {LABEL_CE, "logits_kl"} <= self.computed_losses:
            raise ValueError(f"head_mix: two heads are for {LABEL_CE} and logits_kl together")
        self._check_students()
        self._check_cache()
        if self.run.global_batch and self.run.batch_size != "auto":
            raise ValueError("run.global_batch is for run.batch_size=auto; a fixed batch grows by run.accumulate")
        if self.run.batch_size == "auto" and self.run.accumulate > 1:
            raise ValueError("run.accumulate is found with run.batch_size=auto: give run.global_batch instead")
        return self

    def _check_students(self) -> None:
        if (self.student is None) == (not self.students):
            raise ValueError("give either student or students (student=null, or students=[], takes one away)")
        if len(self.students) > 1 and self.run.precision == "fp16":
            raise ValueError(
                "students: with run.precision=fp16 they would share one loss scale; use bf16, or train them one by one"
            )

    def _check_cache(self) -> None:
        if not self.teacher_cache:
            return
        if not self.all_teachers:
            raise ValueError("teacher_cache: there is no teacher")
        if self.data.augment.device:
            raise ValueError("teacher_cache replays views to the pixel: data.augment.device must be false")
        on_patches = {"patch", "feature", "patch_feature"} & self.computed_losses
        if on_patches and self.teacher_cache.tokens == "cls":
            raise ValueError(
                f"losses.{min(on_patches)} compares patch tokens: teacher_cache.tokens=all keeps them, cls does not"
            )

    @property
    def all_students(self) -> dict[str, Student]:
        """The students by the name of their network, a number behind it where it comes again."""
        named: dict[str, Student] = {}
        for section in [self.student] if self.student else self.students:
            stem = section.name.replace("/", "_").replace(":", "_")  # a folder of the run is called so
            name, copy = stem, 2
            while name in named:
                name, copy = f"{stem}_{copy}", copy + 1
            named[name] = section
        return named

    def alone(self, student: Student) -> "Config":
        """The run in which this student learns alone."""
        return self.model_copy(update={"student": student, "students": []})

    @property
    def all_teachers(self) -> dict[str, Teacher]:
        """The teachers, one or several, by their keys: `teacher`, or `teachers.0`, `teachers.1`, ..."""
        if self.teacher:
            return {"teacher": self.teacher}
        return {f"teachers.{index}": teacher for index, teacher in enumerate(self.teachers)}

    @property
    def active_losses(self) -> dict[str, float]:
        """The run's losses with a weight above 0."""
        return _active(self.losses)

    def losses_of(self, teacher: Teacher) -> dict[str, float]:
        """What is learnt from a teacher: its own losses, else the run's, with a weight above 0."""
        own = _active(self.losses if teacher.losses is None else teacher.losses)
        return {name: weight for name, weight in own.items() if name != LABEL_CE}

    @property
    def computed_losses(self) -> set[str]:
        """The names of all losses that are computed, whoever teaches them."""
        learnt = {name for teacher in self.all_teachers.values() for name in self.losses_of(teacher)}
        return learnt | ({LABEL_CE} & self.active_losses.keys())


def _active(losses: dict[str, float]) -> dict[str, float]:
    return {name: weight for name, weight in losses.items() if weight > 0}
