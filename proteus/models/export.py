"""A trained encoder for other libraries: timm, the Hugging Face hub, ONNX, torch.export.

What is written is read back by the library it is for and compared with the encoder, before anyone sees it.
"""

import contextlib
import importlib.util
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from proteus.errors import InputError, RunError, nearest
from proteus.models.attention import use_attention
from proteus.models.encoder import Encoder
from proteus.models.vit import VitEncoder
from proteus.models.weights import save_encoder
from proteus.models.zoo import HUB_PREFIX, TIMM_PREFIX, in_timm, is_own

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ONNX_LIMIT = 2**31  # bytes: of one protobuf message

NORMALISE = """mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
x = (images - mean) / std  # images: [B, 3, H, W], RGB in [0, 1]"""

Outputs = dict[str, Tensor]


class Difference(NamedTuple):
    """How far what was written is from the encoder: the largest deviation, and the largest value of the encoder."""

    absolute: float
    scale: float


def check_format(name: str) -> None:
    """InputError where there is no such format, or packages that it needs are not installed."""
    if name not in FORMATS:
        raise InputError(f"unknown format {name!r}{nearest(name, FORMATS)}")
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if name == "onnx" and missing:
        raise InputError(f'onnx needs {", ".join(missing)}: pip install "proteus-distill[export]"')


@torch.no_grad()
def export(encoder: Encoder, name: str, path: Path) -> Difference:
    """Write an encoder in a format of `FORMATS`, for its image size, and compare; it moves to that size itself.

    InputError where the encoder does not suit the format. RunError where the network cannot be written, or where what
    was written does not compute what the encoder does; what lies at `path` then is of no use.
    """
    format = FORMATS[name]
    if is_own(encoder.name) and name in ("timm", "hf"):
        raise InputError(f"{name}: timm cannot build {encoder.name}, a network of your own: export to onnx or torch")
    try:
        encoder.grid_of(*_size(encoder))
    except ValueError as error:
        raise InputError(f"image size: {error}") from None
    encoder.eval()
    use_attention(encoder.network, "sdpa")  # xformers' kernels are known to no other library
    images = torch.rand(3, 3, *_size(encoder), generator=torch.Generator().manual_seed(0))
    batches = images[:1], images
    expected = [format.expect(encoder, batch) for batch in batches]
    if isinstance(encoder, VitEncoder):
        encoder.move_to_grid(encoder.grid_of(*_size(encoder)))  # then other libraries have nothing to resize
    try:
        with _quiet():
            format.write(encoder, path)
            run = format.read(encoder, path)
            found = [run(batch) for batch in batches]
    except (InputError, OSError):
        raise
    except Exception as error:  # an exporter may meet anything in a network
        text = " ".join(str(error).split())[:300]
        raise RunError(f"{encoder.name} cannot be exported to {name}: {type(error).__name__}: {text}") from error
    pairs = [(one[key], other[key]) for one, other in zip(found, expected, strict=True) for key in other]
    # torch's maximum, unlike Python's, is NaN where any number is, and a NaN fails the comparison below.
    difference = Difference(
        torch.stack([(one - other).abs().max() for one, other in pairs]).max().item(),
        torch.stack([other.abs().max() for _, other in pairs]).max().item(),
    )
    if not difference.absolute <= format.tolerance * difference.scale:
        raise RunError(
            f"{name}: what was written is off by {difference.absolute:.1e} in features up to {difference.scale:.1e}, "
            f"more than {format.tolerance:.0e} of that, and was removed"
        )
    return difference


def _size(encoder: Encoder) -> tuple[int, int]:
    size = encoder.image_size
    return (size, size) if isinstance(size, int) else size


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters log of their own insides."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


# timm and the hub


class TimmRecipe(NamedTuple):
    """What `timm.create_model` builds a network from. `norm_eps` is that of its norms, where it is not timm's own."""

    architecture: str
    args: dict[str, Any]
    norm_eps: float | None


