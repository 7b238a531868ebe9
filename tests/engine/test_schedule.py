"""The learning rate against timm's scheduler, over whole runs."""

import math
from itertools import pairwise

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from proteus.config import Schedule
from proteus.engine.schedule import decayed_rate, learning_rate, scaled_rate

BASE = 3e-3


def timms(per_epoch: bool, length: int, warmup: int, schedule: Schedule):
    """timm's rate at step (or epoch) t."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=BASE)
    scheduler = CosineLRScheduler(
        optimizer,
        t_initial=length,
        lr_min=schedule.min_lr,
        warmup_t=warmup,
        warmup_lr_init=schedule.warmup_lr,
        t_in_epochs=per_epoch,
    )

    def rate(t):
        (scheduler.step if per_epoch else scheduler.step_update)(t)
        return optimizer.param_groups[0]["lr"]

    return rate


def rates(schedule, total, steps_per_epoch):
    return [learning_rate(step, total, steps_per_epoch, BASE, schedule) for step in range(total)]


@pytest.mark.parametrize("warmup", [0, 1, 17, 199])
def test_per_step_it_is_timms(warmup):
    schedule = Schedule(steps=200, warmup_steps=warmup, warmup_lr=2e-6, min_lr=1e-5)
    expected = timms(False, 200, warmup, schedule)
    assert rates(schedule, 200, 23) == pytest.approx([expected(step) for step in range(200)], rel=1e-12)


def test_per_step_a_warm_up_in_epochs_is_timms():
    schedule = Schedule(epochs=8, warmup_epochs=2.5, warmup_lr=0, min_lr=0)
    expected = timms(False, 80, 25, schedule)
    assert rates(schedule, 80, 10) == pytest.approx([expected(step) for step in range(80)], rel=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_per_epoch_it_is_timms(warmup):
    schedule = Schedule(epochs=30, warmup_epochs=warmup, warmup_lr=1e-6, min_lr=1e-5, per="epoch")
    expected = timms(True, 30, warmup, schedule)
    epochs = [expected(epoch) for epoch in range(30)]
    assert rates(schedule, 30 * 7, 7) == pytest.approx([epochs[step // 7] for step in range(30 * 7)], rel=1e-12)
    assert len(set(rates(schedule, 30 * 7, 7))) == 30


def test_the_ends():
    schedule = Schedule(steps=100, warmup_steps=10, warmup_lr=1e-6, min_lr=1e-5)
    assert learning_rate(0, 100, 10, BASE, schedule) == 1e-6
    # The cosine is not shifted by the warm-up: where that ends, it has gone a tenth of its way.
    after_warmup = 1e-5 + (BASE - 1e-5) * (1 + math.cos(math.pi / 10)) / 2
    assert learning_rate(10, 100, 10, BASE, schedule) == pytest.approx(after_warmup, rel=1e-12)
    assert learning_rate(50, 100, 10, BASE, schedule) == pytest.approx((BASE + 1e-5) / 2, rel=1e-12)
    assert 1e-5 < learning_rate(99, 100, 10, BASE, schedule) < 1.1e-5
    assert learning_rate(100, 100, 10, BASE, schedule) == pytest.approx(1e-5, rel=1e-12)


def test_without_warm_up_it_starts_at_the_base_rate_and_falls():
    schedule = Schedule(steps=50)
    values = rates(schedule, 50, 10)
    assert values[0] == BASE
    assert all(later < earlier for earlier, later in pairwise(values))


def test_the_warm_up_is_a_straight_line():
    values = rates(Schedule(steps=50, warmup_steps=20, warmup_lr=1e-4), 50, 10)[:20]
    steps = [later - earlier for earlier, later in pairwise(values)]
    assert steps == pytest.approx([(BASE - 1e-4) / 20] * 19)


@pytest.mark.parametrize(
    ("lr", "lr_batch", "batch", "expected"),
    [(5e-4, 512, 1024, 1e-3), (5e-4, 512, 64, 6.25e-5), (5e-4, 512, 512, 5e-4), (7e-4, None, 4096, 7e-4)],
)
def test_linear_scaling(lr, lr_batch, batch, expected):
    assert scaled_rate(lr, lr_batch, batch) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------ mmcv's schedules


@pytest.mark.parametrize(
    ("step", "shape", "shifted", "expected"),
    [
        (0, "line", False, 0.1),  # the warm-up's start times the whole curve
        (10, "line", False, (0.1 + 0.9 * 0.5) * 0.9),
        (20, "line", False, 0.8),  # a fifth of the line is gone when the warm-up ends
        (20, "line", True, 1.0),
        (10, "line", True, 0.1 + 0.9 * 0.5),
        (60, "line", True, 0.5),
        (99, "line", False, 0.01),
        (100, "line", True, 0.0),
        (50, "cosine", False, 0.5),
        (20, "cosine", False, (1 + math.cos(math.pi / 5)) / 2),
        (40, "cosine", True, (1 + math.cos(math.pi / 4)) / 2),
    ],
)
def test_a_curve_under_a_ramp(step, shape, shifted, expected):
    rate = decayed_rate(step, 100, BASE, shape=shape, warmup=20, start=0.1, shifted=shifted)
    assert rate == pytest.approx(BASE * expected, rel=1e-12)


def test_a_curve_ends_where_it_is_told():
    for shape in ("line", "cosine"):
        assert decayed_rate(100, 100, BASE, shape=shape, final=0.1) == pytest.approx(0.1 * BASE)
        assert decayed_rate(50, 100, BASE, shape=shape, final=0.1) == pytest.approx(0.55 * BASE)
        assert decayed_rate(0, 100, BASE, shape=shape) == BASE
