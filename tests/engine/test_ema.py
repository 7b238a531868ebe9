"""The moving average of the weights: how slow it is, and what it is."""

import pytest
import torch
from torch import nn

from proteus.engine.ema import build_ema


@pytest.mark.parametrize(
    ("steps", "decay"),
    [(1, 0.0), (10, 0.0), (20, 0.5), (1000, 0.99), (250_000, 0.99996), (375_000, 0.99996), (200_000, 0.99995)],
)
def test_the_automatic_decay(steps, decay):
    assert build_ema(nn.Linear(2, 2), "auto", steps).decay == pytest.approx(decay, abs=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99996])
def test_a_given_decay_holds_whatever_the_length(decay):
    assert build_ema(nn.Linear(2, 2), decay, 5).decay == decay


def test_no_average_where_none_is_wanted():
    assert build_ema(nn.Linear(2, 2), None, 1000) is None


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_the_average_is_the_recursion(decay):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    ema = build_ema(net, decay, 100)
    expected = [parameter.detach().double() for parameter in net.parameters()]
    for _ in range(7):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(net)
        expected = [
            decay * average + (1 - decay) * parameter.detach().double()
            for average, parameter in zip(expected, net.parameters(), strict=True)
        ]
    for average, wanted in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(average.double(), wanted, atol=1e-6, rtol=0)


def test_the_average_starts_as_a_copy():
    net = nn.Linear(3, 3)
    ema = build_ema(net, 0.9, 100)
    before = net.weight.detach().clone()
    with torch.no_grad():
        net.weight.add_(1)
    assert torch.equal(ema.module.weight, before)
