"""window_attention's Triton kernels in the interpreter: accuracy against float64, padding, groups, bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmim_kernels import reference
from fastmim_kernels.window_attention import (
    triton_backward as window_attention_backward,
)
from fastmim_kernels.window_attention import triton_forward as kernels
from fastmim_kernels.window_attention import triton_rows_launch as rows_launch
from fastmim_kernels.window_attention import (
    triton_tiles as window_tiles,
)
from fastmim_kernels.window_attention.layout import shift_mask
from fastmim_kernels.window_attention.op import OP, traffic, window_attention
from tests.kernels.oracle import FLOOR, check, run

pytestmark = pytest.mark.usefixtures("poison")

# (B, H, W), heads, head_dim, window, shift, cosine
CASES = {
    "16 tokens, one warp": ((1, 8, 4), 2, 16, (4, 4), (0, 0), False),
    "window of 6, 36 tokens in 64 rows": ((1, 12, 12), 1, 32, (6, 6), (3, 3), False),
    "window = map, 3 windows in 2 groups": ((3, 6, 6), 2, 32, (6, 6), (0, 0), True),
    "49 tokens, rows that no vector width divides": ((1, 7, 14), 2, 32, (7, 7), (3, 3), True),
    "head dimension between powers of two, as in no vector": ((1, 8, 8), 2, 44, (4, 4), (2, 1), True),
    "rectangle shifted along one axis only": ((1, 8, 6), 2, 16, (4, 3), (2, 0), True),
    "144 tokens, every mask": ((1, 24, 12), 1, 16, (12, 12), (6, 6), True),
    "65 tokens, a chunk of one key, seams along one axis": ((3, 5, 13), 2, 16, (5, 13), (2, 0), True),
    "100 tokens, last chunk and last tile padded": ((1, 10, 10), 1, 16, (10, 10), (0, 0), False),
    "208 tokens, tiles on the grid, last one padded": ((1, 13, 16), 1, 16, (13, 16), (0, 5), True),
    "one token a window": ((1, 2, 3), 2, 16, (1, 1), (0, 0), False),
    "64 tokens, a tile without padding": ((1, 8, 16), 1, 32, (8, 8), (4, 4), True),
    "heads of 64, the widest rows": ((1, 8, 8), 1, 64, (4, 4), (2, 2), True),
    "heads of 24, a row of three vectors": ((1, 6, 12), 2, 24, (6, 6), (3, 3), False),
    "196 tokens, a tile more than 192": ((1, 14, 14), 1, 16, (14, 14), (0, 0), True),
    "143 tokens in 9 chunks, unequal tiles, two groups": ((2, 11, 13), 2, 32, (11, 13), (5, 6), True),
    "144 tokens, dot products, seams along one axis": ((1, 12, 24), 1, 24, (12, 12), (0, 6), False),
    "256 tokens, whole tiles": ((1, 16, 16), 1, 16, (16, 16), (8, 8), True),
    "576 tokens, the largest window": ((1, 24, 24), 1, 16, (24, 24), (0, 0), True),
}


def inputs_for(name: str) -> tuple[dict, list[str]]:
    shape, heads, head_dim, window, shift, cosine = CASES[name]
    g = torch.Generator().manual_seed(len(name))
    n = window[0] * window[1]
    inputs = {"qkv": torch.randn(*shape, 3 * heads * head_dim, generator=g),
              "bias": 3 * torch.randn(heads, n, n, generator=g), "num_heads": heads, "window_size": window,
              "shift_size": shift}
    if cosine:
        # The last of several heads lies beyond the clamp at ln 100 and gets no gradient.
        inputs["logit_scale"] = torch.linspace(1.5, 5.0, heads).reshape(heads, 1, 1)
    return inputs, ["qkv", "bias"] + ["logit_scale"] * cosine


def ours(**kwargs: object) -> Tensor:
    return window_attention(impl="triton", **kwargs)


def oracle(**kwargs: object) -> Tensor:
    return reference.window_attention(**{"logit_scale": None, **kwargs})


def dtypes_for(names: list[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    return dict.fromkeys(names, torch.float32) | {"qkv": dtype}


# Windows of 12 and more take seconds in the interpreter: float32 (the large kernel) is seen on 16 and 100 tokens.
SLOW = tuple(name for name, case in CASES.items() if case[3][0] * case[3][1] > 100)


@pytest.mark.parametrize("name, dtype", [(n, d) for n in CASES for d in (torch.float32, torch.bfloat16)
                                         if d == torch.bfloat16 or n not in SLOW])
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    inputs, names = inputs_for(name)
    # A softmax of one logit is 1: d bias is zero, a sum over six windows of the roundings of products of size √16.
    floor = torch.finfo(torch.float32).eps * 4 * 6 if name == "one token a window" else FLOOR
    check(ours, oracle, inputs, dtypes_for(names, dtype), wrt=names, floor=floor)


# One for each kernel: a single tile, and whole rows.
@pytest.mark.parametrize("name", ["window of 6, 36 tokens in 64 rows", "100 tokens, last chunk and last tile padded"])
def test_float16(name: str) -> None:
    inputs, names = inputs_for(name)
    check(ours, oracle, inputs, dtypes_for(names, torch.float16), wrt=names)


# On sm_80 cosine attention takes the large kernel for every window, and smaller tiles of queries.
@pytest.mark.parametrize("name", ["window = map, 3 windows in 2 groups", "144 tokens, every mask"])
def test_as_on_sm_80(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window_attention_backward, "sm_of", lambda device: 80)
    inputs, names = inputs_for(name)
    check(ours, oracle, inputs, dtypes_for(names, torch.bfloat16), wrt=names)


@pytest.mark.parametrize("groups", [2, 5])
def test_groups_do_not_matter(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    # 5 windows: groups of unequal length, and one window each.
    g = torch.Generator().manual_seed(0)
    inputs = {"qkv": torch.randn(5, 4, 4, 3 * 16, generator=g), "bias": torch.randn(1, 16, 16, generator=g),
              "logit_scale": torch.ones(1), "num_heads": 1, "window_size": (4, 4), "shift_size": (0, 0)}
    names = ["qkv", "bias", "logit_scale"]
    dtypes = dtypes_for(names, torch.float32)
    for module in (kernels, window_attention_backward):
        monkeypatch.setattr(module, "window_groups", lambda *args: groups)
    check(ours, oracle, inputs, dtypes, wrt=names)
    monkeypatch.setattr(window_attention_backward, "single_tile", lambda *args: False)
    check(ours, oracle, inputs, dtypes, wrt=names)


# Three windows for two programs of keys, which leaves one of a group without any.
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_of_whole_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    monkeypatch.setattr(rows_launch, "window_groups", lambda *args: groups)
    inputs, names = inputs_for("65 tokens, a chunk of one key, seams along one axis")
    check(ours, oracle, inputs, dtypes_for(names, torch.bfloat16), wrt=names)


def test_bias_tables() -> None:
    """What each kind of window adds to its logits is the bias and the mask of the torch implementation."""
    window, shift, bias = (3, 4), (1, 2), torch.randn(2, 12, 12)
    mask = shift_mask(6, 8, window, shift, torch.float32, bias.device)
    assert mask is not None
    for given, wanted in ((shift, bias[:, None] + mask[None]), ((0, 0), bias[:, None])):
        table, turned = rows_launch.bias_tables(bias, window, given)
        # Of 2x2 windows: bit 1 in the last row, bit 0 in the last column.
        torch.testing.assert_close(table.view(wanted.shape), wanted)
        assert torch.equal(turned.view(wanted.shape), table.view(wanted.shape).mT)


def test_without_bias_gradient() -> None:
    for name in ("window = map, 3 windows in 2 groups", "49 tokens, rows that no vector width divides",
                 "65 tokens, a chunk of one key, seams along one axis", "100 tokens, last chunk and last tile padded"):
        inputs, names = inputs_for(name)
        heads, window, shift = inputs["num_heads"], inputs["window_size"], inputs["shift_size"]
        qkv, bias, scale = inputs["qkv"].bfloat16(), inputs["bias"], inputs.get("logit_scale")
        out, lse = kernels.forward(qkv, bias, scale, heads, window, shift)
        given = (torch.ones_like(out), qkv, bias, scale, out, lse, heads, window, shift)
        dqkv, dbias, dscale = kernels.backward(*given)
        fewer = kernels.backward(*given, bias_grad=False)
        assert dbias is not None and fewer[1] is None
        torch.testing.assert_close(fewer[0], dqkv, rtol=0, atol=0)
        torch.testing.assert_close(fewer[2], dscale)


@pytest.mark.parametrize("name, dtype", [
    ("16 tokens, one warp", torch.float32), ("65 tokens, a chunk of one key, seams along one axis", torch.bfloat16)])
def test_zero_vectors_are_finite(name: str, dtype: torch.dtype) -> None:
    inputs, _ = inputs_for(name)
    inputs["qkv"] = torch.zeros_like(inputs["qkv"])
    names = ["qkv", "bias", "logit_scale"]
    found = run(ours, inputs | {"logit_scale": torch.ones(2)}, dtypes_for(names, dtype), ["qkv", "bias"])
    assert all(torch.isfinite(t).all() for t in found)


def test_opcheck() -> None:
    inputs, names = inputs_for("rectangle shifted along one axis only")
    qkv, bias, scale = (inputs[n].requires_grad_() for n in ("qkv", "bias", "logit_scale"))
    torch.library.opcheck(OP.forward.op, (qkv, bias, scale, 2, (4, 3), (2, 0), "triton"))


@pytest.mark.parametrize("window, heads", [(6, 2), (9, 1)])
def test_bytes(window: int, heads: int, byte_counter, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    batch, n, groups = 3, window * window, 2  # 81 tokens pad a tile and a chunk
    for module in (kernels, window_attention_backward, rows_launch):
        monkeypatch.setattr(module, "window_groups", lambda *args: groups)
    qkv = torch.randn(batch, window, window, 3 * heads * 32).bfloat16()
    bias, scale, size = torch.zeros(heads, n, n), torch.zeros(heads), (window, window)
    least = [sum(moved[:2]) for moved in traffic(qkv.shape, heads, size)]
    byte_counter.reset()
    out, lse = kernels.forward(qkv, bias, scale, heads, size, (0, 0))
    # Up to 64 tokens a program reads its bias once, beyond from L1 for every window.
    assert byte_counter.total <= 1.02 * least[0] + ((groups if n <= 64 else batch) - 1) * bias.nbytes
    assert byte_counter.distinct <= 1.02 * least[0]
    byte_counter.reset()
    kernels.backward(out, qkv, bias, scale, out, lse, heads, size, (0, 0))
    sums = 2 * groups * bias.nbytes  # the groups' bias gradients, written and read
    if n <= 64:
        assert byte_counter.total <= 1.02 * least[1] + (batch - 1) * bias.nbytes + sums
    # Beyond 64 tokens a window is read again, from L1, for each tile: only what is distinct comes from memory.
    if n > 64:
        # Its bias is turned, and two programs of keys keep two values of each query of their window.
        sums += 2 * bias.nbytes + 2 * groups * heads * 2 * 2 * n * 4
    # `out` stands for its own gradient here and is counted once.
    assert byte_counter.distinct <= 1.02 * least[1] + sums - out.nbytes


def test_the_unused_gradient_of_the_statistics_is_not_made() -> None:
    """Autograd would fill a tensor of zeros, a launch, for an output that has no gradient."""
    inputs, names = inputs_for("16 tokens, one warp")
    with torch.profiler.profile() as profile:
        run(ours, inputs, dtypes_for(names, torch.float32), names)
    assert not {e.key for e in profile.key_averages()} & {"aten::zeros", "aten::zero_", "aten::zeros_like"}


@pytest.mark.parametrize(
    "windows, heads, slots", [(2048, 4, 396), (128, 44, 132), (128, 64, 132), (3, 128, 132), (1, 1, 1)]
)
def test_groups_fill_the_gpu(windows: int, heads: int, slots: int) -> None:
    groups = window_tiles.window_groups(windows, heads, slots)
    assert 1 <= groups <= windows
    waves = -(-heads * groups // slots)
    work = waves * -(-windows // groups)
    assert work <= 1.25 * max(windows * heads / slots, -(-heads // slots) * 1) + 1
