"""The models that are measured: zoo names, checkpoints, and either untrained."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.result import Model, Role
from proteus.errors import InputError
from proteus.models import Encoder, create_model, load_checkpoint
from proteus.models.weights import find_official, weights_hash
from proteus.models.zoo import check_name

UNTRAINED = "untrained:"
FILES = (".safetensors", ".pth", ".pt", ".bin")


class Measured(NamedTuple):
    """A frozen model, what a report says of it, and the folder of its results."""

    model: Model
    encoder: Encoder
    folder: Path


def check_model(spec: str, download: bool) -> None:
    """InputError where a model is neither a file nor a name of the zoo whose weights are there, before any work.

    download: whether published weights may be fetched.
    """
    plain = spec.removeprefix(UNTRAINED)
    if Path(plain).is_file():
        return
    if plain.endswith(FILES) or plain.startswith((".", "/", "~")):
        raise InputError(f"{plain}: no such file; give a checkpoint, or a name of the zoo")
    check_name(plain)
    if plain == spec:
        try:
            find_official(plain, download)
        except InputError as error:
            raise InputError(str(error) if download else f"{error}, or run with --download") from None


def open_model(spec: str, role: Role, out: Path) -> Measured:
    """Load what the command line calls `spec`. An untrained network is that of seed 0, with its twin's statistics."""
    plain = spec.removeprefix(UNTRAINED)
    untrained = plain != spec
    if Path(plain).is_file():
        encoder = load_checkpoint(plain)
        if untrained:
            torch.manual_seed(0)
            twin = encoder
            encoder = create_model(twin.name, image_size=twin.image_size, mean=twin.mean, std=twin.std, **twin.arch)
    else:
        torch.manual_seed(0)
        encoder = create_model(plain, checkpoint=None if untrained else str(find_official(plain, download=False)))
    encoder.freeze()
    weights = weights_hash(encoder)
    slug = re.sub(r"[^A-Za-z0-9]+", "-", spec).strip("-")[-60:]
    model = Model(
        label=spec,
        role=role,
        name=UNTRAINED * untrained + encoder.name,
        weights=weights,
        parameters=sum(parameter.numel() for parameter in encoder.network.parameters()),
        image_size=encoder.image_size,
    )
    return Measured(model, encoder, out / "models" / f"{slug}-{weights[:8]}")
