"""The paper's five tasks: every preset fits, and its budgets and splits come out as published."""

import re

import numpy as np
import pytest
import timm

from proteus.config_files import CONFIGS, load_config
from proteus.models import list_models
from proteus.transfer import target as module
from proteus.transfer.config import TransferConfig
from proteus.transfer.target import open_target
from tests.data.sets.fixtures import put, text
from tests.transfer.test_target import Known, KnownDense, counts, known, names, of_counts  # noqa: F401  # a fixture

PRESETS = ["ade20k", "eurosat", "ham10k", "imagenet", "places365"]
LAND = [3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000]  # in alphabetical order of the classes
LESIONS = {"AKIEC": 327, "BCC": 514, "BKL": 1099, "DF": 115, "MEL": 1113, "NV": 6705, "VASC": 142}


def preset(name: str, *overrides: str) -> TransferConfig:
    return load_config(f"transfer/{name}.yaml", list(overrides), TransferConfig)


def labels(name: str, *overrides: str) -> tuple[int, ...]:
    """Sizes of what is labelled, validated on, tested on, and left without labels."""
    target = open_target(preset(name, *overrides), 0)
    if target.val is not None and target.val.classes:
        assert target.val.classes == target.classes
    return len(target.train), len(target.val) if target.val else 0, len(target.test), len(target.unlabelled)


def spread(total: int, classes: int, low: int, high: int) -> list[int]:
    """Sizes of classes from low to high that add up to a total, no two alike where that is possible."""
    sizes = np.linspace(0, 1, classes) ** 2
    scale = (total - low * classes) / sizes.sum()
    sizes = np.floor(low + sizes * scale).astype(int)
    sizes[: total - sizes.sum()] += 1
    assert sizes.sum() == total
    assert sizes.max() <= high
    return sizes.tolist()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_and_its_comments_name_keys_that_exist(name):
    cfg = preset(name)
    assert (cfg.teacher.name, cfg.student.name) == ("dinov2_vitl14", "timm/fastvit_s12")
    assert cfg.run.dir == f"runs/{name}"
    for stage in (cfg.adapt, cfg.transfer, cfg.finetune):
        assert stage.optimizer.lr_batch == stage.batch_size
        assert stage.schedule.min_lr < stage.optimizer.lr / 10
        assert stage.validate_every <= stage.schedule.steps / 10
    assert cfg.image_size % 14 == cfg.image_size % 32 == 0
    for file in (name, "base"):
        for key in re.findall(r"\b((?:target|transfer|teacher|student)\.[a-z_.]+)=", _text(file)):
            branch = cfg.model_dump()
            for part in key.split("."):
                assert part in branch, key
                branch = branch[part]


def test_the_networks_are_known():
    assert {"dinov2_vitl14", "openclip_vitl14_datacompxl"} <= set(list_models())
    assert timm.is_model("fastvit_s12")
    assert timm.is_model("mobilevitv2_100")
    for name in ("openclip_vitl14_datacompxl", "timm/mobilevitv2_100"):
        assert f"name={name}" in _text("base")


def test_eurosat(known):  # noqa: F811
    known["."] = of_counts(LAND)
    for budget, expected in [("5", 50), ("10", 100), ("25", 250), ("null", 2700)]:
        assert labels("eurosat", f"target.train.per_class={budget}") == (expected, 5400, 18900, 2700)
    target = open_target(preset("eurosat", "target.train.per_class=null"), 0)
    for part, share in [(target.test, 0.7), (target.val, 0.2), (target.train, 0.1)]:
        assert counts(part) == pytest.approx([count * share for count in LAND])
    assert counts(open_target(preset("eurosat"), 0).train) == [10] * 10


def test_ham10k(known):  # noqa: F811
    known["train.csv"] = of_counts(list(LESIONS.values()), "train", list(LESIONS))
    known["val.csv"] = of_counts([8, 15, 22, 1, 21, 123, 3], "val", list(LESIONS))
    known["test.csv"] = of_counts([43, 93, 217, 44, 171, 909, 35], "test", list(LESIONS))
    for budget, expected in [("100", 700), ("250", 1507), ("500", 2584), ("1000", 4098), ("null", 10015)]:
        assert labels("ham10k", f"target.train.per_class={budget}") == (expected, 193, 1512, 10015)
    assert len(open_target(preset("ham10k"), 0).train) == 700


