"""Two processes are one: the same global batches, and the same losses."""

import json

import pytest
import torch

from tests.training.conftest import LAUNCH, read_log

RECORD = """
import os, torch
from proteus.training.task import Distillation
forward, seen = Distillation.forward, []
def record(self, images, mask, *others):
    seen.append((images.clone(), mask.clone()))
    torch.save(seen, os.environ["PROTEUS_SEEN"] + os.environ.get("RANK", "0"))
    return forward(self, images, mask, *others)
Distillation.forward = record
"""

STEPS = 20
SETTINGS = (f"schedule.steps={STEPS}", "student.arch.drop_path=0.0")


@pytest.fixture
def both(trainer, tmp_path, monkeypatch):
    """The same run by one process of 16 images and by two of 8: their folders, and what each process was fed."""
    runs = {}
    for name, options, batch in (("one", {}, 16), ("two", {"launcher": LAUNCH}, 8)):
        monkeypatch.setenv("PROTEUS_SEEN", str(tmp_path / f"{name}_seen"))
        runs[name] = trainer(name, *SETTINGS, f"run.batch_size={batch}", prelude=RECORD, **options)
    for run in runs.values():
        assert run.wait() == 0, run.output()
    seen = {name: torch.load(tmp_path / f"{name}_seen{rank}") for name, rank in (("one", 0), ("two", 1))}
    return runs, seen["one"], [torch.load(tmp_path / "two_seen0"), seen["two"]]


def test_two_processes_see_the_global_batches_of_one_and_lose_the_same(both):
    runs, whole, shares = both
    facts = json.loads((runs["two"].directory / f"checkpoints/step_{STEPS}/progress.json").read_text())
    assert facts["environment"]["processes"] == 2
    assert (
        json.loads((runs["one"].directory / f"checkpoints/step_{STEPS}/progress.json").read_text())["environment"][
            "processes"
        ]
        == 1
    )

    assert len(whole) == len(shares[0]) == len(shares[1]) == STEPS
    for (images, mask), *parts in zip(whole, *shares, strict=True):
        for rank, (own_images, own_mask) in enumerate(parts):
            assert torch.equal(own_images, images[rank::2])  # pixels: crop, augmentation and erasing alike
            assert torch.equal(own_mask, mask[rank::2])
            assert len(own_images) == 8

    one, two = read_log(runs["one"].directory), read_log(runs["two"].directory)
    assert [row["step"] for row in two] == list(range(1, STEPS + 1))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "loss_token", "loss_patch", "loss_feature", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), f"step {a['step']}: {key}"


def test_the_error_comes_once_from_two_processes(trainer):
    run = trainer("bad", "losses.tokn=1", launcher=LAUNCH)
    assert run.wait() != 0
    assert run.output().count("error: unknown loss 'tokn'; did you mean 'token'?") == 1
