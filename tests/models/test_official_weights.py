"""Official weights: found where they are, described where they are not, fetched only when asked for."""

import hashlib
import http.server
import socket
import threading
from dataclasses import replace

import pytest

from proteus.config import Config
from proteus.errors import InputError
from proteus.models import create_model
from proteus.models.entries import ENTRIES
from proteus.models.weights import find_official
from proteus.training.preflight import check_inputs


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty folders where torch and the hub keep files, and a machine whose names resolve nowhere but here."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(tmp_path / "no_such"), raising=False)
    monkeypatch.setattr(
        "huggingface_hub.utils._detect_agent._registry", None, raising=False
    )  # asked for once a process
    monkeypatch.setenv("no_proxy", "*")
    asked = []

    def resolve(host, *args, **kwargs):
        if host == "127.0.0.1":
            return original(host, *args, **kwargs)
        asked.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    original = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return tmp_path, asked


def files_under(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vitg14_reg"])
def test_official_weights_that_are_not_there_are_described(caches, name):
    folder, asked = caches
    with pytest.raises(InputError) as caught:
        find_official(name, download=False)
    text = str(caught.value)
    file = f"{name.replace('_reg', '_reg4')}_pretrain.pth"
    assert f"https://dl.fbaipublicfiles.com/dinov2/{name.removesuffix('_reg')}/{file}" in text
    assert str(folder / "torch" / "hub" / "checkpoints" / file) in text
    assert asked == []
    assert files_under(folder) == []


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("dinov2_vits14", "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"),
        ("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors of timm/vit_tiny_patch16_224.augreg_in21k"),
    ],
)
def test_a_teacher_that_is_not_there_is_told_with_its_options(caches, name, file):
    config = Config(
        teacher={"name": name},
        student={"name": "proteus_vitt14"},
        losses={"token": 1},
        data={"kind": "digits"},
        schedule={"steps": 1},
    )
    with pytest.raises(InputError) as caught:
        check_inputs(config, "auto")
    (line,) = caught.value.lines
    assert name in line
    assert file in line
    for hint in ("teacher.checkpoint=PATH", "teacher.download=true", "give its path"):
        assert line.count(hint) == 1, line


def test_looking_for_weights_on_the_hub_asks_nobody(caches):
    folder, asked = caches
    with pytest.raises(InputError, match=r"model\.safetensors of timm/vit_tiny_patch16_224\.augreg_in21k"):
        find_official("timm/vit_tiny_patch16_224.augreg_in21k", download=False)
    assert asked == []
    assert files_under(folder) == []


def test_official_weights_on_the_disk_are_found(caches):
    folder, _ = caches
    path = folder / "torch" / "hub" / "checkpoints" / "dinov2_vitb14_pretrain.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert find_official("dinov2_vitb14", download=False) == path


def test_weights_in_the_hubs_cache_are_found(caches):
    folder, _ = caches
    repository = folder / "hub" / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    path = repository / "snapshots" / ("0" * 40) / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert find_official("timm/vit_tiny_patch16_224", download=False) == path


def test_without_a_network_a_download_is_an_input_error(caches):
    folder, asked = caches
    with pytest.raises(InputError, match=r"https://www.dropbox.com/.*synclr_vit_b_16\.pth.*checkpoint"):
        create_model("synclr_vitb16", pretrained=True)
    assert asked == ["www.dropbox.com"]
    assert files_under(folder) == []


@pytest.mark.parametrize("name", ["proteus_vits14", "dinov2_vits15", "timm/vit_tny_patch16_224", "xyzzy"])
def test_names_without_official_weights_are_input_errors(caches, name):
    _, asked = caches
    with pytest.raises(InputError, match=name):
        find_official(name, download=False)
    assert asked == []


@pytest.fixture
def publisher(monkeypatch):
    """A web server on this machine that publishes 1,000 bytes as DINOv2-S and breaks off after `sends` of them."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"w" * server.sends)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sends = 1000
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/dinov2_vits14_pretrain.pth"
    monkeypatch.setitem(ENTRIES, "dinov2_vits14", replace(ENTRIES["dinov2_vits14"], tag=None, official=url))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_download_lands_where_it_is_looked_for(caches, publisher):
    path = find_official("dinov2_vits14", download=True)
    assert path.read_bytes() == b"w" * 1000
    publisher.shutdown()
    assert find_official("dinov2_vits14", download=False) == path


def test_a_download_that_breaks_off_leaves_no_file(caches, publisher):
    publisher.sends = 400
    with pytest.raises(InputError, match="checkpoint"):
        find_official("dinov2_vits14", download=True)
    assert files_under(caches[0]) == []


def test_a_file_with_another_checksum_is_no_download(caches, publisher, monkeypatch):
    entry = ENTRIES["dinov2_vits14"]
    monkeypatch.setitem(ENTRIES, "dinov2_vits14", replace(entry, sha256=hashlib.sha256(b"other").hexdigest()))
    with pytest.raises(InputError, match=f"its SHA-256 is {hashlib.sha256(b'w' * 1000).hexdigest()}, not"):
        find_official("dinov2_vits14", download=True)
    assert files_under(caches[0]) == []
    monkeypatch.setitem(ENTRIES, "dinov2_vits14", replace(entry, sha256=hashlib.sha256(b"w" * 1000).hexdigest()))
    assert find_official("dinov2_vits14", download=True).is_file()


def test_a_licence_that_is_not_open_is_told_once_and_only_when_weights_are_fetched(
    caches, tmp_path, monkeypatch, capsys
):
    asked = []

    def fetch(repository, file, revision=None):
        asked.append((repository, file))
        return str(tmp_path / file)

    monkeypatch.setattr("proteus.models.weights.hf_hub_download", fetch)
    monkeypatch.setattr("proteus.models.weights._told", set())
    with pytest.raises(InputError, match="fetch them"):
        find_official("mae_vitb16", download=False)
    assert capsys.readouterr() == ("", "")
    for name in ("mae_vitb16", "mae_vitb16", "dinov2_vits14", "timm/vit_base_patch16_dinov3.lvd1689m", "dino_vits16"):
        find_official(name, download=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "mae_vitb16: these weights come under cc-by-nc-4.0; see that your use is allowed",
        "timm/vit_base_patch16_dinov3.lvd1689m: these weights come under dinov3-license; see that your use is allowed",
    ]
    assert asked == [
        ("timm/vit_base_patch16_224.mae", "model.safetensors"),
        ("timm/vit_base_patch16_224.mae", "model.safetensors"),
        ("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors"),
        ("timm/vit_base_patch16_dinov3.lvd1689m", "model.safetensors"),
        ("timm/vit_small_patch16_224.dino", "model.safetensors"),
    ]


@pytest.mark.parametrize("name", ["clip_vitl14", "openclip_vith14_dfn5b", "siglip2_vitb16_224", "dinov3_convnext_tiny"])
def test_weights_are_looked_for_under_the_name_the_hub_has(caches, name):
    """timm's QuickGELU names have their weights under the plain ones."""
    entry = ENTRIES[name]
    repository = f"timm/{entry.timm.replace('quickgelu_', '')}.{entry.tag}"
    with pytest.raises(InputError, match=rf"model\.safetensors of {repository} in the hub's cache"):
        find_official(name, download=False)