@pytest.fixture
def unnamed(monkeypatch):
    """Images are not compared by name, which takes most of the time of opening millions."""
    monkeypatch.setattr(module, "_check_apart", lambda target, views: None)


@pytest.mark.usefixtures("unnamed")
def test_places365(known):  # noqa: F811
    known["train"], known["val"] = of_counts(spread(1_803_460, 365, 3068, 10_000), "train"), of_counts([100] * 365)
    for budget, expected in [("250", 91_250), ("1000", 365_000)]:
        assert labels("places365", f"target.train.per_class={budget}") == (expected, 3650, 32_850, 1_803_460)
    target = open_target(preset("places365"), 0)
    assert (counts(target.val), counts(target.test)) == ([10] * 365, [90] * 365)
    assert counts(target.train) == [50] * 365


@pytest.mark.usefixtures("unnamed")
def test_imagenet(known):  # noqa: F811
    sizes = [1300] * 895 + spread(1_281_167 - 895 * 1300, 105, 732, 2000)
    known["train"], known["val"] = of_counts(sizes, "train"), of_counts([50] * 1000, "val")
    for budget, expected in [("128116", 128_116), ("320255", 320_255), ("640557", 640_557)]:
        assert labels("imagenet", f"target.train.images={budget}") == (expected, 0, 50_000, 1_281_167)
    target = open_target(preset("imagenet"), 0)
    assert len(target.train) == 12_811
    assert np.abs(np.array(counts(target.train)) - np.array(sizes) / 100).max() < 1


def test_ade20k(known):  # noqa: F811
    known["train"], known["val"] = KnownDense([0] * 20_210, "ab", "train"), KnownDense([0] * 2000, "ab", "val")
    for budget in (1200, 2401, 4802, 9605, 19_210):
        assert labels("ade20k", f"target.train.images={budget}") == (budget, 1000, 2000, 19_210)
    assert labels("ade20k", "target.train.images=null") == (19_210, 1000, 2000, 19_210)
    assert labels("ade20k")[0] == 1200


def test_ade20ks_queries_and_retrieved_images_are_as_many_at_every_budget():
    retrieval = _text("ade20k").partition("--per-query")[2].partition(";")[0].replace("labels", "")
    pairs = [(int(k), int(labels.replace(",", ""))) for k, labels in re.findall(r"(\d+)\s+for\s+([\d,]+\d)", retrieval)]
    assert [labels for _, labels in pairs] == [1200, 2401, 4802, 9605, 19_210]
    retrieved = [k * labels for k, labels in pairs]
    assert retrieved == [152_400, 151_263, 148_862, 144_075, 134_470]


def test_eurosat_as_it_lies_on_the_disk_and_with_label_files(tmp_path):
    for label in ("AnnualCrop", "Forest"):
        for index in range(20):
            put(tmp_path / f"2750/{label}/{label}_{index}.jpg", 50)
    sizes = ["target.train.per_class=2", "target.val.images=8", "target.test.images=28"]
    cfg = preset("eurosat", f"target.root={tmp_path}/2750", *sizes)
    target = open_target(cfg, 0)
    assert (counts(target.train), counts(target.val), counts(target.test)) == ([2, 2], [4, 4], [14, 14])
    assert all(f"{tmp_path}/2750/AnnualCrop/AnnualCrop_" in name for name in names(target.train)[:2])
    for part, index in [("train", 0), ("val", 5), ("test", 9)]:
        text(tmp_path / f"{part}.txt", [f"{label}_{index}.jpg,{label}" for label in ("Forest", "AnnualCrop")])
    lists = [f"target.{part}.split={tmp_path}/{part}.txt" for part in ("train", "val", "test")]
    whole = ["target.train.per_class=null", "target.val.images=null", "target.test.images=null"]
    cfg = preset("eurosat", "target.set=listed", f"target.root={tmp_path}/2750", *lists, *whole)
    target = open_target(cfg, 0)
    assert [name.rpartition("/")[2] for name in names(target.test)] == ["Forest_9.jpg", "AnnualCrop_9.jpg"]
    assert target.test.labels.tolist() == [1, 0]
    assert len(target.unlabelled) == 2


def _text(name: str) -> str:
    """A preset's comments, joined."""
    lines = (CONFIGS / f"transfer/{name}.yaml").read_text().splitlines()
    return " ".join(line.partition("#")[2] for line in lines)
