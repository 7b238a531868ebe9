"""From queries and a gallery to a transfer set on disk."""

import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from proteus.engine.atomic import write_file
from proteus.engine.lock import RunLock
from proteus.errors import InputError
from proteus.evaluation.extract import View
from proteus.models import Encoder, create_model, load_checkpoint
from proteus.models.weights import find_official, weights_hash
from proteus.models.zoo import check_name
from proteus.transfer.retrieval import output, select, sheet
from proteus.transfer.retrieval.duplicates import Guard, near
from proteus.transfer.retrieval.embed import Contents, Embeddings, embed
from proteus.transfer.retrieval.gallery import HUB, Gallery, Photos, class_names, open_gallery
from proteus.transfer.retrieval.index import Index, similarities
from proteus.transfer.retrieval.select import SELECTIONS, Selection

FILES = (".safetensors", ".pth", ".pt", ".bin")


class Request(NamedTuple):
    """What is to be retrieved; the names are those of the command line's options, where they are explained."""

    queries: Path
    gallery: list[str]
    model: str
    per_query: int
    out: Path
    checkpoint: Path | None = None
    selection: str = "balanced"
    seed: int = 0
    exclude: tuple[Path, ...] = ()
    near_duplicate: float = 0.98
    gallery_split: str | None = None
    image_size: int | None = None
    crop: float = 0.875
    batch_size: int = 64
    workers: int = 0
    embeddings: Path | None = None
    download: bool = False


class Precision(NamedTuple):
    """Of the images that the queries of a class retrieved the share of that class, and its share of the gallery."""

    name: str
    precision: float
    chance: float


def check(request: Request) -> None:
    """InputError where a number is out of its range or a name unknown, before any work."""
    for option, value, least in (
        ("--per-query", request.per_query, 1),
        ("--batch-size", request.batch_size, 1),
        ("--workers", request.workers, 0),
        ("--seed", request.seed, 0),
        ("--image-size", 1 if request.image_size is None else request.image_size, 1),
    ):
        if value < least:
            raise InputError(f"{option} {value}: a number from {least} on")
    if not 0.05 <= request.crop <= 1:
        raise InputError(f"--crop {request.crop}: a share of the short side from 0.05 to 1")
    if not 0 < request.near_duplicate <= 0.999:
        raise InputError(
            f"--near-duplicate {request.near_duplicate}: a cosine above 0, up to 0.999; above that half precision "
            "tells no copy from another image"
        )
    if request.selection not in SELECTIONS:
        raise InputError(f"--selection {request.selection}: one of {', '.join(SELECTIONS)}")
    is_file = Path(request.model).is_file() or request.model.endswith(FILES)
    if is_file and request.checkpoint is not None:
        raise InputError(f"--model {request.model} is a file already: --checkpoint goes with a name of the zoo")
    if not is_file:
        check_name(request.model)
    out = Path(os.path.realpath(request.out))
    folders = [request.queries, *request.exclude, *(Path(spec.removeprefix(HUB)) for spec in request.gallery)]
    for folder in folders:
        if out.is_relative_to(os.path.realpath(folder.expanduser())):
            raise InputError(f"--out {request.out} lies in {folder}, whose images it would add to: give another folder")


