"""The records of a teacher cache: read back whole or not at all, and shown in turn."""

import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from proteus.config import Augment
from proteus.data import view_cache
from proteus.data.loader import TrainingSet, training_batches
from proteus.data.sampler import Draw, Sampler
from proteus.data.transforms import Box, Crop, TrainTransform, View, seeded
from proteus.data.view_cache import ViewCache, chunk_file, chunks, pixels_crc, record_dtype, seal, view_key
from proteus.errors import InputError, UnreadableError

VIEWS, BYTES, SEED = 3, 7, 5


class Photos:
    """Images of noise."""

    classes: list[str] = []  # noqa: RUF012
    labels = None

    def __init__(self, count: int, broken: int | None = None):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def load(self, index):
        if index == self.broken:
            raise OSError("broken")
        rng = np.random.default_rng(index)
        return Image.fromarray(rng.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8))

    def name(self, index):
        return f"photo {index}"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(view_cache, "CHUNK", 4)


@pytest.fixture
def photos():
    return Photos(10)


@pytest.fixture
def transform():
    return TrainTransform(16, Augment(erasing=0.5))


@pytest.fixture
def directory(tmp_path, photos, transform):
    """A cache of the photos whose targets are counted up."""
    for chunk in chunks(len(photos)):
        records = np.zeros(len(chunk) * VIEWS, record_dtype(BYTES))
        for place in range(len(records)):
            image, view = chunk.start + place // VIEWS, place % VIEWS
            with seeded(*view_key(SEED, image, view)):
                seen = transform(photos.load(image))
            target = np.arange(BYTES) + 10 * image + view
            records[place] = (seen.crop[:4], seen.crop.flip, pixels_crc(seen.pixels, seen.box), target, 0)
        seal(records, chunk.start * VIEWS)
        records.tofile(chunk_file(tmp_path, chunk.start))
    return tmp_path


def opened(directory, images=10, repeats=2):
    return ViewCache(directory, images, VIEWS, BYTES, SEED, repeats)


def test_records_come_back(directory, photos, transform):
    cache = opened(directory)
    assert sorted(path.name for path in directory.iterdir()) == [f"chunk_{at:08d}.bin" for at in (0, 4, 8)]
    flips = set()
    for image in range(10):
        for view in range(VIEWS):
            record = cache.read(image, view)
            with seeded(*cache.key(image, view)):
                seen = transform(photos.load(image))
            assert record.crop == seen.crop
            assert isinstance(record.crop.flip, bool)
            assert record.pixels == pixels_crc(seen.pixels, seen.box)
            assert list(record.target) == [number + 10 * image + view for number in range(BYTES)]
            flips.add(record.crop.flip)
    assert flips == {True, False}


def test_every_flipped_bit_of_a_record_is_found(directory):
    path, size = chunk_file(directory, 4), record_dtype(BYTES).itemsize
    whole = path.read_bytes()
    number = (5 - 4) * VIEWS + 2  # image 5, view 2
    for byte in range(size):
        changed = bytearray(whole)
        changed[number * size + byte] ^= 1 << byte % 8
        path.write_bytes(changed)
        cache = opened(directory)
        cache.read(5, 1)
        with pytest.raises(UnreadableError, match=rf"{path.name} is damaged .*image 5, view 2.*: delete it and run"):
            cache.read(5, 2)


def test_records_that_stand_elsewhere_are_damaged(directory):
    chunk_file(directory, 0).write_bytes(chunk_file(directory, 4).read_bytes())
    with pytest.raises(UnreadableError, match=r"chunk_00000000.bin is damaged"):
        opened(directory).read(0, 0)


def test_a_file_that_is_missing_or_cut_is_said_at_once(directory):
    path = chunk_file(directory, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"chunk_00000008.bin is damaged .its size.: delete it"):
        opened(directory)
    path.unlink()
    with pytest.raises(InputError, match=r"is not finished .chunk_00000008.bin is missing.: run tools/cache.py"):
        opened(directory)
    path.write_bytes(whole)
    cache = opened(directory)
    path.unlink()
    with pytest.raises(UnreadableError, match=r"chunk_00000008.bin cannot be read"):
        cache.read(9, 0)


def test_few_files_are_open_and_none_travels(directory, monkeypatch):
    monkeypatch.setattr(view_cache, "OPEN", 2)
    cache = opened(directory)
    for image in (0, 5, 9, 1):
        cache.read(image, 0)
        assert 1 <= len(cache._open) <= 2
    copy = pickle.loads(pickle.dumps(cache))
    assert not copy._open
    assert copy.read(9, 1) == cache.read(9, 1)


