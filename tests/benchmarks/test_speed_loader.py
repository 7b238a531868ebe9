"""The loader benchmark at toy size: every loader and stage has its figures, and a ratio is that of a round."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.speed import loader
from proteus.data.sources import FolderSource


def test_it_measures_every_loader(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "SIZE", 32)
    out = tmp_path / "loader.json"
    argv = ["--images", "12", "--batch", "4", "--batches", "2", "--rounds", "2", "--workers", "0", "--out", str(out)]
    assert loader.main(argv) == 0
    result = json.loads(out.read_text())
    assert len(result["images_per_second"]) == 6
    assert all(len(values) == 2 and min(values) > 0 for values in result["images_per_second"].values())
    assert result["ratio_to_timm"]["timm"] == 1
    stages = result["milliseconds"]
    assert set(stages) == {"timm", "ours", "ours, packed at 256"}
    for row in stages.values():
        assert sum(value for name, value in row.items() if name != "all") == pytest.approx(row["all"])
        assert row["decode"] > 0
    table = capsys.readouterr().out
    for name, ratio in result["ratio_to_timm"].items():
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |") and line.count("|") == 4]
        assert f"{ratio:.2f}" in line


def test_a_ratio_is_the_median_of_those_of_a_round():
    assert loader._ratio([2.0, 30.0, 8.0], [1.0, 10.0, 8.0]) == 2


def test_a_rate_leaves_out_the_batches_that_were_ready(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    batches = iter([torch.zeros(7)] * (5 + 3))
    assert loader.rate(batches, 3, 5) == 3 * 7 / 2
    assert next(batches, None) is None


def test_images_are_of_imagenets_typical_size(tmp_path):
    loader.make_images(tmp_path / "made", 4, None)
    loader.make_images(tmp_path / "again", 4, tmp_path / "made")
    for folder in ("made", "again"):
        source = FolderSource(tmp_path / folder)
        assert [source.load(i).size for i in range(4)] == [(500, 375)] * 4
        assert source.classes == ["a", "b"]
    image = Image.open(next((tmp_path / "made").rglob("*.jpg")))
    assert 5 < np.asarray(image, dtype=float).std() < 100
    assert 15e3 < np.mean([path.stat().st_size for path in (tmp_path / "made").rglob("*.jpg")]) < 150e3
