"""The optimiser's groups, the clipped step, and the step that is not taken."""

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from proteus.config import Optimizer
from proteus.engine.update import build_optimizer, finite_step, scaled_groups, set_rate
from proteus.models import create_model
from proteus.training.sizes import Sizes
from proteus.training.task import Adaptor, Distillation

CONFIG = Optimizer(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)  # one per process, and other tests may want another
    yield Accelerator(cpu=True, mixed_precision="no")
    AcceleratorState._reset_state(reset_partial_state=True)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3))


class Trainer:
    """A small network with its optimiser; the gradient of step t is a function of t and the weights."""

    def __init__(self, accelerator, clip=None, scale=1.0):
        self.accelerator, self.clip, self.scale = accelerator, clip, scale
        self.net = accelerator.prepare(network())
        self.optimizer = accelerator.prepare(build_optimizer(self.net, CONFIG))

    def backward(self, t):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
        self.accelerator.backward(self.scale * self.net(x).square().mean())

    def step(self, t, poison=None):
        self.backward(t)
        if poison is not None:
            poison(list(self.net.parameters()))
        return finite_step(self.accelerator, self.optimizer, self.clip)

    def state(self):
        return copy.deepcopy((self.net.state_dict(), self.optimizer.optimizer.state_dict()))


def assert_identical(a, b):
    """Bit for bit, in tensors nested in containers."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, two in zip(a, b, strict=True):
            assert_identical(one, two)
    else:
        assert a == b


# --------------------------------------------------------------------------------------------------------- groups


def test_what_is_decayed():
    student = create_model(
        "timm/vit_tiny_patch16_224", image_size=32, embed_dim=32, depth=2, num_heads=2, init_values=1.0, reg_tokens=1
    )
    grid = (2, 2)
    adaptor = Adaptor(32, 48, {"token": 1.0, "patch": 1.0, "feature": 1.0}, grid, standardize=True)
    task = Distillation(student, {"teacher": adaptor}, Sizes(32, 32, grid, [grid], [grid], grid))
    optimizer = build_optimizer(task, Optimizer(weight_decay=0.07, lr=2e-4, betas=(0.8, 0.9), eps=1e-5))
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups) == len(names)

    plain = {name for name, value in decay.items() if value == 0}
    assert {value for name, value in decay.items() if name not in plain} == {0.07}
    kinds = {name for name in decay if name.endswith(("bias", "gamma")) or ".norm" in name}
    assert plain == kinds
    assert {
        "student.network.blocks.0.ls1.gamma",
        "student.network.norm.weight",
        "adaptors.0.heads.token.norm.weight",
    } <= plain
    for name in ("pos_embed", "cls_token", "reg_token", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight"):
        assert f"student.network.{name}" not in plain
    assert not {"student.mask_token", "adaptors.0.heads.patch.linear.weight"} & plain


def test_the_optimizer_is_fused_adamw_with_the_configs_numbers():
    optimizer = build_optimizer(network(), CONFIG)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (1e-2, (0.8, 0.95), 1e-6, True)


def test_rates_follow_their_groups_scale(accelerator):
    net = network()
    groups = [{"params": [p], "lr_scale": 0.5**i} for i, p in enumerate(net.parameters())]
    groups.append({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer = accelerator.prepare(torch.optim.AdamW(groups))
    for rate in (1e-3, 4e-3):
        set_rate(optimizer, rate)
        expected = [rate * 0.5**i for i in range(len(groups) - 1)] + [rate]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(expected)


@pytest.mark.parametrize("decay_vectors", [True, False])
def test_groups_with_a_scale_are_split_by_what_decays(decay_vectors):
    net = network()
    first, last = list(net[0].parameters()), [*net[1].parameters(), *net[3].parameters()]
    groups = scaled_groups(
        [{"params": first, "lr_scale": 0.5}, {"params": last, "lr_scale": 1.0}, {"params": []}], 0.1, decay_vectors
    )
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for part, scale in ((first, 0.5), (last, 1.0)):
        for p in part:
            assert found[id(p)] == (scale, 0.1 if p.ndim > 1 or decay_vectors else 0.0)
    assert len(groups) == (2 if decay_vectors else 4)


# ----------------------------------------------------------------------------------------------- the step itself


@pytest.mark.parametrize(("clip", "scale"), [(None, 1.0), (0.05, 1.0), (3.0, 1.0), (3.0, 100.0)])
def test_steps_are_those_of_plain_torch(accelerator, clip, scale):
    ours, reference = Trainer(accelerator, clip, scale), network()
    # timm's groups in timm's order: without decay first.
    vectors = [p for p in reference.parameters() if p.ndim <= 1]
    matrices = [p for p in reference.parameters() if p.ndim > 1]
    plain = torch.optim.AdamW(
        [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}],
        lr=1e-2,
        betas=(0.8, 0.95),
        eps=1e-6,
    )
    clipped = 0
    for t in range(6):
        norm, skipped = ours.step(t)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(t))
        plain.zero_grad()
        (scale * reference(x).square().mean()).backward()
        expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip if clip is not None else math.inf)
        plain.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)  # before clipping
        assert not skipped
        clipped += clip is not None and norm.item() > clip
        for one, two in zip(ours.net.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert clipped == {None: 0, 0.05: 6, 3.0: 0 if scale == 1.0 else 6}[clip]


def test_clipping_leaves_a_gradient_of_the_norm_asked_for(accelerator):
    net = nn.Linear(4, 1, bias=False)
    before = net.weight.detach().clone()
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=1.0, fused=True))
    net.weight.grad = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    norm, _ = finite_step(accelerator, optimizer, 0.5)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(before - net.weight, torch.tensor([[0.3, 0.0, 0.4, 0.0]]))


def test_gradients_are_cleared(accelerator):
    trainer = Trainer(accelerator)
    trainer.step(0)
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in trainer.net.parameters())


# ----------------------------------------------------------------------------------------- the step not taken


def one_nan(parameters):
    parameters[1].grad[3] = math.nan


def all_nan(parameters):
    for parameter in parameters:
        parameter.grad.fill_(math.nan)


def one_inf(parameters):
    parameters[0].grad[2, 1] = math.inf


def minus_inf(parameters):
    parameters[-1].grad[0] = -math.inf


POISONS = [one_nan, all_nan, one_inf, minus_inf]


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("poison", POISONS, ids=lambda poison: poison.__name__)
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(accelerator, poison, clip):
    trainer = Trainer(accelerator, clip)
    for t in range(3):
        assert not trainer.step(t)[1]
    before = trainer.state()
    norm, skipped = trainer.step(3, poison)
    assert skipped
    assert not norm.isfinite()
    assert_identical(trainer.state(), before)
    assert all(parameter.grad is None or (parameter.grad == 0).all() for parameter in trainer.net.parameters())


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("bad", [[0], [2], [0, 1, 4]], ids=str)
def test_later_steps_go_on_as_if_it_had_not_been(accelerator, bad, clip):
    poisoned, clean = Trainer(accelerator, clip), Trainer(accelerator, clip)
    start = copy.deepcopy(poisoned.net.state_dict())
    for t in range(6):
        _, skipped = poisoned.step(t, one_nan if t in bad else None)
        assert bool(skipped) == (t in bad)
        if t not in bad:
            clean.step(t)
    assert_identical(poisoned.state(), clean.state())
    assert not torch.equal(poisoned.net.state_dict()["0.weight"], start["0.weight"])


def test_parameters_without_a_gradient_are_left_out(accelerator):
    trainer = Trainer(accelerator, 1.0)
    trainer.net[0].requires_grad_(False)
    before = copy.deepcopy(trainer.net[0].state_dict())
    norm, skipped = trainer.step(0)
    assert not skipped
    assert norm > 0
    assert_identical(trainer.net[0].state_dict(), before)
