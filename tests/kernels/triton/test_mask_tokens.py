from __future__ import annotations

import pytest
import torch

from fastmim_kernels import mask_tokens
from fastmim_kernels.mask_tokens import on_triton as kernels
from fastmim_kernels.mask_tokens.op import OP
from tests.kernels.oracle import check
from tests.kernels.test_mask_tokens import VARIANTS, inputs_for, with_impl

pytestmark = pytest.mark.usefixtures("poison")
# 3x3 positions leave a partial block, 40 channels pad to 64, 17 images make two unequal programs.
SHAPES = [(3, 3, 3, 40), (17, 1, 3, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], variant: str, dtype: torch.dtype) -> None:
    inputs, names = inputs_for(shape, variant)
    check(with_impl("triton"), with_impl("reference"), inputs, dict.fromkeys(names, dtype), wrt=names)


def test_float16() -> None:
    inputs, names = inputs_for((2, 2, 3, 24), "norm+pos")
    check(with_impl("triton"), with_impl("reference"), inputs, dict.fromkeys(names, torch.float16), wrt=names)


def test_infinite_hidden_tokens_are_never_read() -> None:
    inputs, names = inputs_for((2, 2, 2, 16), "norm")
    args = {k: v.float().requires_grad_() if k in names else v for k, v in inputs.items()}
    with torch.no_grad():
        args["tokens"][args["mask"]] = float("nan")
    out = mask_tokens(**args, impl="triton")
    grads = torch.autograd.grad(out.sum(), [args[n] for n in names])
    assert torch.isfinite(out).all() and all(torch.isfinite(g).all() for g in grads)
    assert grads[0][args["mask"]].eq(0).all()


@pytest.mark.parametrize("variant", ["plain", "norm+pos"])
def test_opcheck(variant: str) -> None:
    inputs, names = inputs_for((2, 2, 2, 8), variant)
    args = {k: v.float().requires_grad_() if k in names else v for k, v in inputs.items()}
    torch.library.opcheck(OP.forward.op, (args["tokens"], args["mask"], args["mask_token"], args.get("norm_weight"),
                                args.get("norm_bias"), args.get("pos_embed"), 1e-5, torch.float32, "triton"))


@pytest.mark.parametrize("channels, positions, batch", [(128, 2304, 128), (768, 196, 64), (512, 2304, 1), (8, 1, 4096)])
def test_config_covers_everything(channels: int, positions: int, batch: int) -> None:
    cfg = kernels.config(channels, positions, batch)
    assert cfg["blocks"] * cfg["BLOCK_P"] >= positions and cfg["splits"] * cfg["per_program"] >= batch
    assert (cfg["splits"] - 1) * cfg["per_program"] < batch, "a program without images"
