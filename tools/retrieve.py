"""Choose unlabelled images for a task:  python tools/retrieve.py --queries task/train --gallery photos \
--model dinov2_vitb14 --per-query 8 --out sets/task
"""

import argparse
import sys
from pathlib import Path

from proteus.errors import FAILURES, InputError, say


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 a disk failed, 2 bad input, 130 interrupted."""
    args = _parser().parse_args(argv)
    try:
        if not args.queries.expanduser().is_dir():
            raise InputError(f"--queries {args.queries}: no such folder; give a folder of images")
        # Importing torch takes seconds: what is plainly wrong with the command line is said before.
        from proteus.transfer.retrieval.run import Request, retrieve

        retrieve(Request(**{**vars(args), "exclude": tuple(args.exclude)}))
    except FAILURES as error:
        return say(error, about=str(args.out))
    except KeyboardInterrupt:
        print("\nstopped; what is embedded is kept, the same command goes on from there", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrieve.py", description="Choose from a gallery the images that are most like those of a task."
    )
    add = parser.add_argument
    add("--queries", type=Path, required=True, help="folder of the task's images")
    add("--gallery", action="append", required=True, metavar="DIR|hf:ID", help="folder of images, or hf: and a "
        "dataset's hub id or path; may be given more than once")  # fmt: skip
    add("--gallery-split", help="split of the hf: galleries (default: train)")
    add("--model", required=True, help="a name of the zoo, or a checkpoint that says what it is")
    add("--checkpoint", type=Path, help="weights for a name (default: the published ones, if on this disk)")
    add("--per-query", type=int, required=True, help="images to each query")
    add("--out", type=Path, required=True, help="folder for what is found")
    add("--selection", default="balanced", help="balanced (as many to every query), agnostic (the nearest to any "
        "query) or random (default: balanced)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random selection (default: 0)")
    add("--exclude", type=Path, action="append", default=[], metavar="DIR", help="folder of images that must not be "
        "selected, such as the task's test images; may be given more than once")  # fmt: skip
    add("--near-duplicate", type=float, default=0.98, metavar="COSINE", help="images at least as similar count as the "
        "same: none is selected twice, or is a query or an excluded one (default: 0.98)")  # fmt: skip
    add("--image-size", type=int, help="pixels a side that the model is shown (default: the model's)")
    add("--crop", type=float, default=0.875, help="share of the short side that is cut out (default: 0.875)")
    add("--batch-size", type=int, default=64, help="images a forward pass (default: 64)")
    add("--workers", type=int, default=0, help="processes that load images (default: 0)")
    add("--embeddings", type=Path, help="folder where embeddings are kept and found again (default: OUT/embeddings)")
    add("--download", action="store_true", help="fetch weights and datasets that are not on this disk")
    return parser


if __name__ == "__main__":
    sys.exit(main())
