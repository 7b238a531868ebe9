"""Each loss against plain loops over its definition."""

import math

import pytest
import torch

from proteus.errors import InputError
from proteus.losses import LOSSES, Projected, Target, check_losses
from proteus.models import Features

B, M, N, D, K = 4, 3, 6, 5, 7


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scene(dtype=torch.float32, masked=M, temperature=1.0):
    """(what a student says, what a teacher says), all of it random."""

    def features(rows, seed):
        return Features(normal(rows, D, seed=seed, dtype=dtype), normal(rows, N, D, seed=seed + 1, dtype=dtype), (2, 3))

    mask = torch.rand(masked, N, generator=torch.Generator().manual_seed(9)) < 0.5
    labels = torch.tensor([3, 0, 6, 3])
    logits, label_logits = (3 * normal(B, K, seed=seed, dtype=dtype) for seed in (5, 10))
    student = Projected(features(B, 1), features(masked, 3), logits, label_logits)
    target = Target(features(B, 6), mask, 3 * normal(B, K, seed=8, dtype=dtype), labels, temperature)
    return student, target


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def probabilities(logits, temperature):
    powers = [math.exp(value / temperature) for value in logits]
    return [power / sum(powers) for power in powers]


def slow_token(student, target):
    s, t = student.plain.cls.tolist(), target.features.cls.tolist()
    return mean((s[b][d] - t[b][d]) ** 2 for b in range(B) for d in range(D))


def slow_feature(student, target):
    s = [[cls, *patch] for cls, patch in zip(student.plain.cls.tolist(), student.plain.patch.tolist(), strict=True)]
    t = [[c, *patch] for c, patch in zip(target.features.cls.tolist(), target.features.patch.tolist(), strict=True)]
    return mean((s[b][i][d] - t[b][i][d]) ** 2 for b in range(B) for i in range(1 + N) for d in range(D))


def slow_patch_feature(student, target):
    s, t = student.plain.patch.tolist(), target.features.patch.tolist()
    return mean((s[b][i][d] - t[b][i][d]) ** 2 for b in range(B) for i in range(N) for d in range(D))


def slow_patch(student, target):
    s, t = student.masked.patch.tolist(), target.features.patch.tolist()
    places = [(m, i) for m in range(len(target.mask)) for i in range(N) if target.mask[m, i]]
    return mean((s[m][i][d] - t[m][i][d]) ** 2 for m, i in places for d in range(D))


def slow_logits_kl(student, target):
    total = 0.0
    for s, t in zip(student.logits.tolist(), target.logits.tolist(), strict=True):
        s, t = probabilities(s, target.temperature), probabilities(t, target.temperature)
        total += sum(q * math.log(q / p) for q, p in zip(t, s, strict=True))
    return total / B * target.temperature**2


def slow_label_ce(student, target):
    logits, labels = student.label_logits.tolist(), target.labels.tolist()
    return mean(-math.log(probabilities(row, 1.0)[label]) for row, label in zip(logits, labels, strict=True))


def slow_contrastive(student, target):
    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    queries, keys = student.plain.cls.tolist(), target.features.cls.tolist()
    chances = [probabilities([cosine(query, key) for key in keys], 0.07) for query in queries]
    return mean(-math.log(chances[b][b]) for b in range(B))


