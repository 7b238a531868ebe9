"""Teachers that answered before: their targets for fixed views, read from disk instead of computed.

A class token is kept in float16. Patch tokens, where they are kept, lose their mean, are projected on the principal
components of a sample of them, and become 8-bit codes with a scale for each component; one product brings them back.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, Field, ValidationError, model_validator
from safetensors.torch import load
from torch import Tensor

from proteus import config
from proteus.config import Config
from proteus.data.dense import DenseSource, is_dense
from proteus.data.loader import Batch
from proteus.data.sources import Source
from proteus.data.view_cache import ViewCache
from proteus.errors import InputError
from proteus.models.features import Features
from proteus.models.heads import PixelClassifier
from proteus.models.weights import weights_hash
from proteus.training.resize import Grid
from proteus.training.sizes import Sizes
from proteus.training.teacher import Answer, Teacher

IDENTITY = "identity.json"  # {"made_with": facts, "components": hash, "error": what was measured, once it is finished}
COMPONENTS = "components.safetensors"
NAMES = 65_536  # images whose names tell whether a set is the same


class _Identity(BaseModel):
    """What has to be in identity.json, so that it can be relied on."""

    made_with: dict[str, str | int]
    components: str | None
    error: Annotated[dict[str, Any], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _whole(self) -> "_Identity":
        if self.error and self.made_with.get("teacher_cache.tokens") == "all" and not self.components:
            raise ValueError("a finished cache of all tokens has components")
        return self


class Components(NamedTuple):
    """What patch tokens are coded with: token = mean + (code * scale) @ basis.

    mean: [D]; basis: [P, D], orthonormal rows; scale: [P], what one step of a code is worth.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor


class Code:
    """A teacher's Features as bytes, and back. `components` is None where class tokens alone are kept."""

    def __init__(self, dim: int, grid: Grid, components: Components | None):
        self.dim, self.grid, self.components = dim, grid, components
        self._back = None if components is None else components.scale[:, None] * components.basis  # [P, D]

    @staticmethod
    def size(dim: int, grid: Grid, components: int) -> int:
        """Bytes of a view's Features, with codes for so many components of a patch token."""
        return 2 * dim + math.prod(grid) * components

    def encode(self, features: Features) -> Tensor:
        """Features of B images as uint8 [B, bytes]."""
        parts = [features.cls.half().contiguous().view(torch.uint8)]  # [B, 2 D]
        if self.components is not None:
            mean, basis, scale = self.components
            scores = (features.patch.float() - mean) @ basis.T  # [B, N, P]
            codes = (scores / scale).round().clamp(-127, 127).to(torch.int8)
            parts.append(codes.view(torch.uint8).flatten(1))
        return torch.cat(parts, dim=1)

    def decode(self, rows: Tensor) -> Features:
        """Float32 Features of uint8 [B, bytes]; without components no patch tokens, [B, 0, D]. No host sync."""
        cls = rows[:, : 2 * self.dim].contiguous().view(torch.float16).float()  # [B, D]
        if self.components is None or self._back is None:
            return Features(cls, cls.new_empty(len(cls), 0, self.dim), self.grid)
        codes = rows[:, 2 * self.dim :].contiguous().view(torch.int8).float()  # [B, N * P]
        codes = codes.view(-1, len(self._back))  # [B * N, P]
        with torch.autocast(codes.device.type, enabled=False):
            patch = torch.addmm(self.components.mean, codes, self._back)
        return Features(cls, patch.view(len(cls), -1, self.dim), self.grid)


class CachedTeacher:
    """Answers as its teacher did about the same views: from the rows of the cache that come with a batch.

    rows: which bytes of a row are this teacher's.
    """

    def __init__(self, teacher: Teacher, code: Code, rows: slice):
        self.name, self.code, self._head, self._rows = teacher.name, code, teacher.head, rows

    @torch.no_grad()
    def answer(self, batch: Batch) -> Answer:
        """Features and logits of a batch on the device."""
        assert batch.targets is not None
        features = self.code.decode(batch.targets[:, self._rows])
        return Answer(features, self._head(features) if self._head else None)


def open_cache(
    cfg: Config, teachers: list[Teacher], source: Source | DenseSource, sizes: Sizes
) -> tuple[ViewCache, list[CachedTeacher]]:
    """The finished cache of a config, and its teachers' stand-ins.

    InputError where it is not there, not finished, damaged, or made with other weights, views or images.
    """
    directory = cache_directory(cfg)
    facts = cache_facts(cfg, teachers, source, sizes)
    identity = read_identity(directory)
    if identity is None:
        raise InputError(f"teacher_cache.dir={directory} holds no teacher cache: make it by tools/cache.py")
    check_facts(identity, facts, directory)
    if "error" not in identity:
        raise InputError(f"{directory} is not finished: run tools/cache.py again, it goes on from what is there")
    return open_records(cfg, teachers, source, sizes, identity)


def open_records(
    cfg: Config, teachers: list[Teacher], source: Source | DenseSource, sizes: Sizes, identity: dict[str, Any]
) -> tuple[ViewCache, list[CachedTeacher]]:
    """As `open_cache`, of a cache whose identity is known to fit."""
    directory, cached, end = cache_directory(cfg), [], 0
    for teacher, code in zip(teachers, build_codes(cfg, teachers, sizes, identity), strict=True):
        components = 0 if code.components is None else len(code.components.scale)
        start, end = end, end + Code.size(code.dim, code.grid, components)
        cached.append(CachedTeacher(teacher, code, slice(start, end)))
    assert cfg.teacher_cache is not None
    views = ViewCache(directory, len(source), cfg.teacher_cache.views, end, cfg.run.seed, cfg.data.repeats)
    return views, cached


