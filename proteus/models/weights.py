"""Checkpoint files: reading them, fitting them strictly, writing our own, finding the official ones."""

import contextlib
import hashlib
import io
import json
import shutil
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from proteus.errors import InputError
from proteus.models.encoder import Encoder
from proteus.models.entries import ENTRIES, Entry
from proteus.models.facts import Facts
from proteus.models.layouts import State, layout_of, to_timm_layout
from proteus.models.torchscript import is_torchscript, read_torchscript
from proteus.models.vit import VitEncoder
from proteus.models.zoo import HUB_PREFIX, TIMM_PREFIX, check_name, entry_of, hub_repository, is_own

OPEN_LICENCES = ("apache-2.0", "mit", "bsd-3-clause")


def read_checkpoint(path: str | Path) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of a `.safetensors`, PyTorch or TorchScript file. InputError where none can be read."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {str(path)!r} do not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        if is_torchscript(path):
            return read_torchscript(path), {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a reader of a broken file may raise anything
        # Without torch's advice to read it unsafely, which is not ours to give.
        reason = f": {' '.join(str(error).split())[:200]}" if str(error) and "weights_only" not in str(error) else ""
        raise InputError(f"weights {str(path)!r} cannot be read as a state dict{reason}") from None
    for wrapper in ("model", "state_dict", "teacher"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise InputError(f"weights {str(path)!r} hold no state dict")
    return {key: value for key, value in loaded.items() if isinstance(value, Tensor)}, {}


def load_into(encoder: Encoder, state: State, source: str) -> Encoder:
    """Load weights in timm's or their publisher's layout, strictly; InputError names what does not fit.

    Left out are a classifier and, where it is not the encoder's, `mask_token`; both may be absent.
    """
    own = encoder.network.state_dict()
    layout = "timm" if is_own(encoder.name) else layout_of(state)
    fitted = _backbone(encoder, state if is_own(encoder.name) else to_timm_layout(state))
    mask_token = fitted.pop("mask_token", None) if "mask_token" not in own else None
    biases = [key for key in fitted if layout == "dinov3" and key.endswith((".q_bias", ".v_bias")) and key not in own]
    placeless = [key for key in biases if torch.count_nonzero(fitted[key])]  # timm would drop them, as it does zeros
    fitted = {key: value for key, value in fitted.items() if key not in biases or key in placeless}
    if fitted.keys() != own.keys() and not placeless:
        converted = _convert_by_timm(encoder, state)
        fitted = converted if converted is not None and converted.keys() == own.keys() else fitted
    problems = _differences(fitted, own)
    if problems:
        raise InputError(f"{source} does not fit {encoder.name}: {'; '.join(problems)}")
    encoder.network.load_state_dict(fitted)
    if mask_token is not None and mask_token.numel() == encoder.mask_token.numel():
        encoder.mask_token.data.copy_(mask_token.reshape(1, -1))
    return encoder


def _backbone(encoder: Encoder, state: State) -> State:
    """A state without its classifier, whose names timm knows."""
    cfg = getattr(encoder.network, "pretrained_cfg", None) or {}
    classifiers = cfg.get("classifier") or ()
    names = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    names += ("head",) if isinstance(encoder, VitEncoder) else ()
    return {key: value for key, value in state.items() if not key.startswith(tuple(f"{name}." for name in names))}


def _convert_by_timm(encoder: Encoder, state: State) -> State | None:
    """A state of another publisher (EVA, PE, RADIO, SAM, ...) as timm converts it; None where it does not."""
    module = sys.modules[type(encoder.network).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    if convert is None or not module.__name__.startswith("timm."):
        return None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints
            return _backbone(encoder, convert(dict(state), encoder.network))
    except Exception:  # it is not written for files of any kind
        return None


def _differences(state: State, own: State) -> list[str]:
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    return [
        f"{kind}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if keys
    ]


def save_encoder(encoder: Encoder, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the backbone, and in the metadata what `create_model` and a reader need to know of it.

    The keys are timm's, so `timm.create_model(..., num_classes=0).load_state_dict` takes the file strictly.
    """
    own = encoder.network.state_dict()
    # Copies, because networks may tie weights, which the format does not know.
    state = {key: value.detach().to("cpu", dtype, copy=True).contiguous() for key, value in own.items()}
    written = save(state, metadata={"format": "pt", "proteus": _facts(encoder).model_dump_json()})
    # Not save_file, whose files only their owner may read.
    Path(path).write_bytes(_with_sorted_metadata(written))


def weights_hash(encoder: Encoder) -> str:
    """SHA-256 over the network's weights and all that decides what it makes of an image, its statistics included."""
    digest = hashlib.sha256(_facts(encoder).model_dump_json().encode())
    for key, value in sorted(encoder.network.state_dict().items()):
        value = value.full_tensor() if hasattr(value, "full_tensor") else value  # of a sharded encoder
        value = value.detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _facts(encoder: Encoder) -> Facts:
    facts = Facts.model_construct(
        name=encoder.name, arch=encoder.arch, image_size=encoder.image_size, mean=encoder.mean, std=encoder.std
    )
    if isinstance(encoder, VitEncoder):
        facts.native_grid, facts.position = encoder.native_grid, encoder.position
        facts.num_heads, facts.norm_eps = encoder.num_heads, encoder.norm_eps
        facts.patch_norm = encoder.patch_norm
    return facts


def _with_sorted_metadata(file: bytes) -> bytes:
    """A safetensors file whose bytes depend on its contents alone; the library orders the metadata at random."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + file[8 + length :]


def find_official(name: str, download: bool) -> Path:
    """The published weight file of a name on this disk; fetched where `download` says so and it is not there.

    It is looked for in torch's hub cache (the publisher's own file) and in the Hugging Face hub's (timm's copy).
    InputError says which file is missing, where it is looked for and what to do.
    """
    check_name(name)
    entry = entry_of(name)
    repository = _repository(name, entry)
    url = entry.official if entry else None
    official = Path(torch.hub.get_dir(), "checkpoints", _file_name(url)) if url else None
    if official is not None and official.is_file():
        return official
    if repository is not None:
        cached = _in_hub_cache(repository)
        if cached is not None:
            return cached
    places = [f"{url} at {official}"] if url else []
    places += [f"{repository.file} of {repository.id} in the hub's cache"] if repository else []
    if not places:
        raise InputError(f"{name} has no published weights: give a checkpoint")
    if not download:
        raise InputError(f"{name}: its weights are not on this disk ({', nor '.join(places)}); fetch them")
    _tell_licence(name, entry)
    if repository is not None:
        return _fetch_from_hub(name, repository)
    assert official is not None and url is not None and entry is not None  # noqa: PT018 - the other place there is
    try:
        _fetch(url, official, entry.sha256)
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f"{name}: {url} cannot be fetched ({error}); get it elsewhere and give it as checkpoint"
        ) from None
    return official


class _Repository(NamedTuple):
    id: str
    file: str = "model.safetensors"
    revision: str | None = None


def _repository(name: str, entry: Entry | None) -> _Repository | None:
    """Where on the hub timm's copy of a network's weights is; None where it is not."""
    if name.startswith(HUB_PREFIX):
        identity, revision = hub_repository(name)
        return _Repository(identity, revision=revision)
    if is_own(name) or (name in ENTRIES and entry and entry.tag is None):
        return None
    cfg = timm.get_pretrained_cfg(f"{entry.timm}.{entry.tag}" if entry else name.removeprefix(TIMM_PREFIX))
    if cfg is None or not cfg.hf_hub_id:
        return None
    return _Repository(cfg.hf_hub_id, cfg.hf_hub_filename or "model.safetensors")


def _file_name(url: str) -> str:
    return url.partition("?")[0].rsplit("/", 1)[-1]


def _tell_licence(name: str, entry: Entry | None) -> None:
    cfg = timm.get_pretrained_cfg(name.removeprefix(TIMM_PREFIX)) if name.startswith(TIMM_PREFIX) else None
    licence = entry.licence if entry else cfg.license if cfg else None
    if licence and licence not in OPEN_LICENCES and name not in _told:
        _told.add(name)
        print(f"{name}: these weights come under {licence}; see that your use is allowed", file=sys.stderr)


_told: set[str] = set()


def _fetch(url: str, path: Path, sha256: str | None = None) -> None:
    """Download to a temporary name; rename when all of it is there and, if the checksum is known, right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with urllib.request.urlopen(url) as response, open(pending, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(file, "write", total=size, desc=path.name) as out:
                shutil.copyfileobj(response, out)
        if size and pending.stat().st_size != size:
            raise OSError(f"the connection broke off after {pending.stat().st_size} of {size} bytes")
        if sha256:
            with open(pending, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise OSError(f"its SHA-256 is {found}, not {sha256}")
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)


def _in_hub_cache(repository: _Repository) -> Path | None:
    # Not hf_hub_download(local_files_only=True), which still asks the hub who is calling.
    cached = try_to_load_from_cache(
        repository.id, repository.file, cache_dir=constants.HF_HUB_CACHE, revision=repository.revision
    )
    return Path(cached) if isinstance(cached, str) else None


def _fetch_from_hub(name: str, repository: _Repository) -> Path:
    files = ["config.json", repository.file] if name.startswith(HUB_PREFIX) else [repository.file]
    try:
        return [Path(hf_hub_download(repository.id, file, revision=repository.revision)) for file in files][-1]
    except Exception as error:  # the hub's errors share no base class with those of its transport
        raise InputError(
            f"{name}: {repository.file} of {repository.id} cannot be fetched ({type(error).__name__}); "
            "get it elsewhere and give it as checkpoint"
        ) from None
