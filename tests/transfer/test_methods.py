"""The baselines: all of them at equal steps in one table, and what sets the single-stage one apart."""

import numpy as np
import pytest
import torch
from PIL import Image

from proteus.config_files import load_config
from proteus.data.scenes import SceneSource
from proteus.data.sources import DigitsSource, Subset
from proteus.models import create_model
from proteus.models.features import Features
from proteus.models.heads import build_head
from proteus.training.sizes import Sizes
from proteus.training.task import Adaptor, Distillation
from proteus.training.teacher import Answer
from proteus.transfer.config import TransferConfig
from proteus.transfer.methods import METHODS, mix_labels
from proteus.transfer.pipeline import Result
from proteus.transfer.report import compare_table
from proteus.transfer.target import Unlabelled
from tests.transfer.conftest import SEGMENTATION, results, stage


@pytest.mark.slow
def test_compare_all(transfer_here, tmp_path, capsys):
    start = tmp_path / "start" / "seed_1" / "oriented" / "finetune" / "student.safetensors"
    assert transfer_here(directory="start") == 0
    capsys.readouterr()
    assert transfer_here("--compare=all", f"pretrained={{own: {start}}}") == 0
    rows = results(tmp_path / "run", "compare")
    assert [row["method"] for row in rows if row["seed"] == 1] == ["teacher", *METHODS, "pretrained-own"]
    assert [row["method"] for row in rows if row["seed"] == 2] == ["teacher", *METHODS, "pretrained-own"]
    assert {row["steps"] for row in rows if row["method"] != "teacher"} == {10}
    seed = tmp_path / "run" / "seed_2"
    taken = {
        "oriented": ["oriented/transfer", "oriented/finetune"],
        "single_stage": ["single_stage"],
        "agnostic": ["agnostic/transfer", "agnostic/finetune"],
        "contrastive": ["contrastive/transfer", "contrastive/finetune"],
        "scratch": ["scratch"],
        "pretrained-own": ["pretrained-own"],
    }
    for row in rows:
        if row["seed"] == 2 and row["method"] in taken:
            facts = [stage(seed / name) for name in taken[row["method"]]]
            assert sum(fact["steps"] for fact in facts) == 10
            adapted = stage(seed / "adapt")["flops"] if row["method"] in ("oriented", "single_stage") else 0
            assert row["flops"] == sum(fact["flops"] for fact in facts) + adapted
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 1 + len(taken)
    assert "mean ± standard deviation over 2 seeds" in (tmp_path / "run" / "compare.md").read_text()


def test_some_methods_by_name(transfer_here, tmp_path):
    assert transfer_here("--compare=scratch,agnostic", "run.seeds=1") == 0
    assert [row["method"] for row in results(tmp_path / "run", "compare")] == ["scratch", "agnostic"]


