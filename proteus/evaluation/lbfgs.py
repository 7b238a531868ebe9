"""L-BFGS for many regularised linear models at once (Liu and Nocedal, 1989), with a stop by the gradient's norm.

Problem b minimises f_b(w) = strength_b * loss_b(z) + sum(decay * w^2) / 2, where z is linear in w. That the loss sees w
only through z makes the line search cheap: along a direction d, z moves by t * dz, and no step that is tried needs
another product with the data. The search looks for the zero of the slope, which unlike the value does not cancel near
the minimum.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HISTORY = 10
CHECK = 4  # iterations from one look at the certificate, which costs a value, to the next
FLATTER = 0.9  # the share of the slope at the start that may be left where a step ends
TRIALS = 20


class Objective(Protocol):
    """B problems. Points are [B, K, P], of which z is [B, K, n]."""

    @property
    def strength(self) -> Tensor:
        """[B], > 0."""

    @property
    def decay(self) -> Tensor:
        """[P], 1 or 0."""

    def linear(self, point: Tensor) -> Tensor:
        """z of points."""

    def residual(self, z: Tensor) -> Tensor:
        """The loss's derivative by z."""

    def pull_back(self, residual: Tensor) -> Tensor:
        """The loss's derivative by the point, given that by z."""

    def loss(self, z: Tensor) -> Tensor:
        """[B]."""

    def curvature(self, residual: Tensor) -> Tensor:
        """An estimate > 0 of the diagonal of the loss's Hessian, [B, K, P], from the residual."""

    def select(self, rows: Tensor) -> "Objective":
        """Those of the problems that rows [B] bool name."""


class Minimum(NamedTuple):
    """Points [B, K, P], values there [B], which problems converged [B] bool, and the iterations each took [B]."""

    point: Tensor
    value: Tensor
    converged: Tensor
    iterations: Tensor


class _State(NamedTuple):
    """What an iteration hands to the next, of the problems that still run."""

    number: Tensor  # [B] the place of the problem in the result
    point: Tensor
    z: Tensor
    gradient: Tensor
    curvature: Tensor
    steps: Tensor  # [B, m, K * P] the last changes of the point, oldest first
    changes: Tensor  # of the gradient; a pair that says nothing is 0 in both

    def select(self, rows: Tensor) -> "_State":
        return _State(*(field[rows] for field in self))


@torch.inference_mode()
def minimise(objective: Objective, start: Tensor, tolerance: float, max_iter: int = 1000) -> Minimum:
    """Minimise from start [B, K, P], in its dtype and on its device.

    A problem has converged when the certificate is at most `tolerance` times its value. A point whose decay is 1
    everywhere has f(w) - min f <= |gradient|^2 / 2 (strong convexity); a coordinate without decay (an intercept) counts
    gradient^2 / (2 curvature), as if it did not interact. A problem also ends where no step goes downhill any more.
    """
    batch = len(start)
    point, value = start.clone(), torch.empty(batch, dtype=start.dtype, device=start.device)
    converged = torch.zeros(batch, dtype=torch.bool, device=start.device)
    iterations = torch.full((batch,), max_iter, device=start.device)
    z = objective.linear(start)
    none = start.new_zeros(batch, 0, start[0].numel())
    residual = objective.residual(z)
    gradient, curvature = _gradient(objective, start, residual), _curvature(objective, residual)
    state = _State(torch.arange(batch, device=start.device), start, z, gradient, curvature, none, none)
    stuck = torch.zeros_like(converged)
    for iteration in range(max_iter + 1):
        if iteration % CHECK == 0 or iteration == max_iter:
            here = (
                objective.strength * objective.loss(state.z) + (objective.decay * state.point.square()).sum((1, 2)) / 2
            )
            gap = _certificate(state, objective.decay)
            number = state.number
            point[number], value[number], converged[number] = state.point, here, gap <= tolerance * here
            ended = converged[number] | stuck
            iterations[number[ended]] = iteration
            if iteration == max_iter or bool(ended.all()):
                break
            if bool(ended.any()):
                state, objective, stuck = state.select(~ended), objective.select(~ended), stuck[~ended]
        state, moved = _iterate(objective, state, renew=(iteration + 1) % CHECK == 0)
        stuck = stuck | ~moved
    return Minimum(point, value, converged, iterations)


def _certificate(state: _State, decay: Tensor) -> Tensor:
    """An estimate [B] of how far values are from their minima; a bound where all coordinates have decay 1."""
    return (state.gradient.square() / torch.where(decay > 0, 1, state.curvature)).sum((1, 2)) / 2


