"""Write a trained student for another library:  python tools/export.py onnx runs/x/student.safetensors --out x.onnx"""

import argparse
import sys
import tempfile
from pathlib import Path

from proteus.errors import FAILURES, InputError, RunError, say


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 what was written is not what was asked for, 2 bad input."""
    parser = argparse.ArgumentParser(prog="export.py", description="Write a trained student for another library.")
    parser.add_argument("format", help="timm, hf (a folder for the Hugging Face hub), onnx, or torch (torch.export)")
    parser.add_argument("checkpoint", type=Path, help="the student: runs/NAME/student.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="the file, or for hf the folder; it must not exist yet")
    parser.add_argument("--image-size", type=int, help="pixels a side that the export is for (default: the student's)")
    parser.add_argument("--licence", help="hf: the licence that the model card names, as the hub abbreviates it")
    parser.add_argument("--push", metavar="OWNER/NAME", help="hf: upload the folder to this repository of the hub")
    args = parser.parse_args(argv)
    try:
        if args.out.exists() and not _is_empty_folder(args.out):
            raise InputError(f"--out {args.out} exists already: give another name or remove it")
        if args.image_size is not None and args.image_size <= 0:
            raise InputError(f"--image-size {args.image_size}: a number of pixels above 0")
        if args.format != "hf" and (args.licence or args.push):
            raise InputError("--licence and --push are for the format hf")
        if args.push and args.push.count("/") != 1:
            raise InputError(f"--push {args.push}: write OWNER/NAME")
        _export(args)
        if args.push:
            _push(args.out, args.push)
    except FAILURES as error:
        return say(error, about=str(args.out))
    return 0


def _export(args: argparse.Namespace) -> None:
    # Importing torch takes seconds: what is wrong with the command line is said before.
    from proteus.models import load_checkpoint
    from proteus.models.card import model_card
    from proteus.models.export import FORMATS, check_format, export, timm_code

    check_format(args.format)
    if args.out.suffix != FORMATS[args.format].suffix and args.format != "hf":
        raise InputError(f"--out {args.out}: a file of {args.format} ends in {FORMATS[args.format].suffix}")
    encoder = load_checkpoint(str(args.checkpoint), image_size=args.image_size)
    repository = args.push or f"OWNER/{args.out.resolve().name}"
    card = model_card(encoder, args.checkpoint, repository, args.licence) if args.format == "hf" else ""
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pending-", dir=args.out.parent) as folder:
            pending = Path(folder, args.out.name)
            difference = export(encoder, args.format, pending)
            if card:
                (pending / "README.md").write_text(card, encoding="utf-8")
            pending.rename(args.out)  # there whole and checked, or not at all
    except OSError as error:
        raise InputError(f"--out {args.out} cannot be written: {error.strerror or error}") from None
    if args.format in ("timm", "hf"):
        print(timm_code(encoder, str(args.out) if args.format == "timm" else f"local-dir:{args.out}"))
    print(f"{args.out}: largest difference {difference.absolute:.1e}, in features up to {difference.scale:.1e}")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _push(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # the hub's errors share no base class with those of its transport
        reason = " ".join(str(error).split())[:200]
        again = f"{folder} is written; later: hf upload {repository} {folder}"
        raise RunError(f"--push {repository}: {type(error).__name__}: {reason}; {again}") from None
    print(f"{folder} is now https://huggingface.co/{repository}")


if __name__ == "__main__":
    sys.exit(main())
