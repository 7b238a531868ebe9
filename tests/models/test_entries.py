"""Every fact of the zoo against what timm builds, on the meta device."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from proteus.models.entries import ENTRIES
from proteus.models.opaque import OpaqueEncoder
from proteus.models.table import build_for_table, main
from proteus.models.vit import VitEncoder
from proteus.models.zoo import build

ACTIVATIONS = {"gelu": "GELU", "quickgelu": "QuickGELU", "gelu_tanh": "GELUTanh", "swiglu": "SiLU"}
GATED = {"SwiGLU", "GluMlp", "SwiGLUPacked"}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_is_what_timm_builds(name):
    entry, encoder = ENTRIES[name], build_for_table(name)
    network = encoder.network
    assert encoder.patch_size == entry.patch_size
    assert encoder.embed_dim == entry.width
    assert (encoder.mean, encoder.std) == (tuple(entry.mean), tuple(entry.std))
    assert next(network.parameters()).is_meta

    blocks = getattr(network, "blocks", None)
    if blocks is None:
        assert (entry.heads, entry.norm_eps, entry.depth) == (None, None, encoder.num_blocks)
    else:
        block = blocks[0]
        assert (len(blocks), block.attn.num_heads) == (entry.depth, entry.heads)
        assert type(block.mlp.act).__name__ == ACTIVATIONS[entry.activation]
        assert (type(block.mlp).__name__ in GATED) == (entry.activation == "swiglu")
        assert block.norm1.eps == entry.norm_eps

    if isinstance(encoder, VitEncoder):
        assert encoder.cls == entry.cls
        assert network.num_prefix_tokens == entry.prefix
        norms = [type(norm) for norm in (network.norm, network.fc_norm)]
        assert norms.count(nn.Identity) == (2 if entry.final_norm == "none" else 1)
        assert encoder.patch_norm == (entry.final_norm != "cls")
        assert (entry.position is None) == (network.pos_embed is None)
        assert entry.position in (None, encoder.position)
    else:
        assert isinstance(encoder, OpaqueEncoder)
        assert (entry.cls, entry.prefix, entry.position) == ("average", 0, None)
        has_norm = not isinstance(encoder._norm(), nn.Identity)
        assert has_norm == (entry.final_norm == "all")

    x = torch.zeros(1, 3, 224, 224, device="meta")
    features = encoder(x)
    side = 224 // entry.patch_size
    assert features.grid == (side, side)
    assert features.patch.shape == (1, side * side, entry.width)
    assert features.cls.shape == (1, entry.width)


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.tag])
def test_an_entry_says_what_its_weights_say(name):
    entry = ENTRIES[name]
    cfg = timm.get_pretrained_cfg(f"{entry.timm}.{entry.tag}")
    assert cfg is not None and cfg.hf_hub_id  # noqa: PT018
    assert (tuple(cfg.mean), tuple(cfg.std)) == (tuple(entry.mean), tuple(entry.std))
    assert cfg.input_size == (3, entry.image_size, entry.image_size)
    assert cfg.license == entry.licence
    assert not (entry.official and cfg.url) or cfg.url == entry.official


def test_the_facts_that_others_get_wrong():
    quick = {name for name, entry in ENTRIES.items() if entry.activation == "quickgelu"}
    assert quick == {
        *("clip_vitb16", "clip_vitl14", "clip_vitl14_336"),
        *("openclip_vitl14_dfn2b", "openclip_vith14_dfn5b"),
    }
    assert ENTRIES["openclip_vitl14_laion2b"].mean == (0.5, 0.5, 0.5)
    assert {name for name, entry in ENTRIES.items() if entry.final_norm == "cls"} == {
        "clip_vitb16",
        "clip_vitl14",
        "clip_vitl14_336",
    }
    no_norm = {name.split("_")[0] for name, entry in ENTRIES.items() if entry.final_norm == "none"}
    assert no_norm == {"cradio", "sam", "pe"}
    assert all(ENTRIES[f"dinov2_vit{size}14"].position.offset == 0.1 for size in "sblg")
    assert all(ENTRIES[f"dinov2_vit{size}14_reg"].position.offset == 0 for size in "sblg")
    with torch.device("meta"):
        student = build("proteus_vits14", arch={"depth": 1})
    assert student.native_grid == (16, 16)
    assert "init_values" in ENTRIES["proteus_vits14"].args


def test_layer_scale_of_students_starts_at_one():
    student = build("proteus_vitt14", arch={"depth": 1, "embed_dim": 48, "num_heads": 3})
    assert (student.network.blocks[0].ls1.gamma == 1).all()


@pytest.mark.slow
def test_the_page_of_models_is_current(capsys):
    main()
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert capsys.readouterr().out == page.read_text(), "run: python -m proteus.models.table > docs/models.md"
