from __future__ import annotations

import pytest
import torch

from fastmim_kernels import local_norm_target
from fastmim_kernels.local_norm.op import OP
from tests.kernels.test_local_norm import CASES, images_for, loops

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("shape, k", CASES)
def test_against_loops(shape: tuple[int, ...], k: int, kind: str) -> None:
    images = images_for(shape, kind)
    found = local_norm_target(images, k, impl="triton")
    assert (found.double() - loops(images, k)).abs().max() <= 1e-5
    assert torch.equal(found, local_norm_target(images, k, impl="triton"))


def test_full_window_of_the_recipe() -> None:
    """k = 47 on 96 px: every program sees complete and cut windows."""
    images = images_for((1, 1, 96, 96))
    truth = local_norm_target(images.double(), 47, impl="reference")
    assert (local_norm_target(images, 47, impl="triton").double() - truth).abs().max() <= 1e-5


def test_flat_images_give_exact_zeros() -> None:
    assert local_norm_target(torch.full((1, 2, 20, 24), 2.6400001), 7, impl="triton").eq(0).all()


def test_opcheck() -> None:
    torch.library.opcheck(OP.forward.op, (images_for((1, 1, 8, 8)), 5, "triton"))
