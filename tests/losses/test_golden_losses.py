"""One step of the recipe gives the authors' losses and gradients (tests/golden), on one process and on several."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from proteus.data.sampler import Sampler
from proteus.models import load_checkpoint
from proteus.training.sizes import Sizes
from proteus.training.task import Adaptor, Distillation
from proteus.training.teacher import Answer

GOLDEN = Path(__file__).parents[1] / "golden" / "proteus_losses.safetensors"
LOSSES = {"token": 1.0, "patch": 1.0, "feature": 1.0}
IMAGES, MASKED = 6, 3


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def networks(golden, tmp_path_factory):
    """(student, teacher), with the golden weights and images as they enter the network."""
    built = []
    for part, heads in (("student", 2), ("teacher", 4)):
        state = {key.removeprefix(part + "."): value for key, value in golden.items() if key.startswith(part + ".")}
        path = tmp_path_factory.mktemp(part) / "weights.safetensors"
        save_file(state, path)
        built.append(load_checkpoint(str(path), num_heads=heads, mean=(0, 0, 0), std=(1, 1, 1)).train())
    return built[0], built[1].freeze()


def build_task(networks, golden, masked_per_process, losses=None):
    size = golden["image"].shape[-1]
    grid = networks[0].grid_of(size, size)
    adaptor = Adaptor(networks[0].embed_dim, 48, losses or LOSSES, grid, masked_per_process=masked_per_process)
    task = Distillation(networks[0], {"teacher": adaptor}, Sizes(size, size, grid, [grid], [grid], grid))
    task.zero_grad()
    heads = {key.removeprefix("heads."): value for key, value in golden.items() if key.startswith("heads.")}
    adaptor.heads.load_state_dict({key: value for key, value in heads.items() if key.split(".")[0] in adaptor.heads})
    return task


@torch.no_grad()
def answers_of(teacher, images):
    return [Answer(teacher(images), None)]


def assert_gradients(golden, gradients):
    compared = 0
    for key, expected in golden.items():
        if not key.startswith("grad."):
            continue
        name = key.removeprefix("grad.").replace("student.", "student.network.").replace("heads.", "adaptors.0.heads.")
        name = name.replace("network.mask_token", "mask_token")
        found = gradients[name]
        if name.endswith("attn.qkv.bias"):
            # Softmax does not see the key bias: its gradient is zero but for rounding.
            query, key_bias, value = found.chunk(3)
            assert key_bias.abs().max() < 1e-7
            found = torch.cat([query, value])
            expected = torch.cat([expected.chunk(3)[0], expected.chunk(3)[2]])
        assert expected.norm() > 0, name
        assert (found - expected).norm() / expected.norm() < 1e-4, name
        compared += 1
    assert compared == len(gradients)


def test_losses_and_gradients_agree(networks, golden):
    task = build_task(networks, golden, MASKED)
    mask, answers = golden["mask"][:MASKED].bool(), answers_of(networks[1], golden["image"])
    losses = task(golden["image"], mask, answers)
    assert losses.keys() == LOSSES.keys()
    for name, value in losses.items():
        assert value.item() == pytest.approx(golden[f"loss.{name}"].item(), abs=1e-5)
    total = sum(losses.values())
    assert total.item() == pytest.approx(golden["loss.total"].item(), abs=1e-5)
    total.backward()
    assert_gradients(golden, {name: parameter.grad for name, parameter in task.named_parameters()})


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_the_mean_over_processes_is_the_global_batch(networks, golden, processes):
    # As in the loop: process r holds images r, r + W, ..., and of six processes three hold no masked image.
    sampler = Sampler(1000, IMAGES // processes, processes, mask_probability=0.5)
    assert sampler.masked == MASKED
    task = build_task(networks, golden, sampler.masked / sampler.processes)
    means = dict.fromkeys(LOSSES, 0.0)
    held = 0
    for rank in range(processes):
        images, mask = golden["image"][rank::processes], golden["mask"][rank:MASKED:processes].bool()
        assert len(mask) == sum(draw.masked for draw in sampler.micro_batch(0, 0, rank))
        held += len(mask)
        losses = task(images, mask, answers_of(networks[1], images))
        (sum(losses.values()) / processes).backward()  # summed up in .grad, as DDP averages
        for name, value in losses.items():
            means[name] += value.item() / processes
    assert held == MASKED
    for name, value in means.items():
        assert value == pytest.approx(golden[f"loss.{name}"].item(), abs=1e-5)
    assert_gradients(golden, {name: parameter.grad for name, parameter in task.named_parameters()})


def test_weights_scale_their_loss(networks, golden):
    weights = {"token": 0.5, "patch": 2.0, "feature": 3.0}
    task = build_task(networks, golden, MASKED, weights)
    mask, answers = golden["mask"][:MASKED].bool(), answers_of(networks[1], golden["image"])
    for name, value in task(golden["image"], mask, answers).items():
        assert value.item() == pytest.approx(weights[name] * golden[f"loss.{name}"].item(), abs=5e-5)


@pytest.mark.parametrize(
    ("losses", "heads"),
    [
        ({"token": 1.0}, ["token"]),
        ({"feature": 1.0}, ["feature", "token"]),
        ({"patch": 1.0}, ["patch"]),
        (LOSSES, ["feature", "patch", "token"]),
    ],
    ids=str,
)
def test_a_subset_of_losses_keeps_its_numbers_and_builds_its_heads_only(networks, golden, losses, heads):
    task = build_task(networks, golden, MASKED, losses)
    assert sorted(task.adaptors[0].heads) == heads
    mask, answers = golden["mask"][:MASKED].bool(), answers_of(networks[1], golden["image"])
    values = task(golden["image"], mask, answers)
    assert values.keys() == losses.keys()
    for name, value in values.items():
        assert value.item() == pytest.approx(golden[f"loss.{name}"].item(), abs=1e-5)


@pytest.mark.parametrize("masked_per_process", [0.0, 1.5], ids=["nowhere", "on other processes"])
def test_without_masked_images_the_patch_loss_is_zero_and_moves_nothing(networks, golden, masked_per_process):
    task = build_task(networks, golden, masked_per_process)
    losses = task(golden["image"], torch.zeros(0, 64, dtype=torch.bool), answers_of(networks[1], golden["image"]))
    assert losses["patch"].item() == 0
    losses["patch"].backward(retain_graph=True)
    gradients = [parameter.grad for parameter in task.parameters() if parameter.grad is not None]
    assert all((gradient == 0).all() for gradient in gradients)  # not NaN
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in task.parameters() if parameter.grad is not None)
    assert task.adaptors[0].heads["token"].linear.weight.grad.abs().max() > 0
