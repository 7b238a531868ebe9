"""Options of a run that change how it computes, not what it is for."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.conftest import read_log


def weights(directory, file="student.safetensors"):
    return load_file(directory / file)


def distance(one, other):
    """Relative distance of two state dicts."""
    a, b = (torch.cat([state[key].flatten() for key in sorted(state)]) for state in (one, other))
    return ((a - b).norm() / a.norm()).item()


PLAIN = ("student.arch.drop_path=0.0", "losses.patch=0.0", "ema.decay=null")


def test_accumulated_micro_batches_are_one_batch(run_here, tmp_path):
    assert run_here(*PLAIN, "run.batch_size=16", directory="whole") == 0
    assert run_here(*PLAIN, "run.batch_size=4", "run.accumulate=4", directory="parts") == 0
    assert run_here(*PLAIN, "run.batch_size=4", directory="less") == 0
    whole = weights(tmp_path / "whole")
    assert distance(whole, weights(tmp_path / "parts")) < 1e-4
    assert distance(whole, weights(tmp_path / "less")) > 1e-3
    for a, b in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "parts"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)


def test_the_same_seed_is_the_same_run_and_another_is_not(run_here, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run_here(f"run.seed={seed}", directory=name) == 0
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "b")) == 0
    assert distance(weights(tmp_path / "a"), weights(tmp_path / "c")) > 0.1


def test_bf16_follows_float32(run_here, tmp_path):
    assert run_here(*PLAIN, directory="full") == 0
    assert run_here(*PLAIN, "run.precision=bf16", directory="half") == 0
    full, half = read_log(tmp_path / "full"), read_log(tmp_path / "half")
    assert all(b["loss"] == pytest.approx(a["loss"], rel=0.02) for a, b in zip(full, half, strict=True))
    assert any(a["loss"] != b["loss"] for a, b in zip(full, half, strict=True))
    assert weights(tmp_path / "half")["cls_token"].dtype == torch.float32


def test_a_bfloat16_teacher_is_near(run_here, tmp_path):
    assert run_here(*PLAIN, directory="full") == 0
    assert run_here(*PLAIN, "teacher.dtype=bfloat16", directory="half") == 0
    for a, b in zip(read_log(tmp_path / "full"), read_log(tmp_path / "half"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)


def test_clipping_bounds_the_update_and_the_norm_is_told_before_it(run_here, tmp_path):
    assert run_here(*PLAIN, directory="free") == 0
    assert run_here(*PLAIN, "optimizer.clip_grad=1e-8", "optimizer.weight_decay=0", directory="clipped") == 0
    assert run_here(*PLAIN, "schedule.steps=1", "schedule.warmup_steps=0", "optimizer.lr=1e-30", directory="start") == 0
    start = weights(tmp_path / "start")
    assert distance(start, weights(tmp_path / "clipped")) < 0.5 * distance(start, weights(tmp_path / "free"))
    assert read_log(tmp_path / "clipped")[0]["grad_norm"] == pytest.approx(read_log(tmp_path / "free")[0]["grad_norm"])


def test_an_average_of_decay_zero_is_the_student(run_here, tmp_path):
    assert run_here("ema.decay=0.0") == 0
    assert distance(weights(tmp_path / "run"), weights(tmp_path / "run", "student_ema.safetensors")) == 0
    assert run_here("ema.decay=null", directory="none") == 0
    assert not (tmp_path / "none/student_ema.safetensors").exists()


@pytest.fixture
def teacher_head(tmp_path):
    """A classifier of 7 classes on the tiny teacher's class token."""
    torch.manual_seed(0)
    save_file({"weight": torch.randn(7, 32), "bias": torch.randn(7)}, tmp_path / "head.safetensors")
    return f"teacher.head={tmp_path / 'head.safetensors'}"


def test_logits_of_a_teacher_head_are_learnt(run_here, teacher_head, tmp_path):
    only_kl = ("losses.token=0", "losses.patch=0", "losses.feature=0", "losses.logits_kl=1", "schedule.steps=60")
    assert run_here(*only_kl, teacher_head, "data.augment.auto_augment=null", "optimizer.lr=3e-3") == 0
    rows = read_log(tmp_path / "run")
    assert rows[-1]["loss_logits_kl"] < 0.5 * rows[0]["loss_logits_kl"]
    model = load_file(tmp_path / "run/checkpoints/step_60/model.safetensors")
    assert model["classifier.weight"].shape == (7, 16)


def test_labels_and_logits_together_and_labels_without_a_teacher(run_here, tmp_path):
    save_file({"weight": torch.randn(10, 64)}, tmp_path / "head.safetensors")  # class token and mean patch token
    no_features = ("losses.token=0", "losses.patch=0", "losses.feature=0")
    both = (
        *no_features,
        "losses.logits_kl=0.5",
        "losses.label_ce=0.5",
        f"teacher.head={tmp_path / 'head.safetensors'}",
    )
    assert run_here(*both) == 0
    assert {"loss_logits_kl", "loss_label_ce"} <= read_log(tmp_path / "run")[0].keys()
    assert run_here(*no_features, "losses.label_ce=1", "teacher=null", directory="labels") == 0
    assert read_log(tmp_path / "labels")[0]["loss"] == pytest.approx(2.3, abs=0.3)  # ln 10


def test_labels_that_are_not_there_are_missed(run_here, capsys):
    assert run_here("losses.label_ce=1", "data.labels=ignore", "data.kind=image", "data.root=nowhere.png") == 2
    assert "nowhere.png" in capsys.readouterr().err


@pytest.mark.slow
def test_compiled_networks_learn_the_same(run_here, tmp_path):
    assert run_here(*PLAIN, directory="eager") == 0
    assert run_here(*PLAIN, "teacher.compile=true", "student.compile=true", directory="compiled") == 0
    for a, b in zip(read_log(tmp_path / "eager"), read_log(tmp_path / "compiled"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "eager").keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["token_only", "token_feature", "logits_ce_kl", "logits_kl", "feature_mse", "single_image"]
)
def test_an_ablation_runs(run_here, name, tmp_path):
    """The shipped ablations on small networks: their losses and data as they are, their sizes made small."""
    small = (
        "student.name=timm/vit_tiny_patch16_224",
        "student.arch={embed_dim: 16, depth: 1, num_heads: 2}",
        "teacher.name=timm/vit_tiny_patch16_224",
        "teacher.arch={embed_dim: 32, depth: 1, num_heads: 2}",
        "teacher.checkpoint=random",
        *("data.image_size=32", "data.workers=0", "run.precision=no", "run.batch_size=8", "run.log_every=1"),
        *("schedule.epochs=null", "schedule.steps=3", "schedule.warmup_epochs=0", "probe.every_epochs=0"),
    )
    if name == "single_image":
        from PIL import Image

        Image.effect_noise((200, 160), 80).convert("RGB").save(tmp_path / "one.png")
        data = (f"data.root={tmp_path / 'one.png'}", "data.crops=64")
    else:
        data = ("data.kind=digits",)
    if name.startswith("logits"):
        save_file({"weight": torch.randn(10, 64)}, tmp_path / "head.safetensors")
        data += (f"teacher.head={tmp_path / 'head.safetensors'}",)
    assert run_here(*small, *data, cfg=f"ablations/{name}.yaml") == 0
    assert len(read_log(tmp_path / "run")) == 3
