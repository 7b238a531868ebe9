"""Real photos, a really trained network: what is retrieved is of the query's class. Skips without PROTEUS_REALDATA."""

import json

import pytest

from proteus.models import load_checkpoint
from proteus.models.weights import save_encoder
from tools.retrieve import main

pytestmark = pytest.mark.realdata
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@pytest.fixture
def model(realdata, tmp_path):
    weights = realdata / "weights/vit_cifar10_d128_l4_h4_p4.safetensors"
    save_encoder(
        load_checkpoint(str(weights), num_heads=4, mean=MEAN, std=STD, norm_eps=1e-5), tmp_path / "vit.safetensors"
    )
    return tmp_path / "vit.safetensors"


def test_ten_images_to_a_query_are_of_its_class_four_times_as_often_as_by_chance(realdata, model, tmp_path):
    for folder in (realdata / "imagenette-subset/test").iterdir():
        (tmp_path / "queries" / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[:5]:
            (tmp_path / "queries" / folder.name / path.name).symlink_to(path)

    def precision(selection):
        galleries = [f"--gallery={realdata / name}" for name in ("imagenet-sample", "imagenette-subset/train")]
        options = [f"--model={model}", "--per-query=10", f"--selection={selection}", f"--out={tmp_path / selection}"]
        assert main([f"--queries={tmp_path / 'queries'}", *galleries, *options, f"--embeddings={tmp_path / 'e'}"]) == 0
        summary = json.loads((tmp_path / selection / "summary.json").read_text())
        assert (summary["gallery"], summary["unreadable"], summary["selected"]) == (3000, 0, 500)
        return {row["name"]: row for row in summary["classes"]}

    balanced, random = precision("balanced"), precision("random")
    assert len(balanced) == 10
    for name, row in balanced.items():
        assert row["chance"] == pytest.approx(201 / 3000)
        assert row["precision"] > max(row["chance"], random[name]["precision"] if name in random else 0), name
    assert sum(row["precision"] for row in balanced.values()) / 10 > 4 * 201 / 3000
