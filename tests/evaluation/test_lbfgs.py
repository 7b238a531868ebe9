"""Batched L-BFGS on problems whose minimum is known."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from proteus.evaluation.lbfgs import minimise


class LeastSquares(NamedTuple):
    """strength * |z - target|^2 / 2, z = x w, as an `Objective` with K = 1."""

    x: Tensor  # [n, P]
    target: Tensor  # [B, 1, n]
    strength: Tensor
    decay: Tensor
    diagonal: bool = True

    def linear(self, point):
        return point @ self.x.T

    def residual(self, z):
        return z - self.target

    def pull_back(self, residual):
        return residual @ self.x

    def loss(self, z):
        return (z - self.target).square().sum((1, 2)) / 2

    def curvature(self, residual):
        diagonal = self.x.square().sum(0)
        diagonal = diagonal if self.diagonal else diagonal.mean().expand(12)
        return diagonal.expand(len(residual), 1, -1)

    def select(self, rows):
        return self._replace(target=self.target[rows], strength=self.strength[rows])

    def minimum(self) -> tuple[Tensor, Tensor]:
        gram, right = self.x.T @ self.x, self.target[:, 0] @ self.x
        points = torch.stack(
            [torch.linalg.solve(s * gram + self.decay.diag(), s * r) for s, r in zip(self.strength, right, strict=True)]
        )[:, None]
        decayed = (self.decay * points.square()).sum((1, 2)) / 2
        return points, self.strength * self.loss(self.linear(points)) + decayed


def problem(strengths, diagonal=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 12, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 12, dtype=torch.float64)
    target = torch.randn(len(strengths), 1, 40, generator=generator, dtype=torch.float64)
    decay = torch.ones(12, dtype=torch.float64)
    decay[-1] = 0
    return LeastSquares(x, target, torch.tensor(strengths, dtype=torch.float64), decay, diagonal)


@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "a bad estimate"])
@pytest.mark.parametrize("tolerance", [1e-3, 1e-9])
def test_the_certificate_bounds_the_error(tolerance, diagonal):
    p = problem([1e-4, 1e-2, 1.0, 100.0, 1e4], diagonal)
    found = minimise(p, torch.zeros(5, 1, 12, dtype=torch.float64), tolerance)
    _, best = p.minimum()
    assert found.converged.all()
    excess = (found.value - best) / best
    assert (excess > -1e-12).all()
    assert (excess <= tolerance).all()


def test_problems_do_not_feel_each_other():
    p = problem([1e-3, 1.0, 1e3])
    together = minimise(p, torch.zeros(3, 1, 12, dtype=torch.float64), 1e-10)
    assert together.iterations.unique().numel() > 1  # some left before others
    for b in range(3):
        only = torch.arange(3) == b
        alone = minimise(p.select(only), torch.zeros(1, 1, 12, dtype=torch.float64), 1e-10)
        torch.testing.assert_close(together.point[only], alone.point, rtol=1e-6, atol=1e-9)


def test_a_minimum_is_left_at_once():
    p = problem([0.1, 10.0])
    points, best = p.minimum()
    found = minimise(p, points, 1e-9)
    assert found.iterations.tolist() == [0, 0]
    assert torch.equal(found.point, points)
    torch.testing.assert_close(found.value, best)


def test_too_few_iterations_are_owned_up_to():
    p = problem([1e-6, 1e4])
    found = minimise(p, torch.zeros(2, 1, 12, dtype=torch.float64), 1e-12, max_iter=3)
    assert not found.converged[1]
    assert found.iterations[1] == 3
    _, best = p.minimum()
    assert found.value[1] > best[1]
