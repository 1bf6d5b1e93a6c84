"""The gradients of weight and bias in one pass, whole and split over the rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastmim_kernels import linear
from fastmim_kernels.linear import weight_gradient as kernels
from fastmim_kernels.linear.op import OP
from tests.kernels.oracle import check, relative_error
from tests.kernels.triton.sanitizers import visit
from tests.kernels.triton.test_linear_gelu import BF16, F16, F32, judge

pytestmark = pytest.mark.usefixtures("poison")

# rows, N, K: one value; partial tiles everywhere; 1,100 rows of one tile, split in two; three tiles of N.
SHAPES = {"one": (1, 1, 1), "partial": (77, 72, 200), "split": (1100, 72, 40), "wide": (100, 384, 128)}


def make(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, n, k = shape
    g = torch.Generator().manual_seed(rows + n)
    return torch.randn(rows, n, generator=g).to(dtype), torch.randn(rows, k, generator=g).to(dtype)


@pytest.mark.parametrize("name, dtype, out", [("partial", F32, F32), ("partial", F16, F32), ("split", BF16, BF16),
                                              *((name, BF16, F32) for name in SHAPES)])
def test_against_float64(name: str, dtype: torch.dtype, out: torch.dtype) -> None:
    grad, x = make(SHAPES[name], dtype)
    dw, d_bias = kernels.weight_gradient(grad, x, out)
    assert dw.dtype == out and d_bias.dtype == F32
    truth, sums = grad.double().t() @ x.double(), grad.double().sum(0)
    judge(dw, (grad.float().t() @ x.float()).to(out), truth)
    judge(d_bias, grad.float().sum(0), sums)


@pytest.mark.usefixtures("shared_counters")
@pytest.mark.parametrize("at_once, groups", [(4, 1), (40, 4)])
def test_split_in_any_order(at_once: int, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,100 rows in 3 and in 9 parts (of two blocks of rows each; the last has one): the same bits backwards."""
    monkeypatch.setattr(kernels, "programs_at_once", lambda device: at_once)
    monkeypatch.setattr(kernels, "PART", 2)
    grad, x = make(SHAPES["split"], BF16)
    parts, share = kernels.split_rows(1100, 1, 64, at_once)
    assert parts == min(at_once, 9) and -(-parts // share) == groups - (groups > 1)
    first = kernels.weight_gradient(grad, x, F32)
    visit(monkeypatch, "reversed")
    second = kernels.weight_gradient(grad, x, F32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert relative_error(first[0], grad.double().t() @ x.double()) < 1e-6
    assert relative_error(first[1], grad.double().sum(0)) < 1e-6


@pytest.mark.parametrize("rows", [1, 63, 64, 4608, 294912])
@pytest.mark.parametrize("tiles", [1, 3, 48, 300])
def test_no_part_is_empty(rows: int, tiles: int) -> None:
    parts, share = kernels.split_rows(rows, tiles, 64, 264)
    blocks = -(-rows // 64)
    each = -(-blocks // parts)
    assert (parts - 1) * each < blocks <= parts * each and 1 <= share <= parts
    assert parts == 1 or (parts * tiles <= 264 and share * share < 2 * parts + 16)


def test_requested_bytes(byte_counter) -> None:  # type: ignore[no-untyped-def]
    """Operands once per tile of the other side; each part written, read, and its group's sum once more."""
    rows, n, k = 1100, 384, 128
    grad, x = make((rows, n, k), BF16)
    tiles = kernels.weight_config(n, k, BF16, 90)
    kernels.weight_gradient(grad, x, F32)
    blocks = -(-n // tiles["BN"]) * -(-k // tiles["BK"])
    parts, share = kernels.split_rows(rows, blocks, tiles["BR"], 6)
    assert parts == 2 == share, "one group"
    operands = 2 * rows * (n * -(-k // tiles["BK"]) + k * -(-n // tiles["BN"]))
    partial = 4 * (n * k + n)
    assert byte_counter.read == operands + partial * parts + 4 * n * k
    assert byte_counter.written == partial * parts + 4 * n * k + partial + 8 * blocks


@pytest.mark.parametrize("x, parameters", [(F32, F32), (BF16, F32), (BF16, BF16)])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear(bias: bool, x: torch.dtype, parameters: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    inputs = {"x": torch.randn(3, 13, 24, generator=g), "weight": torch.randn(40, 24, generator=g) * 0.2}
    inputs |= {"bias": torch.randn(40, generator=g)} if bias else {}
    check(lambda **t: linear(**t, impl="triton"), lambda **t: linear(**t, impl="reference"), inputs,
          dict.fromkeys(inputs, parameters) | {"x": x}, wrt=list(inputs))


def test_opcheck() -> None:
    args = [torch.randn(size, requires_grad=True) for size in ((2, 3, 16), (24, 16), (24,))]
    torch.library.opcheck(OP.forward.op, (*args, None, None, "triton"))


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        linear(torch.zeros(2, 3).double(), torch.zeros(4, 3).double(), impl="triton")
