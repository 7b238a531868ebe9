"""What makes a step cheaper and leaves its numbers alone."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from proteus.engine.compiled import keep_compiled
from proteus.models import create_model
from proteus.training.memory import PeakMemory
from proteus.training.teacher import hold_in_precision
from tests.training.conftest import read_log

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}


def vit(**options):
    torch.manual_seed(0)
    return create_model("timm/vit_tiny_patch16_224", image_size=32, **(VIT | options))


def test_a_held_teacher_says_to_the_bit_what_autocast_says():
    for name, options in (("timm/vit_tiny_patch16_224", VIT), ("proteus_vitt14", {})):
        torch.manual_seed(0)
        plain = create_model(name, image_size=32 if options else 28, **options).freeze()
        held = copy.deepcopy(plain)
        hold_in_precision(held, "bf16")
        images = torch.rand(2, 3, *[plain.image_size] * 2)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            a, b = plain(images), held(images)
        assert torch.equal(a.cls, b.cls)
        assert torch.equal(a.patch, b.patch)
        size = [sum(p.numel() * p.element_size() for p in encoder.parameters()) for encoder in (plain, held)]
        assert size[1] < 0.6 * size[0]
        kinds = {type(m) for m in held.modules() if any(p.dtype == torch.bfloat16 for p in m.parameters(recurse=False))}
        assert kinds == {nn.Linear, nn.Conv2d}


def test_in_float32_a_teacher_is_held_as_it_is():
    encoder = vit()
    hold_in_precision(encoder, "no")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_selective_checkpointing_computes_no_product_twice(precision):
    images = torch.rand(4, 3, 32, 32)
    flops, peaks, gradients = {}, {}, {}
    for choice in (False, "selective", True):
        encoder = vit().train()
        if choice:
            encoder.set_grad_checkpointing(choice)

        def step(encoder=encoder):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                features = encoder(images)
            (features.cls.float().square().mean() + features.patch.float().square().mean()).backward()

        with PeakMemory() as memory:
            step()
        peaks[choice] = memory.peak
        gradients[choice] = [p.grad.clone() for p in encoder.network.parameters()]
        with FlopCounterMode(display=False) as counter:
            step()
        flops[choice] = counter.get_total_flops()
    for choice in ("selective", True):
        for a, b in zip(gradients[False], gradients[choice], strict=True):
            assert torch.equal(a, b)
    assert flops["selective"] == flops[False]
    assert flops[True] > 1.2 * flops[False]
    assert peaks[True] < 0.8 * peaks["selective"] < 0.8 * 0.85 * peaks[False]


def test_selective_checkpointing_is_for_transformers(run_here, capsys):
    assert run_here("student={name: timm/resnet10t, grad_checkpointing: selective}", "data.image_size=32") == 2
    assert "grad_checkpointing=selective is for transformers" in capsys.readouterr().err


def test_compiled_blocks_hide_their_products(run_here, capsys):
    assert run_here("student.grad_checkpointing=selective", "student.compile=true") == 2
    assert "student.grad_checkpointing: selective cannot see the products of compiled blocks" in capsys.readouterr().err


def test_a_run_with_selective_checkpointing_is_the_same_run(run_here, tmp_path):
    assert run_here(directory="kept") == 0
    assert run_here("student.grad_checkpointing=selective", directory="again") == 0
    rows = [[row["loss"] for row in read_log(tmp_path / name)] for name in ("kept", "again")]
    assert rows[0] == rows[1]


def test_channels_last_changes_the_layout_and_not_the_numbers():
    torch.manual_seed(0)
    plain = create_model("timm/resnet10t", image_size=64).eval()
    laid = copy.deepcopy(plain)
    laid.use_channels_last()
    images, mask = torch.rand(4, 3, 64, 64), torch.tensor([[True, False, False, True]] * 2)
    seen = []
    laid.network.layer1.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    for a, b in zip(plain.forward_pair(images, mask), laid.forward_pair(images, mask), strict=True):
        torch.testing.assert_close(b.patch, a.patch, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.cls, a.cls, rtol=1e-4, atol=1e-5)
    assert seen == [True]
    weight = laid.network.layer1[0].conv1.weight
    assert not weight.is_contiguous()
    assert torch.equal(weight, plain.network.layer1[0].conv1.weight)


def test_compiled_code_outlives_a_reboot_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "proteus" / "inductor")


COUNT = """
import atexit, sys
def tell():
    from torch._dynamo.utils import counters
    told = counters["inductor"]
    print("kept", told["fxgraph_cache_hit"], told["fxgraph_cache_miss"], file=sys.stderr)
atexit.register(tell)
"""


@pytest.mark.slow
def test_a_second_start_finds_what_the_first_has_compiled_and_learns_the_same(trainer, tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settings = ("student.compile=true", "teacher.compile=true", "schedule.steps=4", "student.arch.drop_path=0")
    told = []
    for name in ("first", "second"):
        run = trainer(name, *settings, prelude=COUNT)
        assert run.wait(400) == 0, run.output()
        kept = next(line for line in run.output().splitlines() if line.startswith("kept"))
        told.append([int(number) for number in kept.split()[1:]])
    assert (tmp_path / "cache" / "proteus" / "inductor").is_dir()
    assert told[0][1] > 0
    assert told[1][0] > 0
    assert told[1][1] == 0
    eager = trainer("eager", "schedule.steps=4", "student.arch.drop_path=0")
    assert eager.wait() == 0, eager.output()
    first, second, plain = ([row["loss"] for row in read_log(tmp_path / name)] for name in ("first", "second", "eager"))
    assert first == second
    assert first == pytest.approx(plain, rel=1e-4)
