"""The linear probe of DINOv2 on ImageNet: a grid of heads trained at once on one pass of the frozen encoder."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from proteus.config import Augment
from proteus.data.loader import Batch, TrainingSet, training_batches
from proteus.data.sampler import Sampler
from proteus.data.sources import Source, hold_out
from proteus.data.transforms import TrainTransform
from proteus.errors import InputError, UnreadableError
from proteus.evaluation.extract import View, unreadable_image
from proteus.evaluation.linear_head import (
    HeadInput,
    LinearHead,
    class_subset,
    classify,
    head_inputs,
    possible_inputs,
)
from proteus.evaluation.metrics import accuracy
from proteus.models.encoder import Encoder

# For a global batch of 256. The first are those of DINOv2's code, the others those its paper lists.
RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1)
PAPER_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.3, 0.5)
MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearProtocol:
    """Length, rates and views of the training; the defaults are DINOv2's.

    epochs:       of as many samples as the training set has images, held-out ones counted.
    global_batch: images of a step over all processes; rates are scaled by global_batch / 256.
    rates:        learning rates before scaling.
    size, crop:   training crops of that size; in evaluation the short side goes to size / crop before.
    held_out:     share of the training set the honest choice is made on, at most a tenth; 0 trains on everything.
    batch_size:   images the encoder sees in one pass; it decides nothing but memory.
    """

    epochs: float = 10.0
    global_batch: int = 1024
    rates: Sequence[float] = RATES
    size: int = 224
    crop: float = 0.875
    held_out: float = 0.01
    seed: int = 0
    batch_size: int = 256
    workers: int = 0

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and self.global_batch > 0 and self.rates and min(self.rates) > 0):
            raise InputError("linear probe: epochs, global_batch and rates are above 0")
        if not (0 <= self.held_out <= 0.1 and 0 < self.crop <= 1 and self.size > 0 and self.seed >= 0):
            raise InputError("linear probe: held_out is 0 to 0.1, crop 0 to 1, size above 0, and seed at least 0")


class HeadScore(NamedTuple):
    """Accuracy of one head of the grid at the end of training: on the validation set, and on held-out images."""

    input: HeadInput
    lr: float
    accuracy: float
    held_out: float | None


class LinearResult(NamedTuple):
    """What the probe found.

    accuracy:        the best head's on the validation set that chose it, which is how published figures are made.
    head:            that head.
    honest_accuracy: on the validation set too, of the head that held-out training images chose: not comparable with
                     published figures. None where nothing was held out.
    honest:          which head that is.
    scores:          of all heads, by input and then rate.
    warning:         what to know before the figure is believed, or None.
    """

    accuracy: float
    head: LinearHead
    honest_accuracy: float | None
    honest: HeadScore | None
    scores: list[HeadScore]
    warning: str | None


def linear_probe(
    encoder: Encoder,
    train: Source,
    val: Source,
    accelerator: Accelerator,
    protocol: LinearProtocol = LinearProtocol(),
) -> LinearResult:
    """Train 2 blocks x 2 avgpool x 13 rates = 52 heads and take the best of them on `val` after the last step.

    SGD with momentum 0.9 and no weight decay, cosine to 0 over all steps, weights from N(0, 0.01), biases 0. Crops
    (scale 0.08 to 1, bicubic) and flips are those of (seed, position), so neither workers nor processes change them.

    An encoder with fewer than four blocks gives what it has. One whose blocks have no class token (convnets, SigLIP) is
    probed at its output alone, with what stands in for the token: 26 heads.

    InputError where a set has no labels or other classes than the other, an image cannot be read, or the encoder does
    not take images of the size.
    """
    numbers = _check(train, val, accelerator, protocol)
    encoder = encoder.to(accelerator.device).eval()
    steps = max(1, int(protocol.epochs * len(train)) // protocol.global_batch)
    held = None
    if protocol.held_out:
        train, held = hold_out(train, round(protocol.held_out * len(train)), protocol.seed)
    heads = _Heads(encoder, len(train.classes), accelerator, protocol)
    _train(encoder, heads, train, steps, accelerator, protocol)

    assert val.labels is not None
    on_val = heads.accuracies(encoder, val, numbers[val.labels])
    on_held = None
    if held is not None:
        assert held.labels is not None
        on_held = heads.accuracies(encoder, held, held.labels)
    scores = [
        HeadScore(seen, lr, on_val[i], None if on_held is None else on_held[i])
        for i, (seen, lr) in enumerate(heads.grid)
    ]
    best = int(np.argmax(on_val))
    honest = None if on_held is None else scores[int(np.argmax(on_held))]
    return LinearResult(
        scores[best].accuracy,
        heads.head(best, train.classes),
        None if honest is None else honest.accuracy,
        honest,
        scores,
        _warning(scores[best], protocol.rates),
    )


class _Heads:
    """The heads of the grid, those of one input as one weight [L, K, D] and bias [L, K] for L rates."""

    def __init__(self, encoder: Encoder, classes: int, accelerator: Accelerator, protocol: LinearProtocol):
        device, count = accelerator.device, len(protocol.rates)
        self.inputs = possible_inputs(encoder, protocol.size)
        self.grid = [(seen, lr) for seen in self.inputs for lr in protocol.rates]
        self.view = View(protocol.size, protocol.crop, protocol.batch_size, protocol.workers)
        self.global_batch, self.accelerator = protocol.global_batch, accelerator
        scaled = torch.tensor(protocol.rates, dtype=torch.float32, device=device) * (protocol.global_batch / 256)
        generator = torch.Generator().manual_seed(protocol.seed)
        self.parameters: list[tuple[Tensor, Tensor]] = []
        self.rates = scaled.view(-1, 1, 1), scaled.view(-1, 1)  # of weights and biases
        self.momenta: list[list[Tensor]] = []
        for seen in self.inputs:
            width = encoder.embed_dim * (max(seen.blocks, 1) + seen.avgpool)
            weight = torch.empty(count, classes, width).normal_(0, 0.01, generator=generator).to(device)
            both = weight.requires_grad_(), torch.zeros(count, classes, device=device, requires_grad=True)
            self.parameters.append(both)
            self.momenta.append([torch.zeros_like(part) for part in both])

    def logits(self, features: list[Tensor]) -> Iterator[Tensor]:
        """[B, L, K] for the features [B, D'] of each input: one matrix product for all rates."""
        for x, (weight, bias) in zip(features, self.parameters, strict=True):
            yield F.linear(x, weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)

    def step(self, features: list[Tensor], labels: Tensor, factor: float) -> None:
        """One step of SGD on this process's part of the global batch, at `factor` of the rates."""
        for i, logits in enumerate(self.logits(features)):
            rows = labels[:, None].expand(-1, logits.shape[1]).flatten()  # [B * L]
            # Heads share nothing, so the gradient of the sum of their losses is each one's own.
            loss = F.cross_entropy(logits.flatten(0, 1), rows, reduction="sum") / self.global_batch
            gradients = torch.autograd.grad(loss, self.parameters[i])
            for parameter, gradient, momentum, rate in zip(
                self.parameters[i], gradients, self.momenta[i], self.rates, strict=True
            ):
                if self.accelerator.num_processes > 1:
                    gradient = self.accelerator.reduce(gradient, reduction="sum")
                with torch.no_grad():  # by hand: torch's SGD has one rate for a whole parameter
                    momentum.mul_(MOMENTUM).add_(gradient)
                    parameter.addcmul_(momentum, rate, value=-factor)

    def accuracies(self, encoder: Encoder, source: Source, labels: np.ndarray) -> list[float]:
        """Of every head of the grid on a source, whose images have these labels [n]."""

        @torch.no_grad()
        def answer(images: Tensor) -> Tensor:
            features = head_inputs(encoder, images, self.inputs)
            return torch.cat([logits.argmax(-1) for logits in self.logits(features)], dim=1)

        answers = classify(source, self.view, self.accelerator, answer, len(self.grid))  # [n, heads]
        return [accuracy(of_head, labels) for of_head in answers.T]

    def head(self, index: int, classes: list[str]) -> LinearHead:
        """One head of the grid, on the CPU."""
        which, rate = divmod(index, len(self.rates[0]))
        weight, bias = (part.detach()[rate].cpu().clone() for part in self.parameters[which])
        return LinearHead(*self.grid[index], weight, bias, classes)


def _train(
    encoder: Encoder, heads: _Heads, train: Source, steps: int, accelerator: Accelerator, protocol: LinearProtocol
) -> None:
    augment = Augment(auto_augment=None, erasing=0.0)  # the crop and the flip remain
    dataset = TrainingSet(train, TrainTransform(protocol.size, augment), protocol.seed, patches=0, mask_ratio=0.0)
    world, rank = accelerator.num_processes, accelerator.process_index
    sampler = Sampler(len(train), protocol.global_batch // world, world, seed=protocol.seed)
    batches = training_batches(dataset, sampler, 0, steps, rank, protocol.workers)
    bar = tqdm(batches, "linear probe", steps, leave=False, disable=None if accelerator.is_main_process else True)
    for step, batch in enumerate(bar):
        if batch.bad:
            raise _unreadable(train, batch)
        batch = batch.to(accelerator.device)
        parts = [head_inputs(encoder, part, heads.inputs) for part in batch.images.split(protocol.batch_size)]
        features = [torch.cat(of_input) for of_input in zip(*parts, strict=True)]
        assert batch.labels is not None
        heads.step(features, batch.labels, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _check(train: Source, val: Source, accelerator: Accelerator, protocol: LinearProtocol) -> np.ndarray:
    """The number in `train` of every class of `val`; InputError where the two cannot be used."""
    for name, source in (("training", train), ("validation", val)):
        if source.labels is None or np.ndim(source.labels) != 1:
            raise InputError(f"linear probe: the {name} set has not one label an image; it needs them")
    if len(train) < 2 or not len(val):
        raise InputError(f"linear probe: {len(train)} training and {len(val)} validation images are too few")
    if protocol.global_batch % accelerator.num_processes:
        raise InputError(
            f"linear probe: {accelerator.num_processes} processes cannot share a global batch of "
            f"{protocol.global_batch} images; give a multiple"
        )
    return class_subset(train.classes, val.classes)


def _unreadable(source: Source, batch: Batch) -> UnreadableError:
    """What to say of the first image that was replaced by another."""
    index = batch.bad[0]
    try:
        source.load(index)
    except Exception as error:  # a decoder of a broken file may raise anything
        return UnreadableError(str(unreadable_image(source.name(index), error)))
    return UnreadableError(f"{source.name(index)} could not be read, and now it can: see to the storage")


def _warning(best: HeadScore, rates: Sequence[float]) -> str | None:
    if best.lr not in (min(rates), max(rates)):
        return None
    return f"the best learning rate, {best.lr:g}, is at an end of the grid: a better one may be beyond it"
