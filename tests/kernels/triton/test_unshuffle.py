from __future__ import annotations

import pytest
import torch

from fastmim_kernels import unshuffle
from fastmim_kernels.unshuffle import on_triton as kernels
from fastmim_kernels.unshuffle.op import OP
from tests.kernels.oracle import check
from tests.kernels.test_unshuffle import SHAPES, inputs_for, with_impl

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (17, 2, 3, 8)])  # 17 images make two unequal programs
def test_against_float64(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    inputs, names = inputs_for(shape)
    check(with_impl("triton"), with_impl("reference"), inputs, dict.fromkeys(names, dtype), wrt=names)


def test_opcheck() -> None:
    inputs, names = inputs_for((2, 2, 5, 8))
    args = [inputs[n].float().requires_grad_() if n in names else inputs[n]
            for n in ("tokens", "places", "mask_token", "pos_embed")]
    torch.library.opcheck(OP.forward.op, (*args, torch.float32, "triton"))


def test_hidden_places_read_no_token() -> None:
    """Where nothing is kept, the class token alone is read."""
    inputs, _ = inputs_for((2, 3, 6, 8))
    args = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    args["tokens"][:, 1:] = float("nan")
    out = unshuffle(**args, impl="triton")
    shown = torch.nn.functional.pad(args["places"] >= 0, (1, 0))
    assert out[shown][:, 0].isnan().sum() == 6 and torch.isfinite(out[~shown]).all()


@pytest.mark.parametrize("channels, length, batch", [(512, 197, 64), (512, 257, 1), (16, 17, 4096), (1024, 4097, 3)])
def test_config_covers_everything(channels: int, length: int, batch: int) -> None:
    cfg = kernels.config(channels, length, batch)
    assert cfg["blocks"] * cfg["BLOCK_P"] >= length and cfg["splits"] * cfg["per_program"] >= batch
    assert (cfg["splits"] - 1) * cfg["per_program"] < batch, "a program without images"
