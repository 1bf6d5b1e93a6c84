from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import local_norm_target
from fastmim_kernels.local_norm.op import OP, local_statistics, traffic
from tests.kernels.oracle import relative_error

# (shape, window): several windows an image; odd edges; narrower than the window on one side and on both.
CASES = [((2, 3, 32, 40), 5), ((1, 1, 17, 31), 7), ((1, 2, 9, 70), 47), ((2, 1, 6, 5), 47), ((1, 1, 1, 2), 3)]


def images_for(shape: tuple[int, ...], kind: str = "noise") -> torch.Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if kind == "edges":  # flat halves: variance 0 within, far from 0 between
        noise = (noise[:, :, :1, :1] + (torch.arange(shape[3]) >= shape[3] // 2) * 2.0).expand(shape).contiguous()
    return noise


def loops(images: torch.Tensor, k: int) -> torch.Tensor:
    """The definition, pixel by pixel, in float64."""
    images = images.double()
    out = torch.empty_like(images)
    r = k // 2
    for y in range(images.shape[2]):
        for x in range(images.shape[3]):
            window = images[:, :, max(0, y - r) : y + r + 1, max(0, x - r) : x + r + 1].flatten(2)
            var = window.var(2, unbiased=True) if window.shape[2] > 1 else window.new_zeros(window.shape[:2])
            out[:, :, y, x] = (images[:, :, y, x] - window.mean(2)) / (var + 1e-6).sqrt()
    return out


@pytest.mark.parametrize("kind", ["noise", "edges"])
@pytest.mark.parametrize("shape, k", CASES)
def test_against_loops(shape: tuple[int, ...], k: int, kind: str) -> None:
    images = images_for(shape, kind)
    expected = loops(images, k)
    assert (local_norm_target(images, k, impl="torch").double() - expected).abs().max() <= 1e-5
    assert torch.allclose(local_norm_target(images.double(), k, impl="torch"), expected, atol=1e-9)


def test_error_is_at_most_twice_that_of_pooling() -> None:
    images = images_for((2, 3, 96, 96))
    truth = local_norm_target(images.double(), 47, impl="reference")
    pooled = relative_error(local_norm_target(images, 47, impl="reference"), truth)
    assert relative_error(local_norm_target(images, 47, impl="torch"), truth) <= 2 * pooled


@pytest.mark.parametrize("value", [0.0, 0.3, 2.6400001])
def test_flat_images_give_exact_zeros(value: float) -> None:
    assert local_norm_target(torch.full((1, 3, 20, 24), value), 7, impl="torch").eq(0).all()


def test_statistics_undo_the_normalisation() -> None:
    images = images_for((1, 3, 40, 40))
    mean, std = local_statistics(images, 9)
    assert torch.allclose(local_norm_target(images, 9) * std + mean, images, atol=1e-5)
    padded = F.avg_pool2d(images.double(), 9, 1, 4, count_include_pad=False)
    assert torch.allclose(mean.double(), padded, atol=1e-6)


def test_no_gradient_and_no_alias() -> None:
    images = torch.randn(1, 1, 8, 8, requires_grad=True)
    target = local_norm_target(images, 3)
    assert not target.requires_grad and target.data_ptr() != images.data_ptr()
    assert local_norm_target(images.detach().half(), 3).dtype == torch.float32


def test_opcheck_compile_and_flops() -> None:
    images = images_for((1, 2, 12, 12))
    torch.library.opcheck(OP.forward.op, (images, 5, "torch"))
    torch._dynamo.reset()
    compiled = torch.compile(local_norm_target, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, 5), local_norm_target(images, 5))
    with FlopCounterMode(display=False) as counter:
        local_norm_target(images, 5)
    assert counter.get_total_flops() == 0
    assert traffic((1, 2, 12, 12)) == (288 * 16, 288 * 12, 0)


@pytest.mark.parametrize("k", [0, 1, 2, 46])
def test_window_must_be_odd(k: int) -> None:
    with pytest.raises(ValueError, match="odd"):
        local_norm_target(torch.zeros(1, 1, 4, 4), k)
