"""What only a GPU can show. These skip themselves without one."""

import signal

import pytest
import torch
from safetensors.torch import load_file

from proteus.models import create_model
from tests.training.conftest import read_log

ARCH = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}

pytestmark = pytest.mark.gpu

# Plain, and with images, masks and patch tokens resized and standardised on the device.
RESIZED = ("teacher.image_size=24", "student.image_size=16", "teacher.standardize=true")
settings = pytest.mark.parametrize("settings", [(), RESIZED], ids=["plain", "resized"])


@pytest.fixture(autouse=True)
def on_the_gpu(run_here, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_each_precision_learns(run_here, tmp_path, precision):
    assert run_here(f"run.precision={precision}", "schedule.steps=60") == 0
    rows = read_log(tmp_path / "run")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert sum(row["skipped_steps"] for row in rows) < 20  # fp16 looks for its loss scale


def test_compiled_networks_learn(run_here, tmp_path):
    assert run_here("run.precision=bf16", "teacher.compile=true", "student.compile=true", "schedule.steps=30") == 0
    rows = read_log(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]


@settings
def test_the_step_does_not_wait_for_the_device(run_here, settings):
    torch.cuda.set_sync_debug_mode("error")
    try:
        # One interval without logging in it; what start-up and the end of a run do is theirs.
        from proteus.training.learner import Learner

        learn, steps = Learner.learn, []

        def only_inside(self, batch, answers, step, micro):
            torch.cuda.set_sync_debug_mode("error" if 2 <= len(steps) < 8 else "default")
            steps.append(step)
            learn(self, batch, answers, step, micro)

        Learner.learn = only_inside
        torch.cuda.set_sync_debug_mode("default")
        assert run_here("run.precision=bf16", "run.log_every=100", "run.save_every=100", *settings) == 0
        assert len(steps) == 12
    finally:
        Learner.learn = learn
        torch.cuda.set_sync_debug_mode("default")


GPU = "import os\nos.environ['ACCELERATE_USE_CPU'] = 'false'\n"


def whole_and_killed(trainer, prelude, settings, *resumed_with):
    """A run that was left alone, and one of the same settings that was killed and went on."""
    whole = trainer("whole", *settings, prelude=prelude)
    assert whole.wait() == 0, whole.output()
    killed = trainer("killed", *settings, prelude=prelude)
    killed.wait_until(lambda: killed.steps() >= 13)
    killed.kill(signal.SIGKILL)
    killed.wait()
    resumed = trainer("killed", *settings, *resumed_with, prelude=prelude)
    assert resumed.wait() == 0, resumed.output()
    assert "resumed from" in resumed.output()
    return whole, killed


@settings
def test_killed_on_the_gpu_ends_bit_identical(trainer, settings):
    settings = ("schedule.steps=40", "run.deterministic=true", *settings)
    whole, killed = whole_and_killed(trainer, GPU, settings, "data.workers=2")
    one, other = (load_file(run.directory / "student.safetensors") for run in (whole, killed))
    assert all(torch.equal(one[key], other[key]) for key in one)


ONE_SHARDED = GPU + (
    "os.environ.update(RANK='0', LOCAL_RANK='0', WORLD_SIZE='1', LOCAL_WORLD_SIZE='1', MASTER_ADDR='127.0.0.1', "
    "MASTER_PORT='29411', ACCELERATE_USE_FSDP='true', FSDP_VERSION='2')\n"
)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("prelude", [GPU, ONE_SHARDED], ids=["plain", "fsdp2"])
def test_killed_in_half_precision_ends_bit_identical(trainer, prelude, precision):
    settings = ("schedule.steps=60", "run.deterministic=true", f"run.precision={precision}", "ema.decay=0.9")
    whole, killed = whole_and_killed(trainer, prelude, settings)
    for name in ("student.safetensors", "student_ema.safetensors", "checkpoints/step_60/model.safetensors"):
        one, other = (load_file(run.directory / name) for run in (whole, killed))
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp2_on_one_gpu_is_the_plain_run(trainer, precision):
    settings = ("schedule.steps=12", "run.deterministic=true", f"run.precision={precision}", "optimizer.clip_grad=0.5")
    rows = {}
    for name, prelude in {"plain": GPU, "sharded": ONE_SHARDED}.items():
        run = trainer(name, *settings, prelude=prelude)
        assert run.wait() == 0, run.output()
        rows[name] = [row["loss"] for row in read_log(run.directory)]
        create_model("timm/vit_tiny_patch16_224", checkpoint=run.directory / "student.safetensors", **ARCH)
    assert rows["sharded"] == pytest.approx(rows["plain"], rel=1e-3)
