"""Heads: what they compute, their shapes, and their parameters counted by hand."""

import pytest
import torch
import torch.nn.functional as F

from proteus.evaluation.dense.dpt import Dpt, Fusion
from proteus.evaluation.dense.heads import BinsDepth, LinearSegmentation
from proteus.evaluation.dense.upernet import Logits, UperNet
from proteus.models.features import Features


def tokens(width, grid, count=4, batch=2):
    generator = torch.Generator().manual_seed(0)
    h, w = grid
    return [
        Features(
            torch.randn(batch, width, generator=generator), torch.randn(batch, h * w, width, generator=generator), grid
        )
        for _ in range(count)
    ]


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_linear_segmentation_by_hand():
    features = tokens(6, (3, 5), count=2)
    head = LinearSegmentation(12, 7, batch_norm=False)
    logits = head(features)
    assert logits.shape == (2, 7, 3, 5)
    token = torch.cat([features[0].patch[1, 2 * 5 + 4], features[1].patch[1, 2 * 5 + 4]])
    expected = head.classify.weight[:, :, 0, 0] @ token + head.classify.bias
    torch.testing.assert_close(logits[1, :, 2, 4], expected)
    assert parameters(head) == 12 * 7 + 7
    assert 0.005 < head.classify.weight.std() < 0.015
    assert (head.classify.bias == 0).all()


def test_batch_norm_comes_before_the_convolution():
    features = tokens(6, (3, 5), count=1)
    features = [features[0]._replace(patch=features[0].patch * 50 + 30)]
    head = LinearSegmentation(6, 7, batch_norm=True)
    assert parameters(head) == 6 * 7 + 7 + 2 * 6
    x = features[0].patch.flatten(0, 1)  # [B * N, D]
    normed = (x - x.mean(0)) / x.std(0, correction=0)
    expected = normed @ head.classify.weight[:, :, 0, 0].T
    torch.testing.assert_close(head(features).permute(0, 2, 3, 1).flatten(0, 2), expected, atol=1e-4, rtol=1e-3)


def test_bins_in_the_order_of_the_original():
    """Upsampling first, then the convolution: the same depth."""
    features = tokens(6, (3, 4), count=2)
    head = BinsDepth(24, 16, 1e-3, 10.0, upsample=4)
    maps = []
    for part in features:
        grid = part.patch.transpose(1, 2).reshape(2, 6, 3, 4)
        both = torch.cat([grid, part.cls[:, :, None, None].expand(2, 6, 3, 4)], dim=1)
        maps.append(F.interpolate(both, scale_factor=4, mode="bilinear", align_corners=False))
    weights = head.classify(torch.cat(maps, dim=1)).relu() + 0.1
    weights = weights / weights.sum(1, keepdim=True)
    expected = torch.einsum("bkhw,k->bhw", weights, torch.linspace(1e-3, 10, 16))[:, None]
    depth = head(features)
    assert depth.shape == (2, 1, 12, 16)
    torch.testing.assert_close(depth, expected)
    assert parameters(head) == 24 * 16 + 16
    assert (depth > 0).all()
    assert (depth < 10).all()


def test_without_a_preference_depth_is_the_middle():
    head = BinsDepth(24, 256, 1e-3, 10.0, upsample=1)
    torch.nn.init.zeros_(head.classify.weight)
    torch.nn.init.constant_(head.classify.bias, -1.0)
    torch.testing.assert_close(head(tokens(6, (2, 2), count=2)), torch.full((2, 1, 2, 2), 5.0005))


# ------------------------------------------------------------------------------------------------------------- UperNet


@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_upernet_shapes(grid):
    head = UperNet(16, 9, dropout=0.1)
    h, w = grid
    trained = head.train()(tokens(16, grid))
    assert isinstance(trained, Logits)
    assert trained.main.shape == (2, 9, 4 * h, 4 * w)
    assert trained.auxiliary.shape == (2, 9, h, w)
    assert head.eval()(tokens(16, grid)).shape == (2, 9, 4 * h, 4 * w)


@pytest.mark.parametrize(("d", "classes"), [(384, 150), (768, 150), (16, 3)])
def test_upernet_parameters(d, classes):
    with torch.device("meta"):
        head = UperNet(d, classes, dropout=0.1)
    up, norm = 4 * d * d + d, 2 * d
    neck = up + norm + up + up
    pools = 4 * (d * d + norm)
    bottleneck = 5 * d * d * 9 + norm
    laterals = 3 * (d * d + norm)
    smooths = 3 * (9 * d * d + norm)
    fuse = 4 * d * d * 9 + norm
    main = d * classes + classes
    auxiliary = 9 * d * 256 + 2 * 256 + 256 * classes + classes
    assert parameters(head) == neck + pools + bottleneck + laterals + smooths + fuse + main + auxiliary


