"""Teachers of different scales on one footing: every dimension of their tokens with mean 0 and variance 1."""

import torch
from torch import Tensor, nn

EPS = 1e-6  # of a variance: a dimension that never moves stays 0


class Standardizer(nn.Module):
    """(x - mean) / sqrt(var + eps), each dimension by itself, over all tokens of the training so far.

    Squared errors of several teachers are then comparable, and no dimension counts more because its values are large.
    PHI-S (arXiv 2410.01680) balances its teachers so, with one scale after a rotation; this is the per-dimension form.

    In training mode the tokens that come in are counted first, those of all processes: n tokens with mean m and
    variance v change the statistics of the count before them, with w = n / (count + n), to (Chan et al., 1979)

        mean + w * (m - mean)   and   (1 - w) * var + w * v + w * (1 - w) * (m - mean)^2

    which are the mean and the (population) variance of everything seen. No large sums are kept, so float32 is exact
    enough. A batch with a value that is not finite leaves all as it is.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.var: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(dim))  # [D]
        self.register_buffer("var", torch.ones(dim))  # [D]

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [..., D] of a teacher, standardised, float32."""
        tokens = tokens.float()
        if self.training:
            self._count(tokens.flatten(0, -2))
        return (tokens - self.mean) * torch.rsqrt(self.var + EPS)

    def _count(self, tokens: Tensor) -> None:
        """Let tokens [n, D] into the statistics. Nothing here waits for the device."""
        n = len(tokens) * (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
        mean = _sum_over_processes(tokens.sum(dim=0)) / n  # [D]
        var = _sum_over_processes((tokens - mean).square().sum(dim=0)) / n  # [D]
        weight, difference = n / (self.count + n), mean - self.mean
        finite = (mean + var).isfinite().all()
        spread = (1 - weight) * self.var + weight * var + weight * (1 - weight) * difference.square()
        self.var.copy_(torch.where(finite, spread, self.var))
        self.mean.copy_(torch.where(finite, self.mean + weight * difference, self.mean))
        self.count.add_(finite * n)


def _sum_over_processes(sums: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    return sums
