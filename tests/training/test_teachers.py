"""Several teachers to one student, teachers of different scales, and what a student's own switches do."""

import json
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import nn

from proteus.config import Optimizer
from proteus.config_files import load_config
from proteus.data.loader import Batch
from proteus.engine.update import build_optimizer
from proteus.losses import LOSSES, Projected, Target
from proteus.models.encoder import CLIP_MEAN
from proteus.training import start
from proteus.training.networks import build_student
from proteus.training.probe import Probe, split_source
from proteus.training.resize import resize_images
from proteus.training.standardize import EPS, Standardizer
from proteus.training.task import Distillation, build_task
from proteus.training.teacher import build_teachers
from tests.training.conftest import LAUNCH, read_log

VIT = "timm/vit_tiny_patch16_224"
FIRST = {"name": VIT, "checkpoint": "random", "arch": {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}}
SECOND = {
    "name": VIT,
    "checkpoint": "random",
    "normalize": "clip",
    "losses": {"token": 2.0, "patch": 0.5},
    "arch": {"patch_size": 4, "embed_dim": 48, "depth": 1, "num_heads": 2},
}
PROBE = ("probe.every_epochs=1", "probe.split=test", "probe.images=50", "probe.bank=60", "probe.crop=1.0")


@pytest.fixture
def taught(tiny, tmp_path):
    """Writes a config of the tiny run with these teachers and returns its path."""

    def write(*teachers: dict, **changes) -> str:
        path = tmp_path / "taught.yaml"
        tree = {"base": str(tiny), "teacher": None, "teachers": list(teachers)} | changes
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def recorded(monkeypatch):
    """What each step was given and gave: (task, images, mask, answers, losses)."""
    seen = []
    forward = Distillation.forward

    def record(self, images, mask, answers, labels=None):
        losses = forward(self, images, mask, answers, labels)
        seen.append((self, images, mask, answers, losses))
        return losses

    monkeypatch.setattr(Distillation, "forward", record)
    return seen


def checkpoint(directory, step=12):
    return load_file(directory / f"checkpoints/step_{step}/model.safetensors")


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# Several teachers


def test_a_list_of_one_is_the_teacher(run_here, taught, tmp_path):
    assert run_here(directory="single") == 0
    assert run_here(cfg=taught(FIRST), directory="list") == 0
    assert_same(checkpoint(tmp_path / "single"), checkpoint(tmp_path / "list"))
    losses = [[row["loss_feature"] for row in read_log(tmp_path / name)] for name in ("single", "list")]
    assert losses[0] == losses[1]


def test_two_teachers_each_have_their_losses_heads_and_eyes(run_here, taught, recorded, tmp_path, capsys):
    assert run_here("student.arch.drop_path=0", cfg=taught(FIRST, SECOND)) == 0
    said = capsys.readouterr().err
    assert f"teacher  {VIT} (0.0 M), 1 token + 1 patch + 1 feature\n" in said
    assert f"teacher  {VIT} (0.0 M), 2 token + 0.5 patch\n" in said
    names = [f"{name}/{VIT}" for name in ("token", "patch", "feature")] + [f"token/{VIT}_2", f"patch/{VIT}_2"]
    rows = read_log(tmp_path / "run")
    assert [key for key in rows[0] if key.startswith("loss_")] == [f"loss_{name}" for name in names]
    assert rows[0]["loss"] == pytest.approx(sum(rows[0][f"loss_{name}"] for name in names), rel=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]

    state = checkpoint(tmp_path / "run")
    assert state["adaptors.0.heads.feature.linear.weight"].shape == (32, 16)
    assert state["adaptors.1.heads.token.linear.weight"].shape == (48, 16)
    assert "adaptors.1.heads.feature.linear.weight" not in state

    # The last batch again, by hand.
    task, images, mask, answers, _ = recorded[-1]
    task.eval().zero_grad()
    losses = task(images, mask, answers)
    assert list(losses) == names
    plain, masked = task.student.forward_pair(images, mask)
    everything = {"token": 1.0, "patch": 1.0, "feature": 1.0}
    for teacher, (weights, suffix) in enumerate([(everything, f"/{VIT}"), (SECOND["losses"], f"/{VIT}_2")]):
        heads = task.adaptors[teacher].heads
        projected = Projected(
            plain._replace(cls=heads["token"](plain.cls), patch=heads["feature"](plain.patch) if not teacher else None),
            masked._replace(patch=heads["patch"](masked.patch)),
        )
        for name, weight in weights.items():
            expected = weight * LOSSES[name].function(projected, Target(answers[teacher].features, mask))
            assert losses[name + suffix].item() == pytest.approx(expected.item(), rel=1e-6)
    sum(losses.values()).backward()
    for name, parameter in task.adaptors.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_student_looks_once_however_many_teach(run_here, taught, monkeypatch, recorded):
    from proteus.models import Encoder

    calls = []
    normalise = Encoder.normalise

    def counted(self, images):
        if not images.is_meta:  # the trial of its arguments
            calls.append(self)
        return normalise(self, images)

    monkeypatch.setattr(Encoder, "normalise", counted)
    assert run_here("schedule.steps=3", "losses.patch=0", cfg=taught(FIRST, SECOND, FIRST)) == 0
    task = recorded[0][0]
    assert sum(encoder is task.student for encoder in calls) == 3
    assert len(set(map(id, calls))) == 4
    assert task.suffixes == [f"/{VIT}", f"/{VIT}_2", f"/{VIT}_3"]


