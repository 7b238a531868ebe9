"""A linear classifier on frozen features: what it is fed, and what it says of sets of images it was not trained on."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from proteus.data.sources import Source
from proteus.engine.atomic import write_file
from proteus.errors import InputError, nearest
from proteus.evaluation.extract import View, image_batches
from proteus.models.encoder import Encoder
from proteus.models.weights import read_checkpoint


class HeadInput(NamedTuple):
    """What a head sees: class tokens of the last `blocks` blocks, each after the final norm, earliest first.

    avgpool: and after them the mean patch token of the last. 0 blocks is the encoder's own output, with whatever stands
    in for its class token, where the blocks have none.
    """

    blocks: int
    avgpool: bool


@dataclass(frozen=True)
class LinearHead:
    """A trained head: weight [K, D] and bias [K] in float32, and the learning rate (before scaling) of its training."""

    input: HeadInput
    lr: float
    weight: Tensor
    bias: Tensor
    classes: list[str]

    def logits(self, encoder: Encoder, images: Tensor) -> Tensor:
        """[B, K] of images [B, 3, S, S]; InputError where the encoder has not the width the head was trained on."""
        (x,) = head_inputs(encoder, images, [self.input])
        if x.shape[1] != self.weight.shape[1]:
            raise InputError(
                f"the head takes features of {self.weight.shape[1]} values, and {encoder.name} gives {x.shape[1]}: "
                "it is another encoder's"
            )
        return F.linear(x, self.weight.to(x.device), self.bias.to(x.device))

    def to(self, device: torch.device) -> "LinearHead":
        """The head on a device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def save(self, path: Path) -> None:
        """Write a safetensors file; what is not a tensor is in its metadata."""
        facts = {**self.input._asdict(), "lr": self.lr, "classes": self.classes}
        state = {"weight": self.weight.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
        written = save(state, metadata={"format": "pt", "linear_head": json.dumps(facts)})
        write_file(path, lambda pending: pending.write_bytes(written))

    @staticmethod
    def load(path: Path) -> "LinearHead":
        """Read what `save` wrote; InputError where the file is none such."""
        state, metadata = read_checkpoint(path)
        try:
            facts = json.loads(metadata["linear_head"])
            seen = HeadInput(facts["blocks"], facts["avgpool"])
            return LinearHead(seen, facts["lr"], state["weight"], state["bias"], facts["classes"])
        except (KeyError, ValueError):
            raise InputError(f"{path} holds no linear head") from None


def possible_inputs(encoder: Encoder, size: int) -> list[HeadInput]:
    """DINOv2's inputs that an encoder has: 1 and 4 last blocks, or as many as there are, without and with avgpool.

    InputError where the encoder does not take images of size x size.
    """
    try:
        encoder.grid_of(size, size)
    except ValueError as error:
        raise InputError(f"linear probe: {error}; give another size") from None
    counts = [0]
    try:
        with torch.no_grad():
            (last,) = encoder.intermediate(torch.zeros(1, 3, size, size, device=encoder.mask_token.device), 1)
        if last.cls is not None:
            counts = sorted({1, min(4, encoder.num_blocks)})
    except ValueError:  # it does not show what is between its input and its output
        pass
    return [HeadInput(blocks, avgpool) for blocks in counts for avgpool in (False, True)]


@torch.no_grad()
def head_inputs(encoder: Encoder, images: Tensor, inputs: Sequence[HeadInput]) -> list[Tensor]:
    """Features [B, D'] float32 for each input, of one pass of the encoder: in float16 on a GPU, as DINOv2's."""
    with torch.autocast(images.device.type, torch.float16, enabled=images.device.type == "cuda"):
        most = max(seen.blocks for seen in inputs)
        features = encoder.intermediate(images, most) if most else [encoder(images)]
    cls = [of_block.cls.float() for of_block in features]
    pooled = features[-1].patch.float().mean(dim=1)
    return [
        torch.cat(cls[-max(blocks, 1) :] + ([pooled] if avgpool else []), dim=1).contiguous()
        for blocks, avgpool in inputs
    ]


def class_subset(head_classes: Sequence[str], set_classes: Sequence[str]) -> np.ndarray:
    """For every class of a set its number in the head [k]; InputError where the head does not know it.

    Classes are matched by name. Those of a set that names them 0, 1 ... by number, as ImageNet-V2, are the head's in
    its order, where there are as many.

    Logits [:, subset] are the set's: ImageNet-A and -R have 200 of the 1000 classes, and in DINOv2 only those compete.
    """
    number = {name: index for index, name in enumerate(head_classes)}
    if list(set_classes) == [str(index) for index in range(len(number))] and not set(set_classes) & set(number):
        return np.arange(len(number))
    for name in set_classes:
        if name not in number:
            raise InputError(f"class {name!r} is none of the {len(number)} the head knows{nearest(name, number)}")
    return np.array([number[name] for name in set_classes], dtype=np.int64)


def classify(
    source: Source, view: View, accelerator: Accelerator, answer: Callable[[Tensor], Tensor], width: int
) -> np.ndarray:
    """What `answer` [B, width] integers says of images [B, 3, S, S] uint8, for a whole source: [n, width].

    Process r answers for images r, r + W, ... and every process gets all answers, none twice. InputError, on every
    process, where an image cannot be read: it names the image.
    """
    device = accelerator.device
    answers = torch.zeros(len(source), width, dtype=torch.int64, device=device)
    unreadable: list[str] = []
    mine = range(accelerator.process_index, len(source), accelerator.num_processes)
    batches = [list(mine[start : start + view.batch_size]) for start in range(0, len(mine), view.batch_size)]
    with tqdm(
        total=len(source), unit="image", leave=False, disable=None if accelerator.is_main_process else True
    ) as bar:
        for numbers, images in zip(batches, image_batches(source, view, batches, device), strict=True):
            if isinstance(images, InputError):
                unreadable.append(str(images))
                break
            answers[numbers] = answer(images.to(device, non_blocking=True))
            bar.update(len(numbers) * accelerator.num_processes)  # the others are about as far
    if accelerator.num_processes > 1:
        unreadable = gather_object(unreadable)
    if unreadable:
        raise InputError(unreadable[0])
    if accelerator.num_processes > 1:
        answers = accelerator.reduce(answers, reduction="sum")
    return answers.cpu().numpy()
