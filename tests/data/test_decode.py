"""Decoding: JPEG pixels are Pillow's, whatever the file is like; what is broken raises; Pillow's copy comes late."""

import io
import os
import pickle
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from proteus.data import decode as module
from proteus.data.decode import DecodedImage, decode
from proteus.data.workers import as_is


def picture(width: int = 90, height: int = 70) -> Image.Image:
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(
        (np.asarray(coarse, int) + rng.integers(-9, 10, (height, width, 3))).clip(0, 255).astype("u1")
    )


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


EXIF = Image.Exif()
EXIF[0x0112] = 6  # to be turned by 90 degrees


@pytest.mark.parametrize("size", [(90, 70), (91, 67), (8, 8), (1, 1), (17, 3), (640, 480)])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4", "quality": 95},
        {"subsampling": "4:2:0", "quality": 90},
        {"subsampling": "4:2:2", "quality": 60},
        {"progressive": True},
        {"optimize": True, "quality": 5},
        {"restart_marker_rows": 1},
        {"exif": EXIF},
        {"keep_rgb": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_jpeg_pixels_are_those_of_pillow(size, options):
    data = jpeg(picture(*size), **options)
    image = decode(io.BytesIO(data))
    assert isinstance(image, DecodedImage)  # by torchvision, or the rest shows nothing
    assert (image.mode, image.size) == ("RGB", size)
    assert np.array_equal(image.pixels.permute(1, 2, 0).numpy(), by_pillow(data))
    assert np.array_equal(np.asarray(image), by_pillow(data))


def test_jpeg_of_one_and_four_components():
    colours, black = picture(), picture().convert("L")
    for image in (black, Image.merge("CMYK", (*colours.split(), black))):
        data = jpeg(image)
        assert Image.open(io.BytesIO(data)).mode == image.mode
        assert np.array_equal(np.asarray(decode(io.BytesIO(data))), by_pillow(data))


def test_paths_text_and_buffers_are_taken(tmp_path):
    data, path = jpeg(picture()), tmp_path / "x.jpg"
    path.write_bytes(data)
    buffer = io.BytesIO(data)
    for file in (path, str(path), buffer, buffer):
        image = decode(file)
        assert isinstance(image, DecodedImage)
        assert np.array_equal(np.asarray(image), by_pillow(data))
    picture().save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(decode(tmp_path / "x.png")), np.asarray(picture()))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.9])
def test_truncated_files_raise(tmp_path, share):
    data = jpeg(picture(300, 200))
    path = tmp_path / "half.jpg"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(OSError, match=r"(?i)half\.jpg|truncated"):
        decode(path)


def test_broken_and_missing_files_raise(tmp_path):
    for name, content in (("empty", b""), ("text", b"no image" * 100), ("start", b"\xff\xd8\xff" + bytes(500))):
        (tmp_path / f"{name}.jpg").write_bytes(content)
        with pytest.raises(OSError, match=name):
            decode(tmp_path / f"{name}.jpg")
    with pytest.raises(FileNotFoundError, match="gone"):
        decode(tmp_path / "gone.jpg")


def test_too_many_pixels_are_refused_before_they_take_memory(monkeypatch):
    data = jpeg(picture(90, 70))
    for place in (b"\xff\xc0", b"\xff\xc2"):
        progressive = jpeg(picture(90, 70), progressive=place == b"\xff\xc2", exif=EXIF, comment=b"x" * 700)
        assert module._jpeg_size(progressive) == (90, 70)
        assert module._jpeg_size(progressive.replace(b"\xff" + place[1:], b"\xff\xff\xff" + place[1:])) == (90, 70)
        assert module._jpeg_size(progressive[: progressive.index(place) + 8]) == (0, 0)
    monkeypatch.setattr(module, "MAX_PIXELS", 90 * 70)
    assert isinstance(decode(io.BytesIO(data)), DecodedImage)
    monkeypatch.setattr(module, "MAX_PIXELS", 90 * 70 - 1)
    assert not isinstance(decode(io.BytesIO(data)), DecodedImage)  # Pillow has the last word
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90 * 70 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        decode(io.BytesIO(data))


