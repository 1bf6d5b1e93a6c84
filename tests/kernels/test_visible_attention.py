"""visible_attention: accuracy against float64, on the way of a CPU and on that of a GPU, registration, FLOPs."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels.visible_attention import on_torch
from fastmim_kernels.visible_attention.op import OP, visible_attention
from tests.kernels import oracle

# (B, T, W, N), heads, head_dim, shift groups, padded positions a window, cosine
CASES = {
    "windows of every fullness": ((3, 40, 5, 36), 2, 8, False, 0, False),
    "shifted": ((2, 70, 6, 25), 3, 16, True, 0, True),
    "padded and shifted": ((2, 30, 4, 16), 2, 8, True, 3, True),
    "padded": ((2, 30, 4, 16), 1, 17, False, 5, False),
    "a window holds all tokens": ((3, 14, 1, 36), 4, 8, False, 0, True),
    "every place is taken": ((2, 32, 2, 16), 2, 8, True, 0, False),
    "one token in many windows": ((1, 1, 9, 4), 2, 8, False, 0, True),
}


def make(name):
    """Arguments: tokens at random places, and of each window its first positions padded."""
    (batch, tokens, windows, n), heads, dim, shifted, padded, cosine = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    slots = torch.full((batch, windows, n), -1)
    slots[:, :, :padded] = -2
    for own in slots.view(batch, -1):
        free = (own == -1).nonzero().flatten()
        own[free[torch.randperm(len(free), generator=g)[:tokens]]] = torch.arange(tokens)
    places = (slots == -1).int().argsort(dim=2, stable=True)
    given = {"qkv": torch.randn(batch, tokens, 3 * heads * dim, generator=g),
             "bias": 2 * torch.randn(heads, n, n, generator=g)}  # fmt: skip
    if cosine:  # the last head lies beyond the clamp
        given["logit_scale"] = torch.linspace(1, 5, heads).view(heads, 1, 1)
    if padded:
        given["padding"] = torch.randn(3 * heads * dim, generator=g)
    groups = torch.randint(0, 3, (windows, n), generator=g) if shifted else None
    return given, {"slots": slots.gather(2, places), "places": places, "groups": groups, "num_heads": heads}


def by_hand(qkv, bias, *, slots, places, groups, num_heads, logit_scale=None, padding=None):
    """Every query, one by one, with every key of its window."""
    dim, rows = qkv.shape[-1] // 3 // num_heads, []
    scale = None if logit_scale is None else logit_scale.flatten().clamp(max=math.log(100)).exp()
    unit = functools.partial(torch.nn.functional.normalize, dim=-1, eps=1e-12)
    for image, own in enumerate(slots):
        found = [None] * qkv.shape[1]
        for w, window in enumerate(own):
            there = [(int(t), int(p)) for t, p in zip(window, places[image, w], strict=True) if t != -1]
            x = torch.stack([padding if t < 0 else qkv[image, t] for t, _ in there]) if there else None
            for i, (token, place) in enumerate(there):
                q, k, v = x.view(-1, 3, num_heads, dim).unbind(1)
                s = (q[i] * k).sum(-1) * dim**-0.5 if scale is None else (unit(q[i]) * unit(k)).sum(-1) * scale
                s = s + bias[:, place, [p for _, p in there]].mT
                if groups is not None:
                    apart = groups[w, place] != groups[w, [p for _, p in there]]
                    s = s - 100 * apart[:, None].to(s.dtype)
                if token >= 0:
                    found[token] = (s.softmax(0)[..., None] * v).sum(0).flatten()
        rows.append(torch.stack(found))
    return torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_the_oracle_is_attention_query_by_query(name):
    given, rest = make(name)
    given = {key: value.double() for key, value in given.items()}
    expected = by_hand(**given, **rest)
    torch.testing.assert_close(visible_attention(**given, **rest, impl="reference"), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["cpu", "gpu"])
@pytest.mark.parametrize("name", CASES)
def test_accuracy(name, where, dtype, monkeypatch):
    """Output and every gradient; no value is looked at on the way of a GPU, and small chunks are many."""
    if where == "gpu":
        monkeypatch.setattr(on_torch, "_values_are_at_hand", lambda x: False)
        monkeypatch.setattr(on_torch, "CHUNK_CPU", 2000)
    given, rest = make(name)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dtypes = {key: dtype if key == "qkv" else wide for key in given}
    op, truth = (functools.partial(visible_attention, impl=impl) for impl in ("torch", "reference"))
    # The gradient of a logit scale sums up what nearly cancels, in an order that depends on the width of CPU vectors.
    floor = 1e-13 if dtype == torch.float64 else 4e-6 if "logit_scale" in given else oracle.FLOOR
    oracle.check(op, truth, {**given, **rest}, dtypes, list(given), floor=floor)


def test_registration():
    given, rest = make("padded and shifted")
    inputs = [value.requires_grad_() for value in given.values()]
    args = (*inputs, rest["slots"], rest["places"], rest["groups"], rest["num_heads"], "torch")
    torch.library.opcheck(OP.forward.op, args)
    op = torch.compile(functools.partial(visible_attention, **given, **rest), fullgraph=True, backend="eager")
    torch.testing.assert_close(op(), visible_attention(**given, **rest))


@pytest.mark.parametrize("name", ["windows of every fullness", "a window holds all tokens"])
def test_flops_are_those_of_the_widest_windows_there_can_be(name):
    """2 and 5 products of W·min(N, T)² pairs; counted on fakes, where no value is known."""
    (batch, tokens, windows, n), heads, dim, *_ = CASES[name]
    given, rest = make(name)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        leaves = {key: torch.empty_like(value).requires_grad_() for key, value in given.items()}
        visible_attention(**leaves, **rest).sum().backward()
    product = 2 * batch * windows * min(n, tokens) ** 2 * heads * dim
    assert counter.get_total_flops() == 7 * product


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(num_heads=5), "qkv must be .B, …, 3C. with C divisible by num_heads=5"),
        (dict(bias=torch.zeros(3, 24, 25)), "bias must be"),
        (dict(slots=torch.zeros(1, 6, 25, dtype=torch.int64)), "slots must be"),
        (dict(places=torch.zeros(2, 6, 24, dtype=torch.int64)), "places must be"),
        (dict(groups=torch.zeros(25, 6, dtype=torch.int64)), "groups must be"),
        (dict(padding=torch.zeros(4)), "padding must be"),
        (dict(logit_scale=torch.zeros(2)), "logit_scale must be num_heads=3 values"),
    ],
)
def test_a_wrong_argument_is_named(change, words):
    given, rest = make("shifted")
    with pytest.raises(ValueError, match=words):
        visible_attention(**{**given, **rest, **change})