def timm_recipe(encoder: Encoder) -> TimmRecipe:
    """The recipe of an encoder at its image size."""
    name = encoder.name
    architecture, defaults, _ = in_timm(name)
    architecture = architecture.partition(".")[0]  # a tag names other weights than these
    args = defaults | {key: value for key, value in encoder.arch.items() if value is not None}
    if not all(key.isidentifier() for key in args):  # they come from a file, and become lines of Python
        raise InputError(f"{name}: {', '.join(map(repr, args))} are not all names of arguments")
    norm_eps = args.pop("norm_eps", None)
    for ours in ("drop_path", "attention", "patch_norm", "num_classes", "img_size"):
        args.pop(ours, None)
    if isinstance(encoder, VitEncoder) or encoder.network.pretrained_cfg.get("fixed_input_size"):
        args["img_size"] = encoder.image_size
    if norm_eps is not None:
        with torch.device("meta"):
            default = timm.create_model(architecture, num_classes=0, **args)
        if _epsilons(default) == _epsilons(encoder.network):
            norm_eps = None
    return TimmRecipe(architecture, args, norm_eps)


def _epsilons(network: nn.Module) -> list[float]:
    return [module.eps for module in network.modules() if isinstance(module, nn.LayerNorm)]


def pretrained_cfg(encoder: Encoder) -> dict[str, Any]:
    """What timm is to know of the weights; from it `timm.data` makes the transform that the encoder is meant for."""
    return {
        "custom_load": False,
        "num_classes": 0,
        "input_size": [3, *_size(encoder)],
        "fixed_input_size": "img_size" in timm_recipe(encoder).args,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": list(encoder.mean),
        "std": list(encoder.std),
    }


def timm_code(encoder: Encoder, source: str) -> str:
    """Python that computes `cls` and `patch`, or of a network that is no plain vision transformer `features`, in timm.

    source: where the weights are: a file, `hf-hub:owner/name` or `local-dir:folder`.
    """
    if source.startswith((HUB_PREFIX, "local-dir:")):
        model = f"model = timm.create_model({source!r}, pretrained=True).eval()"
    else:
        architecture, args, norm_eps = timm_recipe(encoder)
        options = [f"{key}={value!r}" for key, value in args.items()]
        if norm_eps is not None:
            options.append(f"norm_layer=partial(torch.nn.LayerNorm, eps={norm_eps!r})")
        weights = "".join(f"        {key}={value!r},\n" for key, value in pretrained_cfg(encoder).items())
        network = ", ".join([repr(architecture), "num_classes=0", *options])
        overlay = f"    pretrained_cfg_overlay=dict(\n        file={source!r},\n{weights}    ),\n"
        model = f"model = timm.create_model(\n    {network},\n    pretrained=True,\n{overlay}).eval()"
    imports = "from functools import partial\n" * ("partial(" in model) + "import timm\nimport torch\n"
    return f"{imports}\n{model}\n{NORMALISE}\n{_reading(encoder)}\n"


def _reading(encoder: Encoder) -> str:
    """The lines that make features of `model` and `x`."""
    if not isinstance(encoder, VitEncoder):
        return "features = model.forward_features(x)  # the network's own output; Proteus makes cls and patch of it"
    network, prefix = encoder.network, encoder.network.num_prefix_tokens
    # Networks pooled by averaging keep their final norm for after the pool; Features get it token by token.
    norm = "model.fc_norm({})" if isinstance(network.norm, nn.Identity) else "{}"
    cls = norm.format("tokens[:, 0]") if encoder.cls == "token" else "model.forward_head(tokens, pre_logits=True)"
    patch = norm.format(f"tokens[:, {prefix}:]")
    if not encoder.patch_norm:
        patch += "  # after the final norm, which Proteus gives to cls alone, as CLIP does"
    return f"tokens = model.forward_features(x)\ncls = {cls}\npatch = {patch}"


def _expect_timm(encoder: Encoder, images: Tensor) -> Outputs:
    if not isinstance(encoder, VitEncoder):
        return {"features": encoder.network.forward_features(encoder.normalise(images))}
    features = encoder(images)
    # timm gives every token the final norm, also where (OpenAI's CLIP) the class token alone is meant to have it.
    patch = features.patch if encoder.patch_norm else encoder.network.norm(features.patch)
    return {"cls": features.cls, "patch": patch}


def _write_timm(encoder: Encoder, path: Path) -> None:
    recipe = timm_recipe(encoder)
    if encoder.name.startswith(HUB_PREFIX):
        # Whoever loads the file need not have the repository that the student was built from.
        encoder.name = TIMM_PREFIX + recipe.architecture
        arch = {key: value for key, value in recipe.args.items() if key != "img_size"}
        kept = {key: value for key, value in encoder.arch.items() if key in ("norm_eps", "patch_norm", "drop_path")}
        encoder.arch = arch | kept
    save_encoder(encoder, path)


