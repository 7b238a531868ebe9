"""The attention kernels give timm's numbers, and xformers is asked only where it can answer.

xformers has no kernel for a CPU. There its place is taken by softmax attention written out in xformers' layout, so that
what leads to the kernel and back is tested everywhere; the kernels themselves are tested on a GPU.
"""

import copy
import importlib.util
import logging
import pickle
import sys

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope, use_fused_attn
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.eva import EvaAttention
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.speed import attention as benchmark
from proteus.errors import InputError
from proteus.models import attention
from proteus.models.attention import attend, check_attention, use_attention

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {}, Attention),
    "vit with qk norm": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}, Attention),
    "c-radio": ("vit_base_patch16_radio_v3", {}, Attention),
    "dinov3": ("vit_small_patch16_dinov3", {}, EvaAttention),
    "dinov3 with qkv bias": ("vit_small_patch16_dinov3_qkvb", {}, EvaAttention),
    "eva02, fused qkv": ("eva02_tiny_patch14_224", {}, EvaAttention),
    "eva02, unfused qkv": ("eva02_base_patch14_224", {}, EvaAttention),
    "pe": ("vit_pe_core_tiny_patch16_384", {}, AttentionRope),
    "rope by block": ("vit_small_patch16_rope_mixed_224", {}, AttentionRope),
}
each_network = pytest.mark.parametrize(("name", "options", "kind"), NETWORKS.values(), ids=NETWORKS.keys())


def randomise(module: nn.Module) -> nn.Module:
    """Weights that let the attention be seen; timm scales some branches to nearly nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def build(name="vit_tiny_patch16_224", **options):
    size = 28 if "patch14" in name else 32
    return randomise(timm.create_model(name, img_size=size, num_classes=0, **TINY, **options).eval())


def images(network, batch=2):
    size = 28 if network.patch_embed.patch_size[0] == 14 else 32
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def outputs_and_gradients(network, x):
    network.zero_grad()
    x = x.clone().requires_grad_()
    out = network.forward_features(x)
    out.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "images": x.grad, **gradients}


def swapped(network):
    return [module for module in network.modules() if type(module) in attention._CHOSEN.values()]


class Kernel:
    """Softmax attention in xformers' layout [B, N, H, K]; remembers what it was called with."""

    def __init__(self):
        self.calls, self.probes = [], []

    def __call__(self, q, k, v):
        if q.shape[2] != k.shape[2] or len({x.dtype for x in (q, k, v)}) > 1:
            raise ValueError("xformers takes equal heads and one dtype")
        (self.probes if q.shape[:3] == (1, 8, 1) else self.calls).append(q)
        weights = torch.einsum("bnhk,bmhk->bhnm", q * q.shape[-1] ** -0.5, k).softmax(dim=-1)
        return torch.einsum("bhnm,bmhk->bnhk", weights, v)


@pytest.fixture(autouse=True)
def forget():
    """What was found out about xformers belongs to one test."""
    caches = (attention._refusal, attention._kernel)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def kernel(monkeypatch, forget):
    """A CPU that xformers has a kernel for."""
    kernel = Kernel()
    monkeypatch.setattr(attention, "_DEVICE", "cpu")
    monkeypatch.setattr(attention, "_kernel", lambda: kernel)
    return kernel


# ------------------------------------------------------------------------------------------------- timm's numbers


@each_network
def test_outputs_and_gradients_are_those_of_timm(kernel, name, options, kind):
    network = build(name, **options)
    assert {type(block.attn) for block in network.blocks} == {kind}
    x = images(network)
    stock = outputs_and_gradients(network, x)
    use_attention(network, "xformers")
    torch.testing.assert_close(outputs_and_gradients(network, x), stock, atol=2e-5, rtol=1e-4)
    assert len(kernel.calls) == len(network.blocks) == 2
    assert stock["out"].std() > 0.1


MODULES = {
    "gate": lambda: Attention(32, 2, gated=True, norm_layer=nn.LayerNorm, scale_norm=True, attn_head_dim=8),
    "rope, grouped queries": lambda: AttentionRope(32, 4, num_kv_heads=2, qkv_fused=False, gated=True),
    "rope, half rotated": lambda: AttentionRope(32, 2, rotate_half=True, qk_norm=True, norm_layer=nn.LayerNorm),
    "eva, bias apart": lambda: EvaAttention(32, 2, qkv_bias_separate=True, scale_norm=False),
    "eva, unfused": lambda: EvaAttention(32, 2, qkv_fused=False, gated=True, qk_norm=True, norm_layer=nn.LayerNorm),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES.keys())
