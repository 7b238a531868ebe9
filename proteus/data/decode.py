"""Image files to pixels."""

import io
import os
import stat
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import io as torchvision_io

JPEG = b"\xff\xd8\xff"  # what every JPEG file begins with
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**63)  # of an image, 179 million: where Pillow says decompression bomb
# Bytes of a file, 1.4 GB: no image of MAX_PIXELS needs more, at 16 bits and four channels. Some decoders read all of
# a file, whatever its header says, or look through it byte by byte. A TIFF may hold many images, of which one is read.
MAX_BYTES = 8 * MAX_PIXELS
TIFF = b"II", b"MM"  # what every TIFF file begins with
# What a set of images may hold. Pillow knows more, and runs a program of its own for some (EPS).
Image.init()
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
FORMATS = [name for name in FORMATS if name in Image.OPEN]
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of JPEG's segment that holds the size


class DecodedImage(Image.Image):
    """An RGB image that still has its pixels as the decoder gave them: [3, H, W] uint8, channels last in memory.

    Most images are only cropped and resized, which needs no copy of Pillow's own; it is made when Pillow first asks
    for it, and `pixels` is None from then on.
    """

    pixels: Tensor | None = None

    def __init__(self, pixels: Tensor):
        super().__init__()
        self.pixels = pixels
        self._mode, self._size = "RGB", (pixels.shape[2], pixels.shape[1])

    def load(self):
        if self.pixels is not None:
            self.im = Image.fromarray(self.pixels.permute(1, 2, 0).numpy()).im
            self.pixels = None
        return super().load()


def decode(file: Path | str | io.BytesIO) -> Image.Image:
    """An image file as RGB; raises whatever the decoder raises where it is broken, or too large to be one in earnest.

    JPEG goes through torchvision, whose pixels are Pillow's, in about 0.6 of its time; every other format, a JPEG of
    four components and one that torchvision refuses go through Pillow. An orientation in EXIF is not applied, of
    several frames the first counts, transparency is left out. Pixels that are floats are an error: what is white?
    """
    if not isinstance(file, io.BytesIO) and not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(f"{file} is no file")  # a pipe would be waited for, a device has no end
    with nullcontext(file) if isinstance(file, io.BytesIO) else open(file, "rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        begin = stream.read(len(JPEG))
        if size > MAX_BYTES and not begin.startswith(TIFF):
            raise OSError(f"{file} has {size} bytes, more than the {MAX_BYTES} that an image may have")
        stream.seek(0)
        if begin == JPEG and (decoded := _decode_jpeg(_read(stream, size))):
            return decoded
        stream.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, a palette's transparency: nobody at a run can do anything
            return _decode_by_pillow(stream)


def _decode_by_pillow(stream: IO[bytes]) -> Image.Image:
    with Image.open(stream, formats=FORMATS) as image:
        if image.mode == "F":
            raise ValueError("pixels are floats, whose range is not known")
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255, not scale
            return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")


def _read(stream: io.BufferedReader | io.BytesIO, size: int) -> bytearray:
    data = bytearray(size)  # torch wants bytes that may be written; a copy of what `read` gives would be a second one
    del data[stream.readinto(data) :]  # somebody may just have made it shorter
    return data


def _decode_jpeg(data: bytearray) -> Image.Image | None:
    width, height = _jpeg_size(data)
    if not 0 < width * height <= MAX_PIXELS:  # torchvision would take any amount of memory
        return None
    try:
        pixels = torchvision_io.decode_jpeg(torch.frombuffer(data, dtype=torch.uint8))
    # Pillow may read it, or say better what is wrong. torchvision has announced that its decoders will go.
    except (RuntimeError, AttributeError):
        return None
    if len(pixels) == 1:
        return Image.fromarray(pixels[0].numpy()).convert("RGB")
    return DecodedImage(pixels) if len(pixels) == 3 else None


def _jpeg_size(data: bytes | bytearray) -> tuple[int, int]:
    """(width, height) as a JPEG's header has it; (0, 0) where none is found."""
    place = 2
    while place + 9 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in FRAMES:
            height, width = data[place + 5 : place + 7], data[place + 7 : place + 9]
            return int.from_bytes(width, "big"), int.from_bytes(height, "big")
        # 0xFF may be repeated before a marker; other segments tell their length.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0, 0
