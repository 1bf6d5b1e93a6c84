"""Ops in a row as one node of autograd, where nobody looks at them one by one.

A node of its own, and the look at arguments of which the op before has made half, cost the host as much as an op's
launches do. A chain is two functions that run the same passes and formulas as the ops by themselves, so that its
results and gradients are theirs bit for bit. What an op saves for its gradient is kept until the chain's is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .define_op import Kept, Op, apart, autograd_function, tuple_of
from .direct import Plain, as_given, plain_to_all, unwatched
from .saved import save as save_tensors
from .saved import saved


class Forward:
    """Runs the ops of a chain, and remembers what their gradients need."""

    def __init__(self, impl: str, given: Plain) -> None:
        self._impl, self._given = impl, given
        self._chosen: dict[Op, tuple[str, Callable]] = {}
        self.tensors: list[Tensor | None] = []
        self.kept: list[tuple[Op, int, Any]] = []

    def run(self, op: Op, *args: Any) -> Any:
        """The results of ``op``, whose arguments are checked."""
        chosen = self._chosen.get(op)
        if chosen is None:
            impl = op.choose(self._impl, self._given, op.forward.functions.names)
            chosen = self._chosen[op] = impl, op.forward.functions[impl]
        impl, function = chosen
        save, _, select = op.formulas  # type: ignore[misc]
        inputs, outputs = (*args, impl), tuple_of(function(*args))
        tensors, settings = save(inputs, outputs)
        self.kept.append((op, len(tensors), settings))
        self.tensors += tensors
        return select(inputs, outputs)


class Backward:
    """Runs their gradients, from the last to the first."""

    def __init__(self, tensors: Sequence[Tensor | None], kept: Sequence[tuple[Op, int, Any]], direct: bool) -> None:
        self._tensors, self._kept, self._direct = list(tensors), list(kept), direct

    def run(self, *grads: Tensor | None, need_first: bool = True) -> tuple[Tensor | None, ...]:
        """Gradients of the next op's first inputs; ``need_first``: that of the very first is wanted."""
        op, count, settings = self._kept.pop()
        first = len(self._tensors) - count
        kept = Kept(tuple(self._tensors[first:]), settings, (need_first,))
        del self._tensors[first:]
        assert op.formulas is not None and op.backward is not None
        found: tuple[Tensor | None, ...] = op.formulas.gradients(
            op.backward.run if self._direct else op.backward.op, kept, *grads)
        return found


def define_chain(name: str, forward: Callable, backward: Callable) -> Callable[..., Any]:
    """Make a chain.

    Args:
        name: Of the node, as profilers show it.
        forward: (:class:`Forward`, how, *tensors) → the results of the last op.
        backward: (:class:`Backward`, how, which tensors want a gradient, *grads) → gradients of the first tensors.

    Returns:
        (impl, how, *tensors) → the results, or None where the ops are to be called one by one: what they are given
        is empty or not plain, or somebody wants to see them (a compiler, a mode, a profiler), or the oracle is meant.
    """
    def run(ctx: Any, way: Forward, how: Any, *tensors: Tensor | None) -> Any:
        found = forward(way, how, *tensors)
        save_tensors(ctx, way.tensors)
        ctx.kept, ctx.how = way.kept, how
        return apart(found, tensors)

    def gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        given = next((g for g in grads if g is not None), None)
        if given is None:
            return (None,) * len(needs)
        way = Backward(saved(ctx), ctx.kept, unwatched(grads))
        found = as_given(given, backward, way, ctx.how, needs[2:], *grads)
        return None, None, *found, *(None,) * (len(needs) - 2 - len(found))

    function = autograd_function(f"fastmim::{name}", run, gradients)

    def call(impl: str, how: Any, *tensors: Tensor | None) -> Any:
        given = None if impl == "reference" else plain_to_all(tensors)
        if given is None or not given.like.numel() or torch.autograd._profiler_enabled():
            return None
        return as_given(given.like, function.apply, Forward(impl, given), how, *tensors)

    return call