def cache_directory(cfg: Config) -> Path:
    """Where the cache of a config is."""
    if cfg.teacher_cache is None:
        raise InputError("teacher_cache.dir is not set: teacher_cache.dir=DIR is where the cache is to be")
    return Path(cfg.teacher_cache.dir).expanduser()


def check_possible(cfg: Config, teachers: list[Teacher], source: Source | DenseSource) -> None:
    """InputError where what the cache keeps is not what the run needs."""
    if is_dense(source):
        raise InputError("teacher_cache: a cache is of images, and the data has labels for each pixel")
    assert cfg.teacher_cache is not None
    for key, teacher in zip(cfg.all_teachers, teachers, strict=True):
        on_patches = isinstance(teacher.head, PixelClassifier) or getattr(teacher.head, "with_patches", False)
        if on_patches and cfg.teacher_cache.tokens == "cls":
            raise InputError(f"{key}.head reads patch tokens: teacher_cache.tokens=all keeps them, cls does not")


def cache_facts(
    cfg: Config, teachers: list[Teacher], source: Source | DenseSource, sizes: Sizes
) -> dict[str, str | int]:
    """All that a record depends on, by name; the same facts make the same cache."""
    check_possible(cfg, teachers, source)
    section, augment = cfg.teacher_cache, cfg.data.augment
    assert section is not None
    facts: dict[str, str | int] = {"format": 1}
    for (key, part), teacher, grid in zip(cfg.all_teachers.items(), teachers, sizes.teacher_grids, strict=True):
        facts[f"{key}.name"] = teacher.name
        facts[f"{key}.weights"] = weights_hash(teacher.encoder)  # and the input convention
        facts[f"{key}.image_size"] = teacher.image_size
        facts[f"{key}.precision"] = _computes_in(part, cfg)
        facts[f"{key}.grid"] = f"{grid[0]} x {grid[1]}"
    facts |= {"images": len(source), "names of the images": hash_of_names(source, NAMES), "image size": sizes.crop}
    facts |= {f"data.augment.{name}": str(value) for name, value in augment.model_dump(exclude={"device"}).items()}
    facts |= {"run.seed": cfg.run.seed, "teacher_cache.views": section.views, "teacher_cache.tokens": section.tokens}
    if section.tokens == "all":
        facts["teacher_cache.components"] = section.components
    if augment.erasing:  # its noise is drawn on the device, and kinds of devices draw differently
        facts["device"] = _device(teachers).type
    return facts


def read_identity(directory: Path) -> dict[str, Any] | None:
    """What a cache says of itself; None where there is none."""
    path = directory / IDENTITY
    try:
        data = path.read_bytes()
        _Identity.model_validate_json(data)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): give another teacher_cache.dir") from None
    except ValidationError:
        raise InputError(f"{path} is damaged: delete {directory} and run tools/cache.py again") from None
    return json.loads(data)


def check_facts(identity: dict[str, Any], facts: dict[str, str | int], directory: Path) -> None:
    """InputError, one line, where a cache was made with other facts."""
    made = identity.get("made_with", {})
    other = [name for name in {**made, **facts} if made.get(name) != facts.get(name)]
    # Weights are held in the precision that they are computed in, so another precision alone makes other weights too.
    other = [
        name for name in other if not (name.endswith(".weights") and name[: -len("weights")] + "precision" in other)
    ]
    if other:
        told = "; ".join(f"{name} was {_short(made.get(name))}, is {_short(facts.get(name))}" for name in other)
        raise InputError(f"{directory} is the cache of another run: {told}; give another teacher_cache.dir")


def build_codes(cfg: Config, teachers: list[Teacher], sizes: Sizes, identity: dict[str, Any]) -> list[Code]:
    """The codes of the teachers, with the components that were fitted, on the device."""
    directory, fitted = cache_directory(cfg), {}
    if identity.get("components"):
        path = directory / COMPONENTS
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != identity["components"]:
            raise InputError(f"{path} is damaged: delete {directory} and run tools/cache.py again")
        fitted = {name: tensor.to(_device(teachers)) for name, tensor in load(data).items()}
    codes = []
    for place, (teacher, grid) in enumerate(zip(teachers, sizes.teacher_grids, strict=True)):
        components = Components(*(fitted[f"{place}.{name}"] for name in Components._fields)) if fitted else None
        codes.append(Code(teacher.encoder.embed_dim, grid, components))
    return codes


def _computes_in(section: config.Teacher, cfg: Config) -> str:
    if section.dtype != "auto":
        return section.dtype
    return "float32" if cfg.run.precision == "no" else f"{cfg.run.precision} autocast"


def hash_of_names(source: Source | DenseSource, count: int) -> str:
    """SHA-256 of the names of `count` images, evenly spread over a set; of all, where it has fewer."""
    # Names and their order, not where files are or when they were written: a set may be copied to another machine,
    # and that its pixels are the same is checked view by view.
    digest = hashlib.sha256()
    for index in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)):
        digest.update(source.name(int(index)).encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def _device(teachers: list[Teacher]) -> torch.device:
    return next(teachers[0].encoder.parameters()).device


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
