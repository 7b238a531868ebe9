"""Weights shared out among processes (FSDP2): the same numbers as unsharded, in training, in checkpoints, in files."""

import filecmp
import itertools
import json
import os

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import nn

import proteus.training.state
from proteus.config import Teacher as TeacherConfig
from proteus.engine.ema import build_ema
from proteus.engine.shard import (
    full_optimizer_state,
    full_state,
    is_sharded,
    load_full,
    load_full_optimizer,
    own_share,
    shard,
    whole,
)
from proteus.engine.update import finite_step
from proteus.models import create_model
from proteus.training.teacher import _build_teacher
from tests.training.conftest import read_log
from tests.training.together import FSDP, run_tool, together

ARCH = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
PLAIN = ("student.arch.drop_path=0.0",)


@pytest.fixture
def run(run_together):
    return run_together


@pytest.fixture
def refused(tiny, tmp_path):
    """As `run`, of a run that is refused: the lines it says in all."""

    def start(*overrides, environment=FSDP):
        argv = [f"--cfg={tiny}", f"run.dir={tmp_path / 'refused'}", *overrides]
        ended = together(2, run_tool, "train", argv, place=tmp_path, environment=environment)
        assert [one.status for one in ended] == [2, 2], ended[0].output
        assert "Traceback" not in ended[0].output
        return ended[0].output.splitlines()

    return start


def assert_close_losses(one, other, relative):
    """The steps that both logged lost the same."""
    rows, others = ({row["step"]: row for row in read_log(folder)} for folder in (one, other))
    common = rows.keys() & others.keys()
    assert len(common) >= 7
    for step in common:
        for key in ("loss", "loss_token", "loss_patch", "loss_feature", "grad_norm"):
            assert others[step][key] == pytest.approx(rows[step][key], rel=relative), f"step {step}: {key}"


def assert_close_rows(one, other, relative):
    """Every step lost the same, in every part and of every student."""
    rows, others = read_log(one), read_log(other)
    told = [key for key in rows[-1] if "loss" in key]
    assert len(rows) == len(others) == 12
    for row, another in zip(rows, others, strict=True):
        assert [another[key] for key in told] == pytest.approx([row[key] for key in told], rel=relative)


def assert_close_files(one, other, absolute):
    for name in ("student.safetensors", "student_ema.safetensors"):
        a, b = load_file(one / name), load_file(other / name)
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], atol=absolute, rtol=0, msg=f"{name}: {key}")


def test_three_sharded_processes_are_three_that_are_not(run):
    settings = (*PLAIN, "run.batch_size=4", "run.accumulate=2", "optimizer.clip_grad=0.1", "ema.decay=0.9")
    settings += ("student.grad_checkpointing=true",)
    whole, sharded = run("whole", 3, *settings), run("sharded", 3, *settings, fsdp=True)
    assert_close_losses(whole, sharded, 1e-6)
    assert_close_files(whole, sharded, 1e-6)


