"""The k-nearest-neighbour probe of DINOv2."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from proteus.errors import InputError

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
QUERIES, BANK = 1024, 65536  # images a part: their similarities are 256 MB


class Score(NamedTuple):
    """Shares of the queries whose label gets the most votes, and is among the five that get the most."""

    top1: float
    top5: float


@torch.no_grad()
def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | None = None,
) -> dict[int, Score]:
    """For each k: how many queries [m, D], labels [m], get the right votes from their k nearest in the bank [n, D].

    Neighbours by cosine similarity; each votes with softmax(similarity / temperature) (Wu et al., 2018), as in DINOv2
    over the nearest max(ks) once. A k above n is n. A class without a vote is never right, and of classes with as many
    votes the first wins.

    Features of any precision are compared in float32 on `device`, by default the bank's. The bank passes over it once,
    in parts, so it may be larger than the device and lie elsewhere; InputError where it is empty or a k below 1.
    """
    if min(ks) < 1 or not len(bank):
        raise InputError(f"k-NN: k = {min(ks)} neighbours of {len(bank)} images; both must be at least 1")
    device = device or bank.device
    queries, labels = F.normalize(queries.to(device).float(), dim=-1), labels.to(device)
    similarity, neighbours = _nearest(bank, queries, min(max(ks), len(bank)))  # [m, K], the nearest first
    weights = (similarity / temperature).softmax(-1)
    voted = bank_labels.to(device)[neighbours]  # [m, K]
    classes = int(max(bank_labels.max(), labels.max())) + 1
    return {k: _score(voted[:, :k], weights[:, :k], labels, classes) for k in ks}


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    k: int = 20,
    temperature: float = TEMPERATURE,
) -> float:
    """Share of queries [m, D] whose label [m] wins the vote of their k nearest in the bank [n, D], labels [n]."""
    return knn(bank, bank_labels, queries, labels, (k,), temperature)[k].top1


def _nearest(bank: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity [m, k] to the nearest of the bank, and their numbers in it; the nearest first."""
    similarity = queries.new_full((len(queries), k), -torch.inf)
    numbers = torch.zeros_like(similarity, dtype=torch.int64)
    for start in range(0, len(bank), BANK):
        part = F.normalize(bank[start : start + BANK].to(queries.device).float(), dim=-1)  # [n', D]
        for first in range(0, len(queries), QUERIES):
            here = slice(first, first + QUERIES)
            near, number = (queries[here] @ part.T).topk(min(k, len(part)), dim=-1)
            best, of = torch.cat([similarity[here], near], dim=1).topk(k, dim=-1)
            numbers[here] = torch.cat([numbers[here], number + start], dim=1).gather(1, of)
            similarity[here] = best
    return similarity, numbers


def _score(voted: Tensor, weights: Tensor, labels: Tensor, classes: int) -> Score:
    """What the votes [m, k] with their weights [m, k] are worth."""
    top1 = top5 = torch.zeros((), dtype=torch.int64, device=labels.device)
    for classes_voted, weight, truth in zip(
        voted.split(QUERIES), weights.split(QUERIES), labels.split(QUERIES), strict=True
    ):
        votes = weight.new_zeros(len(weight), classes).scatter_add_(1, classes_voted, weight)
        own = votes.gather(1, truth[:, None])  # [b, 1]
        before = torch.arange(classes, device=truth.device) < truth[:, None]
        rank = ((votes > own) | ((votes == own) & before)).sum(1)  # classes that beat the right one
        known = own[:, 0] > 0
        top1 = top1 + ((rank < 1) & known).sum()
        top5 = top5 + ((rank < 5) & known).sum()
    return Score(top1.item() / len(labels), top5.item() / len(labels))
