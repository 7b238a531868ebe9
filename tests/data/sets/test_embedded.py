"""What needs no file: scenes are what they say and can be learnt, corruptions corrupt; and pinned hub copies."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier

from proteus.data.scenes import CAMERA, CLASSES, draw_scene
from proteus.data.sets import open_set
from proteus.data.sets.embedded import CORRUPTIONS, SEVERITIES
from proteus.data.sets.hub import hub_source
from proteus.data.transforms import EvalTransform
from proteus.errors import InputError, MissingDataError
from proteus.models import load_checkpoint
from tests.data.sets.test_fine_grained import told
from tests.data.test_sources import offline, table  # noqa: F401  # offline is a fixture

TEACHER = Path(__file__).parents[3] / "benchmarks/demo/teacher.safetensors"


@pytest.fixture(scope="module")
def teacher():
    return load_checkpoint(str(TEACHER)).eval()


# Scenes


def test_a_scene_depends_on_seed_and_index_alone():
    scene = draw_scene(3, 7)
    draw_scene(0, 0)
    assert all((a == b).all() for a, b in zip(scene, draw_scene(3, 7), strict=True))
    for other in (draw_scene(3, 8), draw_scene(4, 7), draw_scene(7, 3)):
        assert (other.image != scene.image).any()
    assert [array.dtype for array in scene] == [np.uint8, np.uint8, np.float32]
    assert draw_scene(0, 0, 24, 40).image.shape == (24, 40, 3)


@pytest.mark.parametrize("size", [(32, 32), (48, 64)])
def test_classes_and_distances_agree(size):
    height, width = size
    seen = set()
    for index in range(30):
        scene = draw_scene(0, index, height, width)
        seen |= set(np.unique(scene.classes))
        assert scene.depth.min() > 1.5
        assert scene.depth.max() < 9
        wall = scene.depth[scene.classes == 0]
        assert wall.min() == wall.max() == scene.depth.max()
        rows = np.nonzero(scene.classes == 1)[0] + 0.5
        assert scene.depth[scene.classes == 1] == pytest.approx(0.9 * width * CAMERA / (rows - 0.35 * height), rel=1e-5)
        for label in (2, 3, 4):  # each thing is at one distance
            assert len(np.unique(scene.depth[scene.classes == label])) <= 4
    assert seen == set(range(len(CLASSES)))


def test_nearer_things_hide_farther_ones_and_are_larger():
    near, far = [], []
    for index in range(200):
        scene = draw_scene(1, index)
        for distance in np.unique(scene.depth[scene.classes > 1]):
            area = (scene.depth == distance).sum()
            (near if distance < 3 else far if distance > 6 else []).append(area)
            bottom = np.nonzero((scene.depth == distance).any(1))[0].max()
            # A thing's lowest pixel is not below where it stands on the floor.
            assert bottom <= 0.35 * 32 + 0.9 * 32 * CAMERA / distance
        things = np.where(scene.classes > 1, scene.depth, np.inf)
        rows, columns = np.nonzero(things == things.min())
        if scene.classes[rows[0], columns[0]] == 3:  # nothing hides a part of the nearest box
            assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    assert np.mean(near) > 3 * np.mean(far)


def patch_rows(encoder, name: str, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Patch tokens [n, D] and the target in the middle of each patch."""
    source = open_set(name, None, split)
    images = torch.stack([torch.from_numpy(np.array(source.load(i))).permute(2, 0, 1) for i in range(count)])
    with torch.no_grad():
        tokens = encoder(images).patch.flatten(0, 1)  # [n * 64, D]
    return tokens.numpy(), np.concatenate([source.target(i)[2::4, 2::4].ravel() for i in range(count)])


def test_scenes_can_be_learnt_by_linear_heads(teacher):
    scenes, depth = "scenes", "scenes-depth"
    x, y = patch_rows(teacher, scenes, "train", 60)
    test_x, test_y = patch_rows(teacher, scenes, "test", 40)
    scale = x.std(0)
    head = RidgeClassifier(10, class_weight="balanced").fit(x / scale, y)
    recall = [(head.predict(test_x / scale)[test_y == label] == label).mean() for label in range(5)]
    assert np.mean(recall) > 0.6  # 0.2 by a constant guess
    z, test_z = patch_rows(teacher, depth, "train", 60)[1], patch_rows(teacher, depth, "test", 40)[1]
    error = np.sqrt(np.mean((Ridge(10).fit(x / scale, z).predict(test_x / scale) - test_z) ** 2))
    assert error < 0.65 * np.sqrt(np.mean((test_z - z.mean()) ** 2))


