"""The products around a GELU: against float64, in tiles that do and do not fill, sums in any order of arrival."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim_kernels.linear.product_add import product_add
from fastmim_kernels.mlp import on_triton as kernels
from tests.kernels.oracle import FLOOR, relative_error
from tests.kernels.triton.sanitizers import visit

pytestmark = pytest.mark.usefixtures("poison")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# rows, K, N: one value; partial tiles on every side; a right half (and quarters) wholly outside; whole tiles.
SHAPES = {"one": (1, 1, 1), "partial": (150, 72, 200), "half": (20, 40, 192), "whole": (128, 64, 256)}
CASES = [("one", F32), ("partial", F32), ("partial", F16), *((name, BF16) for name in SHAPES)]


def make(shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    rows, k, n = shape
    g = torch.Generator().manual_seed(rows + n)
    normal = {name: torch.randn(size, generator=g) for name, size in
              {"x": (rows, k), "weight": (n, k), "bias": (n,), "pre": (rows, n), "back": (k, n)}.items()}
    normal["weight"] *= k**-0.5
    normal["back"] *= k**-0.5
    return {name: t if name == "bias" else t.to(dtype) for name, t in normal.items()}


def judge(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert relative_error(ours, truth) <= 2 * relative_error(plain, truth) + FLOOR


def judge_forward(found: tuple[Tensor, Tensor], x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """(x·Wᵀ + b, its GELU)."""
    truth = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    judge(found[0], plain, truth)
    judge(found[1], F.gelu(plain), F.gelu(truth))


def judge_gradient(found: tuple[Tensor, Tensor, Tensor], grad: Tensor, weight: Tensor, pre: Tensor) -> None:
    """((grad·W)·GELU'(pre), its sum over the rows, GELU(pre))."""
    truth = torch.ops.aten.gelu_backward(grad.double() @ weight.double(), pre.double())
    plain = torch.ops.aten.gelu_backward(grad @ weight, pre)
    judge(found[0], plain, truth)
    judge(found[1], plain.float().sum(0), truth.sum(0))
    judge(found[2], F.gelu(pre), F.gelu(pre.double()))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name, dtype", CASES)
def test_forward(name: str, bias: bool, dtype: torch.dtype) -> None:
    t = make(SHAPES[name], dtype)
    b = t["bias"] if bias else None
    pre, out = kernels.linear_gelu(t["x"], t["weight"], b, pre=True, gelu=True)
    judge_forward((pre, out), t["x"], t["weight"], b)
    # What is left out changes nothing in what is not.
    nothing, alone = kernels.linear_gelu(t["x"], t["weight"], b, pre=False, gelu=True)
    again, none = kernels.linear_gelu(t["x"], t["weight"], b, pre=True, gelu=False)
    assert torch.equal(alone, out) and torch.equal(again, pre) and nothing.numel() == none.numel() == 0


@pytest.mark.parametrize("name, dtype", CASES)
def test_gradient(name: str, dtype: torch.dtype) -> None:
    t = make(SHAPES[name], dtype)
    grad, weight, pre = t["x"], t["back"], t["pre"]
    dx, d_bias, out = kernels.gelu_gradient(grad, weight, pre, True)
    judge_gradient((dx, d_bias, out), grad, weight, pre)
    without = kernels.gelu_gradient(grad, weight, pre, False)
    assert torch.equal(without[0], dx) and torch.equal(without[2], out) and without[1].numel() == 0


@pytest.mark.parametrize("name, dtype", CASES)
def test_product_onto_a_tensor(name: str, dtype: torch.dtype) -> None:
    t = make(SHAPES[name], dtype)
    out = product_add(t["x"], t["back"], t["pre"])
    judge(out, t["x"] @ t["back"] + t["pre"], t["x"].double() @ t["back"].double() + t["pre"].double())


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> tuple[int, int, int]:
    """A shape of ten row blocks, the last not full, that are walked three at a time and added up four at a time."""
    forward, gradient = kernels.forward_config, kernels.gradient_config
    monkeypatch.setattr(kernels, "forward_config", lambda *args: forward(*args) | {"BM": 16, "BN": 64})
    monkeypatch.setattr(kernels, "gradient_config", lambda *args: gradient(*args) | {"SHARE": 4})
    monkeypatch.setattr(kernels, "GROUP", 3)
    return 150, 24, 130


def test_tiles_are_walked_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    t = make(small_tiles(monkeypatch), F32)
    pre, _ = kernels.linear_gelu(t["x"], t["weight"], None, pre=True, gelu=True)
    assert relative_error(pre, t["x"].double() @ t["weight"].double().t()) < 1e-6


@pytest.mark.usefixtures("shared_counters")
def test_order_of_arrival_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    t = make(small_tiles(monkeypatch), BF16)
    first = kernels.gelu_gradient(t["x"], t["back"], t["pre"], True)
    visit(monkeypatch, "reversed")
    second = kernels.gelu_gradient(t["x"], t["back"], t["pre"], True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    exact = torch.ops.aten.gelu_backward(t["x"].double() @ t["back"].double(), t["pre"].double())
    assert relative_error(first[1], exact.sum(0)) < 1e-6


def product_bytes(rows: int, k: int, n: int, tiles: dict[str, int], item: int) -> int:
    """Each operand once per tile of the other side."""
    return item * k * (rows * -(-n // tiles["BN"]) + n * -(-rows // tiles["BM"]))


@pytest.mark.parametrize("shape", [SHAPES["whole"], SHAPES["partial"]])
def test_requested_bytes(shape: tuple[int, int, int], byte_counter) -> None:  # type: ignore[no-untyped-def]
    rows, k, n = shape
    t, hidden = make(shape, BF16), 2 * rows * n
    tiles = kernels.forward_config(n, k, BF16, 90)
    kernels.linear_gelu(t["x"], t["weight"], t["bias"], pre=True, gelu=True)
    blocks = -(-rows // tiles["BM"])
    assert byte_counter.written == 2 * hidden
    assert byte_counter.read == product_bytes(rows, k, n, tiles, 2) + 4 * n * blocks
    byte_counter.reset()
    kernels.gelu_gradient(t["x"], t["back"], t["pre"], True)
    # The sums of the row blocks, of their one group, and of all; the counters set to 0 again.
    across = -(-n // kernels.gradient_config(n, k, BF16, 90)["BN"])
    assert byte_counter.written == 2 * hidden + 4 * n * (blocks + 2) + 8 * across
    assert byte_counter.read == product_bytes(rows, k, n, tiles, 2) + hidden + 4 * n * (blocks + 1)


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("depth", [96, 128, 352, 4096])
def test_shipped_widths_need_no_masks_inside(depth: int, sm: int) -> None:
    for config in (kernels.forward_config, kernels.gradient_config):
        tiles = config(4 * depth, depth, BF16, sm)
        assert 4 * depth % tiles["BN"] == 0 and depth % tiles["BK"] == 0
