"""What is done to measure a model on a task: one function a kind."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields, replace
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any, Literal, NamedTuple, TypeVar, get_args, get_origin

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.data import TaskData
from benchmarks.task import Protocol, Split, Task
from proteus.data.sources import Source
from proteus.errors import InputError, nearest
from proteus.evaluation.dense.depth import DepthExample, depth
from proteus.evaluation.dense.presets import DepthPreset, SegmentationPreset, depth_preset, segmentation_preset
from proteus.evaluation.dense.segmentation import SegmentationExample, segmentation
from proteus.evaluation.extract import Precision, View, extract
from proteus.evaluation.knn import KS, knn
from proteus.evaluation.linear import LinearProtocol, linear_probe
from proteus.evaluation.linear_head import LinearHead
from proteus.evaluation.logistic import Metric, logistic_probe
from proteus.evaluation.metrics import mean_average_precision_11, mean_corruption_error
from proteus.evaluation.robustness import corruption_errors, real_top1, top1
from proteus.models.encoder import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Encoder

LINEAR_BATCH: dict[Protocol, int] = {"dinov2": 1024, "proteus": 512}  # images of a step; rates scale with it
K = 20  # neighbours of the k-NN score that is reported; those of the other k stand beside it
LISTS = {"rates", "ratios"}  # settings that may be longer or shorter than the protocol's
NO_SETTINGS = {"name", "head", "size", "batch_size", "workers"}  # they are said elsewhere, or the preset
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: Statistics = (IMAGENET_MEAN, IMAGENET_STD)
CLIP: Statistics = (CLIP_MEAN, CLIP_STD)
LOGISTIC_METRICS: dict[str, Metric] = {"top-1": "accuracy", "mean per class": "mean_per_class", "AP11": "map11"}


class Setting(NamedTuple):
    """How a run measures, whatever the task.

    cache:  folder of the features of frozen encoders.
    folder: of the model's results, in which heads are kept.
    weights: the model's hash.
    stems:   by task what its files are called, which says what they depend on.
    """

    data: TaskData
    accelerator: Accelerator
    protocol: Protocol
    normalize: Literal["own", "protocol"]
    cache: Path
    folder: Path
    weights: str
    stems: dict[str, str]
    batch_size: int
    workers: int


class Outcome(NamedTuple):
    """A score (percent, or metres), the protocol's name, the input statistics, and what else was found."""

    score: float
    protocol: str
    statistics: Statistics
    figures: dict[str, float]
    warnings: list[str]
    examples: Sequence[SegmentationExample] | Sequence[DepthExample] = ()


