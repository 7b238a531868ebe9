"""Images a second of the data path: timm's loader against ours, on files, packed, and with augmentation on the device.

python -m benchmarks.speed.loader [--root IMAGES] [--images 500] [--workers 2] [--rounds 7] [--out loader.json]

All give batches of 224-pixel views under the recipe (RandomResizedCrop bicubic, flip, rand-m9-mstd0.5-inc1, pixelwise
random erasing with probability 1/4), as floats on the device. They take turns on the same JPEGs of 500 x 375 pixels,
made here or, with --root, from the photos in a folder; a ratio is the median of those within a round. The second table
is the time that each stage takes of one core.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, create_transform
from timm.data.loader import fast_collate

from benchmarks.speed import timing
from proteus.config import Augment
from proteus.data.loader import PREFETCH, TrainingSet, training_batches
from proteus.data.packed import PackedSource
from proteus.data.sampler import Draw, Sampler
from proteus.data.sources import FolderSource, Source
from proteus.data.transforms import TrainTransform, mend_posterize, seeded
from proteus.errors import InputError
from proteus.models.encoder import IMAGENET_MEAN, IMAGENET_STD
from tools import pack

SIZE, PATCHES = 224, 256
WIDTH, HEIGHT = 500, 375  # ImageNet's typical size
QUALITY = 90
RECIPE = Augment()
Batches = Generator[torch.Tensor, None, None]  # without end


def make_images(folder: Path, count: int, root: Path | None) -> None:
    """Write `count` JPEGs of 500 x 375 pixels in two classes: photos of `root`, or smooth colours with fine detail."""
    photos = FolderSource(root, use_labels=False) if root else None
    chosen = np.random.default_rng(0).permutation(len(photos))[:count] if photos else range(count)
    for number, index in enumerate(chosen):
        image = photos.load(int(index)) if photos else _synthetic(number)
        path = folder / "ab"[number % 2] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path, quality=QUALITY)


def _synthetic(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    mixed = np.full((HEIGHT, WIDTH, 3), 128.0)
    for side in (8, 32, 128):  # as in a photo, the finer the fainter
        noise = Image.fromarray(rng.integers(0, 256, (side * 3 // 4, side, 3), dtype=np.uint8))
        mixed += (np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=float) - 128) * (
            4 / side
        ) ** 0.5
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def theirs(images: Path, batch: int, workers: int, device: torch.device) -> Batches:
    """timm's loader with its prefetcher: normalised images [B, 3, S, S]."""
    dataset = create_dataset("", str(images))
    dataset.reader.samples *= 10**6 // len(dataset)  # no end of an epoch, at which workers would run dry
    loader = create_loader(
        dataset,
        (3, SIZE, SIZE),
        batch,
        is_training=True,
        use_prefetcher=True,
        re_prob=RECIPE.erasing,
        re_mode="pixel",
        scale=list(RECIPE.scale),
        hflip=RECIPE.hflip,
        auto_augment=RECIPE.auto_augment,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        device=device,
    )
    mend_posterize(loader.dataset.transform.transforms[2])
    return (images for images, _ in loader)


def ours(source: Source, augment: Augment, batch: int, workers: int, device: torch.device) -> Batches:
    """Our loader: images [B, 3, S, S] in [0, 1].

    Augmentation on the device is left out where the device is a CPU: the rate is then what the workers could feed.
    """
    data = TrainingSet(source, TrainTransform(SIZE, augment), 0, PATCHES, 0.5)
    for loaded in training_batches(data, Sampler(len(source), batch, mask_probability=0.5), 0, 10**6, 0, workers):
        yield (loaded._replace(ops=()) if device.type == "cpu" else loaded).to(device).images


def rate(batches: Batches, count: int, ahead: int) -> float:
    """Images a second over `count` batches, after `ahead` that the workers may have had ready."""
    for _ in range(ahead):
        images = next(batches)
    start = time.perf_counter()
    for _ in range(count):
        images = next(batches)
    if images.is_cuda:
        torch.cuda.synchronize()
    return count * len(images) / (time.perf_counter() - start)


