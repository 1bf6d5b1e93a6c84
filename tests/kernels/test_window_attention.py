"""window_attention, torch implementation: accuracy against float64, memory, determinism, registration."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastmim_kernels as fk
from fastmim_kernels.window_attention import layout as window_layout
from fastmim_kernels.window_attention import on_torch as plain
from fastmim_kernels.window_attention.op import traffic

# (B, H, W), heads, head_dim, window, shift, cosine
CASES = {
    "swin shifted": ((2, 12, 12), 2, 32, (6, 6), (3, 3), False),
    "swinv2 shifted": ((1, 24, 24), 6, 32, (12, 12), (6, 6), True),
    "swinv2 plain, window of 12": ((2, 24, 12), 6, 32, (12, 12), (0, 0), True),
    "swin plain, window of 12": ((1, 12, 24), 2, 32, (12, 12), (0, 0), False),
    "swinv2 plain": ((1, 16, 8), 6, 16, (8, 8), (0, 0), True),
    "one window, as in the last stages": ((3, 6, 6), 8, 32, (6, 6), (0, 0), True),
    "odd window of 7, odd shift": ((1, 14, 14), 2, 32, (7, 7), (3, 3), False),
    "rectangular window, shifted along one axis": ((2, 8, 12), 8, 16, (4, 6), (2, 0), True),
    "one token a window: every softmax is 1": ((1, 2, 3), 2, 16, (1, 1), (0, 0), True),
    "head dimension that no vector width divides": ((1, 8, 4), 1, 17, (4, 4), (1, 3), False),
    "window of 24, the largest": ((1, 24, 24), 2, 64, (24, 24), (0, 0), True),
}


def make(name, dtype=torch.float32, seed=0):
    shape, heads, head_dim, window, shift, cosine = CASES[name]
    g = torch.Generator().manual_seed(seed)
    n = window[0] * window[1]
    qkv = torch.randn(*shape, 3 * heads * head_dim, generator=g).to(dtype)
    bias = 3 * torch.randn(heads, n, n, generator=g)
    # The last head lies beyond the clamp at ln 100: its logit scale gets no gradient.
    scale = torch.linspace(1.0, 5.0, heads).reshape(heads, 1, 1) if cosine else None
    grad = torch.randn(*shape, heads * head_dim, generator=g).to(dtype)
    return (qkv, bias, scale), grad, {"num_heads": heads, "window_size": window, "shift_size": shift}


def run(impl, inputs, grad, options, dtype=None):
    """Output and the gradient of each input, in float64."""
    leaves = [None if t is None else t.to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
    qkv, bias, scale = leaves
    out = fk.window_attention(qkv, bias, logit_scale=scale, impl=impl, **options)
    out.backward(grad.to(out.dtype))
    found = {"out": out, "qkv": qkv.grad, "bias": bias.grad}
    if scale is not None:
        found["logit_scale"] = scale.grad
    return {k: t.detach().double() for k, t in found.items()}


def rms(x):
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("dtype, fast", [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
                         ids=["fp32", "bf16", "bf16 on a processor that does not multiply it"])
@pytest.mark.parametrize("name", CASES)
def test_error_is_at_most_twice_that_of_plain_torch(name, dtype, fast, monkeypatch):
    monkeypatch.setattr(plain, "has_bfloat16_units", lambda: fast)
    errors, floors = defaultdict(list), defaultdict(float)
    for seed in range(8):  # a logit scale's gradient is few numbers: one draw of their rounding says little
        inputs, grad, options = make(name, dtype, seed)
        truth = run("reference", inputs, grad, options, torch.float64)
        for impl in ("reference", "torch"):
            for key, t in run(impl, inputs, grad, options).items():
                errors[impl, key].append((t - truth[key]).flatten())
        for key, t in truth.items():  # where plain torch happens to be exact
            floors[key] = torch.finfo(torch.float32).eps * max(rms(t), 1e-3)
    for key, floor in floors.items():
        ours, plain_torch = (rms(torch.cat(errors[impl, key])) for impl in ("torch", "reference"))
        assert ours <= 2 * plain_torch + floor, key


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_several_chunks_give_the_same(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(plain, "has_bfloat16_units", lambda: True)
    names = ("rectangular window, shifted along one axis", "swin shifted", "window of 24, the largest")
    for name in names:
        inputs, grad, options = make(name, dtype)
        whole = run("torch", inputs, grad, options)
        # One window · one head · three of eight heads with all their windows · several heads.
        for size in (1, 5000, 4 * 2 * 24 * 24 * 3, 50_000):
            monkeypatch.setattr(plain, "CHUNK_CPU", size)
            for key, t in run("torch", inputs, grad, options).items():
                assert (t - whole[key]).norm() <= tolerance * whole[key].norm(), (name, size, key)


def test_negligible_weights_are_zero_not_subnormal():
    """exp(−100) is a subnormal float32; the products with it are ten times slower."""
    qk = torch.zeros(2, 1, 1, 4, 8)
    mask = torch.zeros(1, 4, 4)
    mask[:, :2, 2:] = -100.0
    p = plain._softmax(qk, (slice(0, 1), slice(0, 1)), torch.zeros(1, 4, 4), mask, 1.0,
                       *torch.empty(2, 1, 4, 4))
    assert torch.equal(p[0, :2, 2:], torch.zeros(2, 2))
    assert torch.equal(p[0, 2:], torch.full((2, 4), 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["swinv2 shifted", "swinv2 plain, window of 12"])
def test_repeated_backward_is_bitwise_equal(name, dtype):
    inputs, grad, options = make(name, dtype)
    first, second = (run("torch", inputs, grad, options) for _ in range(2))
    for key, t in first.items():
        assert torch.equal(t, second[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["swinv2 shifted", "swin shifted"])
def test_every_value_is_written(name, dtype, monkeypatch):
    inputs, grad, options = make(name, dtype)
    expected = run("torch", inputs, grad, options)

    def poisoned(function):
        return lambda *args, **kwargs: function(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    window_layout._rows.cache_clear()
    # Indices cannot be NaN; the first call fills the cache without poison.
    monkeypatch.setattr(window_layout, "_rows", _unpoisoned_rows(monkeypatch, inputs[0], options))
    for key, t in run("torch", inputs, grad, options).items():
        assert torch.equal(t, expected[key]), key


def _unpoisoned_rows(monkeypatch, qkv, options):
    batch, height, width, _ = qkv.shape
    window, shift = options["window_size"], options["shift_size"]
    with monkeypatch.context() as m:
        m.setattr(torch, "empty_like", torch.zeros_like)
        rows = {parts: window_layout._rows(batch, height, width, parts, window, shift, qkv.device)
                for parts in (options["num_heads"], 3 * options["num_heads"])}
    return lambda b, h, w, parts, *rest: rows[parts]


def saved_beside_inputs(name, dtype=torch.float32):
    """Values that autograd keeps of the op, beside its inputs; storages counted once."""
    inputs, _, options = make(name, dtype)
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fk.window_attention(*leaves[:2], logit_scale=leaves[2], impl="torch", **options)
    sizes = {t.untyped_storage().data_ptr(): t.numel() for t in saved}
    given = {t.untyped_storage().data_ptr() for t in leaves if t is not None}
    return sum(size for pointer, size in sizes.items() if pointer not in given)


@pytest.mark.parametrize("name", ["swinv2 shifted", "swinv2 plain, window of 12"])
def test_nothing_of_the_size_of_the_logits_is_saved(name):
    shape, heads, *_ = CASES[name]
    assert saved_beside_inputs(name) <= math.prod(shape) * heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["swin shifted", "rectangular window, shifted along one axis"])
def test_weights_of_small_windows_are_kept_up_to_a_limit(name, dtype, monkeypatch):
    monkeypatch.setattr(plain, "has_bfloat16_units", lambda: True)
    shape, heads, _, window, *_ = CASES[name]
    weights = math.prod(shape) * heads * math.prod(window)
    inputs, grad, options = make(name, dtype)
    kept = run("torch", inputs, grad, options)
    monkeypatch.setattr(plain, "KEPT_WEIGHTS", weights)
    assert saved_beside_inputs(name, dtype) == weights <= 2 * inputs[0].numel() / 3
    monkeypatch.setattr(plain, "KEPT_WEIGHTS", weights - 1)
    assert saved_beside_inputs(name, dtype) == 0
    # Kept in bfloat16 they have its rounding.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for key, t in run("torch", inputs, grad, options).items():
        assert (t - kept[key]).norm() <= tolerance * kept[key].norm(), key


def test_weights_are_not_kept_in_another_dtype_than_the_inputs(monkeypatch):
    monkeypatch.setattr(plain, "has_bfloat16_units", lambda: False)
    assert saved_beside_inputs("swin shifted", torch.bfloat16) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_backward_again_through_kept_weights_is_bitwise_equal(dtype):
    (qkv, bias, _), grad, options = make("swin shifted", dtype)
    leaves = qkv.requires_grad_(), bias.requires_grad_()
    out = fk.window_attention(*leaves, impl="torch", **options)
    first, second = (torch.autograd.grad(out, leaves, grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["rectangular window, shifted along one axis", "one window, as in the last stages",
                                  "head dimension that no vector width divides"])
def test_registration(name):
    (qkv, bias, scale), _, o = make(name)
    leaves = [None if t is None else t.clone().requires_grad_() for t in (qkv, bias, scale)]
    torch.library.opcheck(torch.ops.fastmim.window_attention.default,
                          (*leaves, o["num_heads"], o["window_size"], o["shift_size"], "torch"))


def test_autocast_casts_qkv_and_nothing_else():
    inputs, grad, options = make("swinv2 plain")
    with torch.autocast("cpu", torch.bfloat16):
        cast = run("torch", inputs, grad, options)
    expected = run("torch", (inputs[0].bfloat16(), *inputs[1:]), grad, options)
    for key, t in cast.items():
        assert torch.equal(t, expected[key]), key


def test_traces_into_one_graph():
    inputs, grad, options = make("swin shifted")
    function = torch.compile(lambda x, b: fk.window_attention(x, b, impl="torch", **options), fullgraph=True,
                             backend="aot_eager")
    qkv, bias = (t.clone().requires_grad_() for t in inputs[:2])
    function(qkv, bias).backward(grad)
    expected = run("torch", inputs, grad, options)
    assert torch.equal(qkv.grad.double(), expected["qkv"]) and torch.equal(bias.grad.double(), expected["bias"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_fake_shapes_are_the_real_ones(name, dtype):
    (qkv, bias, scale), _, o = make(name, dtype)
    arguments = o["num_heads"], o["window_size"], o["shift_size"], "torch"
    real = torch.ops.fastmim.window_attention(qkv, bias, scale, *arguments)
    with FakeTensorMode() as mode:
        given = (None if t is None else mode.from_tensor(t) for t in (qkv, bias, scale))
        fake = torch.ops.fastmim.window_attention(*given, *arguments)
    assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in fake]


def test_flops_are_the_products_of_the_plain_form():
    inputs, grad, options = make("swinv2 plain")
    with FlopCounterMode(display=False) as ours:
        run("torch", inputs, grad, options)
    with FlopCounterMode(display=False) as plain_torch:
        run("reference", inputs, grad, options)
    forward, backward = traffic(inputs[0].shape, options["num_heads"], options["window_size"])
    assert ours.get_total_flops() == forward[2] + backward[2]
    # The backward computes q·kᵀ once more,
    assert ours.get_total_flops() * 6 == plain_torch.get_total_flops() * 7
    # but where the weights are kept.
    inputs, grad, options = make("swin shifted")
    found = []
    for impl in ("torch", "reference"):
        with FlopCounterMode(display=False) as counter:
            run(impl, inputs, grad, options)
        found.append(counter.get_total_flops())
    assert found[0] == found[1]


@pytest.mark.parametrize("change, message", [
    ({"num_heads": 5}, "num_heads=5"), ({"window_size": (5, 8)}, "must divide the 16x8 map"),
    ({"shift_size": (8, 0)}, "must lie within the window"), ({"impl": "cuda"}, "impl='cuda'"),
])
def test_messages(change, message):
    (qkv, bias, scale), _, options = make("swinv2 plain")
    with pytest.raises(ValueError, match=message):
        fk.window_attention(qkv, bias, logit_scale=scale, **(options | {"impl": "torch"} | change))


def test_a_number_stands_for_a_square_window_and_wrong_counts_are_named() -> None:
    qkv, bias = torch.randn(1, 8, 8, 24), torch.randn(2, 16, 16)
    square = fk.window_attention(qkv, bias, num_heads=2, window_size=(4, 4), shift_size=(2, 2))
    assert torch.equal(fk.window_attention(qkv, bias, num_heads=2, window_size=4, shift_size=2), square)
    for wrong in ({"num_heads": 0}, {"window_size": 0}, {"window_size": (4, 4, 4)}, {"bias": None}, {"shift_size": -1}):
        with pytest.raises(ValueError, match=f"window_attention: .*{next(iter(wrong))}"):
            fk.window_attention(**{"qkv": qkv, "bias": bias, "num_heads": 2, "window_size": 4} | wrong)