def evaluate(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    """Measure an encoder on a task; every process comes to the same outcome.

    InputError where an image, a list or a setting is wrong.
    """
    return KINDS[task.kind](task, encoder, setting)


def check(task: Task, encoder: Encoder, setting: Setting) -> None:
    """InputError where a task's settings, size or kind do not fit the protocol, the encoder or the set."""
    source = setting.data.open(
        task, "test", **({"corruption": task.corruptions[0], "severity": 1} if task.corruptions else {})
    )
    if hasattr(source, "target") != (task.kind in ("segmentation", "depth")):
        raise InputError(f"{task.id}: kind: {task.kind} is not measured on the set {task.data.set}")
    if task.kind == "linear":
        _linear_protocol(task, encoder, setting)
    elif task.kind in ("segmentation", "depth"):
        _dense_preset(task, encoder, setting)
    else:
        _known(task.settings, set(), task)
        _size(task, encoder)
    labels = getattr(source, "labels", None)
    if labels is not None and (labels.ndim == 2) != (task.metric == "AP11" or task.kind == "real"):
        raise InputError(f"{task.id}: metric: AP11 is for sets of several labels an image, and for those alone")


def head_file(setting: Setting, task: str) -> Path:
    """Where the head that a linear task chose is kept."""
    return setting.folder / f"{setting.stems[task]}.head.safetensors"


def _knn(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    with _convention(encoder, IMAGENET, setting) as statistics:
        bank, queries = (_tokens(task, split, encoder, setting, "fp16") for split in ("train", "test"))
    bank_labels, labels = (torch.from_numpy(_labels(task, split, setting)) for split in ("train", "test"))
    scores = knn(bank, bank_labels, queries, labels, KS, device=setting.accelerator.device)
    figures = {f"top-1, k = {k}": 100 * score.top1 for k, score in scores.items()}
    figures |= {f"top-5, k = {k}": 100 * score.top5 for k, score in scores.items()}
    return Outcome(100 * scores[K].top1, "dinov2", statistics, figures, [])


def _linear(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    protocol = _linear_protocol(task, encoder, setting)
    train, test = (setting.data.open(task, split) for split in ("train", "test"))
    with _convention(encoder, IMAGENET, setting) as statistics:
        result = linear_probe(encoder, train, test, setting.accelerator, protocol)
    if setting.accelerator.is_main_process:
        result.head.save(head_file(setting, task.id))
    setting.accelerator.wait_for_everyone()
    seen = result.head.input
    figures = {"learning rate": result.head.lr, "blocks": seen.blocks, "mean patch token": float(seen.avgpool)}
    if result.honest_accuracy is not None:
        figures["top-1 of the head that held-out training images chose"] = 100 * result.honest_accuracy
    return Outcome(
        100 * result.accuracy, _named("dinov2", task), statistics, figures, [result.warning] if result.warning else []
    )


def _logistic(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    splits: list[Split] = ["train", "test", *(["val"] if "val" in task.data.splits else [])]  # type: ignore[list-item]
    protocol = task.protocol or setting.protocol
    # The paper's authors feed CLIP's statistics to every model, and compute in full precision.
    usual, precision = (CLIP, "no") if protocol == "proteus" else (IMAGENET, "fp16")
    with _convention(encoder, usual, setting) as statistics:
        tokens = {split: _tokens(task, split, encoder, setting, precision) for split in splits}  # type: ignore[arg-type]
    labels = {split: torch.from_numpy(_labels(task, split, setting)) for split in splits}
    result = logistic_probe(
        tokens["train"],
        labels["train"],
        tokens["test"],
        labels["test"],
        val=(tokens["val"], labels["val"]) if "val" in tokens else None,
        protocol=protocol,
        metric=LOGISTIC_METRICS[task.metric],
        device=setting.accelerator.device,
    )
    figures = {"C": result.C, "validation": 100 * result.val_score}
    if task.metric == "AP11":
        official = mean_average_precision_11(result.predictions, labels["test"].numpy(), "official")
        figures["VOC's own AP11"] = 100 * official
    return Outcome(100 * result.score, protocol, statistics, figures, result.warnings)


def _transfer(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    head, source = _head(task, setting), setting.data.open(task, "test")
    with _convention(encoder, IMAGENET, setting) as statistics:
        score = top1(encoder, head, source, setting.accelerator, _view(task, encoder, setting))
    return Outcome(100 * score, "dinov2", statistics, {}, [])


def _real(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    head, source = _head(task, setting), setting.data.open(task, "test")
    label_sets = [np.flatnonzero(row > 0).tolist() for row in source.labels]
    with _convention(encoder, IMAGENET, setting) as statistics:
        score = real_top1(encoder, head, source, label_sets, setting.accelerator, _view(task, encoder, setting))
    return Outcome(100 * score, "dinov2", statistics, {"images with labels": sum(map(bool, label_sets))}, [])


def _corruptions(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    head, view = _head(task, setting), _view(task, encoder, setting)

    def open_set(corruption: str, severity: int) -> Source:
        return setting.data.open(task, "test", corruption=corruption, severity=severity)

    with _convention(encoder, IMAGENET, setting) as statistics:
        errors = corruption_errors(encoder, head, open_set, task.corruptions, setting.accelerator, view)
    figures = {f"error, {corruption}": 100 * fmean(levels) for corruption, levels in errors.items()}
    score = mean_corruption_error(errors) if task.metric == "mCE" else fmean(figures.values())
    return Outcome(score, "dinov2", statistics, figures, [])


def _segmentation(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    preset = _dense_preset(task, encoder, setting)
    assert isinstance(preset, SegmentationPreset)
    train, test = (setting.data.open(task, split) for split in ("train", "test"))
    with _convention(encoder, (preset.mean, preset.std), setting) as statistics:
        result = segmentation(encoder, train, test, preset, accelerator=setting.accelerator, workers=setting.workers)
    figures = {"pixel accuracy": 100 * result.pixel_accuracy, "class accuracy": 100 * result.class_accuracy}
    figures |= {f"IoU, {name}": 100 * value for name, value in zip(train.classes, result.iou, strict=True)}
    return Outcome(
        100 * result.miou, _named(preset.name, task), statistics, figures, result.warnings, result.predictions
    )


def _depth(task: Task, encoder: Encoder, setting: Setting) -> Outcome:
    preset = _dense_preset(task, encoder, setting)
    assert isinstance(preset, DepthPreset)
    train, test = (setting.data.open(task, split) for split in ("train", "test"))
    with _convention(encoder, (preset.mean, preset.std), setting) as statistics:
        result = depth(encoder, train, test, preset, accelerator=setting.accelerator, workers=setting.workers)
    names = {"abs_rel": "AbsRel", "sq_rel": "SqRel", "rmse_log": "RMSE log", "log10": "log10", "silog": "SILog"}
    names |= {f"delta{i}": f"delta {i}" for i in (1, 2, 3)}
    figures = {title: float(getattr(result, name)) for name, title in names.items()}
    return Outcome(result.rmse, _named(preset.name, task), statistics, figures, result.warnings, result.predictions)


KINDS: dict[str, Callable[[Task, Encoder, Setting], Outcome]] = {
    "knn": _knn,
    "linear": _linear,
    "logistic": _logistic,
    "transfer": _transfer,
    "real": _real,
    "corruptions": _corruptions,
    "segmentation": _segmentation,
    "depth": _depth,
}


@contextmanager
def _convention(encoder: Encoder, usual: Statistics, setting: Setting) -> Iterator[Statistics]:
    """Inside, the encoder normalises its input as the run wants it: by its own statistics or the protocol's."""
    own = encoder.mean, encoder.std
    if setting.normalize == "protocol":
        encoder.set_convention(*usual)
    try:
        yield encoder.mean, encoder.std
    finally:
        encoder.set_convention(*own)


def _tokens(task: Task, split: Split, encoder: Encoder, setting: Setting, precision: Precision) -> torch.Tensor:
    tokens = extract(
        encoder,
        setting.data.open(task, split),
        _view(task, encoder, setting),
        setting.accelerator,
        cache=setting.cache,
        identity=f"{task.data.set} {split} {setting.data.where(task)}",
        weights=f"{setting.weights} {encoder.mean} {encoder.std}",
        precision=precision,
    )
    if not bool(tokens.isfinite().all()):
        raise InputError(f"{task.id}: the features of split {task.data.splits[split]!r} hold NaN or infinity")
    return tokens


def _labels(task: Task, split: Split, setting: Setting) -> np.ndarray:
    source: Source = setting.data.open(task, split)
    if source.labels is None:
        raise InputError(f"{task.id}: split {task.data.splits[split]!r} has no labels")
    return source.labels


def _head(task: Task, setting: Setting) -> LinearHead:
    assert task.head is not None
    return LinearHead.load(head_file(setting, task.head))


def _view(task: Task, encoder: Encoder, setting: Setting) -> View:
    return View(_size(task, encoder), task.crop, setting.batch_size, setting.workers)


def _size(task: Task, encoder: Encoder) -> int:
    """Pixels a side; InputError where the encoder cannot take them."""
    size = encoder.image_size if task.size == "own" else task.size
    if not isinstance(size, int):
        raise InputError(f"{task.id}: {encoder.name} takes images of {size}; the task needs square ones: set its size")
    try:
        encoder.grid_of(size, size)
    except ValueError as error:
        raise InputError(f"{task.id}: {error}") from None
    return size


def _linear_protocol(task: Task, encoder: Encoder, setting: Setting) -> LinearProtocol:
    usual = LinearProtocol(size=_size(task, encoder), crop=task.crop, global_batch=LINEAR_BATCH[setting.protocol])
    return replace(_replaced(usual, task), batch_size=setting.batch_size, workers=setting.workers)


def _dense_preset(task: Task, encoder: Encoder, setting: Setting) -> SegmentationPreset | DepthPreset:
    if setting.protocol not in task.presets:
        raise InputError(f"{task.id}: no preset for --protocol {setting.protocol}; it has {', '.join(task.presets)}")
    name = task.presets[setting.protocol]
    if task.kind == "segmentation":
        return _replaced(segmentation_preset(name, encoder), task)
    return _replaced(depth_preset(name, encoder), task)


def _named(protocol: str, task: Task) -> str:
    """The protocol's name; a task that changes it says so, as its figures are not comparable."""
    return f"{protocol}, changed" if task.settings else protocol


T = TypeVar("T")


def _replaced(settings: T, task: Task) -> T:
    """A protocol with what the task's file changes; InputError for what it has not, or not of that type."""
    known: dict[str, Field[Any]] = {field.name: field for field in fields(settings)}  # type: ignore[arg-type]
    _known(task.settings, set(known) - NO_SETTINGS, task)
    changes = {}
    for key, value in task.settings.items():
        value = tuple(value) if isinstance(value, list) else value
        usual = getattr(settings, key)
        kind = known[key].type
        if value is None:  # a window or a box may be none at all, where the protocol knows of that
            fits = NoneType in get_args(kind)
        elif get_origin(kind) is Literal:
            fits = value in get_args(kind)
        else:
            fits = _alike(value, usual, lengths=key not in LISTS)
        if not fits:
            allowed = f": one of {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else ""
            raise InputError(f"{task.id}: settings.{key}: {value!r} cannot stand for {usual!r}{allowed}")
        changes[key] = value
    return replace(settings, **changes)  # type: ignore[type-var]


def _alike(value: Any, usual: Any, lengths: bool) -> bool:
    """Whether a value of a file can take the place of a protocol's own: a number for a number, a pair for a pair.

    No number that a protocol knows is below 0. lengths: whether a list has to be as long.
    """
    if isinstance(usual, bool) or isinstance(value, bool):
        return isinstance(usual, bool) and isinstance(value, bool)
    if isinstance(usual, int):
        return isinstance(value, int) and 0 <= value < 2**31
    if isinstance(usual, float) or (usual is None and not isinstance(value, tuple)):
        return isinstance(value, int | float) and math.isfinite(value) and value >= 0
    if usual is None:
        return all(_alike(part, 0, lengths) for part in value)
    if isinstance(usual, tuple):
        same = isinstance(value, tuple) and (len(value) == len(usual) if lengths else len(value) > 0)
        return same and all(_alike(part, usual[0], lengths) for part in value)
    return isinstance(value, type(usual))


def _known(settings: dict[str, Any], known: set[str], task: Task) -> None:
    for key in settings:
        if key not in known:
            hint = nearest(key, known) if known else f"; {task.kind} has none"
            raise InputError(f"{task.id}: no setting {key!r}{hint}")
