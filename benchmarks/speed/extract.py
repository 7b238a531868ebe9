"""Images a second of `proteus.evaluation.extract` against a plain loop over timm's loader, in turn, same network.

python -m benchmarks.speed.extract [--root IMAGES] [--model proteus_vits14] [--batch 64] [--workers 2] [--out x.json]

Both decode, resize the short side to size / 0.875 (bicubic), crop the centre, and keep the class token of every image
on the CPU in float32; the weights are random. The plain loop is timm's `create_loader` with its prefetcher, and timm's
own `forward_features`. Without --root the images are 500 x 375 JPEGs of smooth noise, made for the occasion. How far
the two sets of tokens lie apart is printed: the mean of |difference| over the mean of |token|.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import timm.data
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.speed import timing
from benchmarks.speed.ours import write_noise
from proteus.data.sources import FolderSource
from proteus.errors import InputError
from proteus.evaluation.extract import View, extract
from proteus.models import Encoder, create_model

CROP = 0.875
PLAIN, OURS = "timm's loader and network", "proteus.evaluation.extract"


class Files(Dataset):
    """The images of a folder as timm's loader wants them, decoded by Pillow."""

    transform: Any = None  # set by the loader

    def __init__(self, source: FolderSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(self.source.file(index)) as image:
            return self.transform(image.convert("RGB")), 0


@torch.no_grad()
def plain_loop(encoder: Encoder, source: FolderSource, view: View, device: torch.device, dtype: Any) -> Tensor:
    """Class tokens [n, D], as one would write it with timm alone."""
    loader = timm.data.create_loader(
        Files(source),
        input_size=(3, view.size, view.size),
        batch_size=view.batch_size,
        is_training=False,
        use_prefetcher=True,
        interpolation="bicubic",
        mean=encoder.mean,
        std=encoder.std,
        crop_pct=CROP,
        num_workers=view.workers,
        device=device,
        persistent_workers=False,
    )
    tokens = []
    for images, _ in loader:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            tokens.append(encoder.network.forward_features(images)[:, 0].float().cpu())
    return torch.cat(tokens)


def compare(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Measure both; times, images a second, ratio, and the difference of the tokens."""
    accelerator = Accelerator()
    device = accelerator.device
    torch.manual_seed(0)
    encoder = create_model(args.model, image_size=args.image_size).to(device).eval()
    source = FolderSource(root, use_labels=False)
    view = View(args.image_size, CROP, args.batch, args.workers)
    dtype = torch.bfloat16 if device.type == "cuda" else None
    found: dict[str, Tensor] = {}

    def plain() -> None:
        found[PLAIN] = plain_loop(encoder, source, view, device, dtype)

    def ours() -> None:
        found[OURS] = extract(encoder, source, view, accelerator, precision="bf16" if dtype else "no")

    times = timing.in_turn({PLAIN: plain, OURS: ours}, args.rounds, device)
    error = (found[PLAIN] - found[OURS]).abs().mean() / found[PLAIN].abs().mean()
    summary = timing.summarise(times, PLAIN)
    return {
        "images": len(source),
        "times": times,
        "summary": {name: row._asdict() for name, row in summary.items()},
        "difference": error.item(),
    }


def main(argv: list[str] | None = None) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="a folder of images")
    parser.add_argument("--images", default=256, type=int, help="how many are made where no folder is given")
    parser.add_argument("--model", default="proteus_vits14", help="a vision transformer with a class token")
    parser.add_argument("--image-size", default=224, type=int)
    parser.add_argument("--batch", default=64, type=int)
    parser.add_argument("--workers", default=2, type=int)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--threads", default=2, type=int)
    parser.add_argument("--out", help="a JSON file for everything measured")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    facts = timing.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{timing.describe(facts)}; {args.model} at {args.image_size} px, batch {args.batch}, ", end="")
    print(f"{args.workers} workers\n", flush=True)
    try:
        with tempfile.TemporaryDirectory() as made:
            if args.root is None:
                write_noise(Path(made), args.images)
            found = compare(args, Path(args.root or made))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [
        [name, f"{row['seconds']:.2f}", f"{found['images'] / row['seconds']:.1f}", f"{row['speedup']:.2f}"]
        for name, row in found["summary"].items()
    ]
    print(timing.table(["loop", "s", "images/s", "ratio"], rows))
    print(f"\n{found['images']} images; the tokens differ by {found['difference']:.1e}")
    timing.write_json(args.out, {"machine": facts, "settings": vars(args)} | found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