NETWORKS = {
    "convnet": ("student.name=timm/test_resnet", "student.arch={}", "data.image_size=32", "losses={token: 1.0}"),
    "adapters and a head": (*PLAIN, "student.tune=lora", "losses.label_ce=1.0"),
    "heads alone": (*PLAIN, "student.tune=head", "losses.label_ce=1.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", NETWORKS.values(), ids=NETWORKS)
def test_whatever_is_trained_is_trained_sharded_as_it_is_whole(run, settings):
    whole, sharded = run("whole", 2, *settings), run("sharded", 2, *settings, fsdp=True)
    assert_close_rows(whole, sharded, 1e-5)


@pytest.mark.slow
def test_several_students_are_trained_sharded_as_they_are_whole(run, tiny):
    tree = yaml.safe_load(tiny.read_text())
    tree["run"]["precision"] = "no"  # which YAML 1.1 reads as false
    student = tree.pop("student")
    student["arch"]["drop_path"] = 0.0
    wider = student | {"arch": student["arch"] | {"embed_dim": 22}}  # 11 rows a process: not a multiple of anything
    tiny.write_text(yaml.safe_dump(tree | {"students": [student, wider]}))
    whole, sharded = run("whole", 2), run("sharded", 2, fsdp=True)
    assert_close_rows(whole, sharded, 1e-5)


def test_a_run_goes_on_with_other_processes_sharded_or_not(run):
    """1 x 12, 2 x 6 and 3 x 4 images: a checkpoint of any of them is one for all."""
    one = run("one", 1, *PLAIN, "run.batch_size=12")
    two = run("two", 2, *PLAIN, "run.batch_size=6", f"--resume={one}/checkpoints/step_5", fsdp=True)
    three = run("three", 3, *PLAIN, "run.batch_size=4", f"--resume={one}/checkpoints/step_5")
    back = run("back", 1, *PLAIN, "run.batch_size=12", f"--resume={two}/checkpoints/step_10")
    for other in (two, three):
        assert [row["step"] for row in read_log(other)] == list(range(6, 13))
        assert_close_losses(one, other, 1e-4)
    assert_close_files(one, back, 1e-4)
    names = [{path.name: path for path in (run / "checkpoints/step_12").iterdir()} for run in (one, two)]
    assert names[0].keys() == names[1].keys()
    moments = [torch.load(name["optimizer.pt"], weights_only=True) for name in names]
    assert moments[0]["state"].keys() == moments[1]["state"].keys()
    for number, state in moments[0]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(moments[1]["state"][number][key], value, atol=1e-4, rtol=1e-3)


def test_a_sharded_run_resumed_is_the_uninterrupted_one_to_the_bit(run):
    settings = ("run.batch_size=8", "run.precision=bf16")
    uninterrupted = run("whole", 2, *settings, fsdp=True)
    resumed = run("resumed", 2, *settings, f"--resume={uninterrupted}/checkpoints/step_5", fsdp=True)
    assert_close_files(uninterrupted, resumed, 0)


def test_a_process_lost_while_a_checkpoint_is_gathered_is_not_taken_for_a_full_disk(tiny, tmp_path):
    argv = [f"--cfg={tiny}", f"run.dir={tmp_path / 'run'}", "run.batch_size=8"]
    one, other = together(2, die_in_the_second_checkpoint, argv, place=tmp_path, environment=FSDP)
    assert (one.status, other.status) == (1, 9)
    assert "Traceback" not in one.output
    assert one.output.splitlines()[-1].startswith("error: another process of the run has ended")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_5"]


def test_a_sharded_student_and_teacher_are_probed_by_all_processes(run):
    settings = ("probe.every_epochs=1", "data.images_per_class=0.08", "probe.images=24", "probe.bank=24")
    settings += ("run.batch_size=16", "schedule.steps=4", "teacher.dtype=bfloat16", "losses.label_ce=1")
    rows = {}
    for name, options in {"plain": {}, "sharded": {"fsdp": True}}.items():
        folder = run(name, 2, *settings, f"teacher.shard={'true' if options else 'false'}", **options)
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        rows[name] = [row for row in lines if "cosine_cls" in row]
        assert len(list((folder / "pictures").iterdir())) == len(rows[name]) >= 2
        assert (folder / "head.safetensors").is_file()
    for plain, sharded in zip(rows["plain"], rows["sharded"], strict=True):
        assert sharded == pytest.approx(plain, rel=1e-5)


def test_a_cache_of_a_sharded_teacher_is_that_of_a_whole_one(run, tmp_path):
    """With 3 chunks of images for two processes: one asks the teacher more often than the other."""
    settings = ("teacher_cache.tokens=all", "teacher_cache.views=1", "data.images_per_class=0.45", "--yes")
    caches = [tmp_path / name for name in ("whole_cache", "sharded_cache")]
    for cache, flag in zip(caches, ("false", "true"), strict=True):
        run("unused", 2, *settings, f"teacher_cache.dir={cache}", f"teacher.shard={flag}", tool="cache")
    names = sorted(path.name for path in caches[0].iterdir() if path.name != "lock")
    assert len([name for name in names if name.startswith("chunk_")]) == 3
    assert filecmp.cmpfiles(*caches, names, shallow=False) == (names, [], [])


def test_what_sharding_cannot_do_is_refused(refused):
    assert "FSDP1: give fsdp_version: 2" in refused(environment={"ACCELERATE_USE_FSDP": "true"})[-1]
    assert "which are sharded by FSDP here" in refused("--plan")[-1]
    convnet = ("teacher.name=timm/resnet18", "teacher.arch={}", "losses={token: 1.0}")
    assert "teacher.shard: timm/resnet18 is not made of blocks" in refused("teacher.shard=true", *convnet)[-1]


def test_another_number_of_processes_is_told_its_batch(run, refused, tmp_path):
    one = run("one", 1, "run.batch_size=12", "schedule.steps=2")
    said = refused("run.batch_size=12", f"--resume={one}/checkpoints/step_2", environment={})[-1]
    assert (
        "steps of 12 images, this run of 24 (2 processes x run.batch_size x run.accumulate): make the last two 6"
        in said
    )


# Parts, in processes of their own


def die_in_the_second_checkpoint(argv: list[str]) -> int:
    """The trainer, whose second process ends where it would give its share of a moment for step 10's checkpoint."""
    asked = itertools.count(1)

    def gather(optimizer, keep=True):
        if not keep and next(asked) == 2:
            os._exit(9)
        return full_optimizer_state(optimizer, keep)

    proteus.training.state.full_optimizer_state = gather
    return run_tool("train", argv)


def check_teacher() -> None:
    """A sharded teacher says what it says whole, in every precision, and no process holds all of it."""
    images = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))  # another grid than its own
    accelerator = Accelerator(mixed_precision="bf16")
    for dtype in ("auto", "float32", "bfloat16"):
        said = []
        for flag in (False, True):
            torch.manual_seed(0)
            cfg = TeacherConfig(
                name="timm/vit_tiny_patch16_224", checkpoint="random", arch=ARCH, dtype=dtype, shard=flag
            )
            teacher = _build_teacher(cfg, 24, "teacher", "auto", accelerator)
            said.append([teacher(images), teacher(images)])
        assert teacher.sharded
        for one, other in zip(*said, strict=True):
            assert torch.equal(one.cls, other.cls)
            assert torch.equal(one.patch, other.patch)
        for block in teacher.encoder.blocks():
            held = sum(own_share(p).numel() for p in block.parameters())
            assert held <= sum(p.numel() for p in block.parameters()) / 2 + 64


