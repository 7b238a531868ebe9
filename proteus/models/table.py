"""docs/models.md, written from the zoo:  python -m proteus.models.table > docs/models.md"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from proteus.models.encoder import Encoder
from proteus.models.entries import ENTRIES, Entry
from proteus.models.zoo import build

HEAD = """# Models

Every name that `create_model` knows, from `python -m proteus.models.table`. Besides these: `timm/<any name of timm>`,
`hf-hub:<repository of a timm model>`, and `package.module:function` for a network of your own
([docs/teachers.md](teachers.md)).

Parameters are those of the backbone, in millions. GMACs are billions of multiply-adds for one image of 224 x 224,
counted in the matrix products, convolutions and attention of a forward pass. Width and patch are those of the patch
tokens; a convnet's patch is its stride. `size` is the native image size; other sizes work, and the position embedding
follows the family's own rule. Names under *weights* are what `pretrained=True` fetches; weights come under their
publishers' licences. C-RADIO's class token is the first of those that its summary puts together.
"""

COLUMNS = ("name", "params", "GMACs", "patch", "size", "width", "class token", "final norm", "licence", "weights")
CLS = {"token": "own", "attention": "attention pool", "average": "average"}


def measure(encoder: Encoder) -> tuple[float, float]:
    """Parameters in millions, and GMACs of one image of 224 x 224; of a frozen encoder, on any device, "meta" too."""
    parameters = sum(parameter.numel() for parameter in encoder.network.parameters()) / 1e6
    images = torch.zeros(1, 3, 224, 224, device=encoder.mask_token.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder(images)
    return parameters, counter.get_total_flops() / 2e9


def row(name: str, entry: Entry, encoder: Encoder) -> str:
    """The line of one entry."""
    parameters, macs = measure(encoder)
    weights = f"timm/{entry.timm}.{entry.tag}" if entry.tag else "publisher's file" if entry.official else "none"
    norm = {"all": "all tokens", "cls": "class token only", "none": "none"}[entry.final_norm]
    cells = (
        f"`{name}`", f"{parameters:,.1f}", f"{macs:,.1f}", entry.patch_size, entry.image_size, entry.width,
        CLS[entry.cls], norm, entry.licence, weights,
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def build_for_table(name: str) -> Encoder:
    """An entry's network without weights, at 224 pixels."""
    with torch.device("meta"):
        return build(name, 224).freeze()


def main() -> None:
    """Print the page."""
    print(HEAD)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    for name, entry in ENTRIES.items():
        print(row(name, entry, build_for_table(name)))


if __name__ == "__main__":
    main()
