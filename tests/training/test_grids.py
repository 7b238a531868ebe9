"""Teacher and student of different patch sizes, strides and resolutions: who sees what, and where they are compared."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from proteus.config_files import load_config
from proteus.losses import LOSSES, Projected, Target
from proteus.models import create_model, load_checkpoint
from proteus.models.features import Features, resize_patches
from proteus.models.weights import save_encoder
from proteus.training.resize import resize_images, resize_mask
from proteus.training.sizes import Sizes, match_sizes, student_size
from proteus.training.task import Adaptor, Distillation
from proteus.training.teacher import Answer
from tests.training.conftest import read_log

STUDENT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
VIT = "timm/vit_tiny_patch16_224"


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("old", "new"), [((6, 4), (3, 4)), ((6, 4), (4, 3)), ((3, 2), (5, 7)), ((4, 4), (4, 1))])
def test_patches_are_interpolated_bilinearly_with_antialiasing(old, new):
    features = Features(normal(2, 5), normal(2, old[0] * old[1], 5, seed=1).requires_grad_(), old)
    resized = resize_patches(features, new)
    assert resized.grid == new
    assert resized.cls is features.cls
    maps = features.patch.transpose(1, 2).unflatten(2, old)  # [B, D, h, w]
    expected = F.interpolate(maps, size=new, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resized.patch, expected, atol=1e-6, rtol=0)
    weight = normal(*expected.shape, seed=2)
    own, other = (torch.autograd.grad((t * weight).sum(), features.patch)[0] for t in (resized.patch, expected))
    torch.testing.assert_close(own, other, atol=1e-6, rtol=0)


def test_patches_are_interpolated_in_float32_and_equal_grids_are_left_alone():
    features = Features(normal(2, 5), normal(2, 16, 5), (4, 4))
    assert resize_patches(features, (4, 4)) is features
    expected = resize_patches(features, (2, 2)).patch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resize_patches(features, (2, 2)).patch, expected)
    half = resize_patches(features._replace(patch=features.patch.bfloat16()), (2, 2)).patch
    assert half.dtype == torch.float32


def test_images_are_resized_as_floats_and_not_clamped():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert resize_images(images, 16) is images
    as_float = images / 255
    expected = F.interpolate(as_float, size=(12, 12), mode="bicubic", antialias=True)
    assert torch.equal(resize_images(images, 12), expected)
    assert torch.equal(resize_images(as_float, 12), expected)
    noise = resize_images(3 * normal(1, 3, 16, 16), 12)
    assert noise.min() < -1
    assert noise.max() > 2


@pytest.mark.parametrize(("old", "new"), [((2, 2), (4, 4)), ((4, 4), (2, 2)), ((2, 3), (6, 4)), ((4, 4), (6, 6))])
def test_a_mask_takes_the_nearest_cell(old, new):
    mask = normal(3, old[0] * old[1]) > 0
    resized = resize_mask(mask, old, new)
    assert resized.dtype == torch.bool
    for row in range(3):
        for y in range(new[0]):
            for x in range(new[1]):
                # The cell in which the centre of the new cell lies.
                nearest = int((y + 0.5) * old[0] / new[0]) * old[1] + int((x + 0.5) * old[1] / new[1])
                assert resized[row, y * new[1] + x] == mask[row, nearest]
    assert resize_mask(mask, old, old) is mask
    assert resize_mask(mask[:0], old, new).shape == (0, new[0] * new[1])


class Spy(torch.nn.Module):
    """An encoder that keeps what it was given and answers with fixed features."""

    embed_dim = 4

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size

    def forward_pair(self, images, mask):
        self.images, self.mask = images, mask
        side = images.shape[-1] // self.patch_size

        def features(rows, seed):
            return Features(normal(rows, 4, seed=seed), normal(rows, side * side, 4, seed=seed + 1), (side, side))

        self.said = features(len(images), 10), features(len(mask), 20)
        return self.said


def test_each_side_gets_its_size_and_masked_patches_are_compared_on_the_smaller_grid():
    """Student 6 x 6 at 24 px, teachers 3 x 3 and 4 x 4: masks on 3 x 3, losses on 3 x 3 and on 4 x 4."""
    student = Spy(4)
    adaptors = {
        "a": Adaptor(4, 5, {"patch": 1.0}, (3, 3)),
        "b": Adaptor(4, 6, {"token": 1.0, "patch": 1.0, "feature": 0.5}, (4, 4)),
    }
    task = Distillation(student, adaptors, Sizes(32, 24, (6, 6), [(3, 3), (4, 4)], [(3, 3), (4, 4)], (3, 3)))
    images, mask = normal(4, 3, 32, 32), normal(2, 9, seed=5) > 0
    answers = [
        Answer(Features(normal(4, dim, seed=6), normal(4, side * side, dim, seed=7), (side, side)), None)
        for side, dim in ((3, 5), (4, 6))
    ]
    losses = task(images, mask, answers)
    assert losses.keys() == {"patch/a", "token/b", "patch/b", "feature/b"}
    assert torch.equal(student.images, resize_images(images, 24))
    cells = mask.view(2, 3, 3)
    assert torch.equal(student.mask.view(2, 6, 6), cells.repeat_interleave(2, 1).repeat_interleave(2, 2))

    plain, masked = student.said

    def on_grid(tokens, grid):  # [B, 36, D] -> [B, h * w, D]
        maps = tokens.transpose(1, 2).unflatten(2, (6, 6))
        return F.interpolate(maps, size=grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)

    error = on_grid(adaptors["a"].heads["patch"](masked.patch), (3, 3)) - answers[0].features.patch[:2]
    assert losses["patch/a"].item() == pytest.approx(error[mask].square().mean().item(), rel=1e-5)
    on_four = cells[:, [0, 1, 1, 2]][:, :, [0, 1, 1, 2]].flatten(1)  # by hand: centres at 3/8, 9/8, 15/8, 21/8
    heads, features = adaptors["b"].heads, answers[1].features
    error = on_grid(heads["patch"](masked.patch), (4, 4)) - features.patch[:2]
    assert losses["patch/b"].item() == pytest.approx(error[on_four].square().mean().item(), rel=1e-5)
    tokens = torch.cat([heads["token"](plain.cls)[:, None], on_grid(heads["feature"](plain.patch), (4, 4))], dim=1)
    wanted = torch.cat([features.cls[:, None], features.patch], dim=1)
    assert losses["feature/b"].item() == pytest.approx(0.5 * (tokens - wanted).square().mean().item(), rel=1e-5)


def test_the_larger_side_is_interpolated_whichever_it_is():
    """Student 2 x 2, teacher 4 x 4: the teacher's patches come down."""
    adaptor = Adaptor(4, 5, {"feature": 1.0}, (2, 2))
    task = Distillation(Spy(8), {"a": adaptor}, Sizes(16, 16, (2, 2), [(4, 4)], [(2, 2)], (2, 2)))
    features = Features(normal(3, 5), normal(3, 16, 5, seed=1), (4, 4))
    losses = task(normal(3, 3, 16, 16), torch.zeros(0, 4, dtype=torch.bool), [Answer(features, None)])
    plain, _ = task.student.said
    maps = features.patch.transpose(1, 2).unflatten(2, (4, 4))
    small = F.interpolate(maps, size=(2, 2), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    projected = Projected(
        Features(adaptor.heads["token"](plain.cls), adaptor.heads["feature"](plain.patch), (2, 2)), plain
    )
    expected = LOSSES["feature"].function(projected, Target(Features(features.cls, small, (2, 2))))
    assert losses["feature"].item() == pytest.approx(expected.item(), rel=1e-5)


def encoder(patch_size):
    return SimpleNamespace(patch_size=patch_size, grid_of=lambda h, w: (h // patch_size, w // patch_size))


FULL, TOKEN, FEATURE = (dict.fromkeys(names, 1.0) for names in (("token", "patch"), ("token",), ("feature",)))


@pytest.mark.parametrize(
    ("teachers", "patch", "asked", "expected"),
    [
        # (patch, image size, losses) of each teacher; the student's patch and image size; what comes of it
        ([(4, 16, FULL)], 4, "auto", Sizes(16, 16, (4, 4), [(4, 4)], [(4, 4)], (4, 4))),
        ([(4, 16, FULL)], 8, "auto", Sizes(32, 32, (4, 4), [(4, 4)], [(4, 4)], (4, 4))),
        ([(4, 16, FULL)], 2, "auto", Sizes(16, 8, (4, 4), [(4, 4)], [(4, 4)], (4, 4))),
        ([(4, 16, TOKEN)], 8, "auto", Sizes(16, 16, (2, 2), [(4, 4)], [(2, 2)], (2, 2))),
        ([(4, 16, FULL)], 8, 16, Sizes(16, 16, (2, 2), [(4, 4)], [(2, 2)], (2, 2))),
        ([(8, 16, FULL)], 4, 24, Sizes(24, 24, (6, 6), [(2, 2)], [(2, 2)], (2, 2))),
        # The first teacher of patches decides; who has no patch loss has no say in the masks.
        (
            [(8, 16, TOKEN), (4, 16, FULL), (4, 24, FULL)],
            4,
            "auto",
            Sizes(24, 16, (4, 4), [(2, 2), (4, 4), (6, 6)], [(2, 2), (4, 4), (4, 4)], (4, 4)),
        ),
        (
            [(4, 16, FULL), (8, 16, FEATURE), (8, 24, FULL)],
            4,
            "auto",
            Sizes(24, 16, (4, 4), [(4, 4), (2, 2), (3, 3)], [(4, 4), (2, 2), (3, 3)], (3, 3)),
        ),
        ([], 4, "auto", Sizes(16, 16, (4, 4), [], [], (4, 4))),
    ],
)
def test_sizes_follow_from_patches_and_losses(tiny, teachers, patch, asked, expected):
    sections = [{"name": "any", "image_size": size, "losses": losses} for _, size, losses in teachers]
    losses = FULL if teachers else {"label_ce": 1.0}
    cfg = load_config(str(tiny), [f"losses={losses}", "teacher=null", f"teachers={json.dumps(sections)}"])
    cfg.student.image_size = asked
    built = [SimpleNamespace(encoder=encoder(own), image_size=size) for own, size, _ in teachers]
    student = encoder(patch)
    assert match_sizes(cfg, student, student_size(cfg, student, built), built) == expected


def summary(capsys):
    """What the last run said of its sizes and its data."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if line.startswith(("sizes", "data  "))]


def test_a_student_of_twice_the_patch_sees_twice_the_pixels(run_here, tmp_path, capsys):
    probe = ("probe.every_epochs=1", "probe.split=test", "probe.images=20", "probe.bank=40", "probe.crop=1.0")
    assert run_here("student.arch.patch_size=8", *probe, "schedule.steps=6") == 0
    sizes, data = summary(capsys)
    assert sizes == f"sizes    student 32 px (4 x 4), {VIT} 16 px (4 x 4)"
    assert "images at 32 px" in data
    student = load_checkpoint(str(tmp_path / "run/student.safetensors"))
    assert (student.image_size, student.grid_of(32, 32)) == (32, (4, 4))
    assert load_file(tmp_path / "run/student.safetensors")["pos_embed"].shape == (1, 17, 16)
    rows = read_log(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_a_student_of_a_given_size_is_compared_on_the_smaller_grid(run_here, tmp_path, capsys):
    assert run_here("student.arch.patch_size=8", "student.image_size=16") == 0
    sizes, data = summary(capsys)
    assert sizes == f"sizes    student 16 px (2 x 2), {VIT} 16 px (4 x 4) interpolated to 2 x 2"
    assert "images at 16 px" in data
    rows = read_log(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_first_step_of_a_run_on_two_grids_is_its_definition(run_here, tmp_path, monkeypatch):
    """From the images and the mask of a step to its losses, written out."""
    seen = []
    forward = Distillation.forward

    def record(self, images, mask, answers, labels):
        losses = forward(self, images, mask, answers, labels)
        seen.append((self, images, mask, answers, losses))
        return losses

    monkeypatch.setattr(Distillation, "forward", record)
    settings = ("student.image_size=16", "student.arch={patch_size: 8, embed_dim: 16, depth: 1, num_heads: 2}")
    assert run_here(*settings, "teacher.image_size=24", "schedule.steps=1", "optimizer.lr=1e-30") == 0
    ((task, images, mask, (answer,), losses),) = seen
    assert images.shape == (16, 3, 24, 24)  # the largest
    assert mask.shape == (8, 4)
    assert answer.features.grid == (6, 6)
    assert answer.features.patch.shape == (16, 36, 32)
    task.eval()  # without drop path to repeat
    with torch.no_grad():
        small = F.interpolate(images, size=(16, 16), mode="bicubic", antialias=True)
        masked = task.student(small[:8], mask)
        maps = answer.features.patch[:8].transpose(1, 2).unflatten(2, (6, 6))
        wanted = F.interpolate(maps, size=(2, 2), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        error = task.adaptors[0].heads["patch"](masked.patch) - wanted
    assert losses["patch"].item() == pytest.approx(error[mask].square().mean().item(), rel=1e-4)


def test_losses_on_class_tokens_need_no_grid(run_here, capsys):
    token_only = ("losses.patch=0", "losses.feature=0")
    assert run_here("student.arch.patch_size=8", *token_only, "schedule.steps=2") == 0
    sizes, _ = summary(capsys)
    assert sizes == f"sizes    student 16 px (2 x 2), {VIT} 16 px (4 x 4)"
    assert run_here("teacher.image_size=24", *token_only, "schedule.steps=2", directory="larger") == 0
    sizes, data = summary(capsys)
    assert sizes == f"sizes    student 16 px (4 x 4), {VIT} 24 px (6 x 6)"
    assert "images at 24 px" in data


def test_equal_sizes_are_not_worth_a_line(run_here, capsys):
    assert run_here("schedule.steps=1") == 0
    assert [line[:4] for line in summary(capsys)] == ["data"]


def test_a_student_made_again_is_as_if_made_once(run_here, tmp_path):
    """Its patches lead to its size, so it is built before the size is known."""
    small = ("student.arch.patch_size=8", "schedule.steps=1", "optimizer.lr=1e-30", "schedule.warmup_steps=0")
    assert run_here(*small) == 0
    torch.manual_seed(0)
    expected = create_model(VIT, image_size=32, **STUDENT | {"depth": 2}).network.state_dict()
    found = load_file(tmp_path / "run/student.safetensors")
    assert all(torch.allclose(found[key], expected[key], atol=1e-12) for key in found)


def test_a_student_made_for_one_size_is_built_for_its_own(run_here, tmp_path):
    arch = "{embed_dim: 12, depths: [1, 1, 1, 1], window_size: 2}"  # 32 pixels to a cell, and no other size at call
    student = f"student={{name: timm/swin_tiny_patch4_window7_224, arch: {arch}}}"
    assert run_here(student, "schedule.steps=1", "schedule.warmup_steps=0", "run.batch_size=4") == 0
    assert load_checkpoint(str(tmp_path / "run/student.safetensors")).image_size == 128  # 4 x 4, as the teacher's


def test_a_teacher_made_for_one_size_is_built_for_its_own_with_its_weights(run_here, tmp_path):
    arch = {"embed_dim": 12, "depths": [1, 1, 1, 1], "window_size": 2}
    weights = tmp_path / "swin.safetensors"
    save_encoder(create_model("timm/swin_tiny_patch4_window7_224", image_size=64, **arch), weights)
    teacher = f"{{name: timm/swin_tiny_patch4_window7_224, checkpoint: '{weights}', image_size: 128}}"
    assert run_here(f"teacher={teacher}", "schedule.steps=1", "schedule.warmup_steps=0", "run.batch_size=4") == 0