def check_state() -> None:
    """State comes together whole, and goes back into its shares."""
    accelerator = Accelerator()
    rank = accelerator.process_index

    def build(seed):
        torch.manual_seed(seed)
        network = create_model("timm/vit_tiny_patch16_224", image_size=16, **ARCH)
        before = {key: value.clone() for key, value in network.state_dict().items()}
        ema = build_ema(network, 0.9, 10)
        for module in (network, ema.module):
            shard(module, module.blocks(), accelerator.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        return network, ema, optimizer, before

    network, ema, optimizer, before = build(0)
    state = full_state(network, keep=rank == 0)
    assert (state.keys() == before.keys()) if rank == 0 else (state == {})
    assert all(torch.equal(value, before[key]) for key, value in state.items())
    network(torch.rand(2, 3, 16, 16)).cls.square().sum().backward()
    finite_step(accelerator, AcceleratedOptimizer(optimizer), None)
    state, moments, average = full_state(network), full_optimizer_state(optimizer), full_state(ema.module)
    assert any(not torch.equal(state[key], before[key]) for key in state)

    other, other_ema, other_optimizer, _ = build(1)
    load_full(other, state)
    load_full(other_ema.module, average)
    load_full_optimizer(other_optimizer, moments)
    for module, wanted in ((other, state), (other_ema.module, average)):
        assert is_sharded(module)
        found = full_state(module)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    found = full_optimizer_state(other_optimizer)
    for number, values in moments["state"].items():
        assert all(torch.equal(found["state"][number][key], value) for key, value in values.items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_full(other, state | {"more": torch.zeros(1)})


def check_skip() -> None:
    """A gradient that is not finite on one process is a step that none makes; with a loss scaler as without."""
    accelerator = Accelerator()
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=8.0)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        reference = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        reference.load_state_dict(network.state_dict())
        shard(network, network[:1], accelerator.device)
        optimizer = AcceleratedOptimizer(torch.optim.AdamW(network.parameters(), lr=0.1, fused=True), scaler=scaler)
        plain = torch.optim.AdamW(reference.parameters(), lr=0.1, fused=True)
        accelerator.scaler = scaler
        accelerator.unscale_gradients = lambda optimizer: scaler and scaler.unscale_(optimizer.optimizer)  # noqa: B023
        count, rank = accelerator.num_processes, accelerator.process_index
        for step in range(3):
            images = torch.randn(2 * count, 5, generator=torch.Generator().manual_seed(step))
            if step == 1:
                images[count - 1] = torch.nan  # of the last process
            loss = network(images[rank::count]).square().mean()
            (scaler.scale(loss) if scaler else loss).backward()
            norm, skipped = finite_step(accelerator, optimizer, 0.5)
            assert bool(skipped) == (step == 1)
            if step != 1:
                reference(images).square().mean().backward()
                wanted = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
                torch.testing.assert_close(norm, wanted)
                plain.step()
                plain.zero_grad()
            for one, other in zip(network.parameters(), reference.parameters(), strict=True):
                torch.testing.assert_close(whole(one.detach()), other.detach())
        if scaler:
            assert scaler.get_scale() == 4.0


@pytest.mark.parametrize(
    ("check", "count"), [(check_teacher, 2), (check_state, 3), (check_skip, 3)], ids=["teacher", "state", "skip"]
)
def test_sharded_parts(check, count, tmp_path):
    for ended in together(count, check, place=tmp_path):
        assert ended.status == 0, ended.output
