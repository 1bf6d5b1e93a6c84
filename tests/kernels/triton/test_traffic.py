"""Bytes that the kernels request, counted in the interpreter, against each op's closed form.

To add an op: a function that returns ``(run, bytes)`` and a row in ``CASES``. ``run`` is called with the
counter on; ``bytes`` is the total of the closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastmim_kernels.local_norm import on_triton as local_norm_kernels
from fastmim_kernels.local_norm.op import traffic as local_norm_traffic
from fastmim_kernels.mask_tokens import on_triton as mask_tokens_kernels
from fastmim_kernels.mask_tokens.op import traffic as mask_tokens_traffic
from fastmim_kernels.masked_loss import on_triton as masked_l1_kernels
from fastmim_kernels.masked_loss.op import traffic as masked_l1_traffic
from fastmim_kernels.unshuffle import on_triton as unshuffle_kernels
from fastmim_kernels.unshuffle.op import traffic as unshuffle_traffic

SLACK = 1.02
Case = Callable[[], tuple[Callable[[], object], int]]


def mask_tokens_case(direction: str, norm: bool, pos: bool) -> Case:
    def build() -> tuple[Callable[[], object], int]:
        # 15 images in one program, 2 programs of positions: parameters are read twice, not per image.
        shape, c = (15, 4, 8, 128), 128
        mask = torch.rand(shape[:3], generator=torch.Generator().manual_seed(0)) < 0.6
        x, token = torch.randn(shape).bfloat16(), torch.zeros(c)
        weight = torch.ones(c) if norm else None
        embed = torch.zeros(shape[1:]) if pos else None
        closed = mask_tokens_traffic(shape, visible=1 - mask.double().mean().item(), itemsize=2, out_itemsize=2,
                                     param_itemsize=4, norm=norm, pos=pos)
        out, mean, rstd = mask_tokens_kernels.forward(x, mask, token, weight, weight, embed, 1e-5, torch.bfloat16)
        if direction == "forward":
            return lambda: mask_tokens_kernels.forward(x, mask, token, weight, weight, embed, 1e-5,
                                                       torch.bfloat16), sum(closed[0][:2])
        # Two programs write a row of partial sums each, and the last one adds them up, by way of a group's sum.
        partial = 6 * (3 if norm else 1) * c * 4
        return lambda: mask_tokens_kernels.backward(out, None, x if norm else None, mask, mean, rstd, weight, pos,
                                                    torch.bfloat16), sum(closed[1][:2]) + partial
    return build


def masked_l1_case(direction: str, dtype: torch.dtype) -> Case:
    def build() -> tuple[Callable[[], object], int]:
        # 2x2 tokens of 32 px, mask patches of 4 px: all patches of the upper two tokens, none elsewhere.
        prediction, mask = torch.randn(2, 2, 2, 3072).bfloat16(), torch.zeros(2, 16, 16, dtype=torch.bool)
        mask[:, :8] = True
        target = torch.zeros(2, 3, 64, 64, dtype=dtype)
        stats = (torch.zeros(3), torch.ones(3)) if dtype == torch.uint8 else (None, None)
        closed = masked_l1_traffic((2, 2, 2), 3, 32, 512, hit=0.5, itemsize=2, target_itemsize=target.element_size())
        if direction == "forward":
            return lambda: masked_l1_kernels.forward(prediction, target, mask, *stats, 32, "l1"), sum(closed[0][:2])
        return lambda: masked_l1_kernels.backward(torch.ones(()), prediction, target, mask, *stats,
                                                  torch.ones(()), 32, "l1"), sum(closed[1][:2])
    return build


def unshuffle_case(direction: str, pos: bool) -> Case:
    def build() -> tuple[Callable[[], object], int]:
        # 15 images in one program of 31 patches: 16 rows of 128 channels a tile.
        shape, patches, c = (15, 9, 128), 31, 128
        order = torch.rand(15, patches, generator=torch.Generator().manual_seed(0)).argsort(1)
        places = torch.where(order < 8, order, -1)
        x, token, embed = torch.randn(shape).bfloat16(), torch.zeros(c), torch.zeros(1 + patches, c)
        closed = unshuffle_traffic(shape, patches, pos=pos)
        if direction == "forward":  # the mask token once a program
            run = lambda: unshuffle_kernels.forward(x, places, token, embed, torch.bfloat16)  # noqa: E731
            return run, sum(closed[0][:2]) + c * 4
        grad = torch.randn(15, 1 + patches, c).bfloat16()
        # Two programs write a row of partial sums each, and the last one adds them up, by way of a group's sum.
        return lambda: unshuffle_kernels.backward(grad, places, 9, pos, torch.bfloat16), sum(closed[1][:2]) + 6 * c * 4
    return build


def local_norm_case() -> tuple[Callable[[], object], int]:
    images = torch.randn(1, 2, 24, 40)
    return lambda: local_norm_kernels.forward(images, 7), sum(local_norm_traffic((1, 2, 24, 40))[:2])


CASES: dict[str, Case] = {"local_norm": local_norm_case} | {
    f"mask_tokens/{direction}{'/norm' * norm}{'/pos' * pos}": mask_tokens_case(direction, norm, pos)
    for direction in ("forward", "backward") for norm in (False, True) for pos in (False, True)
} | {
    f"unshuffle/{direction}{'/pos' * pos}": unshuffle_case(direction, pos)
    for direction, pos in (("forward", False), ("backward", False), ("backward", True))
} | {
    f"masked_l1/{direction}/{str(dtype)[6:]}": masked_l1_case(direction, dtype)
    for direction in ("forward", "backward") for dtype in (torch.float32, torch.uint8)
}


@pytest.mark.parametrize("name", CASES)
def test_requested_bytes(name: str, byte_counter) -> None:  # type: ignore[no-untyped-def]
    run, closed = CASES[name]()
    byte_counter.reset()
    run()
    assert byte_counter.total, "nothing ran in the interpreter"
    assert byte_counter.total <= SLACK * closed, f"{byte_counter.total} B requested, closed form {closed} B"


def test_the_counter_counts(byte_counter) -> None:  # type: ignore[no-untyped-def]
    """A known kernel: 3 rows of 40 bfloat16 without norm, half of them hidden."""
    mask = torch.tensor([[[True, False, False]]])
    mask_tokens_kernels.forward(torch.zeros(1, 1, 3, 40).bfloat16(), mask, torch.zeros(40), None, None, None, 1e-5,
                                torch.bfloat16)
    assert byte_counter.written == 3 * 80 and byte_counter.read == 2 * 80 + 3 + 160
