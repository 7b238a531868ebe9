"""Batches: the same with any number of workers, from any start; masks; unreadable and odd images; the device view."""

import io
import random
from collections.abc import Iterable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from proteus.config import Augment
from proteus.data.device_augment import apply_ops
from proteus.data.loader import TRIES, Batch, PlainSet, TrainingSet, training_batches
from proteus.data.sampler import Draw, Sampler
from proteus.data.sources import FolderSource
from proteus.data.transforms import Box, Crop, EvalTransform, TrainTransform, View, fill_boxes, seeded
from proteus.errors import InputError, UnreadableError

SIZE, PATCHES = 28, 4


class Pictures:
    """Images made on the spot; those in `broken` cannot be read."""

    def __init__(self, count: int, labels: bool = True, broken: Iterable[int] = ()):
        self.count, self.broken = count, frozenset(broken)
        self.labels = np.arange(count) % 7 if labels else None
        self.classes = [str(number) for number in range(7)] if labels else []
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.count

    def load(self, index: int) -> Image.Image:
        self.asked.append(index)
        if index in self.broken:
            raise OSError("broken")
        return Image.fromarray(np.random.default_rng((index, 8)).integers(0, 256, (40, 36, 3), dtype=np.uint8))

    def name(self, index: int) -> str:
        return f"picture {index}"


def training_set(source, seed: int = 3, patches: int = PATCHES, ratio: float = 0.5, **augment) -> TrainingSet:
    return TrainingSet(source, TrainTransform(SIZE, Augment(**augment)), seed, patches, ratio)


def batches(source, start=0, stop=6, rank=0, workers=0, processes=1, accumulate=1, batch=6, **settings) -> list[Batch]:
    sampler = Sampler(
        size=len(source),
        batch_size=batch,
        processes=processes,
        accumulate=accumulate,
        repeats=2,
        mask_probability=0.5,
        seed=3,
    )
    return list(training_batches(training_set(source, **settings), sampler, start, stop, rank, workers))


def assert_same(one: Batch, other: Batch):
    for field, a, b in zip(Batch._fields, one, other, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field
            assert torch.equal(a, b), field
        else:
            assert a == b, field


def draws(*images: int, masked: bool = False, first: int = 0) -> list[Draw]:
    return [Draw(image, 0, first + position, masked) for position, image in enumerate(images)]


# The same batches, whoever loads them


def test_workers_do_not_change_batches():
    plain = batches(Pictures(20, broken=(4, 11)), workers=0, accumulate=2)
    parallel = batches(Pictures(20, broken=(4, 11)), workers=2, accumulate=2)
    assert len(plain) == len(parallel) == 12
    for one, other in zip(plain, parallel, strict=True):
        assert_same(one, other)
    assert sum(len(batch.boxes) for batch in plain) > 5
    assert sum(len(batch.bad) for batch in plain) > 0
    assert len({batch.images.numpy().tobytes() for batch in plain}) == 12


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (1, 0), (4, 0), (5, 0), (6, 0), (3, 2)])
def test_a_run_that_starts_in_the_middle_sees_the_rest(start, workers):
    whole = batches(Pictures(20, broken=(4,)), accumulate=2)
    random.seed(start)
    torch.manual_seed(start)
    rest = batches(Pictures(20, broken=(4,)), start=start, workers=workers, accumulate=2)
    assert len(rest) == len(whole) - 2 * start
    for one, other in zip(whole[2 * start :], rest, strict=True):
        assert_same(one, other)