def test_a_method_runs_the_same_alone_and_among_all(transfer_here, tmp_path):
    assert transfer_here("--compare=contrastive", "run.seeds=1", directory="alone") == 0
    assert transfer_here("--compare=scratch,contrastive", "run.seeds=1", directory="among") == 0
    files = [tmp_path / run / "seed_1/contrastive/finetune/student.safetensors" for run in ("alone", "among")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_every_method_segments(transfer_here, tmp_path):
    short = [f"{part}.schedule.steps=2" for part in ("adapt", "transfer", "finetune")]
    assert transfer_here("--compare=all", "run.seeds=1", *SEGMENTATION, *short) == 0
    assert len(results(tmp_path / "run", "compare")) == 1 + len(METHODS)


def test_the_table_gives_mean_and_spread(tiny):
    cfg = load_config(str(tiny), ["teacher.name=dinov2_vits14"], TransferConfig)
    rows = [
        Result("scratch", "labels alone", seed, test, 0.5, 10, flops, "")
        for seed, test, flops in [(0, 0.70, 2e12), (1, 0.74, 2e12), (2, 0.78, 5e12)]
    ]
    line = compare_table(cfg, rows).splitlines()[2]
    assert line == "| labels alone | 74.0 ± 4.0 | 70.0 74.0 78.0 | 10 | 3 |"


@pytest.mark.parametrize(("share", "expected"), [(0.5, 20), (0.2, 5), (0.9, 180), (1.0, 4)])
def test_labelled_images_are_repeated_to_their_share(share, expected):
    digits = DigitsSource("train")
    labelled, unlabelled = Subset(digits, np.array([3, 5, 7, 9])), Unlabelled(digits, np.arange(20))
    mixed, real = mix_labels(labelled, unlabelled, share)
    assert real == expected / len(mixed)
    assert len(mixed) == expected + (20 if share < 1 else 0)
    assert (mixed.labels >= 0).sum() == expected
    assert mixed.labels[:5].tolist() == [*labelled.labels.tolist(), labelled.labels[0]][: min(5, expected)]
    assert (mixed.labels[expected:] == -1).all()
    assert mixed.classes == digits.classes
    assert mixed.name(expected - 1) == labelled.name((expected - 1) % 4)
    if share < 1:
        assert mixed.name(expected) == digits.name(0)


def test_unlabelled_pixels_count_nowhere():
    scenes = SceneSource(6, 0, height=12, width=20)
    mixed, _ = mix_labels(scenes, Unlabelled(scenes, np.arange(6)), 0.5)
    assert (len(mixed), mixed.unlabelled_from) == (12, 6)
    assert (mixed.target(2) == scenes.target(2)).all()
    assert mixed.target(8).shape == (12, 20)
    assert (mixed.target(8) == 255).all()
    assert mixed.load(8).tobytes() == scenes.load(2).tobytes()


def _dual_task(kind: str) -> tuple[Distillation, list[Answer]]:
    torch.manual_seed(0)
    student = create_model("timm/vit_tiny_patch16_224", image_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    grid = (4, 4)
    sizes = Sizes(16, 16, grid, [grid], [grid], grid)
    task = Distillation(
        student,
        {"teacher": Adaptor(16, 8, {"logits_kl": 0.5}, grid)},
        sizes,
        label_ce=1.0,
        classifier=build_head(16, 5, kind, mix=0.5),
    )
    logits = torch.randn(2, 5) if kind == "class" else torch.randn(2, 5, 4, 4)
    return task, [Answer(Features(torch.randn(2, 8), torch.randn(2, 16, 8), grid), logits)]


@pytest.mark.parametrize("kind", ["class", "pixel"])
def test_labels_and_teacher_reach_heads_of_their_own(kind):
    task, answers = _dual_task(kind)
    labels = torch.tensor([1, -1]) if kind == "class" else torch.randint(0, 5, (2, 16, 16))
    losses = task(torch.rand(2, 3, 16, 16), torch.zeros(0, 16, dtype=torch.bool), answers, labels)
    assert set(losses) == {"logits_kl", "label_ce"}
    for name, own, other in [("label_ce", "labelled", "distilled"), ("logits_kl", "distilled", "labelled")]:
        task.zero_grad()
        losses[name].backward(retain_graph=True)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in getattr(task.classifier, own).parameters())
        assert all(p.grad is None or not p.grad.any() for p in getattr(task.classifier, other).parameters())
        assert task.student.network.blocks[0].attn.qkv.weight.grad.abs().sum() > 0


def test_a_batch_without_labels_teaches_by_the_teacher_alone():
    task, answers = _dual_task("class")
    mask = torch.zeros(0, 16, dtype=torch.bool)
    losses = task(torch.rand(2, 3, 16, 16), mask, answers, torch.tensor([-1, -1]))
    assert losses["label_ce"].item() == 0
    assert losses["logits_kl"].item() > 0


def test_a_transfer_set_that_holds_test_images_is_refused(transfer_here, tmp_path, capsys):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (16, 16), (90 * index, 0, 0)).save(tmp_path / "set" / part / name / f"{index}.png")
    target = f"target={{root: {tmp_path / 'set'}, train: {{split: train}}, val: null, test: {{split: test}}}}"
    assert transfer_here(target, f"transfer.data={{root: {tmp_path / 'set'}}}") == 2
    said = capsys.readouterr().err
    assert f"error: transfer.data holds {tmp_path}/set/test/cat/0.png, an image of target.test" in said
    # Behind a link it is the same image.
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x.png").symlink_to(tmp_path / "set/test/dog/1.png")
    assert transfer_here(target, f"transfer.data={{root: {tmp_path / 'links'}}}") == 2
    assert f"error: transfer.data holds {tmp_path}/links/x.png, an image of target.test" in capsys.readouterr().err
    assert not list(tmp_path.rglob("checkpoints"))


def test_more_labels_than_their_share_weigh_no_more():
    digits = DigitsSource("train")
    _, share = mix_labels(Subset(digits, np.arange(30)), Unlabelled(digits, np.arange(10)), 0.1)
    assert share == 0.75
