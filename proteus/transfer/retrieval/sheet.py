"""A picture of what queries retrieved."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from proteus.data.sources import Source
from proteus.data.transforms import EvalTransform
from proteus.transfer.retrieval.select import Selection

ROWS, COLUMNS = 12, 10  # queries shown, and images of each
SIDE, GAP, TEXT, BORDER = 112, 6, 16, 3  # pixels


def draw(queries: Source, gallery: Source, selection: Selection, title: str, path: Path) -> None:
    """Write a PNG: a row each for queries spread over their set, then their first images with the similarity."""
    rows = np.unique(np.linspace(0, len(queries) - 1, min(ROWS, len(queries))).round().astype(int))
    columns = min(COLUMNS, int(selection.rank.max()) + 1)
    cell = SIDE + GAP
    width = GAP + cell + 2 * GAP + columns * cell
    sheet = Image.new("RGB", (max(width, 480), TEXT + 2 * GAP + len(rows) * (cell + TEXT)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((GAP, GAP), title, "black", font)
    for row, query in enumerate(rows):
        top = TEXT + 2 * GAP + row * (cell + TEXT)
        pen.rectangle((GAP - BORDER, top - BORDER, GAP + SIDE + BORDER - 1, top + SIDE + BORDER - 1), "royalblue")
        sheet.paste(_thumbnail(queries, int(query)), (GAP, top))
        pen.text((GAP, top + SIDE + BORDER), f"query {query}", "black", font)
        first = np.searchsorted(selection.query, query)
        last = min(np.searchsorted(selection.query, query, side="right"), first + columns)
        for column, entry in enumerate(range(first, last)):
            left = cell + 3 * GAP + column * cell
            sheet.paste(_thumbnail(gallery, int(selection.image[entry])), (left, top))
            pen.text((left, top + SIDE + BORDER), f"{selection.similarity[entry]:.3f}", "black", font)
    with open(path, "wb") as file:
        sheet.save(file, "png")


def _thumbnail(source: Source, index: int) -> Image.Image:
    pixels = EvalTransform(SIDE, 1.0)(source.load(index))  # [3, SIDE, SIDE]
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
