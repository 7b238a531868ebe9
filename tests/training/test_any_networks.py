"""A step of distillation from any teacher to any student: it runs, and every part of the student learns."""

import math

import pytest
import torch
import yaml

from proteus.engine.update import finite_step
from proteus.models import create_model
from tests.training.conftest import read_log

SMALL = "depth: 2, embed_dim: 24, num_heads: 2"
CONVNEXT = "depths: [1, 1, 1, 1], dims: [8, 8, 16, 16]"
DINOV2 = ("dinov2_vits14", f"{{{SMALL}}}", 56)
CLIP = ("clip_vitb16", f"{{{SMALL}}}", 64)
VIT = ("proteus_vitt14", f"{{{SMALL}}}")

# teachers (name, arch, pixels), student (name, arch), the student's pixels for the teacher's grid
PAIRS = {
    "DINOv2 and CLIP to ViT": ([DINOV2, CLIP], VIT, 56),
    "DINOv2 to ViT": ([DINOV2], VIT, 56),
    "CLIP to ViT": ([CLIP], VIT, 56),
    "SigLIP 2 to ViT": ([("siglip2_vitb16_224", f"{{{SMALL}}}", 64)], VIT, 56),
    "DINOv3 to ConvNeXt": (
        [("dinov3_vits16", f"{{{SMALL}}}", 64)],
        ("timm/convnext_atto", f"{{{CONVNEXT}}}"),
        128,
    ),
    "DINOv2 to FastViT": ([("dinov2_vits14", f"{{{SMALL}}}", 28)], ("timm/fastvit_t8", "{}"), 64),
    "DINOv2 to MobileNetV4": ([("dinov2_vits14", f"{{{SMALL}}}", 28)], ("timm/mobilenetv4_conv_small_050", "{}"), 64),
    "ResNet to ViT": ([("timm/resnet18", "{}", 64)], VIT, 28),
    "a user's network to ViT": ([("mynets:build", "{width: 20}", 32)], VIT, 28),
    "ViT to a user's network": ([("dinov2_vits14", f"{{{SMALL}}}", 28)], ("mynets:build", "{width: 20}"), 32),
}

MYNETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.cells = nn.Sequential(nn.Conv2d(3, width, 16, 16), nn.BatchNorm2d(width))

    def forward(self, x):
        return self.cells(x)

def build(width):
    return Net(width)
"""


@pytest.mark.parametrize(("teachers", "student", "pixels"), PAIRS.values(), ids=PAIRS)
def test_a_step(run_here, tmp_path, monkeypatch, teachers, student, pixels):
    (tmp_path / "mynets.py").write_text(MYNETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    listed = ", ".join(
        f"{{name: '{name}', checkpoint: random, image_size: {size}, arch: {arch}}}" for name, arch, size in teachers
    )
    seen = []

    def step(accelerator, optimizer, clip):
        for group in optimizer.param_groups:
            seen.extend(p.grad is not None and bool(p.grad.isfinite().all()) for p in group["params"])
        return finite_step(accelerator, optimizer, clip)

    monkeypatch.setattr("proteus.training.learner.finite_step", step)
    assert (
        run_here(
            "teacher=null",
            f"teachers=[{listed}]",
            f"student={{name: '{student[0]}', arch: {student[1]}}}",
            "schedule.steps=1",
            "schedule.warmup_steps=0",
            "run.batch_size=4",
            "data.image_size=32",
        )
        == 0
    )
    (row,) = read_log(tmp_path / "run")
    suffixes = [""] if len(teachers) == 1 else [f"/{name}" for name, _, _ in teachers]
    for suffix in suffixes:
        for loss in ("token", "patch", "feature"):
            assert math.isfinite(row[f"loss_{loss}{suffix}"])
            assert row[f"loss_{loss}{suffix}"] > 0
    assert row["grad_norm"] > 0
    assert seen
    assert all(seen)  # every parameter the optimiser holds has a gradient

    weights = str(tmp_path / "run" / "student.safetensors")
    trained = create_model(student[0], checkpoint=weights, **yaml.safe_load(student[1]))
    assert trained.image_size == pixels
    fresh = create_model(student[0], image_size=pixels, **yaml.safe_load(student[1]))
    assert trained.network.state_dict().keys() == fresh.network.state_dict().keys()
    features = trained.eval()(torch.rand(2, 3, pixels, pixels))
    if len(teachers) == 1:
        name, arch, size = teachers[0]
        teacher = create_model(name, image_size=size, **yaml.safe_load(arch))
        assert features.grid == teacher.grid_of(size, size)
