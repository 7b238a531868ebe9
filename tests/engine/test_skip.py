"""What a skipped step leaves behind: nothing."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from proteus.engine.skip import Statistics, average_unless, fail_together

YES, NO = torch.tensor(True), torch.tensor(False)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 7, 3))


def moved(module: nn.Module) -> nn.Module:
    """One that has seen a batch and made a step."""
    module(torch.randn(2, 3, 8, 8))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("decay", [0.99996, 0.9, 0.3])
def test_the_average_is_timms_to_the_bit_and_a_skipped_step_leaves_it(decay):
    module = network()
    timms, ours = ModelEmaV3(module, decay=decay), ModelEmaV3(module, decay=decay)
    for _ in range(4):
        moved(module)
        timms.update(module)
        average_unless(NO, ours, module)
        assert same(timms.module, ours.module)
    with torch.no_grad():
        module[0].weight.add_(1)
    average_unless(YES, ours, module)
    assert same(timms.module, ours.module)
    average_unless(NO, ours, module)
    assert not same(timms.module, ours.module)


def test_batch_statistics_come_back_only_where_the_step_was_skipped():
    module = network()
    statistics = Statistics(module)
    for skipped in (NO, YES):
        before = copy.deepcopy(module[1])
        statistics.keep()
        module(torch.randn(2, 3, 8, 8))
        module(torch.randn(2, 3, 8, 8))
        statistics.restore(skipped)
        assert same(before, module[1]) == bool(skipped)
    assert module[1].num_batches_tracked == 2


def test_a_transformer_has_no_statistics_to_keep():
    statistics = Statistics(nn.TransformerEncoderLayer(8, 2))
    statistics.keep()
    assert statistics._kept == []


@pytest.mark.parametrize("loss", [2.5, float("inf"), float("-inf"), float("nan")])
def test_the_gradient_of_a_loss_that_is_not_finite_is_none_either(loss):
    weight = torch.tensor(3.0, requires_grad=True)
    value = weight * 2 + loss  # its gradient is 2 whatever the loss
    fail_together(value).backward()
    assert weight.grad is not None
    assert weight.grad == 2 if loss == 2.5 else weight.grad.isnan()
    assert fail_together(value).isfinite() == (loss == 2.5)