def test_the_probe_compares_with_every_teacher(run_here, taught, tmp_path):
    second = SECOND | {"losses": {"token": 1.0, "feature": 1.0}}
    longer = ("schedule.steps=50", "optimizer.lr=3e-3")
    assert run_here(*PROBE, *longer, cfg=taught(FIRST | {"standardize": True}, second)) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    before, after = (row for row in rows if "knn_student" in row)
    for label in (VIT, f"{VIT}_2"):
        for name in ("cosine_cls", "cosine_patch"):
            assert after[f"{name}/{label}"] > before[f"{name}/{label}"] + 0.05
        assert before[f"knn_teacher/{label}"] == after[f"knn_teacher/{label}"]
    assert (tmp_path / "run/pictures/step_50.png").is_file()


def test_the_probe_looks_at_the_standardised_space_and_leaves_it_alone(taught):
    cfg = load_config(taught(FIRST | {"standardize": True, "image_size": 24}, SECOND), list(PROBE))
    accelerator = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        mixed_precision="no",
        autocast=nullcontext,
        local_main_process_first=nullcontext,
    )
    teachers = build_teachers(cfg, accelerator)
    assert [teacher.encoder.mean for teacher in teachers] == [(0.5, 0.5, 0.5), CLIP_MEAN]  # each its own convention
    student, sizes = build_student(cfg, teachers, accelerator)
    task = build_task(cfg, student, teachers, sizes, None, 0.0)
    batch = Batch(torch.rand(8, 3, 24, 24), torch.zeros(0, 36, dtype=torch.bool), None, [], [])
    answers = [teacher.answer(batch) for teacher in teachers]
    task(torch.rand(8, 3, 24, 24), torch.zeros(0, sizes.mask[0] * sizes.mask[1], dtype=torch.bool), answers)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    assert before["adaptors.0.standardizers.patch.count"] == 8 * 36

    probe = Probe(cfg, *split_source(cfg), sizes.crop, teachers, accelerator.device)
    numbers = probe.measure(task)
    assert_same(task.state_dict(), before)
    assert task.training
    with torch.no_grad():
        images = probe._held_out.images  # [50, 3, 24, 24]
        cls = student.eval()(images).cls
        mean, var = (before[f"adaptors.0.standardizers.cls.{name}"] for name in ("mean", "var"))
        wanted = [
            (teachers[0].encoder(images).cls - mean) / (var + EPS).sqrt(),
            teachers[1].encoder(resize_images(images, 16)).cls,
        ]
        for adaptor, tokens, label in zip(task.adaptors, wanted, (VIT, f"{VIT}_2"), strict=True):
            expected = torch.cosine_similarity(adaptor.heads["token"](cls), tokens).mean()
            assert numbers[f"cosine_cls/{label}"] == pytest.approx(expected.item(), abs=1e-5)
    assert probe.measure(task) == numbers


