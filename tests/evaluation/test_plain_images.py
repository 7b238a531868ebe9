"""Images under the plain view, and the features of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from proteus.data.sources import FolderSource
from proteus.evaluation.features import class_tokens, load_images
from proteus.models import create_model

# class/name: (width, height)
SIZES = {"a/wide.png": (90, 40), "a/tall.png": (30, 77), "b/small.png": (11, 9), "b/square.png": (64, 64)}


@pytest.fixture
def pictures(tmp_path):
    """Four images of two classes, by name: random pixels on a ramp."""
    images = {}
    for seed, (name, (width, height)) in enumerate(SIZES.items()):
        rng = np.random.default_rng(seed)
        pixels = np.linspace(0, 200, height)[:, None, None] + rng.integers(0, 55, (height, width, 3))
        images[name] = Image.fromarray(pixels.astype(np.uint8))
        (tmp_path / name).parent.mkdir(exist_ok=True)
        images[name].save(tmp_path / name)
    return tmp_path, images


def by_hand(image, size, crop):
    """Short side to size / crop (bicubic), then the centre."""
    short = round(size / crop)
    width, height = image.size
    if width <= height:
        image = image.resize((short, int(short * height / width)), Image.Resampling.BICUBIC)
    else:
        image = image.resize((int(short * width / height), short), Image.Resampling.BICUBIC)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


@pytest.mark.parametrize(("size", "crop"), [(28, 0.875), (32, 1.0), (20, 0.5)])
def test_the_plain_view_by_hand(pictures, size, crop):
    root, images = pictures
    loaded = load_images(FolderSource(root), size, crop)
    assert loaded.images.dtype == torch.uint8
    assert loaded.images.shape == (4, 3, size, size)
    for row, name in enumerate(sorted(SIZES)):
        assert np.array_equal(loaded.images[row].numpy(), by_hand(images[name], size, crop)), name
    assert loaded.labels.tolist() == [0, 0, 1, 1]


def break_some(root):
    """Images that cannot be read: first, amid the others, and last."""
    whole = (root / "a" / "wide.png").read_bytes()
    (root / "a" / "0_text.png").write_text("not an image")
    (root / "a" / "u_cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "b" / "z_empty.jpg").write_bytes(b"")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_left_out_with_its_label(pictures, workers):
    root, _ = pictures
    expected = load_images(FolderSource(root), 28, 0.875)
    break_some(root)
    source = FolderSource(root)
    assert len(source) == 7
    loaded = load_images(source, 28, 0.875, workers)
    assert torch.equal(loaded.images, expected.images)
    assert loaded.labels.tolist() == [0, 0, 1, 1]


def test_nothing_that_can_be_read_is_no_image(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_text("not an image")
    loaded = load_images(FolderSource(tmp_path), 28, 0.875)
    assert loaded.images.shape == (0, 3, 28, 28)
    assert len(loaded.labels) == 0


def test_images_without_labels(pictures):
    root, _ = pictures
    (root / "a" / "wide.png").rename(root / "wide.png")  # not in a class folder
    loaded = load_images(FolderSource(root), 28, 0.875)
    assert loaded.labels is None
    assert len(loaded.images) == 4


@torch.no_grad()
def test_class_tokens_in_batches_are_those_of_all_at_once():
    encoder = create_model("timm/vit_tiny_patch16_224", image_size=32, embed_dim=32, depth=2, num_heads=2).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = class_tokens(encoder, images, torch.device("cpu"), batch=3)
    torch.testing.assert_close(tokens, encoder(images).cls, atol=1e-5, rtol=0)
    low = class_tokens(encoder.to(torch.bfloat16), images, torch.device("cpu"))
    assert low.dtype == torch.float32
    assert low.shape == (7, 32)


def test_class_tokens_build_no_graph():
    encoder = create_model("timm/vit_tiny_patch16_224", image_size=32, embed_dim=32, depth=2, num_heads=2)
    assert not class_tokens(encoder, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.device("cpu")).requires_grad
