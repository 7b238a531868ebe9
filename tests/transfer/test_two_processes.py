"""Two processes of half the batch train what one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.conftest import LAUNCH, ROOT
from tests.transfer.conftest import SEGMENTATION, results, stage

STAGES = [
    "adapt",
    "oriented/transfer",
    "oriented/finetune",
    "contrastive/transfer",
    "contrastive/finetune",
    "single_stage",
]


def _run(tiny: Path, directory: Path, launcher: tuple[str, ...], batch: int, *overrides: str) -> None:
    sizes = [f"{part}.batch_size={batch}" for part in ("adapt", "transfer", "finetune")]
    command = [
        *launcher,
        str(ROOT / "tools/transfer.py"),
        f"--cfg={tiny}",
        "--compare=oriented,contrastive,single_stage",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"run.dir={directory}", "run.seeds=1", "run.log_every=1", "run.save_every=1000", *sizes, *overrides],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def _losses(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key.startswith("loss")} for row in rows if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_two_processes_equal_one(tiny, tmp_path, task):
    # The demo's teacher drops paths, by a draw of each process; at a head's rate rounding would multiply.
    overrides = (
        [*SEGMENTATION, "teacher.arch.drop_path=0.0", "adapt.optimizer.lr=1e-4"] if task == "segmentation" else []
    )
    _run(tiny, tmp_path / "one", (sys.executable,), 16, *overrides)
    _run(tiny, tmp_path / "two", LAUNCH, 8, *overrides)
    for name in STAGES:
        one, two = tmp_path / "one" / "seed_1" / name, tmp_path / "two" / "seed_1" / name
        assert len(_losses(one)) == stage(one)["steps"]
        for expected, found in zip(_losses(one), _losses(two), strict=True):
            assert found == pytest.approx(expected, rel=1e-5), name
        # The contrastive loss has a matrix of its own size, the rest is the same work.
        assert stage(two)["flops"] == pytest.approx(stage(one)["flops"], rel=1e-3)
    for expected, found in zip(results(tmp_path / "one", "compare"), results(tmp_path / "two", "compare"), strict=True):
        assert found["test"] == pytest.approx(expected["test"], abs=5e-3)


@pytest.mark.slow
def test_parts_of_a_teacher_that_its_pixels_do_not_reach(tiny, tmp_path):
    # Its attention pooling makes the class token, which a head on patches leaves out: processes must not wait for it.
    name = "teacher.name=timm/vit_base_patch16_siglip_224"
    arch = "teacher.arch={patch_size: 4, embed_dim: 32, depth: 2, num_heads: 2}"
    _run(tiny, tmp_path / "two", LAUNCH, 8, *SEGMENTATION, name, arch, "teacher.checkpoint=random")
    assert len(results(tmp_path / "two", "compare")) == 4