def _iterate(objective: Objective, state: _State, renew: bool) -> tuple[_State, Tensor]:
    """One step of every problem, and which of them found one [B] bool. renew: estimate the curvature where it ends."""
    direction = _direction(state)
    step, z, residual = _search(objective, state, direction)
    point = state.point + step[:, None, None] * direction
    gradient = _gradient(objective, point, residual)
    curvature = _curvature(objective, residual) if renew else state.curvature
    pair = (point - state.point).flatten(1), (gradient - state.gradient).flatten(1)
    known = (_dot(*pair) > 0)[:, None]
    steps, changes = (
        torch.cat([past[:, -HISTORY + 1 :], torch.where(known, new, 0)[:, None]], 1)
        for past, new in zip((state.steps, state.changes), pair, strict=True)
    )
    return _State(state.number, point, z, gradient, curvature, steps, changes), step > 0


def _gradient(objective: Objective, point: Tensor, residual: Tensor) -> Tensor:
    return objective.strength[:, None, None] * objective.pull_back(residual) + objective.decay * point


def _curvature(objective: Objective, residual: Tensor) -> Tensor:
    return objective.strength[:, None, None] * objective.curvature(residual) + objective.decay


def _direction(state: _State) -> Tensor:
    """Minus the inverse Hessian's estimate times the gradient, in matrices (Byrd, Nocedal and Schnabel, 1994, eq. 2.6).

    The estimate starts from the inverse of the curvature, scaled to what the newest pair has seen.
    """
    steps, changes, gradient = state.steps, state.changes, state.gradient.flatten(1)
    inverse = 1 / state.curvature.flatten(1)  # [B, K * P]
    if not steps.shape[1]:
        return -(inverse * gradient).view_as(state.gradient)
    scaled = changes * inverse[:, None]
    products, energies = steps @ changes.mT, scaled @ changes.mT  # [B, m, m]
    scale = products[:, -1, -1] / energies[:, -1, -1]
    scale = torch.where(scale > 0, scale, 1)[:, None, None]
    diagonal = products.diagonal(dim1=1, dim2=2)
    upper = products.triu() + (diagonal == 0).to(products).diag_embed()
    inside = scale * energies + diagonal.diag_embed()
    u = torch.linalg.solve_triangular(upper, steps @ gradient[:, :, None], upper=True)
    right = inside @ u - scale * (scaled @ gradient[:, :, None])  # [B, m, 1]
    a = torch.linalg.solve_triangular(upper.mT, right, upper=False)
    ahead = scale[:, 0] * (inverse * gradient - (u.mT @ scaled)[:, 0]) + (a.mT @ steps)[:, 0]
    return -ahead.view_as(state.gradient)


def _search(objective: Objective, state: _State, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps [B] to where the slope is flatter than at the start (FLATTER), with z and the residual there.

    Convexity makes the slope grow with the step: one that is still negative is a lower end, a positive one an upper
    end, and secants close in. Where that finds nothing in time, the lower end is taken, which is downhill or 0.
    """
    dz = objective.linear(direction)
    straight = _dot(objective.decay * state.point, direction)
    bend = _dot(objective.decay * direction, direction)
    at_start = _dot(state.gradient, direction)
    step = torch.ones_like(at_start)
    low, high = torch.zeros_like(step), torch.full_like(step, float("inf"))
    low_slope, high_slope = at_start, torch.zeros_like(step)
    for _ in range(TRIALS):
        z = torch.addcmul(state.z, step[:, None, None], dz)
        residual = objective.residual(z)
        slope = objective.strength * _dot(residual, dz) + straight + step * bend
        good = slope.abs() <= FLATTER * at_start.abs()
        if bool(good.all()):
            return step, z, residual
        below = slope < 0
        low, low_slope = torch.where(below, step, low), torch.where(below, slope, low_slope)
        high, high_slope = torch.where(below, high, step), torch.where(below, high_slope, slope)
        secant = low - low_slope * (high - low) / (high_slope - low_slope)
        inside = secant.clamp(low + 0.1 * (high - low), high - 0.1 * (high - low))
        step = torch.where(good, step, torch.where(high.isinf(), 4 * step, inside))
    step = torch.where(good, step, low)
    z = torch.addcmul(state.z, step[:, None, None], dz)
    return step, z, objective.residual(z)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products [B]."""
    return torch.linalg.vecdot(a.flatten(1), b.flatten(1))
