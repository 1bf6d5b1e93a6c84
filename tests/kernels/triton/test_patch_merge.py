from __future__ import annotations

import pytest
import torch

from fastmim_kernels.patch_merge import on_triton as kernels
from fastmim_kernels.patch_merge.op import OP
from fastmim_kernels.patch_merge.op import traffic as closed_form
from tests.kernels.oracle import check
from tests.kernels.test_patch_merge import BF16, F32, SHAPES, STREAMS, inputs_for, with_impl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("stream, out", STREAMS)
@pytest.mark.parametrize("norm", [False, True])
# 2x11x9 tokens in 60 merged ones: two programs of unequal work.
@pytest.mark.parametrize("shape", [*SHAPES, (2, 11, 9, 24)])
def test_against_float64(shape: tuple[int, ...], norm: bool, stream: torch.dtype, out: torch.dtype) -> None:
    inputs, names = inputs_for(shape, norm)
    check(with_impl("triton", out), with_impl("reference", out), inputs,
          dict.fromkeys(names, F32) | {"x": stream}, wrt=names)


# 352: SwinV2-H, two blocks of channels without a norm and a padded row with one; 1: pads to 16.
@pytest.mark.parametrize("channels, norm", [(1, False), (1, True), (352, False), (352, True)])
def test_widths(channels: int, norm: bool) -> None:
    inputs, names = inputs_for((1, 3, 2, channels), norm)
    check(with_impl("triton", F32), with_impl("reference", F32), inputs, dict.fromkeys(names, F32), wrt=names)


def test_float16() -> None:
    inputs, names = inputs_for((1, 3, 4, 16), True)
    half = torch.float16
    check(with_impl("triton", half), with_impl("reference", half), inputs, dict.fromkeys(names, half), wrt=names)


@pytest.mark.parametrize("norm", [False, True])
def test_opcheck(norm: bool) -> None:
    inputs, _ = inputs_for((2, 3, 4, 8), norm)
    args = [inputs[n].float().requires_grad_() if n in inputs else None for n in ("x", "weight", "bias")]
    torch.library.opcheck(OP.forward.op, (*args, 1e-5, BF16, "triton"))


@pytest.mark.parametrize("stream", [F32, BF16])
@pytest.mark.parametrize("norm", [False, True])
def test_requested_bytes(norm: bool, stream: torch.dtype, byte_counter) -> None:  # type: ignore[no-untyped-def]
    """Two programs read the (4C,) vectors twice: 210 merged tokens make that small."""
    shape = (2, 27, 29, 32)
    x = torch.randn(shape).to(stream)
    weight = torch.ones(128) if norm else None
    forward, backward = closed_form(shape, norm=norm, itemsize=stream.itemsize)
    byte_counter.reset()
    out, mean, rstd = kernels.forward(x, weight, weight, 1e-5, BF16)
    assert byte_counter.total <= 1.02 * sum(forward[:2])
    byte_counter.reset()
    kernels.backward(out, x if norm else None, mean, rstd, weight, 27, 29, stream)
    # The second program's partial sums are not in the closed form.
    assert byte_counter.total <= 1.02 * sum(backward[:2]) + 32 * 32 * norm


@pytest.mark.parametrize("channels", [1, 96, 128, 192, 352, 704, 1024, 2048])
def test_config(channels: int) -> None:
    assert kernels.config(channels, norm=True)["BLOCK_C"] >= channels
    block = kernels.config(channels, norm=False)["BLOCK_C"]
    assert block <= 256 and (channels % 64 or channels % block == 0), "idle lanes"
