"""The dense losses against their formulas."""

import math

import numpy as np
import pytest
import torch

from proteus.evaluation.dense.losses import cross_entropy, gradient_loss, sig_loss, silog_loss


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 4 + 0.5


def logs(depth, target, eps):
    valid = target > 0
    return np.log(depth[valid].numpy().astype(np.float64) + eps) - np.log(
        target[valid].numpy().astype(np.float64) + eps
    )


def with_holes(target):
    target = target.clone()
    target[:, ::3, ::2] = 0
    return target


def test_cross_entropy_divides_by_all_pixels():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    target = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1)).byte()
    target[0, :2] = 255
    expected = 0.0
    for b in range(2):
        for y in range(4):
            for x in range(5):
                if target[b, y, x] != 255:
                    expected -= float(logits[b, :, y, x].log_softmax(0)[int(target[b, y, x])]) / 40
    assert cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-5)
    assert cross_entropy(logits, torch.full_like(target, 255)).item() == 0


def test_cross_entropy_upsamples_the_logits():
    logits = torch.tensor([[[[4.0, -4.0]], [[-4.0, 4.0]]]])  # class 0 left, class 1 right
    target = torch.tensor([[[0, 0, 1, 1]] * 3]).byte()
    columns = [-8.0, -4.0, -4.0, -8.0]  # the margins of 8 and, a quarter of the way to the other pixel, of 4
    assert cross_entropy(logits, target).item() == pytest.approx(np.mean(np.log1p(np.exp(columns))), rel=1e-5)


@pytest.mark.parametrize("mean_only", [False, True])
def test_the_sig_loss(mean_only):
    depth, target = draw(3, 7, 9), with_holes(draw(3, 7, 9, seed=1))
    g = logs(depth, target, 1e-3)
    expected = math.sqrt((0 if mean_only else g.var(ddof=1)) + 0.15 * g.mean() ** 2)
    assert sig_loss(depth, target, mean_only).item() == pytest.approx(expected, rel=1e-5)


def test_the_silog_loss_is_of_each_image():
    depth, target = draw(3, 7, 9), with_holes(draw(3, 7, 9, seed=1))
    each = [logs(d[None], t[None], 0.0) for d, t in zip(depth, target, strict=True)]
    expected = np.mean([math.sqrt((g**2).mean() - 0.5 * g.mean() ** 2) for g in each])
    assert silog_loss(depth, target).item() == pytest.approx(expected, rel=1e-5)


def test_depths_that_are_not_positive_have_no_gradient_in_silog():
    depth = torch.tensor([[[-1.0, 0.0, 2.0, 3.0]]], requires_grad=True)
    silog_loss(depth, torch.tensor([[[1.0, 1.0, 1.0, 2.0]]])).backward()
    assert depth.grad[0, 0, :2].tolist() == [0, 0]
    assert (depth.grad[0, 0, 2:] != 0).all()


LOSSES = {
    "sig": sig_loss,
    "mean": lambda d, t: sig_loss(d, t, mean_only=True),
    "silog": silog_loss,
    "gradient": gradient_loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name):
    depth, target = draw(2, 14, 15).double().requires_grad_(), with_holes(draw(2, 14, 15, seed=1)).double()
    LOSSES[name](depth, target).backward()
    for place in ((0, 2, 3), (1, 6, 9)):
        up, down = depth.detach().clone(), depth.detach().clone()
        up[place] += 1e-2
        down[place] -= 1e-2
        slope = (LOSSES[name](up, target) - LOSSES[name](down, target)) / 2e-2
        assert depth.grad[place].item() == pytest.approx(slope.item(), rel=0.05, abs=2e-5)
    assert (depth.grad[target == 0] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", ["no reading", "one reading", "perfect"])
def test_what_has_no_spread_is_still_finite(name, case):
    depth, target = draw(2, 14, 15).requires_grad_(), torch.zeros(2, 14, 15)
    if case == "one reading":
        target[0, 3, 3] = 2.0
    elif case == "perfect":
        target = depth.detach().clone()
    value = LOSSES[name](depth, target)
    value.backward()
    assert value.isfinite()
    assert depth.grad.isfinite().all()
    if case != "one reading":
        assert value.item() == pytest.approx(0, abs=2e-6)


def test_the_gradient_loss_of_a_ramp():
    """g grows by 0.1 a row: two rows apart by 0.2 times the step of the scale."""
    g = 0.1 * torch.arange(24.0)[None, :, None].expand(2, 24, 18)
    target = torch.full((2, 24, 18), 2.0)
    depth = g.exp() * 2.001 - 1e-3
    expected = 0.0
    for step in (1, 2, 4, 6):
        rows = math.ceil(24 / step)
        expected += (rows - 2) / rows * 0.2 * step
    assert gradient_loss(depth, target).item() == pytest.approx(expected, rel=1e-4)
    sideways = gradient_loss(depth.transpose(1, 2), target.transpose(1, 2))
    assert sideways.item() == pytest.approx(expected, rel=1e-4)
    target[:, 5] = 0
    assert gradient_loss(depth, target) < expected
