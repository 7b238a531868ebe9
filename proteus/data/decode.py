"""Image files to pixels."""

import io
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import io as torchvision_io

JPEG = b"\xff\xd8\xff"  # what every JPEG file begins with


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
    """An image file as RGB; raises whatever the decoder raises where it is broken.

    JPEG goes through torchvision, whose pixels are Pillow's, in about 0.6 of its time; every other format, a JPEG of
    four components and one that torchvision refuses go through Pillow. An orientation in EXIF is not applied.
    """
    with nullcontext(file) if isinstance(file, io.BytesIO) else open(file, "rb") as stream:
        stream.seek(0)
        begin = stream.read(len(JPEG))
        if begin == JPEG and (decoded := _decode_jpeg(begin + stream.read())):
            return decoded
        stream.seek(0)
        with Image.open(stream) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255, not scale
                return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")


def _decode_jpeg(data: bytes) -> Image.Image | None:
    try:
        pixels = torchvision_io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    # Pillow may read it, or say better what is wrong. torchvision has announced that its decoders will go.
    except (RuntimeError, AttributeError):
        return None
    if len(pixels) == 1:
        return Image.fromarray(pixels[0].numpy()).convert("RGB")
    return DecodedImage(pixels) if len(pixels) == 3 else None
