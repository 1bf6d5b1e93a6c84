from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmim_kernels import linear_masked_l1, masked_l1
from fastmim_kernels.masked_loss.op import OP
from tests.kernels.test_masked_l1 import COVERED, GEOMETRIES, MAE, check_both, inputs_for, operands

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_against_float64(geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_both(masked_l1, "triton", inputs_for(geometry, False), dtype)


@pytest.mark.parametrize("loss", ["l2", "smooth_l1"])
def test_other_losses(loss: str) -> None:
    check_both(masked_l1, "triton", inputs_for(GEOMETRIES[1], False), torch.float32, loss=loss)


def test_uint8_target() -> None:
    inputs = inputs_for(GEOMETRIES[1], False)
    inputs["target"] = torch.randint(0, 256, inputs["target"].shape, dtype=torch.uint8)
    stats = {"mean": torch.tensor([0.4, 0.5, 0.6]), "std": torch.tensor([0.2, 0.3, 0.25])}
    check_both(masked_l1, "triton", inputs | stats, torch.float32)


def test_nothing_masked_is_zero() -> None:
    inputs = inputs_for(GEOMETRIES[0], False)
    prediction = inputs["prediction"].float().requires_grad_()
    loss = masked_l1(**inputs | {"prediction": prediction, "mask": torch.zeros_like(inputs["mask"])}, impl="triton")
    (grad,) = torch.autograd.grad(loss, prediction)
    assert loss.item() == 0 and grad.eq(0).all()


def test_opcheck() -> None:
    torch.library.opcheck(OP.forward.op, (*operands(inputs_for(GEOMETRIES[3], False), False)[:-1], "triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES[:5])
def test_linear_against_float64(geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_both(linear_masked_l1, "triton", inputs_for(geometry, True), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", [*COVERED, ((1, 3, 19, 38), (1, 2), (1, 2), 19)])  # 1,083 values: two pieces
def test_patch_statistics_against_float64(geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_both(linear_masked_l1, "triton", inputs_for(geometry, True), dtype, **MAE)


def test_patch_statistics_of_uint8_pixels() -> None:
    inputs = inputs_for(COVERED[0], True)
    inputs["target"] = torch.randint(0, 256, inputs["target"].shape, dtype=torch.uint8)
    stats = {"mean": torch.tensor([0.4, 0.5, 0.6]), "std": torch.tensor([0.2, 0.3, 0.25])}
    check_both(linear_masked_l1, "triton", inputs | stats, torch.float32, **MAE)
