"""Every tensor of every op in every layout: columns of a matrix, views with an offset, expanded, transposed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.kernels.oracle import relative_error
from tests.kernels.triton.examples import BF16, EXAMPLES, Example, cotangent_of, run, tensors_of

pytestmark = pytest.mark.usefixtures("poison")


def column(x: Tensor) -> Tensor:
    """Every third value of its memory; between them lies what must not be read."""
    around = torch.full((*x.shape, 3), fill_of(x), dtype=x.dtype)
    around[..., 0] = x
    return around[..., 0]


def offset(x: Tensor) -> Tensor:
    """Contiguous, but one value after the begin of its memory."""
    around = torch.full((x.numel() + 2,), fill_of(x), dtype=x.dtype)
    around[1:-1] = x.flatten()
    return around[1:-1].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    """The memory of the tensor with its axes reversed."""
    return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))


def expanded(x: Tensor) -> Tensor:
    """One value in all places of the first axis (and for vectors: in all places)."""
    return x[:1].clone().expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column": column, "offset": offset, "transposed": transposed, "expanded": expanded}


def fill_of(x: Tensor) -> float:
    return float("nan") if x.is_floating_point() else 1


def cases() -> Iterator[tuple[Example, str]]:
    for example in EXAMPLES:
        given = [n for n, value in example.build().items() if tensors_of(value)]
        yield from ((example, name) for name in given if (example.op, name) not in REFUSED)
        if example.grads:
            yield example, "the incoming gradient"


REFUSED = {("low_copies", "tensors")}
"""What says so itself: contiguous parameters that begin at a multiple of 16 bytes."""


def laid_out(value: Any, layout: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, lambda t: layout(t) if t.ndim else t, value)


def plain(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.contiguous().clone(), value)


def pair_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The parameter of a low copy, or the low copy of a parameter, with the values that its partner has now."""
    other = name.removeprefix("low_") if name.startswith("low_") else f"low_{name}"
    return {other: plain(given[name]).to(given[other].dtype)} if other in given else {}


@pytest.mark.parametrize("example, name", list(cases()), ids=lambda value: getattr(value, "name", value))
def test_layout_of_one_tensor_changes_nothing(example: Example, name: str) -> None:
    """Against the reference implementation with the same values laid out contiguously, forward and every gradient."""
    given = example.build()
    low = any(t.dtype == BF16 for t in tensors_of(list(given.values())))
    for title, layout in LAYOUTS.items():
        if name == "plan" and layout is expanded:
            continue  # its tensors are made for each other

        def cotangent(o: Tensor, layout: Callable[[Tensor], Tensor] = layout) -> Tensor:
            return laid_out(cotangent_of(o), layout)

        if name in given:
            ours = given | {name: laid_out(given[name], layout)}
            ours |= pair_of(name, ours)
            found, truth = run(example, "triton", ours), run(example, "reference", plain(ours))
        else:
            found = run(example, "triton", given, cotangent)
            truth = run(example, "reference", given, lambda o, make=cotangent: plain(make(o)))
        for one, true in zip(found, truth, strict=True):
            assert relative_error(one, true) < (2e-2 if low else 1e-5), title


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.grads], ids=lambda example: example.name)
def test_layout_of_what_hooks_give_back_changes_nothing(example: Example) -> None:
    """Hooks that keep what is saved elsewhere need not keep its strides: values alone are theirs to return."""
    given = example.build()
    truth = run(example, "triton", given)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: column(t) if t.ndim else t):
        found = run(example, "triton", given)
    assert all(torch.equal(one, true) for one, true in zip(found, truth, strict=True))