def retrieve(request: Request, say: Callable[[str], None] = print) -> Selection:
    """Embed, index, select, and write the transfer set to `request.out`; returns what was selected.

    InputError where the request cannot be met; what is embedded by then is kept.
    """
    check(request)
    queries = Photos(request.queries.expanduser(), "--queries")
    gallery = open_gallery(request.gallery, request.gallery_split, request.download)
    excluded = [Photos(folder.expanduser(), "--exclude") for folder in request.exclude]
    needed = len(queries) * request.per_query
    if len(gallery) < needed:
        raise InputError(
            f"--gallery holds {len(gallery)} images, too few for {request.per_query} to each of {len(queries)} queries "
            f"({needed}): lower --per-query, take fewer queries or a larger gallery"
        )
    encoder = open_encoder(request)
    view = View(image_size(encoder, request.image_size), request.crop, request.batch_size, request.workers)
    weights = weights_hash(encoder)
    output.prepare(request.out)
    lock = RunLock(request.out)
    try:
        output.forget_pending(request.out)
        output.claim(request.out, _facts(request, view, weights, queries, gallery, excluded))
        keep = partial(embed, encoder, view=view, cache=request.embeddings or request.out / "embeddings")
        query_vectors = _vectors(keep(queries, weights=weights))
        excluded_vectors = [_vectors(keep(part, weights=weights)) for part in excluded]
        for part, vectors in zip(excluded, excluded_vectors, strict=True):
            _check_overlap(queries, query_vectors, part, vectors, request.near_duplicate)
        embeddings = keep(gallery, weights=weights, gallery=True)
        unreadable = np.flatnonzero(~embeddings.readable)
        output.write_unreadable(request.out, gallery, unreadable)
        note = f", {len(unreadable)} of them unreadable ({request.out / output.UNREADABLE})" if len(unreadable) else ""
        say(f"gallery: {len(gallery)} images{note}")
        index = Index(embeddings)
        say(f"index: {index.words}")
        nothing = np.empty((0, embeddings.dim), np.float16)
        guard = Guard(embeddings, query_vectors, np.concatenate([nothing, *excluded_vectors]), request.near_duplicate)
        selection = _select(request, index, query_vectors, guard)
        precision = class_precision(selection, class_names(queries), gallery.class_names(), embeddings.readable)
        _write(request, queries, gallery, index, guard, selection, precision)
    finally:
        lock.release()
    _report(request, queries, guard, selection, precision, say)
    return selection


def open_encoder(request: Request) -> Encoder:
    """The frozen encoder: a checkpoint that says what it is, or a name with its published weights or a local file."""
    if Path(request.model).is_file() or request.model.endswith(FILES):
        return load_checkpoint(request.model).freeze()
    if request.checkpoint is not None:
        return create_model(request.model, checkpoint=str(request.checkpoint)).freeze()
    try:
        file = find_official(request.model, request.download)
    except InputError as error:
        hint = "" if request.download else " with --download, or give --checkpoint FILE"
        raise InputError(f"{error}{hint}") from None
    return create_model(request.model, checkpoint=str(file)).freeze()


def image_size(encoder: Encoder, wanted: int | None) -> int:
    """The side of the square that the encoder is shown. InputError where it cannot take it."""
    size = wanted or encoder.image_size
    if isinstance(size, tuple):
        raise InputError(
            f"{encoder.name} wants images of {size[0]} x {size[1]}: give the side of a square, --image-size"
        )
    try:
        encoder.grid_of(size, size)
    except ValueError as error:
        raise InputError(f"--image-size {size}: {error}") from None
    return size


def class_precision(
    selection: Selection, query_classes: np.ndarray, image_classes: np.ndarray, readable: np.ndarray
) -> list[Precision]:
    """For each class that queries and gallery have in common, by name; none where they have none."""
    table = []
    for name in np.intersect1d(query_classes, image_classes):
        retrieved = image_classes[selection.image[query_classes[selection.query] == name]]
        if name and len(retrieved):
            chance = float((image_classes[readable] == name).mean())
            table.append(Precision(str(name), float((retrieved == name).mean()), chance))
    return table


def _select(request: Request, index: Index, queries: np.ndarray, guard: Guard) -> Selection:
    if request.selection == "random":
        return select.random(index, queries, request.per_query, guard, request.seed)
    choose = select.balanced if request.selection == "balanced" else select.agnostic
    return choose(index, queries, request.per_query, guard)


def _vectors(embeddings: Embeddings) -> np.ndarray:
    """[n, D] float16, in memory."""
    return embeddings.rows(np.arange(len(embeddings)))