def test_logits_of_two_teachers_share_a_classifier(run_here, taught, tmp_path, capsys):
    for classes in (7, 8):
        save_file({"weight": torch.randn(classes, 32)}, tmp_path / f"{classes}.safetensors")
    seven, eight = (FIRST | {"head": str(tmp_path / f"{classes}.safetensors")} for classes in (7, 8))
    only_kl = {"losses": {"logits_kl": 1.0, "token": 0.0, "patch": 0.0, "feature": 0.0}}
    assert run_here("schedule.steps=2", cfg=taught(seven, seven, **only_kl)) == 0
    assert {f"loss_logits_kl/{VIT}", f"loss_logits_kl/{VIT}_2"} <= read_log(tmp_path / "run")[0].keys()
    assert checkpoint(tmp_path / "run", 2)["classifier.weight"].shape == (7, 16)
    capsys.readouterr()
    assert run_here(cfg=taught(seven, eight, **only_kl), directory="other") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert "teachers.0.head 7, teachers.1.head 8" in line


@pytest.mark.parametrize(
    ("teachers", "override", "said"),
    [
        ([FIRST, SECOND], "teacher={name: dinov2_vits14}", "teacher and teachers are both given"),
        ([], "run.seed=1", "needs a teacher, and teacher is null"),
        ([FIRST, SECOND], "teachers.1.name=timm/vit_tny_patch16_224", "did you mean 'timm/vit_tiny_patch16_224'?"),
        ([FIRST, SECOND], "teachers.1.checkpoint=nowhere", "teachers.1.checkpoint=nowhere: no such file"),
        ([FIRST, SECOND], "teachers.0.head=nowhere", "teachers.0.head=nowhere: no such file"),
        ([FIRST, SECOND], "teachers.1.losses.tokn=1", "teachers.1.losses: unknown loss 'tokn'; did you mean 'token'?"),
        ([FIRST, SECOND], "teachers.1.losses.label_ce=1", "teachers.1.losses.label_ce"),
        ([FIRST, SECOND], "teachers.1.losses.logits_kl=1", "losses.logits_kl needs teachers.1.head"),
        ([FIRST, SECOND], "teachers.1.image_size=18", "teachers.1.image_size=18: timm/vit_tiny_patch16_224"),
        ([FIRST, SECOND], "teachers.1.imagesize=18", "unknown key 'teachers.1.imagesize'"),
        ([FIRST, SECOND], "teachers.2.name=x", "2 is no place in a list of 2"),
        ([FIRST, SECOND], "data.mask.ratio=0", "losses.patch needs masked images"),
        ([FIRST], "student.image_size=large", "student.image_size: a number of pixels above 0, or auto, not 'large'"),
        ([FIRST], "run.attention=xformers", "run.attention=xformers"),
        ([FIRST], "run.attention=flash", "run.attention"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(run_here, taught, capsys, teachers, override, said):
    assert run_here(override, cfg=taught(*teachers)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]


def test_missing_weights_name_their_teacher(run_here, taught, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert run_here(cfg=taught(FIRST, {"name": "dinov2_vits14"}, {"name": "dinov2_vitb14"})) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # both at once
    for line, key, file in zip(lines, ("teachers.1", "teachers.2"), ("dinov2_vits14", "dinov2_vitb14"), strict=True):
        assert f"{file}_pretrain.pth" in line
        assert f"{key}.checkpoint=PATH, or {key}.download=true" in line


# Standardisation


def batches(count, rows=40, dim=6):
    """Batches [rows, dim] whose dimensions have means from -20 to 30 and deviations from 0.05 to 50."""
    generator = torch.Generator().manual_seed(0)
    means, deviations = torch.linspace(-20, 30, dim), torch.logspace(-1.3, 1.7, dim)
    return [means + deviations * torch.randn(rows, dim, generator=generator) for _ in range(count)]


def test_statistics_are_those_of_everything_seen():
    standardize, seen = Standardizer(6), batches(200)
    for step, batch in enumerate(seen, start=1):
        given = standardize(batch)
        if step in (1, 2, 7, 200):
            whole = torch.cat(seen[:step]).double()
            mean, var = whole.mean(dim=0), whole.var(dim=0, correction=0)
            torch.testing.assert_close(standardize.mean.double(), mean, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(standardize.var.double(), var, rtol=1e-5, atol=0)
            expected = (batch.double() - mean) / (var + EPS).sqrt()
            torch.testing.assert_close(given.double(), expected, rtol=1e-3, atol=1e-3)
    assert standardize.count == 200 * 40


def test_tokens_of_an_image_count_one_by_one_and_evaluation_counts_nothing():
    (batch,) = batches(1, rows=24)
    one, other = Standardizer(6), Standardizer(6)
    one(batch)
    given = other(batch.view(2, 12, 6).bfloat16())
    assert given.shape == (2, 12, 6)
    assert given.dtype == torch.float32
    assert one.count == other.count == 24
    before = {key: value.clone() for key, value in one.state_dict().items()}
    one.eval()(100 * batch)
    assert_same(one.state_dict(), before)
    fresh = Standardizer(6).eval()
    torch.testing.assert_close(fresh(batch), batch, rtol=1e-5, atol=0)  # nothing is known yet


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30], ids=str)
@pytest.mark.parametrize("first", [True, False])
def test_a_batch_that_is_not_finite_leaves_the_statistics_alone(bad, first):
    standardize, seen = Standardizer(6), batches(3)
    if not first:
        standardize(seen[0])
    before = {key: value.clone() for key, value in standardize.state_dict().items()}
    broken = seen[1].clone()
    broken[3, 2] = bad
    standardize(broken)
    assert_same(standardize.state_dict(), before)
    standardize(seen[2])
    whole = seen[2] if first else torch.cat([seen[0], seen[2]])
    torch.testing.assert_close(standardize.mean, whole.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_a_run_counts_its_micro_batches_and_compares_in_that_space(run_here, taught, recorded, tmp_path, capsys):
    path = taught(FIRST | {"standardize": True}, SECOND)
    assert run_here("run.accumulate=2", "schedule.steps=5", cfg=path) == 0
    assert ", 1 token + 1 patch + 1 feature, standardised" in capsys.readouterr().err
    state = checkpoint(tmp_path / "run", 5)
    assert not any(key.startswith("adaptors.1.standardizers") for key in state)
    features = [answers[0].features for _, _, _, answers, _ in recorded]
    assert len(features) == 10
    for side, tokens in (("cls", [f.cls for f in features]), ("patch", [f.patch.flatten(0, 1) for f in features])):
        whole = torch.cat(tokens)
        key = f"adaptors.0.standardizers.{side}"
        assert state[f"{key}.count"] == len(whole) == 160 * (1 if side == "cls" else 16)
        torch.testing.assert_close(state[f"{key}.mean"], whole.mean(dim=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state[f"{key}.var"], whole.var(dim=0, correction=0), rtol=1e-4, atol=1e-6)

    # The last micro-batch again: the token loss is against its standardised class tokens.
    task, images, mask, answers, _ = recorded[-1]
    task.eval()
    with torch.no_grad():
        losses = task(images, mask, answers)
        mean, var = (state[f"adaptors.0.standardizers.cls.{name}"] for name in ("mean", "var"))
        wanted = (answers[0].features.cls - mean) / (var + EPS).sqrt()
        expected = (task.adaptors[0].heads["token"](task.student(images).cls) - wanted).square().mean()
    assert losses[f"token/{VIT}"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_statistics_survive_a_restart_bit_for_bit(run_here, taught, tmp_path):
    path = taught(FIRST | {"standardize": True}, SECOND | {"standardize": True})
    assert run_here(cfg=path, directory="whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for step in (10, 12):  # as if it had been killed after step 5
        shutil.rmtree(tmp_path / f"killed/checkpoints/step_{step}")
    assert run_here(cfg=path, directory="killed") == 0
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed"))
    assert checkpoint(tmp_path / "whole")["adaptors.1.standardizers.patch.count"] == 12 * 16 * 16


KEEP = """
import os, torch
from proteus.training.probe import Probe, split_source
from proteus.training.task import Distillation, build_task
from proteus.training.teacher import build_teachers
forward = Distillation.forward
def keep(self, *args):
    losses = forward(self, *args)
    torch.save(self.adaptors[0].standardizers.state_dict(), os.environ["PROTEUS_KEPT"] + os.environ["RANK"])
    return losses
Distillation.forward = keep
"""


def test_two_processes_count_what_one_counts(trainer, taught, run_here, tmp_path, monkeypatch):
    """Both hold the same numbers, to the bit, and these are those of one process with the whole batch."""
    path = taught(FIRST | {"standardize": True}, SECOND)
    monkeypatch.setenv("PROTEUS_KEPT", str(tmp_path / "kept"))
    settings = ("student.arch.drop_path=0.0", "schedule.steps=6")
    two = trainer("two", f"--cfg={path}", *settings, "run.batch_size=8", launcher=LAUNCH, prelude=KEEP)
    assert run_here(*settings, cfg=path, directory="one") == 0
    assert two.wait() == 0, two.output()
    kept = [torch.load(tmp_path / f"kept{rank}") for rank in (0, 1)]
    assert_same(*kept)
    one = checkpoint(tmp_path / "one", 6)
    for key, value in kept[0].items():
        torch.testing.assert_close(value, one[f"adaptors.0.standardizers.{key}"], rtol=1e-5, atol=1e-6)
    assert kept[0]["cls.count"] == 6 * 16
    for a, b in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for key in (key for key in a if key.startswith("loss")):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key


# The student's own switches


def test_checkpointed_activations_are_computed_twice_and_change_nothing(run_here, monkeypatch, tmp_path):
    forward, calls = Block.forward, []

    def counted(self, x, *args, **kw):
        if not x.is_meta:  # the trial of its arguments
            calls.append(self)
        return forward(self, x, *args, **kw)

    monkeypatch.setattr(Block, "forward", counted)
    assert run_here(directory="kept") == 0
    assert len(calls) == 12 * (2 + 2)  # steps, of two blocks of the teacher and two of the student
    calls.clear()
    assert run_here("student.grad_checkpointing=true", directory="again") == 0
    assert len(calls) == 12 * (2 + 2 * 2)
    losses = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("kept", "again")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_frozen_parameters_are_not_optimised():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].requires_grad_(False)
    groups = build_optimizer(module, Optimizer()).param_groups
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in module[1].parameters()}


@pytest.mark.parametrize(
    ("device", "processes", "said"),
    [
        ("cuda", 2, ["norm     SyncBatchNorm over 2 processes"]),
        ("cuda", 1, ["norm     BatchNorm per process"]),
        ("cpu", 2, ["norm     BatchNorm per process"]),
    ],
)
def test_batch_statistics_are_of_all_gpus(tiny, device, processes, said):
    name = "student={name: timm/resnet10t}"
    cfg = load_config(str(tiny), [name, "teacher=null", "losses={label_ce: 1.0}", "data.image_size=64"])
    kind = DistributedType.NO if processes == 1 else DistributedType.MULTI_GPU
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device(device), distributed_type=kind)
    student, sizes = build_student(cfg, [], accelerator)
    assert sizes.crop == sizes.student == 64
    assert start.describe_norms(student, accelerator) == said
    synced = [module for module in student.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert bool(synced) == (processes > 1 and device == "cuda")


def test_a_network_without_batch_statistics_says_nothing_of_them(tiny):
    kind = DistributedType.MULTI_GPU
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cuda"), distributed_type=kind)
    cfg = load_config(str(tiny), ["teacher=null", "losses={label_ce: 1.0}"])
    student, _ = build_student(cfg, [], accelerator)
    assert start.describe_norms(student, accelerator) == []