def _read_timm(encoder: Encoder, path: Path) -> Callable[[Tensor], Outputs]:
    return partial(_run_code, timm_code(encoder, str(path)))


def _run_code(code: str, images: Tensor) -> Outputs:
    # What users are told to run is what is checked.
    names: dict[str, Any] = {"images": images}
    exec(code, names)
    return names


def _write_hub(encoder: Encoder, folder: Path) -> None:
    architecture, args, norm_eps = timm_recipe(encoder)
    if norm_eps is not None:
        raise InputError(
            f"hf: config.json has no place for norm_eps={norm_eps:g}, which is not {architecture}'s own: export to timm"
        )
    folder.mkdir()
    _write_timm(encoder, folder / "model.safetensors")
    network = encoder.network
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": network.num_features,
        "model_args": args,
        "pretrained_cfg": {
            **pretrained_cfg(encoder),
            "first_conv": network.pretrained_cfg.get("first_conv"),
            "classifier": network.pretrained_cfg.get("classifier"),
        },
    }
    if isinstance(pool := getattr(network, "global_pool", None), str):
        config["global_pool"] = pool
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_hub(encoder: Encoder, folder: Path) -> Callable[[Tensor], Outputs]:
    return partial(_run_code, timm_code(encoder, f"local-dir:{folder}"))


# ONNX and torch.export


class _Outputs(nn.Module):
    """Images [B, 3, H, W] in [0, 1] to `cls` and `patch`, as a module of tensors alone."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Outputs:
        features = self.encoder(images)
        return {"cls": features.cls, "patch": features.patch}


def _expect(encoder: Encoder, images: Tensor) -> Outputs:
    return _Outputs(encoder)(images)


def _example(encoder: Encoder) -> tuple[Tensor]:
    return (torch.zeros(2, 3, *_size(encoder)),)  # one image would be taken for a number that never changes


def _write_onnx(encoder: Encoder, path: Path) -> None:
    size = sum(value.nbytes for value in encoder.network.state_dict().values())
    if size >= ONNX_LIMIT:
        raise InputError(f"onnx: a file holds at most 2 GB, and these weights are {size / 1e9:.1f} GB: export to torch")
    torch.onnx.export(
        _Outputs(encoder).eval(),
        _example(encoder),
        path,
        dynamo=True,
        input_names=["images"],
        output_names=["cls", "patch"],
        dynamic_shapes={"images": {0: "batch"}},
        external_data=False,
        verbose=False,
    )


def _read_onnx(encoder: Encoder, path: Path) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Outputs:
        outputs = session.run(["cls", "patch"], {"images": images.numpy()})
        return dict(zip(("cls", "patch"), map(torch.from_numpy, outputs), strict=True))

    return run


def _write_torch(encoder: Encoder, path: Path) -> None:
    shapes = {"images": {0: torch.export.Dim("batch")}}
    torch.export.save(torch.export.export(_Outputs(encoder).eval(), _example(encoder), dynamic_shapes=shapes), path)


def _read_torch(encoder: Encoder, path: Path) -> Callable[[Tensor], Outputs]:
    return torch.export.load(path).module()


class Format(NamedTuple):
    """A way to write an encoder.

    suffix:    of the file; a folder has none.
    tolerance: the largest deviation allowed, as a share of the largest feature. timm computes the same operations in
               the same order; other runtimes order them as they like.
    expect:    what the encoder says of images, under the names the reader gives.
    write:     writes the encoder to a path.
    read:      from the path, a function of images; it has the encoder to know what to ask for, not to compute with.
    """

    suffix: str
    tolerance: float
    expect: Callable[[Encoder, Tensor], Outputs]
    write: Callable[[Encoder, Path], None]
    read: Callable[[Encoder, Path], Callable[[Tensor], Outputs]]


FORMATS = {
    "timm": Format(".safetensors", 1e-6, _expect_timm, _write_timm, _read_timm),
    "hf": Format("", 1e-6, _expect_timm, _write_hub, _read_hub),
    "onnx": Format(".onnx", 1e-4, _expect, _write_onnx, _read_onnx),
    "torch": Format(".pt2", 1e-5, _expect, _write_torch, _read_torch),
}
