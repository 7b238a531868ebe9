"""What a retrieval leaves: links to the images, a manifest, a summary, and what it was asked for."""

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from proteus.data.sources import Source
from proteus.engine.atomic import PENDING, write_file, write_folder
from proteus.errors import InputError
from proteus.transfer.retrieval.gallery import Gallery
from proteus.transfer.retrieval.select import Selection

REQUEST, MANIFEST, SUMMARY, UNREADABLE = "request.json", "manifest.csv", "summary.json", "unreadable.txt"
IMAGES, SHEET = "images", "contact_sheet.png"
RESULTS = (SUMMARY, MANIFEST, SHEET, IMAGES)
NAME = 200  # bytes kept of an image's name, which with the query and rank before it may have 255


def prepare(out: Path) -> None:
    """Make the folder. InputError where there is something else in it, or it cannot be made."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = {path.name for path in out.iterdir() if not path.name.startswith(PENDING)} - {"lock"}
    except OSError as error:
        raise InputError(f"--out {out} cannot be made: {error.strerror or error}") from None
    if there and REQUEST not in there:
        raise InputError(f"--out {out} holds other things ({min(there)}): give another folder")


def claim(out: Path, request: dict[str, Any]) -> None:
    """Say in the folder what is asked for. InputError where it holds the results of another request.

    What is there of the same request is written again; embeddings serve every request.
    """
    path = out / REQUEST
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}): give another --out") from None
        different = [key for key in request if earlier.get(key) != request[key]]
        if different and any((out / name).exists() for name in RESULTS):
            key = different[0]
            raise InputError(
                f"--out {out} holds what was retrieved with {key} {earlier.get(key)}, not {request[key]}: give another "
                "folder; with --embeddings its embeddings serve there too"
            )
    _write_text(path, json.dumps(request, indent=1) + "\n")


def write_images(out: Path, gallery: Gallery, selection: Selection) -> list[str]:
    """Fill the folder of images, links to files or copies of stored bytes. Their names sort by query and rank."""
    names: list[str] = []
    width = [max(least, len(str(column.max()))) for least, column in ((5, selection.query), (2, selection.rank))]

    def fill(folder: Path) -> None:
        for query, rank, image in zip(selection.query, selection.rank, selection.image, strict=True):
            name, stored = gallery.stored(int(image))
            tail = os.fsdecode(os.fsencode(name)[-NAME:])
            names.append(f"q{query:0{width[0]}d}_r{rank:0{width[1]}d}_{tail}")
            if isinstance(stored, Path):
                (folder / names[-1]).symlink_to(stored)
            else:
                (folder / names[-1]).write_bytes(stored)

    write_folder(out / IMAGES, fill)
    return names


def write_manifest(out: Path, names: list[str], selection: Selection, queries: Source, gallery: Source) -> None:
    """One line an image: its name, its query, its rank there from 0, the cosine similarity, and where it comes from."""

    def write(pending: Path) -> None:
        with open(pending, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["image", "query", "rank", "similarity", "source"])
            for name, query, rank, image, similarity in zip(names, *selection[:2], *selection[2:], strict=True):
                source = gallery.name(int(image))
                writer.writerow([name, queries.name(int(query)), rank, f"{similarity:.6f}", source])

    write_file(out / MANIFEST, write)


def write_unreadable(out: Path, gallery: Source, unreadable: np.ndarray) -> None:
    """Name the images that could not be read, if there are any."""
    if len(unreadable):
        _write_text(out / UNREADABLE, "".join(f"{gallery.name(int(image))}\n" for image in unreadable))
    else:
        (out / UNREADABLE).unlink(missing_ok=True)


def write_summary(out: Path, summary: dict[str, Any]) -> None:
    """Written last: it says that everything else is there."""
    _write_text(out / SUMMARY, json.dumps(summary, indent=1) + "\n")


def forget_pending(out: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for path in out.glob(f"{PENDING}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _write_text(path: Path, text: str) -> None:
    write_file(path, lambda pending: pending.write_text(text, encoding="utf-8", errors="surrogateescape"))
