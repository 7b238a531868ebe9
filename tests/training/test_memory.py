"""What a step needs in memory, counted, and the batch that is chosen by it."""

import gc
from types import SimpleNamespace

import pytest
import torch
import yaml

from proteus.training import memory
from proteus.training.memory import Memory, PeakMemory
from tests.training.conftest import read_log

MB = 2**20


def counted(run):
    with PeakMemory() as counter:
        run()
    return counter.peak


def megabytes(count):
    return torch.zeros(count, MB // 4)


def test_the_peak_is_of_what_is_there_at_once():
    def one_after_the_other():
        for _ in range(3):
            megabytes(2)

    def together():
        kept = [megabytes(2) for _ in range(3)]
        del kept
        megabytes(1)

    assert counted(one_after_the_other) == 2 * MB
    assert counted(together) == 6 * MB


def test_views_and_what_was_there_before_do_not_count():
    before = megabytes(4)

    def run():
        before.view(-1)[:10].add_(1)
        new = megabytes(1)
        assert new.t()[3].numel()

    assert counted(run) == MB


def test_backward_counts_what_is_kept_for_it_and_gradients():
    weight = torch.ones(256, 1024, requires_grad=True)  # 1 MB
    x = torch.ones(1024, 256)  # 1 MB

    def run():
        y = x @ weight  # 4 MB
        z = y.sigmoid()  # 4 MB, kept
        del y
        z.sum().backward()

    # At the widest: z, the gradient of z expanded from a number, the gradient of y (4 MB), that of the weight (1 MB).
    assert 9 * MB <= counted(run) <= 12.1 * MB
    assert weight.grad is not None
    gc.collect()


def test_a_total_is_what_stays_and_what_each_image_adds():
    assert Memory(teachers=5, students=7, step=11, image=3).total(4) == 5 + 7 + 11 + 12


def tried(run_here, monkeypatch, images, *overrides, **options):
    """A run with room for so many images; returns the exit status."""
    monkeypatch.setattr(memory, "measure_memory", lambda *_: Memory(teachers=100, students=200, step=50, image=10))
    monkeypatch.setattr(memory, "free_memory", lambda _: 350 + 10 * images + 9)
    return run_here("run.batch_size=auto", *overrides, **options)


def settled(directory):
    run = yaml.safe_load((directory / "config.yaml").read_text())["run"]
    return run["batch_size"], run["accumulate"], run["global_batch"]


@pytest.mark.parametrize(("images", "expected"), [(45, 40), (8, 8), (7, 7), (5000, 1347)])
def test_the_most_images_that_fit_are_taken(run_here, monkeypatch, tmp_path, images, expected):
    assert tried(run_here, monkeypatch, images, "schedule.steps=1", "data.augment.auto_augment=null") == 0
    assert settled(tmp_path / "run") == (expected, 1, None)


def test_the_rate_follows_the_batch(run_here, monkeypatch, tmp_path):
    rate = ("optimizer.lr=1e-3", "optimizer.lr_batch=10", "schedule.steps=1", "schedule.warmup_steps=0")
    assert tried(run_here, monkeypatch, 20, *rate, directory="auto") == 0
    assert run_here("run.batch_size=16", *rate, directory="fixed") == 0
    for name in ("auto", "fixed"):
        assert read_log(tmp_path / name)[0]["lr"] == pytest.approx(1.6e-3)
    assert read_log(tmp_path / "auto")[0]["loss"] == read_log(tmp_path / "fixed")[0]["loss"]


@pytest.mark.parametrize(
    ("images", "expected"), [(20, (16, 3)), (15, (12, 4)), (48, (48, 1)), (500, (48, 1)), (1, (1, 48))]
)
def test_a_global_batch_is_made_up_of_equal_micro_batches(run_here, monkeypatch, tmp_path, images, expected):
    common = ("run.global_batch=48", "schedule.steps=1", "losses={token: 1.0}", "data.augment.auto_augment=null")
    assert tried(run_here, monkeypatch, images, *common) == 0
    assert settled(tmp_path / "run") == (*expected, None)


def test_a_run_goes_on_with_the_batch_it_began_with(run_here, monkeypatch, tmp_path):
    assert tried(run_here, monkeypatch, 16, directory="whole") == 0
    assert tried(run_here, monkeypatch, 16, "schedule.steps=12", directory="run") == 0
    for step in (10, 12):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    assert tried(run_here, monkeypatch, 99, directory="run") == 0  # there is more room now
    assert settled(tmp_path / "run") == (16, 1, None)
    assert (tmp_path / "run/student.safetensors").read_bytes() == (tmp_path / "whole/student.safetensors").read_bytes()


def test_where_not_one_image_fits_it_says_so(run_here, monkeypatch, capsys):
    assert tried(run_here, monkeypatch, 0) == 2
    assert "run.batch_size=auto: one image needs" in capsys.readouterr().err


def test_the_memory_of_a_real_step_grows_with_its_images(run_here, tmp_path, monkeypatch):
    """The counted peak of a larger batch is what the line through two small ones says."""
    from proteus.training import loop

    found = {}

    def build(cfg, source, accelerator, directory):
        parts = build_parts(cfg, source, accelerator, directory)
        found["line"] = memory.measure_memory(parts, accelerator.device)
        batch = parts.dataset.batch(parts.sampler.micro_batch(0, 0, 0)).to(accelerator.device)
        with PeakMemory() as counter:
            memory._try_step(parts, batch)
        for learner in parts.learners:
            learner.optimizer.zero_grad()
        found["peak"] = counter.peak
        return parts

    build_parts = loop.start.build_parts
    monkeypatch.setattr(loop.start, "build_parts", build)
    assert run_here("schedule.steps=1", "run.batch_size=32") == 0
    line = found["line"]
    assert line.image > 16 * 16 * 3 * 4  # the pixels alone, as floats
    assert found["peak"] == pytest.approx(line.step + 32 * line.image, rel=0.05)
    parameters = 2 * 16 * 16 * 12
    assert line.students > 4 * 4 * parameters  # weights, two moments, the average
    assert line.teachers > 4 * 2 * 32 * 32 * 12


def test_a_process_has_its_share_of_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=4_000_000))
    monkeypatch.setattr(memory, "_container_memory", lambda: float("inf"))
    on_cpu = SimpleNamespace(device=torch.device("cpu"), num_processes=2)
    assert memory.free_memory(on_cpu) == 1_000_000
    monkeypatch.setattr(memory, "_container_memory", lambda: 2_000_000)
    assert memory.free_memory(on_cpu) == 500_000


def test_a_container_has_less(tmp_path):
    assert memory._container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5000\n")
    assert memory._container_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("9000\n")
    assert memory._container_memory(tmp_path) == 4000


def test_another_global_batch_than_a_run_began_with_is_refused(run_here, monkeypatch, capsys):
    common = ("run.global_batch=48", "schedule.steps=1", "losses={token: 1.0}")
    assert tried(run_here, monkeypatch, 48, *common) == 0
    assert tried(run_here, monkeypatch, 48, "run.global_batch=96", *common[1:]) == 2
    assert "run.global_batch=96: the run has begun with 48 images an update" in capsys.readouterr().err