SLOW = {
    "token": slow_token,
    "feature": slow_feature,
    "patch_feature": slow_patch_feature,
    "patch": slow_patch,
    "contrastive": slow_contrastive,
    "logits_kl": slow_logits_kl,
    "label_ce": slow_label_ce,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", SLOW)
def test_a_loss_is_its_definition(name, temperature, dtype):
    student, target = scene(dtype, temperature=temperature)
    value = LOSSES[name].function(student, target)
    assert value.dtype == torch.float32  # computed in float32 whatever comes in
    assert value.ndim == 0
    assert value.item() == pytest.approx(SLOW[name](student, target), rel=1e-5)


def test_every_loss_is_tested():
    assert SLOW.keys() == LOSSES.keys()


@pytest.mark.parametrize("name", ["token", "feature", "patch", "logits_kl"])
def test_a_loss_is_zero_where_student_and_teacher_agree(name):
    _, target = scene(temperature=3.0)
    features = target.features
    agreeing = Projected(features, features._replace(patch=features.patch[:M]), target.logits)
    assert LOSSES[name].function(agreeing, target).item() == pytest.approx(0, abs=1e-6)


def test_the_temperature_softens_and_is_made_good():
    # For small logits KL(T) * T^2 tends to the same limit whatever T is: half the variance of the difference.
    student, target = scene()
    student = student._replace(logits=student.logits * 1e-2)
    target = target._replace(logits=target.logits * 1e-2)
    difference = target.logits - student.logits
    limit = difference.var(dim=-1, unbiased=False).mean().item() / 2
    for temperature in (1.0, 2.0, 10.0):
        value = LOSSES["logits_kl"].function(student, target._replace(temperature=temperature)).item()
        assert value == pytest.approx(limit, rel=0.05)


def test_the_patch_loss_sees_masked_places_only():
    student, target = scene()
    value = LOSSES["patch"].function(student, target)
    elsewhere = torch.where(target.mask.unsqueeze(-1), student.masked.patch, 1e3)
    unmoved = student._replace(masked=student.masked._replace(patch=elsewhere))
    assert LOSSES["patch"].function(unmoved, target).item() == pytest.approx(value.item())
    row, place = target.mask.nonzero()[0]
    student.masked.patch[row, place] += 10
    assert LOSSES["patch"].function(student, target).item() != pytest.approx(value.item(), rel=1e-3)


LEAVES = {
    "token": lambda student: student.plain.cls,
    "feature": lambda student: student.plain.patch,
    "patch_feature": lambda student: student.plain.patch,
    "patch": lambda student: student.masked.patch,
    "contrastive": lambda student: student.plain.cls,
    "logits_kl": lambda student: student.logits,
    "label_ce": lambda student: student.label_logits,
}


@pytest.mark.parametrize("name", SLOW)
def test_gradients_are_those_of_finite_differences(name):
    student, target = scene(temperature=2.0)
    leaf = LEAVES[name](student)
    leaf.requires_grad_(True)
    LOSSES[name].function(student, target).backward()
    gradient = leaf.grad.flatten()
    leaf.requires_grad_(False)
    flat = leaf.view(-1)  # the same memory, so the student moves with it
    for index in range(0, len(flat), 3):
        here, values = flat[index].item(), []
        for step in (1e-3, -1e-3):
            flat[index] = here + step
            values.append(SLOW[name](student, target))  # in double precision
        flat[index] = here
        assert gradient[index].item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-3, abs=1e-5)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("rows", [0, M], ids=["no masked image", "nothing masked"])
def test_an_empty_mask_gives_zero_and_no_gradient(rows):
    student, target = scene(masked=rows)
    target = target._replace(mask=torch.zeros(rows, N, dtype=torch.bool))
    patch = student.masked.patch.requires_grad_(True)
    loss = LOSSES["patch"].function(student, target)
    loss.backward()
    assert loss.item() == 0
    assert patch.grad.shape == (rows, N, D)
    assert (patch.grad == 0).all()


@pytest.mark.parametrize(
    ("wrong", "near"), [("tokens", "token"), ("pach", "patch"), ("logit_kl", "logits_kl"), ("featrue", "feature")]
)
def test_an_unknown_loss_is_told_the_nearest(wrong, near):
    with pytest.raises(InputError, match=f"unknown loss '{wrong}'; did you mean '{near}'"):
        check_losses(["token", wrong])


def test_a_loss_like_no_other_is_told_all():
    with pytest.raises(InputError) as caught:
        check_losses(["xyz"])
    assert all(name in str(caught.value) for name in LOSSES)


def test_known_losses_pass():
    check_losses(list(LOSSES))
    check_losses([])
