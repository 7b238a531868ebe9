"""What stands on an encoder: projections to the teacher's width, and the heads of tasks."""

import math
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import save
from torch import Tensor, nn

from proteus.errors import InputError
from proteus.models.features import Features
from proteus.models.layouts import State
from proteus.models.weights import read_checkpoint

Kind = Literal["class", "pixel"]

_METADATA = "proteus_head"


class ProjectionHead(nn.Sequential):
    """LayerNorm then Linear, from the student's width to the teacher's; thrown away after training (papers: A1)."""

    def __init__(self, student_dim: int, teacher_dim: int):
        super().__init__()
        self.add_module("norm", nn.LayerNorm(student_dim))
        self.add_module("linear", nn.Linear(student_dim, teacher_dim))


class Classifier(nn.Linear):
    """A linear classifier on the class token: Features to logits [B, K].

    with_patches: also on the mean patch token, as DINOv2 publishes its classifiers: 2 D inputs.
    """

    def __init__(self, dim: int, classes: int, with_patches: bool = False):
        super().__init__(2 * dim if with_patches else dim, classes)
        self.with_patches, self.num_classes = with_patches, classes

    def forward(self, features: Features) -> Tensor:  # type: ignore[override]
        tokens = features.cls.to(self.weight.dtype)  # [B, D]
        if self.with_patches:
            tokens = torch.cat([tokens, features.patch.to(self.weight.dtype).mean(dim=1)], dim=-1)  # [B, 2 D]
        return super().forward(tokens)


class PixelClassifier(nn.Module):
    """A linear classifier of every patch, behind a LayerNorm: Features to a map of logits [B, K, h, w].

    The norm is not the batch norm of published protocols: what it computes does not depend on the other images.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.num_classes = classes
        self.norm = nn.LayerNorm(dim)
        self.linear = nn.Linear(dim, classes)

    def forward(self, features: Features) -> Tensor:
        logits = self.linear(self.norm(features.patch.to(self.linear.weight.dtype)))  # [B, N, K]
        return logits.transpose(1, 2).unflatten(2, features.grid)


class DualClassifier(nn.Module):
    """A head that learns from labels and one that learns from the teacher, together at test time (DHO, 2505.07675).

    Their gradients are in conflict where one head learns from both. Each is trained by itself; called as one head they
    give the logarithm of `mix` times the first one's probabilities plus (1 - mix) times the second one's.
    """

    def __init__(self, labelled: nn.Module, distilled: nn.Module, mix: float):
        super().__init__()
        self.labelled, self.distilled = labelled, distilled
        self.mix, self.num_classes = mix, labelled.num_classes

    def forward(self, features: Features) -> Tensor:
        # The logarithm of a share of 0 is not there to add.
        if self.mix == 1:
            return F.log_softmax(self.labelled(features).float(), dim=1)
        if self.mix == 0:
            return F.log_softmax(self.distilled(features).float(), dim=1)
        labelled = F.log_softmax(self.labelled(features).float(), dim=1) + math.log(self.mix)
        distilled = F.log_softmax(self.distilled(features).float(), dim=1) + math.log(1 - self.mix)
        return torch.logaddexp(labelled, distilled)  # [B, K] or [B, K, h, w]


def build_head(dim: int, classes: int, kind: Kind, mix: float | None = None) -> nn.Module:
    """A task's head on Features of width `dim`: of images (class) or of every patch (pixel). With `mix` a dual one."""
    if mix is not None:
        return DualClassifier(build_head(dim, classes, kind), build_head(dim, classes, kind), mix)
    return Classifier(dim, classes) if kind == "class" else PixelClassifier(dim, classes)


class _HeadFacts(BaseModel, allow_inf_nan=False, extra="forbid"):
    """What a file of ours says of its head."""

    kind: Kind
    classes: list[str] = []
    mix: Annotated[float, Field(ge=0, le=1, strict=True)] | None = None


def save_head(head: nn.Module, classes: list[str], path: str | Path) -> None:
    """Write a head of `build_head` and the names of its classes, in their order; [] where they have none."""
    if classes and len(classes) != head.num_classes:
        raise ValueError(f"{len(classes)} names for {head.num_classes} classes")
    one = head.labelled if isinstance(head, DualClassifier) else head
    if not isinstance(one, Classifier | PixelClassifier) or getattr(one, "with_patches", False):
        raise ValueError(f"{type(one).__name__} is not a head of build_head")
    facts = _HeadFacts(
        kind="class" if isinstance(one, Classifier) else "pixel",
        classes=classes,
        mix=head.mix if isinstance(head, DualClassifier) else None,
    )
    state = {key: value.detach().cpu().contiguous() for key, value in head.state_dict().items()}
    # One entry only: the library orders several at random.
    Path(path).write_bytes(save(state, metadata={_METADATA: facts.model_dump_json()}))


def read_head(path: str | Path, dim: int, key: str = "teacher.head") -> tuple[nn.Module, list[str]]:
    """(head in evaluation mode, names of its classes), on Features of width `dim`; [] where the file names none.

    A file of `save_head`, or of others with a linear classifier: tensors `weight` and perhaps `bias`, also as
    `head.weight` and `head.bias`, on the class token, or on class token and mean patch token as DINOv2 publishes it.
    InputError names `key`, the option that gave the path, and what does not fit.
    """
    state, metadata = read_checkpoint(path)
    source = f"{key} {str(path)!r}"
    if _METADATA not in metadata:
        return _foreign_head(state, dim, source).eval(), []
    try:
        facts = _HeadFacts.model_validate_json(metadata[_METADATA])
    except ValidationError as error:
        first = error.errors()[0]
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first["loc"] else first["msg"]
        raise InputError(f"{source}: what its metadata says of the head makes no sense ({told})") from None
    bias = ("labelled." if facts.mix is not None else "") + ("linear." if facts.kind == "pixel" else "") + "bias"
    outputs = (state[bias].numel() if bias in state else len(facts.classes)) or 1
    with torch.device("meta"):  # whose weights are not drawn: the student's start would be another one
        head = build_head(dim, outputs, facts.kind, facts.mix)
    own = head.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        raise InputError(f"{source} does not fit a network of width {dim}: {'; '.join(problems[:3])}")
    if facts.classes and len(facts.classes) != outputs:
        raise InputError(f"{source}: it names {len(facts.classes)} classes and has {outputs} outputs")
    return _filled(head, state).eval(), facts.classes


def _foreign_head(state: State, dim: int, source: str) -> nn.Module:
    weight = state.get("weight", state.get("head.weight"))
    bias = state.get("bias", state.get("head.bias"))
    if weight is None or weight.ndim != 2 or weight.shape[1] not in (dim, 2 * dim):
        raise InputError(
            f"{source}: expected a tensor `weight` of shape [classes, {dim}] or [classes, {2 * dim}], found "
            f"{list(weight.shape) if weight is not None else sorted(state)[:5]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{source}: bias is {list(bias.shape)}, not {list(weight.shape[:1])}")
    with torch.device("meta"):
        head = Classifier(dim, len(weight), with_patches=weight.shape[1] == 2 * dim)
    return _filled(head, {"weight": weight, "bias": torch.zeros(len(weight)) if bias is None else bias})


def _filled(head: nn.Module, state: State) -> nn.Module:
    head.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return head
