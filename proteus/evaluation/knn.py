"""The k-nearest-neighbour probe of DINOv2."""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: int = 20, temperature: float = 0.07
) -> float:
    """Share of queries [m, D] whose label [m] wins the vote of their k nearest in the bank [n, D], labels [n].

    Neighbours by cosine similarity; each votes with softmax(similarity / temperature) (Wu et al., 2018).
    """
    bank, queries = F.normalize(bank, dim=-1), F.normalize(queries, dim=-1)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = 0
    for part, truth in zip(queries.split(1024), labels.split(1024), strict=True):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=-1)  # [b, k]
        votes = torch.zeros(len(part), classes).scatter_add_(
            1, bank_labels[nearest], (similarity / temperature).softmax(-1)
        )
        correct += int((votes.argmax(-1) == truth).sum())
    return correct / len(queries)
