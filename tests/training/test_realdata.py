"""A folder of real photos, named by PROTEUS_REALDATA; skips without it."""

import pytest

from tests.training.conftest import read_log

pytestmark = pytest.mark.realdata

SMALL = (
    *("teacher.name=dinov2_vits14", "teacher.checkpoint=random", "student.name=proteus_vitt14"),
    *(
        "data.image_size=56",
        "data.workers=1",
        "run.precision=no",
        "run.batch_size=8",
        "run.log_every=2",
        "run.save_every=4",
    ),
    *("schedule.epochs=null", "schedule.warmup_epochs=0", "probe.images=8", "probe.bank=32", "optimizer.lr_batch=null"),
)


def test_a_folder_of_photos_distils_resumes_and_leaves_everything(run_here, realdata, tmp_path):
    here = {"cfg": "examples/folder.yaml"}
    assert run_here(*SMALL, f"data.root={realdata}", "schedule.steps=8", **here) == 0
    assert run_here(*SMALL, f"data.root={realdata}", "schedule.steps=16", **here) == 0
    rows = read_log(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12, 14, 16]
    assert rows[-1]["loss"] < 0.95 * rows[0]["loss"]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"student.safetensors", "student_ema.safetensors", "pictures", "tensorboard", "checkpoints"} <= names