def test_a_modules_own_features_are_kept(kernel, make):
    module = randomise(make())
    x, rope = torch.randn(2, 6, 32), torch.randn(5, 2 * module.head_dim)
    arguments = (x,) if type(module) is Attention else (x, rope)  # one prefix token has no position
    stock = module(*arguments)
    use_attention(module, "xformers")
    torch.testing.assert_close(module(*arguments), stock, atol=1e-5, rtol=1e-5)
    assert len(kernel.calls) == 1
    assert stock.std() > 0.01


def test_gradient_checkpointing_gives_the_same_gradients(kernel):
    network = build("vit_small_patch16_dinov3")
    x = images(network)
    use_attention(network, "xformers")
    plain = outputs_and_gradients(network, x)
    attention._refusal.cache_clear()  # so that the trial happens within a checkpointed block
    network.set_grad_checkpointing()
    torch.testing.assert_close(outputs_and_gradients(network, x), plain, atol=0, rtol=0)
    assert len(kernel.calls) == 2 + 4  # forward; forward and once more
    assert len(kernel.probes) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_trial_may_happen_within_a_checkpoint(kernel, reentrant):
    module = randomise(Attention(32, 2))
    use_attention(module, "auto")
    x = torch.randn(2, 6, 32, requires_grad=True)
    checkpoint(module, x, use_reentrant=reentrant).square().sum().backward()
    assert len(kernel.calls) == 2
    (direct,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(x.grad, direct)


@pytest.mark.parametrize("norms", [False, True])
@torch.no_grad()
def test_under_autocast_the_kernel_sees_one_low_precision(kernel, norms):
    network = build(qk_norm=norms)
    if norms:
        for block in network.blocks:  # a norm that answers in float32, as on CUDA
            block.attn.q_norm.register_forward_hook(lambda module, args, out: out.float())
    x = images(network)
    exact = network(x)
    with torch.autocast("cpu", torch.bfloat16):
        stock = network(x)
        use_attention(network, "xformers")
        out = network(x)
    assert {call.dtype for call in kernel.calls} == {torch.bfloat16}
    assert out.dtype == stock.dtype
    # Both are bfloat16's distance from float32; the reference kernel rounds its softmax too.
    assert (out - exact).norm() < 3 * (stock - exact).norm() + 1e-2 * exact.norm()


def test_without_autocast_the_precision_is_that_of_the_values(kernel):
    q, k, v = torch.randn(3, 1, 2, 5, 16).unbind()
    assert attend("xformers", q.float(), k.float(), v.double()).dtype == torch.float64
    assert attend("auto", q.float(), k.float(), v.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        attend("xformers", q.double(), k.double(), v.double())
        assert kernel.calls[-1].dtype == torch.float64
        attend("xformers", q, k, v)
        assert kernel.calls[-1].dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------- the exchange


@each_network
def test_the_state_dict_is_untouched(name, options, kind):
    network = build(name, **options)
    before = copy.deepcopy(network.state_dict())
    for choice in ("auto", "xformers", "xformers", "sdpa"):
        use_attention(network, choice)
        after = network.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert len(swapped(network)) == (0 if choice == "sdpa" else 2)
    assert {type(block.attn) for block in network.blocks} == {kind}


def test_weights_can_be_loaded_after_the_choice(kernel):
    source, target = build(), timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, **TINY).eval()
    use_attention(target, "xformers")
    target.load_state_dict(source.state_dict())
    torch.testing.assert_close(target(images(source)), source(images(source)), atol=1e-5, rtol=1e-5)
    assert len(kernel.calls) == 2


def test_the_choice_can_be_changed(kernel):
    network = build()
    x = images(network)
    for choice, calls in (("xformers", 2), ("sdpa", 2), ("auto", 4), ("auto", 6), ("sdpa", 6)):
        use_attention(network, choice)
        network(x)
        assert len(kernel.calls) == calls


def test_a_copy_keeps_the_choice(kernel):
    network = build()
    use_attention(network, "xformers")
    for duplicate in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        kernel.calls.clear()
        duplicate(images(network))
        assert len(kernel.calls) == 2


class Own(Attention):
    """Someone's attention: timm's, but what it gives has another sign."""

    def forward(self, x, attn_mask=None, is_causal=False):
        return -super().forward(x, attn_mask, is_causal)


def test_other_attention_is_left_alone(kernel):
    own, pool = Own(32, 2), AttentionPoolLatent(32, num_heads=2)
    use_attention(nn.Sequential(own, pool), "xformers")
    assert type(own) is Own
    assert type(pool) is AttentionPoolLatent
    own(torch.randn(1, 4, 32))
    pool(torch.randn(1, 4, 32))
    assert not kernel.calls


def test_every_choice_uses_a_fused_kernel(kernel):
    for choice in ("auto", "xformers", "sdpa"):
        module = Attention(32, 2)
        module.fused_attn = False
        use_attention(module, choice)
        assert module.fused_attn
    assert use_fused_attn()  # of timm, for all networks: not ours to set


def test_a_direct_call_follows_the_choice(kernel):
    q, k, v = torch.randn(3, 1, 2, 5, 16).requires_grad_().unbind()
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    for choice, calls in (("sdpa", 0), ("auto", 1), ("xformers", 2)):
        torch.testing.assert_close(attend(choice, q, k, v), expected)
        assert len(kernel.calls) == calls
    with torch.no_grad():
        torch.testing.assert_close(attend("xformers", q, k, v), expected)
    assert [probe.requires_grad for probe in kernel.probes] == [True, False]


# ----------------------------------------------------------------------------------- what is not plain attention


def causal(module, x):
    return module(x, is_causal=True)


def masked(module, x):
    return module(x, attn_mask=torch.rand(6, 6, generator=torch.Generator().manual_seed(0)) < 0.7)


def dropping(module, x):
    torch.manual_seed(0)
    return module.train()(x)


@pytest.mark.parametrize("call", [causal, masked, dropping])
@torch.no_grad()
def test_what_is_not_plain_is_computed_by_torch(kernel, call):
    module = randomise(Attention(32, 2, attn_drop=0.5)).eval()
    x = torch.randn(2, 6, 32)
    stock, plain = call(module, x), module.eval()(x)
    use_attention(module, "xformers")
    torch.testing.assert_close(call(module, x), stock, atol=0, rtol=0)
    assert not kernel.calls
    assert (stock - plain).abs().max() > 1e-3
    module.eval()(x)  # dropout that is not active is plain
    assert len(kernel.calls) == 1


def test_an_option_we_do_not_know_is_computed_by_torch(kernel):
    q, k, v = torch.randn(3, 1, 2, 5, 16).unbind()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(attend("xformers", q, k, v, scale=0.5), expected, atol=0, rtol=0)
    assert not kernel.calls


def test_a_trace_holds_torchs_kernel(kernel):
    module = randomise(Attention(32, 2)).eval()
    x = torch.randn(2, 6, 32)
    expected = module(x)
    use_attention(module, "auto")
    traced = torch.jit.trace(module, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected)
    assert not kernel.calls
    assert "scaled_dot_product_attention" in str(traced.inlined_graph)


def test_a_compiled_network_holds_torchs_kernel_in_one_graph(kernel):
    module = randomise(EvaAttention(32, 2, scale_norm=False)).eval()
    x = torch.randn(2, 6, 32)
    expected = module(x)
    use_attention(module, "auto")
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
    assert not kernel.calls


def test_deterministic_runs_keep_torchs_kernel(kernel, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    q = torch.randn(1, 2, 5, 16)
    attend("auto", q, q, q)
    assert not kernel.calls
    attend("xformers", q, q, q)
    assert len(kernel.calls) == 1


# ------------------------------------------------------------------------------------------ finding out, errors


def test_a_kind_of_tensor_is_tried_once(kernel):
    network = build()
    use_attention(network, "auto")
    for _ in range(3):
        network(images(network))
    assert [(p.dtype, p.shape[-1], p.requires_grad) for p in kernel.probes] == [(torch.float32, 16, True)]
    with torch.no_grad():
        network(images(network))
        network(images(network))
    assert len(kernel.probes) == 2
    assert not kernel.probes[1].requires_grad
    q = torch.randn(1, 2, 5, 24)
    for x in (q, q.double(), q):
        attend("auto", x, x, x)
    assert [(p.dtype, p.shape[-1]) for p in kernel.probes[2:]] == [(torch.float32, 24), (torch.float64, 24)]
    assert len(kernel.calls) == 5 * 2 + 3


class ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("No operator found for\n  the backward pass")


@pytest.fixture
def forward_only(kernel, monkeypatch):
    monkeypatch.setattr(attention, "_kernel", lambda: lambda q, k, v: ForwardOnly.apply(kernel(q, k, v)))
    return kernel


def test_auto_uses_torch_where_the_trial_fails(forward_only):
    network = build()
    stock = outputs_and_gradients(network, images(network))
    use_attention(network, "auto")
    torch.testing.assert_close(outputs_and_gradients(network, images(network)), stock, atol=0, rtol=0)
    assert not forward_only.calls
    assert len(forward_only.probes) == 1  # what failed is not tried again
    with torch.no_grad():
        network(images(network))
    assert len(forward_only.calls) == 2  # without gradients it works


def test_explicit_xformers_says_why_it_cannot(forward_only):
    network = build()
    use_attention(network, "xformers")
    with pytest.raises(InputError) as caught:
        network(images(network))
    assert caught.value.lines == (
        "attention=xformers does not work for float32 with head size 16 on cpu: use auto or sdpa "
        "(NotImplementedError: No operator found for the backward pass)",
    )


def xformers_modules():
    return [name for name in sys.modules if name.split(".")[0] == "xformers"]


@pytest.fixture
def not_imported():
    """As in a process that has not imported xformers yet."""
    before = {name: sys.modules.pop(name) for name in xformers_modules()}
    yield
    for name in xformers_modules():
        del sys.modules[name]
    sys.modules.update(before)


def install(monkeypatch, folder, ops):
    """A package `xformers` in place of the installed one, if any, and a CPU that is asked about."""
    package = folder / "xformers"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ops.py").write_text(ops)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(attention, "_DEVICE", "cpu")


@pytest.mark.parametrize("failure", ["ImportError('no symbol')", "OSError('no library')", "RuntimeError('schema')"])
def test_xformers_that_cannot_be_imported_is_absent(not_imported, monkeypatch, tmp_path, failure):
    install(monkeypatch, tmp_path, f"raise {failure}")
    q = torch.randn(1, 2, 5, 16)
    torch.testing.assert_close(attend("auto", q, q, q), nn.functional.scaled_dot_product_attention(q, q, q))
    with pytest.raises(InputError, match=r"does not work .*Error: (no symbol|no library|schema)"):
        attend("xformers", q, q, q)


def test_the_import_is_quiet_and_only_the_import(not_imported, monkeypatch, tmp_path, caplog):
    warn = "logging.getLogger('xformers.ops.fmha').warning('no extensions')"
    kernel = f"def memory_efficient_attention(q, k, v):\n    {warn}\n    return v"
    install(monkeypatch, tmp_path, f"import logging\n{warn}\n{kernel}")
    monkeypatch.setattr(logging.getLogger("xformers"), "level", logging.NOTSET)
    q = torch.randn(1, 2, 5, 16)
    torch.testing.assert_close(attend("auto", q, q, q), q)
    assert [record.message for record in caplog.records] == ["no extensions"] * 2  # the trial and the call


@pytest.mark.skipif(importlib.util.find_spec("xformers") is None, reason="xformers is not installed")
def test_the_installed_xformers_is_asked_quietly_and_declines_on_a_cpu(monkeypatch, caplog, capfd):
    monkeypatch.setattr(attention, "_DEVICE", "cpu")
    q = torch.randn(1, 2, 5, 16)
    torch.testing.assert_close(attend("auto", q, q, q), nn.functional.scaled_dot_product_attention(q, q, q))
    with pytest.raises(InputError, match=r"NotImplementedError: No operator found") as caught:
        attend("xformers", q, q, q)
    assert len(caught.value.lines) == 1
    assert "\n" not in caught.value.lines[0]
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("choice", ["auto", "sdpa"])
def test_on_a_cpu_xformers_is_not_imported(not_imported, choice):
    network = build()
    use_attention(network, choice)
    outputs_and_gradients(network, images(network))
    check_attention(choice, "cpu")
    assert not xformers_modules()


def test_explicit_xformers_on_a_cpu_is_one_line():
    line = "attention=xformers needs a CUDA device, not cpu: use auto or sdpa"
    network = build()
    use_attention(network, "xformers")  # the network may go to the device later
    with pytest.raises(InputError) as caught:
        network(images(network))
    assert caught.value.lines == (line,)
    with pytest.raises(InputError) as caught:
        check_attention("xformers", "cpu")
    assert caught.value.lines == (line,)
    check_attention("xformers", "cuda")


def test_an_unknown_choice_is_named():
    for call in (lambda: use_attention(build(), "xformer"), lambda: check_attention("xformer", "cuda")):
        with pytest.raises(InputError, match=r"attention=xformer does not exist; did you mean 'xformers'\?"):
            call()


# --------------------------------------------------------------------------------------------------- the benchmark


def test_the_benchmark_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: attention is timed on a CUDA device, and there is none here\n"


def test_the_benchmark_compares_pair_by_pair():
    # The machine slows down threefold halfway; the second way always takes twice as long as the first.
    clock = iter([(1, 2), (1, 2), (3, 6), (3, 6), (3, 6)])
    times = {"first": [], "second": []}
    for first, second in clock:
        times["first"].append(first)
        times["second"].append(second)
    assert benchmark.summary(times["first"], times["second"]) == (3, 6, 2)


def test_the_benchmarks_step_is_forward_and_backward():
    qkv = torch.randn(2, 5, 3, 2, 16, requires_grad=True)
    grad = torch.randn(2, 5, 2, 16)
    q, k, v = qkv.unbind(2)
    (expected,) = torch.autograd.grad(Kernel()(q, k, v), qkv, grad)
    torch.testing.assert_close(benchmark.step("sdpa", qkv, grad), expected)


# ------------------------------------------------------------------------------------------------------- on a GPU


def relative(x, reference):
    return ((x.double() - reference).norm() / reference.norm()).item()


def errors(choice, dtype, head_size, tokens, device, **options):
    """Relative errors (Frobenius norm) of the output and the gradients of q, k and v, and the four tensors."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, 2, 4, tokens, head_size, generator=generator).to(device, dtype).unbind()
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    weights = (exact[0] @ exact[1].transpose(-2, -1) * head_size**-0.5).softmax(dim=-1)
    expected = weights @ exact[2]
    references = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = attend(choice, *inputs, **options)
    found = [out, *torch.autograd.grad(out, inputs, grad)]
    return [relative(x, reference) for x, reference in zip(found, references, strict=True)], found


# Inputs are rounded before the reference sees them, so what is left is rounding within a kernel: it keeps sums in
# float32 and rounds the softmax weights, their gradient and each result to `dtype`. One rounding to nearest is off by
# at most eps / 2 and about 0.2 eps in the mean square; those of one kernel add up to 0.3 eps to 0.5 eps (as the same
# roundings done by hand, and torch's own kernel on a CPU, show). The bound of 2 eps leaves room for another order of
# operations; a softmax scale that is off by a twentieth exceeds it fourfold in bfloat16.
TOLERANCE = {dtype: 2 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}
shapes = pytest.mark.parametrize(
    ("dtype", "head_size", "tokens"),
    [(dtype, head_size, tokens) for dtype in TOLERANCE for head_size in (64, 96) for tokens in (257, 1370)],
    ids=str,
)


@pytest.mark.gpu
@shapes
def test_xformers_and_sdpa_agree(dtype, head_size, tokens):
    by_xformers, of_xformers = errors("xformers", dtype, head_size, tokens, "cuda")
    by_sdpa, of_sdpa = errors("sdpa", dtype, head_size, tokens, "cuda")
    assert max(by_xformers) < TOLERANCE[dtype]
    assert max(by_sdpa) < TOLERANCE[dtype]
    apart = [relative(x, y.double()) for x, y in zip(of_xformers, of_sdpa, strict=True)]
    assert max(apart) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_tolerance_is_kept_on_a_cpu_and_a_wrong_scale_is_told(dtype):
    assert max(errors("sdpa", dtype, 64, 257, "cpu")[0]) < TOLERANCE[dtype]
    wrong = min(errors("sdpa", dtype, 64, 257, "cpu", scale=1.05 / 8)[0])
    assert wrong > TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384"])
def test_a_network_under_autocast_agrees(name, monkeypatch):
    network = randomise(timm.create_model(name, img_size=64, embed_dim=128, depth=2, num_heads=2, num_classes=0)).cuda()
    x = torch.randn(2, 3, 64, 64, device="cuda")
    exact = outputs_and_gradients(network, x)["out"].double()
    calls, kernel = [], attention._kernel()
    monkeypatch.setattr(attention, "_kernel", lambda: lambda *qkv: calls.append(qkv[0].dtype) or kernel(*qkv))
    found = {}
    for choice in ("sdpa", "xformers"):
        use_attention(network, choice)
        with torch.autocast("cuda", torch.bfloat16):
            found[choice] = relative(outputs_and_gradients(network, x)["out"], exact)
    assert set(calls) == {torch.bfloat16}
    assert len(calls) == 1 + 2  # the trial and two blocks
    # Two blocks of bfloat16 layers differ from float32 by far more than their attention's kernels do from each other.
    assert found["xformers"] < 1.5 * found["sdpa"]


@pytest.mark.gpu
def test_the_benchmark_prints_a_table(capsys):
    assert benchmark.main(["--batch", "2", "--repeats", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(benchmark.SHAPES)
