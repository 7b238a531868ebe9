"""A tiny transfer: digits at 16 pixels, the demo's teacher, a student of a few thousand parameters, a dozen steps."""

import json
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

TINY = """
image_size: 16
crop: 1.0
teacher:
  name: timm/vit_tiny_patch16_224
  checkpoint: benchmarks/demo/teacher.safetensors
  arch: {patch_size: 4, embed_dim: 128, depth: 4, num_heads: 4}
student:
  name: timm/vit_tiny_patch16_224
  arch: {patch_size: 4, embed_dim: 16, depth: 2, num_heads: 2}
target:
  set: digits
  train: {split: train, per_class: 3}
  val: {split: train, per_class: 2}
  test: {split: test}
adapt:
  batch_size: 16
  optimizer: {lr: 1e-2, lr_batch: null}
  schedule: {steps: 8}
  augment: &plain {scale: [0.8, 1.0], hflip: 0.0, auto_augment: null, erasing: 0.0}
  validate_every: 4
transfer:
  batch_size: 16
  optimizer: {lr: 2e-3, lr_batch: null}
  schedule: {steps: 6}
  augment: *plain
  validate_every: 3
finetune:
  batch_size: 16
  optimizer: {lr: 5e-4, lr_batch: null}
  schedule: {steps: 4}
  augment: *plain
  validate_every: 2
run: {seed: 1, seeds: 2, precision: no, workers: 0, log_every: 100, save_every: 2, keep: 9}
"""

SEGMENTATION = [
    "task=segmentation",
    "image_size=32",
    "target={set: scenes, train: {split: train, images: 6}, val: {split: train, images: 4}, "
    "test: {split: test, images: 12}}",
    "adapt.tune=all",
]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The path of the tiny transfer's config."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def transfer_here(tiny: Path, tmp_path: Path):
    """Call the tool's main in this process: transfer_here("--compare=all", "run.seed=2") -> exit status."""

    def run(*words: str, directory: str = "run") -> int:
        return call_main(tiny, tmp_path / directory, *words)

    return run


@pytest.fixture(scope="session")
def done_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("transfer")
    (folder / "tiny.yaml").write_text(TINY)
    assert call_main(folder / "tiny.yaml", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def done(done_once: Path, tmp_path: Path) -> Path:
    """The seed's folder of a tiny transfer that is done, a copy of this test's own in `tmp_path / "run"`."""
    shutil.copytree(done_once, tmp_path / "run")
    return tmp_path / "run" / "seed_1"


def call_main(cfg: Path, directory: Path, *words: str, cpu: bool = True) -> int:
    """The tool's main in this process, as if it were the first run."""
    from tools.transfer import main

    flags = [word for word in words if word.startswith("--")]
    keys = [word for word in words if not word.startswith("--")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(cpu).lower())
        patch.delenv("RANK", raising=False)
        PartialState._reset_state()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return main([f"--cfg={cfg}", *flags, f"run.dir={directory}", *keys])


def stage(folder: Path) -> dict:
    """What a stage says of itself."""
    return json.loads((folder / "stage.json").read_text())


def results(directory: Path, name: str = "results") -> list[dict]:
    """The results of a run, or of the comparison `compare`."""
    return json.loads((directory / f"{name}.json").read_text())
