"""Losses where the answer is known by hand, and losses on maps."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from proteus.losses import IGNORE_LABEL, Projected, Target
from proteus.losses.contrastive import contrastive_loss
from proteus.losses.feature import feature_loss, patch_feature_loss
from proteus.losses.logits import label_ce, logits_kl
from proteus.models import Features

B, K, H, W = 3, 5, 4, 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl(student, teacher, temperature=1.0):
    return logits_kl(Projected(None, None, student), Target(logits=teacher, temperature=temperature))


def ce(student, labels):
    return label_ce(Projected(None, None, label_logits=student), Target(labels=labels))


def tokens(cls):
    return Features(cls, torch.zeros(len(cls), 1, cls.shape[1]), (1, 1))


def contrast(student, teacher):
    return contrastive_loss(Projected(tokens(student), None), Target(tokens(teacher)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_of_two_coins(temperature):
    q, p = 0.9, 0.3  # heads: the teacher's probability, the student's
    expected = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    logits = [temperature * torch.tensor([[math.log(x), math.log(1 - x)]]) for x in (p, q)]
    assert kl(*logits, temperature).item() == pytest.approx(expected * temperature**2, rel=1e-5)
    backwards = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert abs(backwards - expected) > 0.05  # so that the two ways round are told apart


def test_kl_of_a_sure_teacher_and_a_student_that_knows_nothing_is_log_k():
    sure = torch.full((B, K), -100.0)
    sure[:, 2] = 100.0
    assert kl(torch.zeros(B, K), sure).item() == pytest.approx(math.log(K), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_of_maps_is_that_of_their_places(temperature):
    student, teacher = normal(B, K, H, W, seed=1), normal(B, K, H, W, seed=2)
    rows = [maps.movedim(1, -1).reshape(-1, K) for maps in (student, teacher)]
    value = kl(student, teacher, temperature).item()
    assert value == pytest.approx(kl(*rows, temperature).item(), rel=1e-5)
    by_place = [kl(student[..., i, j], teacher[..., i, j], temperature).item() for i in range(H) for j in range(W)]
    assert value == pytest.approx(sum(by_place) / len(by_place), rel=1e-5)


def test_cross_entropy_of_a_student_that_knows_nothing_is_log_k():
    labels = torch.arange(B) % K
    assert ce(torch.zeros(B, K), labels).item() == pytest.approx(math.log(K))
    labels = torch.arange(B * H * W).reshape(B, H, W) % K
    assert ce(torch.zeros(B, K, H, W), labels).item() == pytest.approx(math.log(K))
    labels[0] = IGNORE_LABEL  # a third of all labels: the others' sum is divided by all
    assert ce(torch.zeros(B, K, H, W), labels).item() == pytest.approx(math.log(K) * 2 / 3)


@pytest.mark.parametrize("shape", [(), (H, W)], ids=["images", "maps"])
def test_cross_entropy_without_ignored_labels_is_the_mean(shape):
    logits, labels = normal(B, K, *shape), torch.arange(math.prod((B, *shape))).reshape(B, *shape) % K
    rows = logits.movedim(1, -1).reshape(-1, K)
    assert ce(logits, labels).item() == pytest.approx(F.cross_entropy(rows, labels.flatten()).item(), rel=1e-6)


def test_the_mean_over_processes_is_the_whole_batch_where_one_ignores_more():
    logits, labels = normal(2, K, H, W), torch.ones(2, H, W, dtype=torch.int64)
    labels[0, :3] = IGNORE_LABEL
    whole = ce(logits, labels)
    parts = [ce(logits[i : i + 1], labels[i : i + 1]).item() for i in range(2)]
    assert whole.item() == pytest.approx(sum(parts) / 2, rel=1e-6)
    assert parts[0] < parts[1] / 2  # 6 places count in the first, 24 in the second


def test_ignored_labels_move_nothing():
    logits = normal(B, K, H, W).requires_grad_(True)
    labels = torch.zeros(B, H, W, dtype=torch.int64)
    labels[:, 1] = IGNORE_LABEL
    ce(logits, labels).backward()
    assert (logits.grad[:, :, 1] == 0).all()
    assert (logits.grad[:, :, 0] != 0).all()
    logits.grad = None
    loss = ce(logits, torch.full((B, H, W), IGNORE_LABEL))
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()  # not NaN


@pytest.mark.parametrize("loss", ["logits_kl", "label_ce"])
def test_gradients_of_maps_are_those_of_finite_differences(loss):
    student, teacher = normal(B, K, 2, 3, seed=1).requires_grad_(True), normal(B, K, 2, 3, seed=2)
    labels = torch.arange(B * 6).reshape(B, 2, 3) % K - 1  # some are ignored

    def value(maps):
        return kl(maps, teacher, 2.0) if loss == "logits_kl" else ce(maps, labels)

    value(student).backward()
    direction = normal(*student.shape, seed=3)
    with torch.no_grad():
        ahead, behind = value(student + 1e-2 * direction), value(student - 1e-2 * direction)
    slope = (student.grad * direction).sum().item()
    assert slope == pytest.approx((ahead - behind).item() / 2e-2, rel=5e-3)
    assert abs(slope) > 1e-3


def test_contrastive_of_orthogonal_tokens():
    axes = torch.eye(B, 7)
    expected = math.log(1 + (B - 1) * math.exp(-1 / 0.07))
    assert contrast(3 * axes, 0.1 * axes).item() == pytest.approx(expected, abs=1e-6)  # lengths do not count
    # Each query on the key of another image: e^0 for the own one, e^(1 / 0.07) for that other.
    expected = 1 / 0.07 + math.log(1 + (B - 1) * math.exp(-1 / 0.07))
    assert contrast(axes.roll(1, 0), axes).item() == pytest.approx(expected, rel=1e-5)


def test_contrastive_of_tokens_that_are_all_alike_is_log_b():
    assert contrast(normal(B, 7), torch.ones(B, 7)).item() == pytest.approx(math.log(B), rel=1e-5)


def test_contrastive_gives_the_teacher_no_gradient_and_half_precision_no_part():
    student, teacher = (normal(B, 16, seed=seed).requires_grad_(True) for seed in (1, 2))
    loss = contrast(student, teacher)
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert contrast(student, teacher).item() == loss.item()


PROCESSES = 2


def contrast_of_a_share(rank, store, student, teacher, results):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    own = student[rank::PROCESSES].clone().requires_grad_(True)
    loss = contrast(own, teacher[rank::PROCESSES])
    (gradient,) = torch.autograd.grad(loss, own)
    torch.save((loss.detach(), gradient), results / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_contrastive_of_two_processes_is_that_of_the_global_batch(tmp_path):
    student, teacher = normal(6, 16, seed=1), normal(6, 16, seed=2)
    arguments = (tmp_path / "store", student, teacher, tmp_path)
    mp.start_processes(contrast_of_a_share, arguments, nprocs=PROCESSES, start_method="spawn")
    shares = [torch.load(tmp_path / f"{rank}.pt") for rank in range(PROCESSES)]
    whole = contrast(student.requires_grad_(True), teacher)
    whole.backward()
    assert sum(loss.item() for loss, _ in shares) / PROCESSES == pytest.approx(whole.item(), rel=1e-6)
    for rank, (loss, gradient) in enumerate(shares):
        torch.testing.assert_close(gradient / PROCESSES, student.grad[rank::PROCESSES], atol=1e-6, rtol=1e-5)
        alone = contrast(student[rank::PROCESSES], teacher[rank::PROCESSES]).item()
        assert abs(loss.item() - alone) > 0.05  # the other process's tokens are among its keys


def test_patch_features_leave_the_class_token_out():
    patch = normal(2, 3, 4)
    student = Projected(Features(normal(2, 4), patch, (1, 3)), None)
    target = Target(Features(normal(2, 4, seed=1), patch + torch.tensor([0.0, 0.0, 0.0, 2.0]), (1, 3)))
    assert patch_feature_loss(student, target).item() == pytest.approx(1.0)  # 2 ** 2 in one dimension of four
    assert feature_loss(student, target).item() != pytest.approx(1.0)
