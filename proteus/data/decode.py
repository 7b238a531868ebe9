"""Image files to pixels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def decode(file: Path | str | io.BytesIO) -> Image.Image:
    """An image file as RGB; raises whatever the decoder raises where it is broken."""
    with Image.open(file) as image:
        if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255, not scale
            return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
        return image.convert("RGB")