@pytest.mark.parametrize(("size", "repeats"), [(36, 1), (36, 2), (36, 3), (3, 2)])
def test_an_image_shows_its_views_in_turn(directory, size, repeats):
    cache = opened(directory, images=10, repeats=repeats)
    cache.images = size
    sampler = Sampler(size, batch_size=12, repeats=repeats, seed=SEED)
    shown: dict[int, list[int]] = {image: [] for image in range(size)}
    epochs = 24
    for step in range(epochs * sampler.steps_per_epoch):
        seen: dict[int, list[int]] = {}
        for image, epoch, position, _ in sampler.micro_batch(step, 0, 0):
            seen.setdefault(image, []).append(cache.view(image, epoch, position))
        for image, views in seen.items():
            shown[image] += views
            assert len(set(views)) == min(len(views), VIEWS), (step, image)  # different ones, while there are any
    counts = Counter(view for views in shown.values() for view in views)
    assert max(counts.values()) < 1.1 * min(counts.values())
    assert all(set(views) == set(range(VIEWS)) for views in shown.values())  # over the epochs, all of them
    if repeats == 1:  # every image stands in every epoch
        assert all(set(Counter(views).values()) == {epochs // VIEWS} for views in shown.values())


def test_keys_of_views_are_their_own():
    keys = {view_key(seed, image, view) for seed in (0, 1) for image in range(20) for view in range(5)}
    drawn = {tuple(np.random.SeedSequence(key).generate_state(3)) for key in keys}
    live = {
        tuple(np.random.SeedSequence((0, epoch, place)).generate_state(3)) for epoch in range(9) for place in range(99)
    }
    assert len(drawn) == len(keys) == 200
    assert not drawn & live


def test_the_checksum_of_pixels():
    pixels = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    other_layout = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert pixels_crc(other_layout, None) == pixels_crc(pixels, None)
    box = Box(0, 1, 2, 3, 2**62 + 1)
    one_off = pixels.clone()
    one_off[2, 3, 3] ^= 1
    different = [
        (pixels, None),
        (one_off, None),
        (pixels, box),
        (pixels, box._replace(seed=2**62)),
        (pixels, Box(1, 1, 2, 3, 4)),
    ]
    assert len({pixels_crc(*one) for one in different}) == len(different)


def test_a_view_that_looks_otherwise_is_refused(directory):
    cache = opened(directory)
    view = View(torch.zeros(3, 16, 16, dtype=torch.uint8), None, Crop(0, 0, 1, 1, False), [])
    with pytest.raises(UnreadableError, match="photo 7 does not look as it did when"):
        cache.check(cache.read(7, 0), view, "photo 7")


def training_set(directory, photos, transform):
    return TrainingSet(photos, transform, SEED, 16, 0.5, opened(directory))


def test_batches_replay_the_views_and_bring_their_targets(directory, photos, transform):
    dataset = training_set(directory, photos, transform)
    draws = [Draw(image, 3, position, position < 2) for position, image in enumerate((4, 4, 9, 0))]
    batch = dataset.batch(draws)
    shown = [opened(directory).view(*draw[:3]) for draw in draws]
    assert shown[0] != shown[1]
    for row, (draw, view) in enumerate(zip(draws, shown, strict=True)):
        with seeded(*view_key(SEED, draw.image, view)):
            seen = transform(photos.load(draw.image))
        assert torch.equal(batch.images[row], seen.pixels)
        assert dict(batch.boxes).get(row) == seen.box
        assert batch.targets[row].tolist() == list(range(10 * draw.image + view, 10 * draw.image + view + BYTES))
        if draw.masked:  # the mask is the place's, not the view's
            assert torch.equal(batch.mask[row], dataset.mask(3, row))
    assert batch.targets.dtype == torch.uint8
    assert torch.equal(batch.to(torch.device("cpu")).targets, batch.targets)


def test_the_stored_crop_is_what_is_shown(directory, photos, transform):
    """Records of another generator of crops are replayed with their crops, and checked against their pixels."""
    path = chunk_file(directory, 0)
    records = np.fromfile(path, record_dtype(BYTES))
    records["crop"][0], records["flip"][0] = (1, 2, 30, 31), 1
    with seeded(*view_key(SEED, 0, 0)):
        seen = transform(photos.load(0), Crop(1, 2, 30, 31, True))
    records["pixels"][0] = pixels_crc(seen.pixels, seen.box)
    seal(records, 0)
    records.tofile(path)
    batch = training_set(directory, photos, transform).batch([Draw(0, 0, 0, False)])
    assert torch.equal(batch.images[0], seen.pixels)


def test_another_image_under_the_same_name_stops_the_batch(directory, transform):
    photos = Photos(10)
    photos.load = lambda index: Photos.load(photos, index).transpose(Image.Transpose.ROTATE_180)
    said = training_set(directory, photos, transform).__getitems__([Draw(6, 0, 0, False)])
    assert isinstance(said, UnreadableError)
    assert "photo 6 does not look as it did" in str(said)


def test_an_unreadable_image_is_replaced_with_its_target(directory, transform):
    batch = training_set(directory, Photos(10, broken=5), transform).batch([Draw(5, 0, 0, False)])
    assert batch.bad == [5]
    assert batch.targets[0, 0] // 10 == 6


def test_workers_bring_the_same(directory, photos, transform):
    sampler = Sampler(10, batch_size=4, repeats=2, mask_probability=0.5, seed=SEED)
    dataset = training_set(directory, photos, transform)
    alone, helped = ([*training_batches(dataset, sampler, 1, 6, 0, workers)] for workers in (0, 2))
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
        assert one.boxes == other.boxes