def peak_of(act) -> int:
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [kind for kind in ("JPEG", "PNG", "WEBP", "AVIF") if kind in module.FORMATS])
@pytest.mark.parametrize("begin", [40, None], ids=["start", "image"])
def test_a_file_too_long_to_be_an_image_is_refused_unread(tmp_path, monkeypatch, kind, begin):
    picture().save(tmp_path / "long.jpg", kind)
    data = (tmp_path / "long.jpg").read_bytes()[:begin]
    monkeypatch.setattr(module, "MAX_BYTES", 2**24)
    (tmp_path / "long.jpg").write_bytes(data)
    os.truncate(tmp_path / "long.jpg", 2**24 + 1)

    def refused() -> None:
        with pytest.raises(OSError, match=r"long\.jpg has 16777217 bytes, more than the 16777216 "):
            decode(tmp_path / "long.jpg")

    assert peak_of(refused) < 2**20
    with pytest.raises(OSError, match="16777217 bytes"):
        decode(io.BytesIO(data.ljust(2**24 + 1, b"\0")))
    if begin is None:
        os.truncate(tmp_path / "long.jpg", 2**24)
        assert decode(tmp_path / "long.jpg").size == (90, 70)


def test_the_limit_of_a_file_is_beyond_every_image(tmp_path, monkeypatch):
    assert module.MAX_BYTES == 8 * module.MAX_PIXELS
    frames = [picture(60, 50 + i) for i in range(3)]
    frames[0].save(tmp_path / "many.tif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(module, "MAX_BYTES", 60 * 50 * 8)
    assert (tmp_path / "many.tif").stat().st_size > module.MAX_BYTES
    assert np.array_equal(np.asarray(decode(tmp_path / "many.tif")), np.asarray(frames[0]))


def test_a_jpeg_is_held_once(tmp_path):
    data, path = jpeg(picture()), tmp_path / "x.jpg"
    path.write_bytes(data)
    os.truncate(path, 2**24)
    assert 2**24 <= peak_of(lambda: decode(path)) < 1.2 * 2**24


def test_of_a_file_that_has_become_shorter_nothing_is_made_up():
    assert module._read(io.BytesIO(b"abc"), 5) == b"abc"


def test_a_format_that_runs_a_program_is_no_image():
    buffer = io.BytesIO()
    picture().save(buffer, "EPS")
    assert Image.open(buffer).format == "EPS"
    with pytest.raises(OSError, match="cannot identify"):
        decode(buffer)


def test_warnings_about_a_file_are_no_news(recwarn):
    buffer = io.BytesIO()
    picture().quantize(8).save(buffer, "PNG", transparency=bytes(8))
    decode(buffer)
    assert not recwarn.list


def test_what_torchvision_refuses_or_has_no_more_is_left_to_pillow(monkeypatch):
    def refuse(*_):
        raise RuntimeError("not today")

    data = jpeg(picture())
    for library in (SimpleNamespace(decode_jpeg=refuse), SimpleNamespace()):
        monkeypatch.setattr(module, "torchvision_io", library)
        image = decode(io.BytesIO(data))
        assert not isinstance(image, DecodedImage)
        assert np.array_equal(np.asarray(image), by_pillow(data))


@pytest.mark.parametrize(
    "act",
    [
        lambda image: image.crop((3, 5, 40, 60)),
        lambda image: image.resize((20, 30), Image.Resampling.BICUBIC),
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: image.rotate(20, Image.Resampling.BICUBIC),
        lambda image: image.convert("L"),
        lambda image: image.copy(),
        lambda image: image.point(lambda value: 255 - value),
        lambda image: pickle.loads(pickle.dumps(image)),
    ],
)
def test_pillow_finds_an_ordinary_image(act):
    data = jpeg(picture())
    ours, theirs = decode(io.BytesIO(data)), Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(act(ours)), np.asarray(act(theirs)))
    assert ours.pixels is None  # a change to Pillow's copy must not leave the other as it was
    ours.putpixel((0, 0), (1, 2, 3))
    assert np.asarray(ours)[0, 0].tolist() == [1, 2, 3]


def test_forked_workers_decode_the_same():
    files = [jpeg(picture(50 + i, 40)) for i in range(8)]
    here = [np.asarray(decode(io.BytesIO(data))) for data in files]  # the library has been used before the fork

    class Files:
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> np.ndarray:
            return np.asarray(decode(io.BytesIO(files[index])))

    loader = DataLoader(Files(), batch_size=1, num_workers=2, collate_fn=as_is, multiprocessing_context="fork")
    for one, (other,) in zip(here, loader, strict=True):
        assert np.array_equal(one, other)
