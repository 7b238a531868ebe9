"""The model card of a published student: what it is, how it came about, what was measured, how to load it."""

import json
from pathlib import Path
from typing import Any

from proteus.config import Config, Source, Teacher
from proteus.config_files import load_config
from proteus.models.encoder import Encoder
from proteus.models.export import timm_code
from proteus.models.zoo import HUB_PREFIX, entry_of, is_known

CITATION = """```bibtex
@inproceedings{zhang2025proteus,
  title     = {Accessing Vision Foundation Models via ImageNet-1K},
  author    = {Zhang, Yitian and Ma, Xu and Bai, Yue and Wang, Huan and Fu, Yun},
  booktitle = {International Conference on Learning Representations},
  year      = {2025}
}
```"""


def model_card(encoder: Encoder, checkpoint: Path, repository: str, licence: str | None = None) -> str:
    """README.md of the hub repository `owner/name` for an encoder at its image size.

    Recipe and scores are those of the run that `checkpoint` lies in: its config.yaml and log.jsonl, where there are.
    """
    run = checkpoint.parent
    config = load_config(str(run / "config.yaml")) if (run / "config.yaml").is_file() else None
    header = ["library_name: timm", "pipeline_tag: image-feature-extraction"]
    header += [f"license: {licence}"] if licence else []
    header += ["tags:", "- timm", "- image-feature-extraction", "- knowledge-distillation", "- proteus"]
    parts = ["---", *header, "---", f"# {repository.partition('/')[2]}", "", _summary(encoder, config), ""]
    parts += ["## Use", "", "With timm:", "", f"```python\n{timm_code(encoder, HUB_PREFIX + repository)}```", ""]
    parts += ["With Proteus, which knows the input convention:", "", _proteus_code(repository), ""]
    if config is not None:
        parts += [f"## Recipe of `{checkpoint.name}`", "", *_recipe(config), ""]
    scores = _last_probe(run / "log.jsonl")
    if config is not None and scores:
        parts += ["## Scores", "", *_scores(scores, config), ""]
    parts += ["## Citation", "", "The method:", "", CITATION, ""]
    return "\n".join(parts)


def _summary(encoder: Encoder, config: Config | None) -> str:
    size = encoder.image_size if isinstance(encoder.image_size, int) else " x ".join(map(str, encoder.image_size))
    millions = sum(parameter.numel() for parameter in encoder.network.parameters()) / 1e6
    names = " and ".join(f"`{teacher.name}`" for teacher in config.all_teachers.values()) if config else ""
    origin = f", distilled from {names} with Proteus" if names else ", trained with Proteus"
    return (
        f"An image encoder of {millions:.1f} M parameters{origin}: class and patch tokens of width "
        f"{encoder.embed_dim}, one patch token to {encoder.patch_size} x {encoder.patch_size} pixels, "
        f"for images of {size} pixels."
    )


def _proteus_code(repository: str) -> str:
    return f"""```python
from proteus.models import create_model

student = create_model("{HUB_PREFIX}{repository}", pretrained=True).eval()
features = student(images)  # [B, 3, H, W], RGB, uint8 or float in [0, 1]
features.cls, features.patch, features.grid
```"""


def _recipe(config: Config) -> list[str]:
    data, schedule, optimizer = config.data, config.schedule, config.optimizer
    length = f"{schedule.epochs:g} epochs" if schedule.epochs else f"{schedule.steps} steps"
    warmup = f"{schedule.warmup_steps} steps" if schedule.warmup_steps else f"{schedule.warmup_epochs:g} epochs"
    rate = f"{optimizer.lr:g}" + (f" for a batch of {optimizer.lr_batch}, scaled with it" if optimizer.lr_batch else "")
    lines = [f"- Teacher: {_teacher(teacher, config)}" for teacher in config.all_teachers.values()]
    lines += [
        f"- Losses: {_weights(config.active_losses)}",
        f"- Data: {', '.join(_source(source) for source in (data, *data.merge))}; crops of {data.image_size} pixels",
        f"- Batch: {config.run.batch_size} images to a process, {config.run.accumulate} to an update",
        f"- Optimizer: AdamW, learning rate {rate}, weight decay {optimizer.weight_decay:g}",
        f"- Schedule: {length}, {warmup} of warm-up, cosine to {schedule.min_lr:g}",
        f"- Precision: {'fp32' if config.run.precision == 'no' else config.run.precision}; seed {config.run.seed}",
    ]
    if "patch" in config.computed_losses:
        lines.append(f"- Masks: of {data.mask.probability:.0%} of the images, {data.mask.ratio:.0%} of their patches")
    return lines


def _teacher(teacher: Teacher, config: Config) -> str:
    entry = entry_of(teacher.name) if is_known(teacher.name) else None
    text = f"`{teacher.name}`"
    if teacher.checkpoint:
        text += f" from `{Path(teacher.checkpoint).name}`"
    elif entry:
        text += f" (weights under {entry.licence})"
    if teacher.losses is not None:
        text += f", with losses of its own: {_weights(config.losses_of(teacher))}"
    return text


def _weights(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in losses.items())


def _source(source: Source) -> str:
    """A source by name: where it lies on somebody's disk is nobody's business."""
    root = source.root or source.kind
    root = Path(root).name if Path(root).is_absolute() else root
    return f"{root} ({source.split})" if source.split else root


def _last_probe(log: Path) -> dict[str, Any]:
    """The last row of a run's log that a probe wrote; empty where there is none."""
    if not log.is_file():
        return {}
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("}\n")]  # the last may be half a row
    return next((row for row in reversed(rows) if any(key.startswith(("cosine_", "knn_")) for key in row)), {})


def _scores(row: dict[str, Any], config: Config) -> list[str]:
    meaning = {
        "cosine_cls": "cosine similarity of class tokens, the student's through its head, and the teacher's",
        "cosine_patch": "cosine similarity of patch tokens, the student's through its head, and the teacher's",
        "knn_student": f"accuracy of {config.probe.neighbours} nearest neighbours by the student's class token",
        "knn_teacher": f"accuracy of {config.probe.neighbours} nearest neighbours by the teacher's class token",
    }
    lines = [
        f"| {meaning[name]}{f' ({teacher})' if teacher else ''} | {value:.3f} |"
        for key, value in row.items()
        for name, _, teacher in [key.partition("/")]
        if name in meaning and value is not None
    ]
    images = "its held-out images" if config.probe.split is None else f"images of the split `{config.probe.split}`"
    about = f"Measured by the run at step {row['step']}, at its own image size, on {images}, with the raw weights:"
    return [about, "", "| score | value |", "| --- | --- |", *lines]