def test_processes_share_the_batch_of_one():
    whole = batches(Pictures(20), batch=6)
    for rank in range(2):
        for one, mine in zip(whole, batches(Pictures(20), batch=3, processes=2, rank=rank), strict=True):
            assert torch.equal(mine.images, one.images[rank::2])
            assert torch.equal(mine.labels, one.labels[rank::2])
            assert torch.equal(mine.mask, one.mask[rank::2])
            assert mine.boxes == [(row // 2, box) for row, box in one.boxes if row % 2 == rank]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_generators_alone(workers):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    expected = torch.rand(2), np.random.random(), random.random()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    random.seed(5)
    assert len(batches(Pictures(12), stop=2, workers=workers)) == 2
    assert torch.equal(torch.rand(2), expected[0])
    assert np.random.random() == expected[1]  # noqa: NPY002
    assert random.random() == expected[2]


def test_an_image_depends_on_its_draw_alone():
    source = Pictures(30)
    data = training_set(source, erasing=1.0)
    draw = Draw(image=17, epoch=2, position=41, masked=True)
    alone = data.batch([draw])
    among = data.batch([Draw(3, 2, 40, True), draw, Draw(17, 2, 42, True), Draw(17, 3, 41, True)])
    assert torch.equal(among.images[1], alone.images[0])
    assert torch.equal(among.mask[1], alone.mask[0])
    assert among.boxes[1] == (1, alone.boxes[0][1])
    assert len({image.numpy().tobytes() for image in among.images}) == 4
    with seeded(3, 2, 41):
        pixels, box, *_ = TrainTransform(SIZE, Augment(erasing=1.0))(source.load(17))
    assert torch.equal(pixels, alone.images[0])
    assert alone.boxes == [(0, box)]
    assert not torch.equal(training_set(source, seed=4).batch([draw]).images, alone.images)


def test_what_a_batch_holds():
    for batch in batches(Pictures(20), erasing=0.5):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (6, 3, SIZE, SIZE)
        assert batch.mask.dtype == torch.bool
        assert batch.mask.shape == (3, PATCHES)
        assert batch.labels.dtype == torch.int64
        assert batch.bad == []
        assert [row for row, _ in batch.boxes] == sorted({row for row, _ in batch.boxes})
        assert all(0 <= row < 6 for row, _ in batch.boxes)


def test_labels_are_those_of_the_images():
    data = training_set(Pictures(30))
    assert data.batch(draws(0, 5, 6, 13, 29)).labels.tolist() == [0, 5, 6, 6, 1]
    assert training_set(Pictures(30, labels=False)).batch(draws(0, 5)).labels is None


# Fixed views


class Views:
    """Two views of each image, all of them the same corner, and two bytes to know them by."""

    corner = Crop(2, 3, 20, 10, True)

    def __init__(self):
        self.checked: list[tuple] = []

    def view(self, image: int, epoch: int, position: int) -> int:
        return (epoch + position) % 2

    def key(self, image: int, k: int) -> tuple[int, ...]:
        return 3, image, k, 2

    def read(self, image: int, k: int) -> SimpleNamespace:
        return SimpleNamespace(crop=self.corner, target=bytes([image, k]))

    def check(self, record: SimpleNamespace, view: View, name: str) -> None:
        if name == "picture 13":
            raise UnreadableError("changed")
        self.checked.append((record.target, view.crop, name))


def viewed(source, **augment) -> TrainingSet:
    return TrainingSet(source, TrainTransform(SIZE, Augment(**augment)), 3, PATCHES, 0.5, Views())


def test_fixed_views_depend_on_image_and_view_and_masks_on_the_place():
    source = Pictures(20, broken=[4])
    data = viewed(source, erasing=1.0)
    places = [Draw(5, 0, 0, True), Draw(4, 1, 1, True), Draw(5, 0, 1, True), Draw(9, 3, 2, False)]
    batch = data.batch(places)
    assert batch.targets.dtype == torch.uint8
    assert batch.targets.tolist() == [[5, 0], [5, 0], [5, 1], [9, 1]]  # the image that was read, not the broken one
    assert batch.bad == [4]
    with seeded(3, 5, 1, 2):
        expected = TrainTransform(SIZE, Augment(erasing=1.0))(source.load(5), Views.corner)
    assert torch.equal(batch.images[2], expected.pixels)
    assert batch.boxes[2] == (2, expected.box)
    assert torch.equal(batch.images[0], batch.images[1])
    assert batch.boxes[0][1] == batch.boxes[1][1] != batch.boxes[2][1]
    live = training_set(source)
    assert torch.equal(batch.mask, torch.stack([live.mask(0, 0), live.mask(1, 1), live.mask(0, 1)]))
    assert data.views.checked[-1] == (bytes([9, 1]), Views.corner, "picture 9")
    assert torch.equal(batch.to(torch.device("cpu")).targets, batch.targets)
    assert live.batch(places).targets is None
    assert live.batch(places).to(torch.device("cpu")).targets is None


def test_a_view_that_has_changed_ends_the_run_in_one_line():
    sampler = Sampler(size=14, batch_size=7, seed=3)
    for workers in (0, 2):
        with pytest.raises(UnreadableError, match=r"^changed$"):
            list(training_batches(viewed(Pictures(14)), sampler, 0, 2, 0, workers))


# Masks


@pytest.mark.parametrize(
    ("patches", "ratio", "count"),
    [
        (256, 0.5, 128),
        (256, 0.3, 76),
        (16, 0.25, 4),
        (49, 0.5, 24),
        (9, 0.4, 3),
        (10, 0.99, 9),
        (16, 0, 0),
        (1, 0.5, 0),
    ],
)
def test_a_mask_hides_exactly_its_share(patches, ratio, count):
    data = training_set(Pictures(8), patches=patches, ratio=ratio)
    batch = data.batch(draws(0, 1, 2, 3, 4, 5, 6, 7, masked=True))
    assert batch.mask.shape == (8, patches)
    assert batch.mask.sum(1).tolist() == [count] * 8


def test_only_masked_draws_have_masks_and_they_come_first():
    data = training_set(Pictures(8), patches=64)
    both = data.batch(draws(0, 1, masked=True) + draws(2, 3, 4, first=2))
    assert both.mask.shape == (2, 64)
    assert torch.equal(both.mask[1], data.mask(0, 1))
    assert data.batch(draws(0, 1)).mask.shape == (0, 64)


def test_a_mask_is_a_function_of_seed_epoch_and_position():
    keys = [(seed, epoch, position) for seed in (0, 3, 2**62) for epoch in (0, 1, 5) for position in (0, 1, 5, 1000)]

    def masks(augment):
        return [training_set(Pictures(2), seed=s, patches=256, **augment).mask(e, p) for s, e, p in keys]

    first = masks({})
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, masks({"auto_augment": None, "erasing": 0}), strict=True))
    assert len({mask.numpy().tobytes() for mask in first}) == len(keys)
    # Unrelated masks agree in half of the 256 patches: 128, standard deviation 8.
    agreements = [int((a == b).sum()) for i, a in enumerate(first) for b in first[:i]]
    assert max(abs(agreement - 128) for agreement in agreements) < 48
    assert abs(np.mean(agreements) - 128) < 2