def test_every_level_of_upernet_matters_and_the_auxiliary_head_sees_the_third():
    head = UperNet(16, 3, dropout=0.0)
    features = tokens(16, (6, 6))
    for part in features:
        part.patch.requires_grad_()
    main, auxiliary = head.train()(features)
    of_main = torch.autograd.grad(main.square().sum(), [part.patch for part in features], retain_graph=True)
    assert all(gradient.abs().sum() > 0 for gradient in of_main)
    of_auxiliary = torch.autograd.grad(auxiliary.square().sum(), [p.patch for p in features], allow_unused=True)
    assert [gradient is not None for gradient in of_auxiliary] == [False, False, True, False]


# ----------------------------------------------------------------------------------------------------------------- DPT


def dpt(width, channels, proteus):
    return Dpt(width, channels, proteus=proteus, dropout=0.1, min_depth=1e-3)


@pytest.mark.parametrize("grid", [(6, 4), (5, 7), (1, 2)])
def test_dpt_shapes(grid):
    half = [-(-side // 2) for side in grid]
    depth = dpt(16, 8, False)(tokens(16, grid))
    assert depth.shape == (2, 1, *(32 * side for side in half))
    assert (depth >= 1e-3).all()
    assert dpt(16, 8, True)(tokens(16, grid)).shape == (2, 1, *(16 * side for side in half))


@pytest.mark.parametrize("proteus", [False, True])
@pytest.mark.parametrize(("d", "c"), [(384, 256), (1024, 256), (16, 8)])
def test_dpt_parameters(d, c, proteus):
    with torch.device("meta"):
        head = dpt(d, c, proteus)
    widths = [d // 8, d // 4, d // 2, d]
    norm = 2 * c if proteus else 0
    readouts = 4 * (2 * d * d + d)
    projects = sum(d * w + w for w in widths)
    scales = 16 * widths[0] ** 2 + widths[0] + 4 * widths[1] ** 2 + widths[1] + 9 * d * d + d
    widen = sum(9 * w * c for w in widths)
    fusions = 7 * 2 * (9 * c * c + norm) + 4 * (c * c + c)  # the coarsest has one residual unit, the others two
    project = 9 * c * c + (norm or c)
    predict = c + 1 if proteus else 9 * c * (c // 2) + c // 2 + 9 * (c // 2) * 32 + 32 + 32 + 1
    assert parameters(head) == readouts + projects + scales + widen + fusions + project + predict


def test_the_class_token_is_read_by_both_heads():
    for proteus in (False, True):
        head = dpt(16, 8, proteus).eval()
        features = tokens(16, (4, 4))
        others = [part._replace(cls=part.cls + 5) for part in features]
        # the maps, not the depth: relu may hide them
        a, b = (torch.cat([x.flatten() for x in head.reassemble(f)]) for f in (features, others))
        assert not torch.equal(a, b)


def test_proteus_depth_has_either_sign():
    head = dpt(16, 8, True).eval()
    with torch.no_grad():
        head.predict[1].bias.fill_(-3.0)
        assert (head(tokens(16, (4, 4))) < 0).all()


def test_a_fusion_by_hand():
    torch.manual_seed(0)
    fusion = Fusion(4, norm=False, first=False)
    x, skip = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 5, 6)

    def residual(unit, x):
        first, second = unit.layers[1][0], unit.layers[3][0]
        assert first.bias is None
        return x + F.conv2d(F.conv2d(x.relu(), first.weight, padding=1).relu(), second.weight, padding=1)

    y = x + residual(fusion.enter, F.interpolate(skip, size=(6, 6), mode="bilinear", align_corners=False))
    y = F.interpolate(residual(fusion.refine, y), scale_factor=2, mode="bilinear", align_corners=True)
    torch.testing.assert_close(fusion(x, skip), fusion.project(y))


def test_dpt_fuses_from_coarse_to_fine():
    head, seen = dpt(16, 8, False), []
    for fusion in head.fusions:
        fusion.register_forward_pre_hook(lambda _, inputs: seen.append([x.shape[-1] for x in inputs]))
    head(tokens(16, (6, 6)))
    assert seen == [[3], [6, 6], [12, 12], [24, 24]]
