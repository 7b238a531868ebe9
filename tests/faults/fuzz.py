"""Image files as they are met in the wild: odd but valid ones with the pixels they stand for, and broken ones."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngInfo

from proteus.data.decode import MAX_BYTES


class File(NamedTuple):
    """What is in a file.

    pixels: [H, W, 3] uint8 that it stands for; None where it is broken, or may be read as anything or not at all.
    valid:  whether it must be read; None where either will do.
    within: how far from `pixels` it may be.
    length: bytes of the whole file, where zeros follow `data`, which take no room on the disk.
    """

    suffix: str
    data: bytes
    pixels: np.ndarray | None = None
    valid: bool | None = True
    within: int = 0
    length: int = 0


Rng = np.random.Generator


def smooth(rng: Rng, low: int = 6, high: int = 48) -> Image.Image:
    """A picture without edges, which JPEG keeps within a few levels."""
    width, height = (int(side) for side in rng.integers(low, high, 2))
    corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def plain(rng: Rng) -> File:
    kind, suffix = [("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tif"), ("PPM", "ppm")][rng.integers(4)]
    image = smooth(rng)
    return File(suffix, encoded(image, kind), rgb(image))


def jpeg(rng: Rng) -> File:
    image = smooth(rng)
    options = {"quality": 98, "subsampling": 0, "progressive": bool(rng.integers(2))}
    return File("JPG", encoded(image, "JPEG", **options), rgb(image), within=8)


def wrong_extension(rng: Rng) -> File:
    image = smooth(rng)
    kind, suffix = [("PNG", "jpg"), ("GIF", "jpeg"), ("BMP", "png"), ("WEBP", "jpg")][rng.integers(4)]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = image.quantize(16).convert("RGB") if kind == "GIF" else image
    return File(suffix, encoded(image, kind, **options), rgb(image))


def cmyk(rng: Rng) -> File:
    image = Image.new("RGB", (20, 20), tuple(int(v) for v in rng.integers(0, 256, 3))).convert("CMYK")
    if rng.integers(2):
        return File("jpg", encoded(image, "JPEG", quality=98), rgb(image), within=8)
    return File("tiff", encoded(image, "TIFF"), rgb(image))


def sixteen_bits(rng: Rng) -> File:
    grey = rng.integers(0, 256, (9, 14), dtype=np.uint16)
    pixels = np.repeat(grey.astype(np.uint8)[..., None], 3, 2)
    kind = int(rng.integers(4))
    if kind < 2:
        return File("png", encoded(Image.fromarray(grey * 257), "PNG"), pixels)
    if kind == 2:
        return File("tif", encoded(Image.fromarray((grey * 257).astype(">u2")), "TIFF"), pixels)
    return File("pgm", b"P5 14 9 65535\n" + (grey * 257).astype(">u2").tobytes(), pixels)


def sixteen_bits_of_colour(rng: Rng) -> File:
    image = smooth(rng)
    pixels = rgb(image)
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in pixels)
    return File("png", png(width, height, zlib.compress(rows), depth=16), pixels)


def palette(rng: Rng) -> File:
    image = smooth(rng).quantize(8)
    pixels = rgb(image)
    kind = int(rng.integers(3))
    if kind == 0:
        return File("png", encoded(image, "PNG", transparency=bytes([0, 128, 255])), pixels)
    if kind == 1:
        return File("gif", encoded(image, "GIF", transparency=0), pixels)
    return File("png", encoded(image, "PNG", transparency=2), pixels)


def turned(rng: Rng) -> File:
    """EXIF wants it turned; an orientation is not applied."""
    image, exif = smooth(rng), Image.Exif()
    exif[0x0112] = int(rng.integers(2, 9))
    if rng.integers(2):
        return File("png", encoded(image, "PNG", exif=exif), rgb(image))
    return File("jpg", encoded(image, "JPEG", quality=98, subsampling=0, exif=exif), rgb(image), within=8)


def animated(rng: Rng) -> File:
    """Of several frames the first counts."""
    frames = [Image.new("RGB", (20, 16), tuple(int(v) for v in rng.integers(0, 256, 3))) for _ in range(3)]
    kind, suffix = [("GIF", "gif"), ("WEBP", "webp"), ("PNG", "png"), ("TIFF", "tif"), ("MPO", "jpg")][rng.integers(5)]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 98} if kind == "MPO" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    return File(suffix, data, rgb(frames[0]), within=8 if kind == "MPO" else 0)


def odd_size(rng: Rng) -> File:
    size = [(1, 1), (20_000, 1), (1, 20_000), (20_000, 3), (3, 1), (1, 2)][rng.integers(6)]
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(0, 256, 3)))
    if rng.integers(2):
        return File("png", encoded(image, "PNG"), rgb(image))
    return File("jpg", encoded(image, "JPEG", quality=98), rgb(image), within=8)


def mode(rng: Rng) -> File:
    """Every mode that a file can hold and that says what is black and what is white."""
    picture = smooth(rng)
    name = ["L", "LA", "RGBA", "1", "PA", "YCbCr", "I"][rng.integers(7)]
    if name == "I":
        grey = np.asarray(picture.convert("L"))
        image = Image.fromarray(grey.astype(np.int32) * 257)
        return File("tif", encoded(image, "TIFF"), np.repeat(grey[..., None], 3, 2))
    if name == "PA":
        image = picture.quantize(8).convert("PA")
        return File("png", encoded(image.convert("P"), "PNG", transparency=bytes(8)), rgb(image.convert("P")))
    if name == "YCbCr":
        return File("tif", encoded(picture.convert(name), "TIFF"), rgb(picture), within=4)
    image = picture.convert(name)
    if name in ("LA", "RGBA"):
        image.putalpha(int(rng.integers(256)))
    return File("png", encoded(image, "PNG"), rgb(image))


def absurd_metadata(rng: Rng) -> File:
    image = smooth(rng)
    kind = int(rng.integers(4))
    if kind == 0:
        info = PngInfo()
        info.add_text("Comment", "x" * 100_000)
        info.add_itxt("a", "\0\n" * 100, zip=True)
        return File("png", encoded(image, "PNG", pnginfo=info, dpi=(10**7, 1)), rgb(image))
    if kind == 1:
        exif = rng.bytes(60_000)
        data = encoded(image, "JPEG", quality=98, subsampling=0, exif=b"Exif\0\0" + exif, comment=rng.bytes(60_000))
        return File("jpg", data, rgb(image), within=8)
    if kind == 2:
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[270], tags[305] = "y" * 50_000, "\u2603"
        return File("tif", encoded(image, "TIFF", tiffinfo=tags), rgb(image))
    data = encoded(image, "JPEG", quality=98, subsampling=0, icc_profile=rng.bytes(200_000))
    return File("jpg", data, rgb(image), within=8)


def floats(rng: Rng) -> File:
    image = Image.fromarray(rng.random((12, 9), dtype=np.float32))
    return File("tif", encoded(image, "TIFF"), valid=False)


def empty(rng: Rng) -> File:
    return File(["jpg", "png", "gif", "webp", "tiff"][rng.integers(5)], b"", valid=False)


def no_image(rng: Rng) -> File:
    suffix = ["jpg", "png", "bmp", "tif"][rng.integers(4)]
    texts = (
        rng.bytes(500),
        b"<html>404 Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\0" * 4096,
    )
    # Pillow would call Ghostscript.
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    return File(suffix, (*texts, postscript)[rng.integers(5)], valid=False)


def truncated(rng: Rng) -> File:
    file = (jpeg, plain, palette)[rng.integers(3)](rng)
    keep = rng.uniform(0, 0.7)
    return file._replace(data=file.data[: int(len(file.data) * keep)], pixels=None, valid=None)


def half(rng: Rng) -> File:
    """Half of a picture of noise: whatever the format, pixels are missing."""
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    options = [("JPEG", "jpg", {}), ("JPEG", "jpg", {"progressive": True}), ("PNG", "png", {}), ("WEBP", "webp", {})]
    kind, suffix, settings = options[rng.integers(4)]
    data = encoded(image, kind, **settings)
    return File(suffix, data[: len(data) // 2], valid=False)


def flipped(rng: Rng) -> File:
    makers = (jpeg, plain, palette, cmyk, sixteen_bits, animated, mode, absurd_metadata)
    file = makers[rng.integers(len(makers))](rng)
    data = np.frombuffer(file.data, np.uint8).copy()
    places = rng.integers(0, len(data), int(rng.integers(1, 6)))
    if rng.integers(2):  # headers are where it hurts
        places %= 64
    data[places % len(data)] ^= (1 << rng.integers(0, 8, len(places))).astype(np.uint8)
    return file._replace(data=data.tobytes(), pixels=None, valid=None)


def png(width: int, height: int, body: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file of given compressed rows, whatever its header says."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def bomb(rng: Rng) -> File:
    """A few kilobytes that ask for gigabytes."""
    side = int(rng.integers(20_000, 65_000))
    kind = int(rng.integers(5))
    if kind == 0:
        return File("png", png(side, side, zlib.compress(bytes(10**6))), valid=False)
    if kind == 1:
        return File("gif", b"GIF89a" + struct.pack("<HH", side, side) + bytes(100), valid=False)
    if kind == 2:
        header = encoded(Image.new("1", (8, 8)), "BMP")[:18]
        return File("bmp", header + struct.pack("<ii", side, side) + bytes(99), valid=False)
    data = bytearray(encoded(smooth(rng), "JPEG", progressive=kind == 3))
    frame = data.index(b"\xff\xc2" if kind == 3 else b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    return File("jpg", bytes(data), valid=False)


def endless(rng: Rng) -> File:
    """What begins like an image, and is too long to be one."""
    image = smooth(rng)
    kind, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")][rng.integers(3)]
    return File(suffix, encoded(image, kind)[:20], valid=False, length=MAX_BYTES + 1)


KINDS: tuple[Callable[[Rng], File], ...] = (
    *(plain, jpeg, wrong_extension, cmyk, sixteen_bits, sixteen_bits_of_colour, palette, turned, animated, odd_size),
    *(mode, absurd_metadata, floats, empty, no_image, truncated, half, flipped, flipped, bomb, endless),
)
NAMES = (
    "photo",
    "two words",
    "line\nbreak",
    "tab\t",
    "b\\n",
    "naïve",
    "日本",
    "🌈",
    " lead",
    "'\"$(x)",
    "-rf",
    b"\xff\xfe\x80",
)


def write_files(root: Path, count: int, seed: int) -> dict[bytes, File]:
    """Write `count` files, of every kind in turn, into a folder: what they are, by their names."""
    root.mkdir()
    files = {}
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        file = KINDS[number % len(KINDS)](rng)
        name = os.fsencode(NAMES[int(rng.integers(len(NAMES)))]) + f"_{number}.{file.suffix}".encode()
        path = os.fsencode(root) + b"/" + name
        Path(os.fsdecode(path)).write_bytes(file.data)
        os.truncate(path, max(len(file.data), file.length))
        files[name] = file
    return files


def write_links(root: Path) -> dict[bytes, bool]:
    """Write what is no plain file: whether each can be read, by name. What is not listed is no image to anyone."""
    root.mkdir()
    data = encoded(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG")
    (root / "good.png").write_bytes(data)
    (root / "to_good.png").symlink_to("good.png")
    (root / "broken.png").symlink_to("nowhere.png")
    (root / "to_itself.png").symlink_to("to_itself.png")
    (root / "to_itself").symlink_to("to_itself")
    os.mkfifo(root / "pipe.png")
    (root / "to_pipe.png").symlink_to("pipe.png")
    (root / "to_device.png").symlink_to("/dev/zero")
    (root / "folder.png").mkdir()
    (root / "folder.png/inside.png").write_bytes(data)
    (root / "to_folder.png").symlink_to("folder.png")
    (root / "round").symlink_to(".")
    (root / "denied.png").write_bytes(data)
    (root / "denied.png").chmod(0)
    good = (b"good.png", b"to_good.png", b"folder.png/inside.png", b"to_folder.png/inside.png")
    bad = (b"broken.png", b"to_itself.png", b"to_pipe.png", b"to_device.png", b"denied.png")
    return dict.fromkeys(good, True) | dict.fromkeys(bad, False)