def test_masked_patches_are_spread_uniformly():
    data = training_set(Pictures(2), patches=64, ratio=0.25)
    counts = sum(data.mask(epoch, position).double() for epoch in range(4) for position in range(750))
    # 3,000 masks hide a patch 750 times; choosing without replacement leaves the variance 3000 * 1/4 * 3/4.
    chi2 = float(((counts - 750) ** 2 / (3000 * 0.25 * 0.75)).sum() * 63 / 64)
    assert 63 - 4 * 126**0.5 < chi2 < 63 + 5 * 126**0.5  # 63 degrees of freedom: too even is as wrong


# Unreadable images


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def damaged(tmp_path):
    """20 files in two classes; 2, 3, 9, 14 and 19 cannot be read, each for a reason of its own."""
    whole = Pictures(20)
    for index in range(20):
        image, folder = whole.load(index), tmp_path / ("a" if index < 10 else "b")
        folder.mkdir(exist_ok=True)
        jpeg, png = encoded(image, "JPEG", quality=95), encoded(image, "PNG")
        content, suffix = {
            2: (jpeg[: len(jpeg) // 2], "jpg"),
            3: (b"", "jpg"),
            9: (b"this is no image\n" * 50, "jpg"),
            14: (png[: len(png) // 2], "png"),
            19: (png[:40], "png"),
        }.get(index, (png, "png"))
        (folder / f"{index:02}.{suffix}").write_bytes(content)
    source = FolderSource(tmp_path)
    assert [source.name(index)[2:4] for index in range(20)] == [f"{index:02}" for index in range(20)]
    return source


BAD = {2: [2, 3], 3: [3], 9: [9], 14: [14], 19: [19]}  # asked for: found unreadable


def test_an_unreadable_image_gives_way_to_the_next(damaged):
    data = training_set(damaged, erasing=1.0)
    for index in range(20):
        bad = BAD.get(index, [])
        there = (index + len(bad)) % 20
        got, expected = data.batch(draws(index, first=7)), data.batch(draws(there, first=7))
        assert got.bad == bad
        assert expected.bad == []
        assert_same(got._replace(bad=[]), expected)
        assert got.labels.tolist() == [0 if there < 10 else 1]


def test_all_unreadable_images_of_a_batch_are_listed(damaged):
    batch = training_set(damaged).batch(draws(0, 19, 2, 5, 14, 9))
    assert batch.bad == [19, 2, 3, 14, 9]
    assert batch.images.shape == (6, 3, SIZE, SIZE)
    assert batch.labels.tolist() == [0, 0, 0, 0, 1, 1]


def test_workers_report_the_same_unreadable_images(damaged):
    plain, parallel = batches(damaged, stop=30), batches(damaged, stop=30, workers=2)
    for one, other in zip(plain, parallel, strict=True):
        assert_same(one, other)
    assert {index for batch in plain for index in batch.bad} == {2, 3, 9, 14, 19}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_is_one_line(tmp_path, workers, capfd):
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(b"no image")
    with pytest.raises(InputError) as caught:
        batches(FolderSource(tmp_path), workers=workers, batch=2)
    (line,) = caught.value.lines
    assert "\n" not in line
    assert "Traceback" not in line
    assert "5 images" in line
    assert ".jpg" in line
    assert str(caught.value) == line
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_before_the_unreadable_stretch_arrive(workers):
    sampler = Sampler(size=300, batch_size=1, seed=3)
    order = [sampler.micro_batch(step, 0, 0)[0].image for step in range(300)]
    source = Pictures(300, broken=set(range(300)) - set(order[:3]))
    away = [min((readable - image) % 300 for readable in order[:3]) for image in order]
    fine = next(step for step in range(300) if away[step] >= TRIES)
    assert fine >= 3
    seen = training_batches(training_set(source), sampler, 0, 300, 0, workers)
    for step in range(fine):
        batch = next(seen)
        assert len(batch.bad) == away[step]
        assert batch.labels.tolist() == [(order[step] + away[step]) % 300 % 7]
    with pytest.raises(InputError, match=f"^data: {TRIES} images in a row"):
        next(seen)


def test_the_search_for_a_readable_image_ends():
    source = Pictures(100_000, broken=range(100_000))
    with pytest.raises(InputError, match="picture 77"):
        training_set(source).batch(draws(77))
    assert source.asked == list(range(77, 77 + TRIES))


def test_the_plain_set_has_none_where_an_image_cannot_be_read(damaged):
    data = PlainSet(damaged, EvalTransform(SIZE, 0.875))
    views = [data[index] for index in range(len(data))]
    assert [index for index, view in enumerate(views) if view is None] == [2, 3, 9, 14, 19]
    assert torch.equal(views[5], EvalTransform(SIZE, 0.875)(damaged.load(5)))


# Odd but valid images


def grey16(order: str = "<") -> Image.Image:
    return Image.fromarray(np.full((50, 60), 100 * 257, f"{order}u2"))


def palette() -> Image.Image:
    image = Image.new("P", (50, 60), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = 0
    return image


def cmyk() -> Image.Image:
    return Image.new("RGB", (50, 60), (200, 100, 50)).convert("CMYK")


ODD = {  # name: (image, format, options, its colour, tolerance)
    "grey": (Image.new("L", (50, 60), 90), "PNG", {}, (90, 90, 90), 0),
    "grey-alpha": (Image.new("LA", (50, 60), (90, 10)), "PNG", {}, (90, 90, 90), 0),
    "bilevel": (Image.new("1", (50, 60), 1), "PNG", {}, (255, 255, 255), 0),
    "palette-transparent": (palette(), "PNG", {"transparency": b"\x00\x80"}, (200, 100, 50), 0),
    "gif": (palette(), "GIF", {}, (200, 100, 50), 0),
    "rgba": (Image.new("RGBA", (50, 60), (200, 100, 50, 30)), "PNG", {}, (200, 100, 50), 0),
    "cmyk": (cmyk(), "JPEG", {"quality": 95}, (200, 100, 50), 3),
    "grey-16-bit": (grey16(), "PNG", {}, (100, 100, 100), 0),
    "grey-16-bit-tiff": (grey16(), "TIFF", {}, (100, 100, 100), 0),
    "grey-16-bit-tiff-big-endian": (grey16(">"), "TIFF", {}, (100, 100, 100), 0),
    "pixel": (Image.new("RGB", (1, 1), (200, 100, 50)), "PNG", {}, (200, 100, 50), 0),
    "wide": (Image.new("RGB", (2000, 3), (200, 100, 50)), "PNG", {}, (200, 100, 50), 0),
    "high": (Image.new("RGB", (3, 2000), (200, 100, 50)), "PNG", {}, (200, 100, 50), 0),
    "webp": (Image.new("RGBA", (50, 60), (200, 100, 50, 255)), "WEBP", {"lossless": True}, (200, 100, 50), 0),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_odd_images_are_read(tmp_path, name):
    image, kind, options, colour, tolerance = ODD[name]
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    (tmp_path / f"x.{suffix}").write_bytes(encoded(image, kind, **options))
    source = FolderSource(tmp_path)
    decoded = source.load(0)
    assert decoded.mode == "RGB"
    assert decoded.size == image.size
    expected = torch.tensor(colour).view(1, 3, 1, 1)
    plain = PlainSet(source, EvalTransform(SIZE, 0.875))[0]
    trained = training_set(source, auto_augment=None).batch(draws(0, 0, 0, 0))
    assert trained.bad == []
    for pixels in (plain[None], trained.images):
        assert pixels.dtype == torch.uint8
        assert pixels.shape[1:] == (3, SIZE, SIZE)
        wrong = ((pixels.int() - expected).abs() > tolerance).flatten(1).any(1)
        assert not wrong.any()
    augmented = training_set(source).batch([Draw(0, 0, position, False) for position in range(30)])
    assert augmented.bad == []
    assert augmented.images.shape == (30, 3, SIZE, SIZE)


def test_sixteen_bits_keep_their_gradations(tmp_path):
    """A ramp from black to white stays one: it is not clipped at 255 of 65,535."""
    ramp = np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (4, 1))
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    decoded = np.asarray(FolderSource(tmp_path).load(0))[0, :, 0].astype(int)
    assert np.abs(decoded - np.arange(256)).max() <= 1


# On the device


def test_a_batch_on_the_device_is_float_in_the_unit_range():
    (batch,) = batches(Pictures(20), stop=1, erasing=0.0)
    there = batch.to(torch.device("cpu"))
    assert there.images.dtype == torch.float32
    assert there.images.is_contiguous()  # whatever it is in the loader: convolutions round by layout
    assert there.images.min() >= 0
    assert there.images.max() <= 1
    assert there.images.max() > 0.9
    assert torch.equal((there.images * 255).round().to(torch.uint8), batch.images)
    assert torch.equal(there.mask, batch.mask)
    assert torch.equal(there.labels, batch.labels)


def test_augmentation_on_the_device_is_that_of_each_row_before_erasing():
    plain, parallel = (batches(Pictures(20), workers=workers, device=True, erasing=0.5) for workers in (0, 2))
    changed = 0
    for one, other in zip(plain, parallel, strict=True):
        assert_same(one, other)
        assert len(one.ops) == 6
        there = one.to(torch.device("cpu"))
        expected = fill_boxes(apply_ops(one.images.contiguous(), one.ops).float() / 255, one.boxes)
        assert torch.equal(there.images, expected)
        assert there.ops == ()
        without = one._replace(ops=()).to(torch.device("cpu")).images
        for row in range(6):
            same = torch.equal(without[row], there.images[row])
            assert same or one.ops[row]
            changed += not same
    assert changed > 12
    assert batches(Pictures(20), stop=1)[0].ops == ()


def test_boxes_are_filled_once_on_the_way_to_the_device():
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    batch = Batch(images, torch.zeros(0, 4, dtype=torch.bool), None, [(1, Box(2, 3, 4, 5, seed=6))], [9])
    there = batch.to(torch.device("cpu"))
    assert there.boxes == []
    assert there.bad == [9]
    assert there.labels is None
    assert torch.equal(batch.images, torch.full_like(images, 255))  # the loader's copy is left as it is
    assert torch.equal(there.images[0], torch.ones(3, 8, 8))
    changed = (there.images[1] != 1).all(0)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6, 3:8] = True
    assert torch.equal(changed, expected)
    assert torch.equal(there.images, batch.to(torch.device("cpu")).images)
