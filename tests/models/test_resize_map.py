"""Maps at another size."""

import pytest
import torch
import torch.nn.functional as F

from proteus.models.features import Features, resize_map, resize_patches


def maps(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [(8, 10), (3, 4), (2, 20), (9, 3), (1, 1)], ids=str)
def test_it_is_bilinear_interpolation_with_antialiasing(size):
    x = maps(2, 3, 4, 5).requires_grad_(True)
    expected = F.interpolate(x, size, mode="bilinear", antialias=True)
    weights = maps(*expected.shape)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    found = resize_map(x, size)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), x)[0], gradient, atol=1e-5, rtol=0)


def test_corners_by_hand():
    x = torch.tensor([[[[0.0, 4.0]]]])
    assert resize_map(x, (1, 4)).flatten().tolist() == [0, 1, 3, 4]  # pixel centres at -1/4, 1/4, 3/4, 5/4 of the old
    assert resize_map(x, (1, 1)).item() == 2


def test_it_is_what_patches_get():
    x = maps(2, 7, 4, 5)
    patches = resize_patches(Features(x[:, :, 0, 0], x.flatten(2).transpose(1, 2), (4, 5)), (6, 3)).patch
    torch.testing.assert_close(resize_map(x, (6, 3)).flatten(2).transpose(1, 2), patches, atol=1e-6, rtol=0)


def test_an_equal_size_is_left_alone_and_another_is_float32():
    x = maps(1, 2, 4, 5).bfloat16()
    assert resize_map(x, (4, 5)) is x
    with torch.autocast("cpu", torch.bfloat16):
        larger = resize_map(x, (8, 10))
    assert larger.dtype == torch.float32
    assert torch.equal(larger, resize_map(x.float(), (8, 10)))