def test_the_splits_of_the_scenes():
    train, test = (open_set("scenes", None, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (160, 80)
    assert train.classes == CLASSES
    assert open_set("scenes-depth", None, "test").classes == []
    assert train.load(0).tobytes() != test.load(0).tobytes()
    assert train.target(0).shape == (32, 32)
    assert train.target(0).dtype == np.uint8
    assert open_set("scenes-depth", None, "test").target(0).dtype == np.float32
    assert open_set("scenes-depth", None, "test").load(5).tobytes() == test.load(5).tobytes()
    assert "scenes: no split 'val'" in told("scenes", None, "val")


# Digits


def test_a_subset_of_the_digits():
    whole, some = open_set("digits", None, "test"), open_set("digits", None, "test", only=[7, 1])
    assert len(whole) == 450
    assert some.classes == ["7", "1"]
    assert len(some) == (whole.labels == 7).sum() + (whole.labels == 1).sum()
    kept = [index for index in range(450) if whole.labels[index] in (1, 7)]
    for position, index in enumerate(kept):
        assert some.name(position) == whole.name(index)
        assert some.classes[some.labels[position]] == whole.classes[whole.labels[index]]
    assert "only=[3, 10]: expected some of 0 to 9" in told("digits", None, "test", only=[3, 10])


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruptions_grow_with_severity(corruption):
    clean = open_set("digits", None, "test")
    previous = 0.0
    for severity in SEVERITIES:
        source = open_set("digits", None, "test", corruption=corruption, severity=severity)
        assert (source.labels == clean.labels).all()
        assert source.load(5).size == (16, 16)
        assert source.load(5).tobytes() == source.load(5).tobytes()
        change = np.mean(
            [
                np.abs(np.asarray(source.load(index), dtype=float) - np.asarray(clean.load(index).resize((16, 16), 3)))
                for index in range(20)
            ]
        )
        assert change > previous + 1
        previous = change


def test_corruptions_hurt(teacher):
    def tokens(source, step):
        view = EvalTransform(16, 1.0)
        with torch.no_grad():
            return teacher(torch.stack([view(source.load(index)) for index in range(0, len(source), step)])).cls.numpy()

    train, test = open_set("digits", None, "train"), open_set("digits", None, "test")
    head, labels = RidgeClassifier().fit(tokens(train, 2), train.labels[::2]), test.labels[::4]
    assert head.score(tokens(test, 4), labels) > 0.95
    for corruption in CORRUPTIONS:
        mild, strong = (
            head.score(tokens(open_set("digits", None, "test", corruption=corruption, severity=s), 4), labels)
            for s in (1, 5)
        )
        assert strong < mild - 0.2
        assert mild > 0.6


def test_unknown_corruptions():
    assert "no corruption 'blur'" in told("digits", None, "test", corruption="blur")
    assert "severity=0 is not one of 1, 2, 3, 4, 5" in told("digits", None, "test", corruption="contrast", severity=0)


# Copies on the hub


def test_a_folder_of_parquet_files(tmp_path, offline):  # noqa: F811
    two = table(4, image="view", label="kind", coarse=[0, 0, 1, 1])
    two.to_parquet(str(tmp_path / "set/train-00000-of-00001.parquet"))
    source = hub_source(str(tmp_path / "set"), "train", label_column="coarse")
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert hub_source(str(tmp_path / "set"), "train", image_column="view").labels.tolist() == [0, 1, 2, 0]
    assert source.load(3).getpixel((0, 0)) == (30, 30, 30)
    with pytest.raises(InputError, match=f"{tmp_path}/set: has no column 'course'; did you mean 'coarse'"):
        hub_source(str(tmp_path / "set"), "train", label_column="course")
    with pytest.raises(InputError, match="column 'view' holds no class numbers"):
        hub_source(str(tmp_path / "set"), "train", label_column="view")
    with pytest.raises(InputError, match="split 'test'"):
        hub_source(str(tmp_path / "set"), "test")
    assert offline == []


def test_a_hub_copy_is_the_one_of_its_commit(tmp_path, offline, monkeypatch):  # noqa: F811
    import huggingface_hub.constants

    commits = ["a" * 40, "b" * 40]
    for number, commit in enumerate(commits):
        folder = tmp_path / "huggingface/hub/datasets--some--set/snapshots" / commit
        table(3 + number).to_parquet(str(folder / "data/train-00000-of-00001.parquet"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "huggingface/hub"))
    assert [len(hub_source("some/set", "train", revision=commit)) for commit in commits] == [3, 4]
    with pytest.raises(MissingDataError, match=r"some/set@cccccccccccc: not in .*, and it may not be downloaded"):
        hub_source("some/set", "train", revision="c" * 40)
    for revision in (None, "main", "abc123"):
        with pytest.raises(InputError, match="needs its commit"):
            hub_source("some/set", "train", revision=revision)
    assert offline == []
    with pytest.raises(MissingDataError, match="some/set@cccc"):
        hub_source("some/set", "train", revision="c" * 40, download=True)
    assert offline != []
