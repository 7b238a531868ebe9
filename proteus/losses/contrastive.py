"""The contrastive loss: whose class token is it?"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from proteus.losses.views import Projected, Target

TEMPERATURE = 0.07  # of cosine similarities (MoCo's)


def contrastive_loss(student: Projected, target: Target) -> Tensor:
    """InfoNCE of the student's class tokens [B, D] among the teacher's of the whole global batch, mean over the rows.

    The task-agnostic transfer of arXiv 2311.18237, whose exact form is not published. Here: cosine similarity divided
    by 0.07, and the cross-entropy with the teacher's token of the same image as the answer. All processes call it
    together, with batches of one size; the mean over them is what one process finds on the global batch.

    Under repeated augmentation a batch holds several crops of one image, each a false negative of the others.
    """
    queries = F.normalize(student.plain.cls.float(), dim=-1)  # [B, D]
    keys, first = _of_all_processes(F.normalize(target.features.cls.float(), dim=-1))  # [W * B, D]
    with torch.autocast(queries.device.type, enabled=False):  # bfloat16 would round the similarities before 1 / 0.07
        similarities = queries @ keys.T / TEMPERATURE  # [B, W * B]
    own = torch.arange(first, first + len(queries), device=queries.device)
    return F.cross_entropy(similarities, own)


def _of_all_processes(rows: Tensor) -> tuple[Tensor, int]:
    """The rows [B, D] of all processes, [W * B, D] and without gradient, and where this process's own begin."""
    rows = rows.detach().contiguous()
    if not (dist.is_available() and dist.is_initialized()):
        return rows, 0
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows)
    return torch.cat(gathered), dist.get_rank() * len(rows)