def stages(folder: Path, packed_256: Source, count: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one core that an image takes, by loader and stage."""
    torch.set_num_threads(1)  # as in a worker; the processor time of threads that wait would count
    files = FolderSource(folder)
    chosen = range(min(count, len(files)))
    dataset = create_dataset("", str(folder))
    arguments = {"is_training": True, "auto_augment": RECIPE.auto_augment, "interpolation": "bicubic"}
    crop_flip, augment, _ = create_transform((3, SIZE, SIZE), separate=True, **arguments)
    mend_posterize(augment.transforms[0])
    dataset.transform = create_transform((3, SIZE, SIZE), use_prefetcher=True, **arguments)
    mend_posterize(dataset.transform.transforms[2])
    pillow = [Image.open(files.file(i)).convert("RGB") for i in chosen]
    views = [crop_flip(image) for image in pillow]
    table = {
        "timm": _split(
            _milliseconds(lambda i: Image.open(files.file(i)).convert("RGB"), chosen),
            _milliseconds(lambda i: crop_flip(pillow[i]), chosen),
            _milliseconds(lambda i: augment(views[i]), chosen),
            _milliseconds(lambda i: fast_collate([dataset[i]]), chosen),
        )
    }
    for name, source in (("ours", files), ("ours, packed at 256", packed_256)):
        images = [source.load(i) for i in chosen]
        whole, plain = (
            TrainTransform(SIZE, RECIPE),
            TrainTransform(SIZE, RECIPE.model_copy(update={"auto_augment": None})),
        )
        data = TrainingSet(source, whole, 0, PATCHES, 0.5)
        cropping = _milliseconds(lambda i: plain(images[i]), chosen)  # noqa: B023
        table[name] = _split(
            _milliseconds(lambda i: source.load(i), chosen),  # noqa: B023
            cropping,
            _milliseconds(lambda i: whole(images[i]), chosen) - cropping,  # noqa: B023
            _milliseconds(lambda i: data.batch([Draw(i, 0, i, i % 2 == 0)]), chosen),  # noqa: B023
        )
    return table


def _split(decode: float, crop: float, augment: float, everything: float) -> dict[str, float]:
    rest = everything - decode - crop - augment
    return {"decode": decode, "crop": crop, "RandAugment": augment, "rest": rest, "all": everything}


def _milliseconds(act: Callable[[int], object], chosen: range) -> float:
    """Processor time of one call, the median of three passes, each with the same draws."""
    times = []
    for _ in range(3):
        with seeded(0):
            start = time.process_time()
            for index in chosen:
                act(index)
            times.append((time.process_time() - start) / len(chosen) * 1e3)
    return statistics.median(times)


def measure(folder: Path, args: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Images a second of each loader, round by round."""
    common = args.batch, args.workers, device
    on_device = RECIPE.model_copy(update={"device": True})
    images = FolderSource(folder / "images")
    small, unchanged = PackedSource(folder / "small"), PackedSource(folder / "unchanged")
    loaders: dict[str, Callable[[], Batches]] = {
        "timm": lambda: theirs(folder / "images", *common),
        "ours": lambda: ours(images, RECIPE, *common),
        "ours, packed unchanged": lambda: ours(unchanged, RECIPE, *common),
        "ours, packed at 256": lambda: ours(small, RECIPE, *common),
        "ours, augmentation on the device": lambda: ours(images, on_device, *common),
        "ours, packed at 256, augmentation on the device": lambda: ours(small, on_device, *common),
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    ahead = PREFETCH * args.workers + 2
    for number in range(args.rounds):
        for name in list(loaders)[:: -1 if number % 2 else 1]:
            batches = loaders[name]()  # its workers live for its turn, else they would load into the others'
            rates[name].append(rate(batches, max(args.batches, ahead), ahead))
            batches.close()
    return rates


def show(rates: dict[str, list[float]], table: dict[str, dict[str, float]]) -> None:
    """Print both tables as Markdown."""
    print("\n| loader | images/s | to timm |\n| --- | ---: | ---: |")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.0f} | {_ratio(values, rates['timm']):.2f} |")
    print(f"\n| ms an image and core | {' | '.join(table['timm'])} |\n| --- |{' ---: |' * len(table['timm'])}")
    for name, row in table.items():
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in row.values())} |")


def _ratio(values: list[float], base: list[float]) -> float:
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Print the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="a folder of photos to take instead of pictures made here")
    parser.add_argument("--images", default=500, type=int)
    parser.add_argument("--workers", default=2, type=int)
    parser.add_argument("--batch", default=32, type=int)
    parser.add_argument("--batches", default=20, type=int, help="of a round that are timed")
    parser.add_argument("--rounds", default=7, type=int)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_images(folder / "images", args.images, args.root)
            for out, options in (("small", ["--size", "256"]), ("unchanged", ["--unchanged"])):
                pack.pack(pack.parse(["--root", str(folder / "images"), "--out", str(folder / out), *options]))
            rates = measure(folder, args, device)
            table = stages(folder / "images", PackedSource(folder / "small"), 200)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(rates, table)
    if args.out:
        ratios = {name: _ratio(values, rates["timm"]) for name, values in rates.items()}
        result = {
            "machine": timing.machine(device),
            "settings": {key: value for key, value in vars(args).items() if isinstance(value, int)},
            "images_per_second": rates,
            "ratio_to_timm": ratios,
            "milliseconds": table,
        }
        args.out.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