def _check_overlap(
    queries: Photos, query_vectors: np.ndarray, excluded: Photos, excluded_vectors: np.ndarray, threshold: float
) -> None:
    """A query that is also a test image would tell the selection about the test set."""
    close = near(query_vectors, excluded_vectors, threshold)
    if (close >= 0).any():
        query = int(np.argmax(close >= 0))
        more = int((close >= 0).sum()) - 1
        cosine = similarities(query_vectors[query : query + 1], excluded_vectors[close[query] : close[query] + 1])[0]
        raise InputError(
            f"--queries: {queries.name(query)} is the same as, or a near-duplicate of, "
            f"{excluded.name(int(close[query]))} of --exclude (cosine {cosine:.4f}), and {more} more queries "
            "are: take them out of the queries, or raise --near-duplicate where they are different images"
        )


def _facts(
    request: Request, view: View, weights: str, queries: Photos, gallery: Gallery, excluded: list[Photos]
) -> dict[str, Any]:
    """What the result depends on, by the name of its option."""
    sources: list[Contents] = [queries, gallery, *excluded]
    return {
        "--queries": str(queries.root),
        "--gallery": [
            spec if spec.startswith(HUB) else os.path.abspath(Path(spec).expanduser()) for spec in request.gallery
        ],
        "--gallery-split": request.gallery_split,
        "--exclude": [str(part.root) for part in excluded],
        "--per-query": request.per_query,
        "--selection": request.selection,
        "--seed": request.seed if request.selection == "random" else None,
        "--near-duplicate": request.near_duplicate,
        "--model": request.model,
        "--image-size": view.size,
        "--crop": view.crop,
        "weights": weights[:16],
        "images": hashlib.sha256("".join(source.contents for source in sources).encode()).hexdigest()[:16],
    }


def _write(
    request: Request,
    queries: Photos,
    gallery: Gallery,
    index: Index,
    guard: Guard,
    selection: Selection,
    precision: list[Precision],
) -> None:
    out = request.out
    names = output.write_images(out, gallery, selection)
    title = f"{request.selection}: {len(selection.image)} of {len(gallery)} images for {len(queries)} queries"
    write_file(out / output.SHEET, lambda pending: sheet.draw(queries, gallery, selection, title, pending))
    output.write_manifest(out, names, selection, queries, gallery)
    output.write_summary(
        out,
        {
            "selection": request.selection,
            "queries": len(queries),
            "per_query": request.per_query,
            "selected": len(selection.image),
            "gallery": len(gallery),
            "unreadable": len(gallery) - len(index),
            "index": index.words,
            "near_duplicate": request.near_duplicate,
            "skipped_near_duplicates": guard.skipped,
            "similarity": {"mean": float(selection.similarity.mean()), "least": float(selection.similarity.min())},
            "classes": [row._asdict() for row in precision],
        },
    )


def _report(
    request: Request,
    queries: Photos,
    guard: Guard,
    selection: Selection,
    precision: list[Precision],
    say: Callable[[str], None],
) -> None:
    each = f", {request.per_query} to each of {len(queries)} queries" if request.selection == "balanced" else ""
    say(f"selected ({request.selection}): {len(selection.image)} images{each}")
    skipped = ", ".join(f"{count} of {what} images" for what, count in guard.skipped.items())
    say(f"skipped as near-duplicates (cosine {request.near_duplicate} or more): {skipped}")
    similarity = selection.similarity
    say(f"similarity: mean {similarity.mean():.3f}, least {similarity.min():.3f}")
    if precision:
        say("| class | precision | chance |\n| --- | ---: | ---: |")
        for row in (*precision, _mean(precision)):
            say(f"| {row.name} | {row.precision:.3f} | {row.chance:.3f} |")
    say(f"contact sheet: {request.out / output.SHEET}")
    say(f"as images of a run: data.kind=folder data.root={Path(os.path.abspath(request.out)) / output.IMAGES}")


def _mean(rows: list[Precision]) -> Precision:
    return Precision("mean", float(np.mean([r.precision for r in rows])), float(np.mean([r.chance for r in rows])))
