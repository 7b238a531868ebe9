"""Checkpoint files: reading them, bringing their keys to timm's layout, fitting them strictly, writing our own."""

import json
import re
import shutil
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from proteus.errors import InputError
from proteus.models.encoder import Encoder
from proteus.models.zoo import ENTRIES, check_name

State = dict[str, Tensor]

# Where a backbone sits in files that hold more than a backbone; the first that occurs is taken.
PREFIXES = ("module.student.backbone.", "student.backbone.", "teacher.backbone.", "module.", "backbone.", "vit.")


def read_checkpoint(path: str | Path) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of a `.safetensors` or PyTorch file. InputError where there is none to be read."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"weights {str(path)!r} do not exist")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
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


def to_timm_layout(state: State) -> State:
    """Keys of an official DINOv2, Proteus or timm file as timm names them; classifier weights are left out."""
    for prefix in PREFIXES:
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            break
    out = {}
    for key, value in state.items():
        key = re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key)  # DINOv2 saves blocks in chunks for FSDP
        key = key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")
        if not key.startswith("head."):
            out[key] = value
    if "register_tokens" in out:
        # DINOv2 adds a position to the class token and none to the registers; timm has neither, so it is folded in.
        out["reg_token"] = out.pop("register_tokens")
        out["cls_token"] = out["cls_token"] + out["pos_embed"][:, :1]
        out["pos_embed"] = out["pos_embed"][:, 1:]
    return out


def load_into(encoder: Encoder, state: State, source: str) -> Encoder:
    """Load weights in timm's layout, strictly; `mask_token` may be absent. InputError names what does not fit."""
    state = dict(state)
    mask_token = state.pop("mask_token", None)
    own = encoder.vit.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
    problems = [
        f"{kind}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for kind, keys in kinds
        if keys
    ]
    if problems:
        raise InputError(f"{source} does not fit {encoder.name}: {'; '.join(problems)}")
    encoder.vit.load_state_dict(state)
    if mask_token is not None and mask_token.numel() == encoder.embed_dim:
        encoder.mask_token.data.copy_(mask_token.reshape(1, -1))
    return encoder


def save_encoder(encoder: Encoder, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the backbone, and in the metadata what `create_model` and a reader need to know of it.

    The keys are timm's, so `timm.create_model(..., num_classes=0).load_state_dict` takes the file strictly.
    """
    state = {key: value.detach().to("cpu", dtype).contiguous() for key, value in encoder.vit.state_dict().items()}
    facts = {
        "name": encoder.name,
        "arch": encoder.arch,
        "image_size": encoder.image_size,
        "native_grid": encoder.native_grid,
        "position": encoder.position,
        "num_heads": encoder.num_heads,
        "mean": encoder.mean,
        "std": encoder.std,
        "norm_eps": encoder.vit.norm.eps if hasattr(encoder.vit.norm, "eps") else None,
    }
    save_file(state, path, metadata={"format": "pt", "proteus": json.dumps(facts)})


def metadata_facts(metadata: dict[str, str]) -> dict[str, Any]:
    """What `save_encoder` wrote of a network; empty for other files."""
    return json.loads(metadata.get("proteus", "{}"))


def find_official(name: str, download: bool) -> Path:
    """The official weight file of a zoo name on this disk; fetched where `download` says so and it is not there.

    InputError says which file is missing, where it is looked for and what to do.
    """
    check_name(name)
    if name.startswith("timm/"):
        return _find_on_hub(name, download)
    url = ENTRIES[name].url
    if url is None:
        raise InputError(f"{name} has no published weights: give a checkpoint")
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    if path.is_file():
        return path
    if not download:
        raise InputError(f"{name}: its weights are not at {path}; fetch {url}")
    try:
        _fetch(url, path)
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f"{name}: {url} cannot be fetched ({error}); get it elsewhere and give it as checkpoint"
        ) from None
    return path


def _fetch(url: str, path: Path) -> None:
    """Download to a temporary name; rename when all of it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pending = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        with urllib.request.urlopen(url) as response, open(pending, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm.wrapattr(file, "write", total=size, desc=path.name) as out:
                shutil.copyfileobj(response, out)
        if size and pending.stat().st_size != size:
            raise OSError(f"the connection broke off after {pending.stat().st_size} of {size} bytes")
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)


def _find_on_hub(name: str, download: bool) -> Path:
    cfg = timm.get_pretrained_cfg(name.removeprefix("timm/"))
    if cfg is None or not cfg.hf_hub_id:
        raise InputError(f"{name} has no published weights on the hub: give a checkpoint")
    architecture, _, tag = name.removeprefix("timm/").partition(".")
    repo = cfg.hf_hub_id if cfg.hf_hub_id != "timm/" else f"timm/{architecture}.{tag or cfg.tag}"
    file = cfg.hf_hub_filename or "model.safetensors"
    # Not hf_hub_download(local_files_only=True), which still asks the hub who is calling.
    cached = try_to_load_from_cache(repo, file, cache_dir=constants.HF_HUB_CACHE)
    if isinstance(cached, str):
        return Path(cached)
    if not download:
        raise InputError(f"{name}: {file} of {repo} is not in the hub's cache; fetch it")
    try:
        return Path(hf_hub_download(repo, file))
    except Exception as error:  # the hub's errors share no base class with those of its transport
        raise InputError(
            f"{name}: {file} of {repo} cannot be fetched ({type(error).__name__}); "
            "get it elsewhere and give it as checkpoint"
        ) from None
