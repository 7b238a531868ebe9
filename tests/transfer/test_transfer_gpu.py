"""The whole pipeline on a GPU: every method, in half precision, and again bit for bit."""

import math

import pytest
from safetensors.torch import load_file

from tests.transfer.conftest import SEGMENTATION, call_main, results

pytestmark = pytest.mark.gpu


@pytest.fixture
def transfer_on_gpu(tiny, tmp_path):
    """As `transfer_here`, on the GPU."""

    def run(*words: str, directory: str = "run") -> int:
        return call_main(tiny, tmp_path / directory, *words, cpu=False)

    return run


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_every_method_in_half_precision(transfer_on_gpu, tmp_path, precision, task):
    overrides = SEGMENTATION if task == "segmentation" else []
    assert transfer_on_gpu("--compare=all", "run.seeds=1", f"run.precision={precision}", *overrides) == 0
    for row in results(tmp_path / "run", "compare"):
        assert 0 <= row["test"] <= 1
        assert row["flops"] > 0
        state = load_file(f"{row['student']}/student.safetensors")
        assert all(math.isfinite(value.float().sum()) for value in state.values())


def test_the_same_again_bit_for_bit(transfer_on_gpu, tmp_path):
    for directory in ("one", "two"):
        assert transfer_on_gpu("run.precision=bf16", "run.deterministic=true", *SEGMENTATION, directory=directory) == 0
    files = [tmp_path / run / "seed_1/oriented/finetune/student.safetensors" for run in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
