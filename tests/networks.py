"""What tests of networks compare."""

import torch


def images(*size):
    """Two images of random pixels, always the same."""
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same_network(a, b, *sizes):
    """Two encoders have the same weights, and the same features of images of these sizes, bit for bit."""
    own, other = a.network.state_dict(), b.network.state_dict()
    assert own.keys() == other.keys()
    for key, value in own.items():
        assert torch.equal(value, other[key]), key
    for size in sizes:
        for one, two in zip(a.eval()(images(*size)), b.eval()(images(*size)), strict=True):
            assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
