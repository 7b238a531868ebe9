"""The tool from its command line to its folder, and what it says to bad input."""

import csv
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from proteus.data.sources import FolderSource
from tests.transfer.retrieval.conftest import photograph


def manifest(out):
    with open(out / "manifest.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_query_gets_as_many_images_and_they_are_a_source(run, task):
    status, out, _ = run()
    assert status == 0
    rows = manifest(task / "out")
    assert [row["rank"] for row in rows] == ["0", "1", "2"] * 4
    assert [row["query"] for row in rows] == [
        str(task / f"queries/{name}") for name in ("a/000.png", "a/001.png", "b/000.png", "b/001.png") for _ in range(3)
    ]
    assert len({row["source"] for row in rows}) == 12
    source = FolderSource(task / "out/images")
    assert source.labels is None
    assert [source.name(i) for i in range(12)] == [row["image"] for row in rows]  # they sort by query and rank
    for index, row in enumerate(rows):
        assert row["image"] == f"q{index // 3:05d}_r{index % 3:02d}_{os.path.basename(row['source'])}"
        assert os.readlink(task / "out/images" / row["image"]) == row["source"]
        assert source.load(index).size == (20, 20)
    assert f"data.kind=folder data.root={task}/out/images" in out
    assert "12 images, 3 to each of 4 queries" in out
    assert "flat, exact: 40 vectors of width 32" in out
    summary = json.loads((task / "out/summary.json").read_text())
    assert (summary["queries"], summary["per_query"], summary["selected"], summary["gallery"]) == (4, 3, 12, 40)
    assert summary["similarity"]["mean"] == pytest.approx(np.mean([float(row["similarity"]) for row in rows]), abs=1e-6)
    picture = Image.open(task / "out/contact_sheet.png")
    assert picture.height > 4 * 112


def test_precision_of_classes_that_both_have(run, task):
    photograph(task / "gallery/c", 10, seed=8)
    _, out, _ = run()
    rows = manifest(task / "out")
    for name in "ab":
        own = [f"/gallery/{name}/" in row["source"] for row in rows if f"/queries/{name}/" in row["query"]]
        assert f"| {name} | {np.mean(own):.3f} | 0.400 |" in out
    assert "| c |" not in out
    shutil.rmtree(task / "gallery/c")
    (task / "gallery/a").rename(task / "gallery/d")
    (task / "gallery/b").rename(task / "gallery/e")
    assert "| precision |" not in run(out=task / "other")[1]


def test_the_same_again_is_the_same_and_another_request_is_refused(run, task):
    run()
    before = everything(task / "out")
    (task / "out/.pending-old-images").mkdir()  # as a kill may leave it
    (task / "out/.pending-sheet.png").write_bytes(b"half")
    assert run()[0] == 0
    assert not list((task / "out").glob(".pending*"))
    after = everything(task / "out")
    assert {name: after[name] for name in before if name.name != "lock"} == {
        name: before[name] for name in before if name.name != "lock"
    }
    status, _, error = run(per_query=2)
    assert status == 2
    assert error.startswith(f"error: --out {task}/out holds what was retrieved with --per-query 3, not 2: give another")
    status, _, error = run(selection="agnostic")
    assert "with --selection balanced, not agnostic" in error
    photograph(task / "more", 1, seed=7)[0].rename(task / "gallery/a/new.png")
    assert "with images" in run()[2]
    assert everything(task / "out").keys() == after.keys()


def test_embeddings_alone_serve_any_request(run, task, monkeypatch):
    run()
    for name in ("summary.json", "manifest.csv", "contact_sheet.png"):
        (task / "out" / name).unlink()
    shutil.rmtree(task / "out/images")
    from proteus.transfer.retrieval import embed

    monkeypatch.setattr(embed, "_tokens", None)  # nothing is computed again
    assert run(per_query=2)[0] == 0
    assert len(manifest(task / "out")) == 8
    assert run(out=task / "shared", selection="random", embeddings=task / "out/embeddings")[0] == 0
    assert len(manifest(task / "shared")) == 12
    assert not (task / "shared/embeddings").exists()


def test_nearer_than_random(run, task):
    means = {}
    for selection in ("balanced", "agnostic", "random"):
        assert run(selection=selection, out=task / selection, embeddings=task / "embeddings")[0] == 0
        means[selection] = json.loads((task / selection / "summary.json").read_text())["similarity"]["mean"]
    assert means["agnostic"] >= means["balanced"] > means["random"]


def test_copies_of_queries_and_of_excluded_images_are_left_out(run, task):
    shutil.copy(task / "queries/a/000.png", task / "gallery/a/query.png")
    shutil.copy(task / "test/001.png", task / "gallery/b/test.png")
    (task / "gallery/a/same.png").symlink_to(task / "gallery/a/007.png")
    status, out, _ = run(exclude=task / "test", per_query=10)
    assert status == 0
    sources = [os.path.basename(row["source"]) for row in manifest(task / "out")]
    assert not {"query.png", "test.png"} & set(sources)
    assert len([row for row in manifest(task / "out") if row["source"].endswith(("a/same.png", "a/007.png"))]) <= 1
    skipped = json.loads((task / "out/summary.json").read_text())["skipped_near_duplicates"]
    assert skipped["query"] == 1
    assert "1 of query images" in out


def test_several_galleries_and_long_names(run, task):
    long = task / "more" / ("é" * 125 + ".png")
    photograph(task / "more", 1, seed=6)[0].rename(long)
    (task / "gallery/a/000.png").unlink()  # 40 are left, and all are taken
    status, _, _ = run(gallery=[task / "more", task / "gallery"], per_query=10)
    assert status == 0
    assert len(list((task / "out/images").iterdir())) == 40


def test_a_dataset_of_hugging_face(run, task, monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    paths = sorted((task / "gallery/a").iterdir())
    images = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    data = datasets.Dataset.from_dict({"picture": images}).cast_column("picture", datasets.Image())
    data.to_parquet(str(task / "set.parquet"))
    assert run(gallery=f"hf:{task}/set.parquet")[0] == 0
    assert run(gallery=task / "gallery/a", out=task / "plain")[0] == 0
    for one, two in zip(manifest(task / "out"), manifest(task / "plain"), strict=True):
        assert one["similarity"] == two["similarity"]
        assert (task / "out/images" / one["image"]).read_bytes() == (task / "plain/images" / two["image"]).read_bytes()
        assert not (task / "out/images" / one["image"]).is_symlink()


def test_unreadable_images_are_counted_named_and_never_selected(run, task):
    for name in ("a/003.png", "b/011.png"):
        (task / "gallery" / name).write_bytes(b"no picture")
    status, out, _ = run(per_query=9)
    assert status == 0
    assert "gallery: 40 images, 2 of them unreadable" in out
    assert (task / "out/unreadable.txt").read_text().splitlines() == [
        str(task / "gallery/a/003.png"),
        str(task / "gallery/b/011.png"),
    ]
    assert not {"a/003.png", "b/011.png"} & {row["source"][-9:] for row in manifest(task / "out")}
    assert json.loads((task / "out/summary.json").read_text())["unreadable"] == 2
    assert "38 readable images, too few for 10 to each of 4 queries (40)" in run(per_query=10, out=task / "new")[2]
    assert run(per_query=9, out=task / "new")[0] == 0  # nothing was retrieved, so nothing is in the way
    assert (task / "new/manifest.csv").read_bytes() == (task / "out/manifest.csv").read_bytes()


BAD = [
    ({"queries": "{}/none"}, "--queries {}/none: no such folder; give a folder of images"),
    ({"queries": "{}/empty"}, "--queries: no images under {}/empty"),
    ({"gallery": "{}/none"}, "--gallery {}/none: no such folder"),
    ({"gallery": "{}/empty"}, "--gallery: no images under {}/empty"),
    ({"exclude": "{}/none"}, "--exclude {}/none: no such folder"),
    ({"gallery": "hf:{}/none"}, "--gallery hf:{}/none, split 'train': "),
    ({"model": "dinov2_vitb"}, "unknown model 'dinov2_vitb'; did you mean 'dinov2_vitb14'?"),
    ({"model": "{}/none.safetensors"}, "weights '{}/none.safetensors' do not exist"),
    ({"model": "proteus_vitt14"}, "proteus_vitt14"),
    ({"model": "proteus_vitt14", "checkpoint": "{}/none.pth"}, "weights '{}/none.pth' do not exist"),
    ({"checkpoint": "{}/x.pth"}, "is a file already: --checkpoint goes with a name of the zoo"),
    ({"per_query": 0}, "--per-query 0: a number from 1 on"),
    ({"per_query": 11}, "--gallery holds 40 images, too few for 11 to each of 4 queries (44): lower --per-query"),
    ({"batch_size": 0}, "--batch-size 0: a number from 1 on"),
    ({"workers": -1}, "--workers -1: a number from 0 on"),
    ({"crop": 1.5}, "--crop 1.5: a share of the short side"),
    ({"near_duplicate": 1}, "--near-duplicate 1.0: a cosine above 0, up to 0.999"),
    ({"selection": "best"}, "--selection best: one of balanced, agnostic, random"),
    ({"image_size": 17}, "--image-size 17: "),
    ({"out": "{}/gallery/out"}, "--out {}/gallery/out lies in {}/gallery, whose images it would add to"),
    ({"out": "{}"}, "--out {} holds other things (broken): give another folder"),
    ({"out": "{}/test/000.png"}, "--out {}/test/000.png cannot be made: File exists"),
    (
        {"exclude": "{}/queries/b"},
        "--queries: {}/queries/b/000.png is the same as, or a near-duplicate of, {}/queries/b/0",
    ),
    ({"exclude": "{}/broken"}, "{}/broken/x.png cannot be read: replace the file"),
    ({"queries": "{}/broken"}, "{}/broken/x.png cannot be read: replace the file"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_input_is_one_clear_line(run, task, options, message):
    (task / "empty").mkdir()
    (task / "broken").mkdir()
    (task / "broken/x.png").write_bytes(b"no picture")
    options = {key: value.format(task) if isinstance(value, str) else value for key, value in options.items()}
    status, _, error = run(**options)
    assert status == 2
    lines = [line for line in error.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message.replace("{}", str(task)) in lines[0]
    assert not (task / "out/manifest.csv").exists()


def test_two_at_once_in_one_folder_are_refused(run, task, monkeypatch):
    from proteus.transfer.retrieval import run as module

    def taken(folder):
        raise module.InputError(f"{folder} is in use by process 1")

    monkeypatch.setattr(module, "RunLock", taken)
    assert run()[0] == 2
    assert not (task / "out/request.json").exists()
