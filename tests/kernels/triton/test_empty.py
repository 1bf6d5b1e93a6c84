"""A batch of no images: results of no rows, and gradients of parameters that are zeros and not what memory holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim_kernels.check.examples import SMALL, Case
from fastmim_kernels.check.self_test import OPS, listed

pytestmark = pytest.mark.usefixtures("poison")

IMAGES = {"tokens", "mask", "residual", "branch", "drop_scale", "qkv", "slots", "places", "x", "prediction", "target",
          "images", "student", "teacher", "weight of rows"}
"""Arguments whose first axis is that of the batch."""
CASES = [case for case in SMALL if case.op not in ("low_copies", "cpb_bias", "distillation_and_entropy")]


def empty(case: Case) -> dict[str, Any]:
    given = case.build()
    batch = IMAGES | {"weight"} if case.op == "distillation" else IMAGES
    return {name: value[:0] if name in batch and isinstance(value, Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op} {case.variant}".strip())
def test_nothing_comes_of_nothing(case: Case, impl: str) -> None:
    given = empty(case)
    for name in case.grads:
        given[name] = given[name].detach().requires_grad_()
    full = listed(OPS[case.op](**case.build(), impl="reference"))
    found = listed(OPS[case.op](**given, impl=impl))
    assert [out.shape for out in found] == [out.shape if not out.ndim else (0, *out.shape[1:]) for out in full]
    if not case.grads:
        return
    used = found if case.used is None else [found[i] for i in case.used]
    grads = torch.autograd.grad(used, [given[n] for n in case.grads], [torch.ones_like(out) for out in used])
    for name, grad in zip(case.grads, grads, strict=True):
        assert grad.shape == given[name].shape and not grad.any(), name


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_block_of_a_model(impl: str) -> None:
    """Ops in a row are one node elsewhere."""
    from fastmim.models import create_encoder

    small = dict(img_size=32, embed_dim=16, depths=(2, 1), num_heads=(1, 2), window_size=4)
    encoder = create_encoder({"name": "swinv2", **small}, impl=impl)
    tokens = encoder(torch.zeros(0, 3, 32, 32), torch.zeros(0, *encoder.grid, dtype=torch.bool))
    tokens.sum().backward()
    assert tokens.shape[0] == 0 and not any(p.grad.any() for p in encoder.parameters() if p.grad is not None)


def test_what_cannot_run_is_named_for_it_too() -> None:
    with pytest.raises(ValueError, match="must be 'auto' or 'torch' for float64"):
        fk.gelu(torch.zeros(0, 4, dtype=torch.float64), impl="triton")
