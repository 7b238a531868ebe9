"""What a file of ours says of its network, in its metadata; read with suspicion, since anybody can write a file."""

import json
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from proteus.errors import InputError
from proteus.models.position import PositionRule

Pixels = Annotated[int, Field(gt=0, le=100_000, strict=True)]
Triple = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]


class Facts(BaseModel, allow_inf_nan=False):
    """What `save_encoder` writes. What is None the file does not say, or the network has not."""

    name: str
    arch: dict[str, Any] = {}
    image_size: Pixels | tuple[Pixels, Pixels]
    mean: Triple
    std: tuple[Positive, Positive, Positive]
    native_grid: tuple[Pixels, Pixels] | None = None
    position: PositionRule | None = None
    num_heads: Pixels | None = None
    norm_eps: Positive | None = None
    patch_norm: Annotated[bool, Field(strict=True)] | None = None


def read_facts(metadata: dict[str, str], source: str) -> Facts | None:
    """The facts in a safetensors file's metadata; None for files of others, InputError where they make no sense."""
    if "proteus" not in metadata:
        return None
    try:
        return Facts.model_validate(json.loads(metadata["proteus"]))
    except (ValidationError, ValueError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else "it is no JSON"
        raise InputError(f"{source}: what its metadata says of the network makes no sense ({told})") from None
