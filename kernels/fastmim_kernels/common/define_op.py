"""The one way to make an op: a declaration, from which torch, autograd, counters and the planner learn what it is.

An implementation is a module with the functions ``forward`` and ``backward``. :func:`define_op` registers them as
``fastmim::<name>`` and ``fastmim::<name>_backward``, with fakes, autograd and formulas of FLOPs and bytes, so that
compilers, fake tensors, selective recomputation and counters see a single call. The dispatcher's way through a custom
op takes several times as long as the work on a small map; where nobody watches, the same functions run without it.

Not by ``torch.library.triton_op``: launches are chosen in Python by properties of the device, work and recomputation
are stated for an op as a whole, and a compiler that saw our kernels inside could fuse nothing into them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from .dispatch import resolve

NAMESPACE = "fastmim"
_DIRECT = ("cpu", "cuda")
"""Devices on which an op's functions are called directly."""

Moved = Callable[[Sequence[Any], float], tuple[int, int]]


class Kept(NamedTuple):
    """What the forward pass left for the backward pass."""

    tensors: tuple[Any, ...]
    settings: tuple[Any, ...]
    needs: tuple[bool, ...]
    """Which inputs want a gradient."""


class Pass:
    """One direction of an op, with the arguments of its schema: ``op`` as torch knows it, ``run`` as a function."""

    def __init__(self, op: str, name: str, fake: Callable, run: Callable, flops: Callable | None, moved: Moved | None
                 ) -> None:
        schema = torch.library.infer_schema(fake, mutates_args=())
        definition = torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=(), schema=schema)
        definition.register_fake(fake)
        self.of, self.name, self.run, self.moved = op, f"{NAMESPACE}::{name}", run, moved
        self.op = definition._opoverload
        # An op without a formula has no matrix product inside; torch's counter counts nothing else.
        register_flop_formula(self.op.overloadpacket)(lambda *args, **_: flops(*args) if flops else 0)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args) if unwatched(args, _DIRECT) else self.op(*args)


PASSES: dict[str, Pass] = {}
"""Every op that is registered, forward and backward, by its full name."""


class Op:
    """What :func:`define_op` makes: call it with the inputs, or :meth:`hand_on` where results have several readers."""

    def __init__(self, name: str, forward: Pass, backward: Pass | None, implementations: dict[str, Callable],
                 handing_on: dict[str, Callable]) -> None:
        self.name, self.forward, self.backward = name, forward, backward
        self._alone, self._handing_on = implementations, handing_on

    def __call__(self, *args: Any, impl: str) -> Any:
        """The results, by the implementation that ``impl`` stands for, outside autocast.

        Raises:
            ValueError: As :func:`.dispatch.resolve`, or Triton, which computes in float32, is asked for float64.
        """
        return self._run(self._alone, args, impl)

    def hand_on(self, *args: Any, impl: str) -> Any:
        """As calling it, with the results that the declaration's ``readers`` hands out."""
        return self._run(self._handing_on, args, impl)

    def _run(self, functions: dict[str, Callable], args: tuple[Any, ...], impl: str) -> Any:
        tensors = _tensors(args)
        if any(t.dtype == torch.float64 for t in tensors):
            if impl == "triton":
                raise ValueError(f"{self.name}: impl='triton' computes in float32 and got float64; use impl='torch'")
            functions = {name: function for name, function in functions.items() if name != "triton"}
        device = tensors[0].device
        function = resolve(self.name, impl, functions, device)
        if not torch.is_autocast_enabled(device.type):
            return function(*args)
        with torch.autocast(device.type, enabled=False):
            return function(*args)


def define_op(
    name: str, on_torch: Any, on_triton: str | None = None, *, reference: Callable, fake: Callable,
    backward_fake: Callable | None = None, save: Callable | None = None, gradients: Callable | None = None,
    results: int = 1, readers: Callable | None = None, flops: Callable | None = None,
    backward_flops: Callable | None = None, moved: Moved | None = None, backward_moved: Moved | None = None) -> Op:
    """Make the op ``fastmim::<name>`` and, with ``backward_fake``, its gradient.

    Args:
        name: Of the op, as :func:`.dispatch.resolve` and messages have it.
        on_torch: Module whose ``forward`` and ``backward`` take the arguments of the fakes, but for ``impl``.
        on_triton: Name of the same module for Triton, relative to that of ``fake``; imported when it is needed.
        reference: The oracle: takes the inputs of the op but for ``impl`` and returns its results.
        fake: The results without values. Its annotated parameters are the op's schema; the last is ``impl: str``.
        backward_fake: The same for the gradient; None for an op through which no gradient flows.
        save: (inputs, outputs) → (tensors, settings) for backward.
        gradients: (backward, kept, *grads) → gradients of the first inputs, the others having none. ``backward`` calls
            the backward op; one of ``grads`` is a :class:`.Tensor` at least, the rest may be None.
        results: Outputs that are results. What comes behind them is for backward alone, and not handed out.
        readers: (inputs, outputs) → results for :meth:`Op.hand_on`, each of which is read by somebody else, so that
            their gradients arrive one by one, behind those of ``results`` if they are more. An input among them and
            one that occurs again share memory.
        flops: Shapes in place of tensors in the op's arguments → FLOPs of its matrix products; None for no product.
        moved: (arguments, share of the rows that are read) → (bytes read, bytes written), where the tensors that the
            kernels are given do not tell it: the mask decides, or they come as a table of pointers.
        backward_flops, backward_moved: Of the gradient.
    """
    modules = {"torch": on_torch} | ({"triton": on_triton} if on_triton else {})
    package = fake.__module__.rpartition(".")[0]
    forward = _define(name, name, fake, modules, package, "forward", flops, moved)
    if backward_fake is None or save is None or gradients is None:
        implementations = {impl: partial(_without_gradient, forward, impl) for impl in modules}
        return Op(name, forward, None, {**implementations, "reference": reference}, {})
    backward = _define(name, f"{name}_backward", backward_fake, modules, package, "backward", backward_flops,
                       backward_moved)
    formula = partial(_formula, len(forward.op._schema.arguments), backward, gradients)
    _register_autograd(forward, save, formula, results)

    def chosen(outputs: tuple[Any, ...]) -> Any:
        return outputs[0] if results == 1 else outputs[:results]

    def calls(select: Callable) -> dict[str, Callable]:
        function = _function(forward, save, formula, select)
        return {impl: partial(_call, forward, function, select, impl) for impl in modules}

    alone = {**calls(lambda inputs, outputs: chosen(outputs)), "reference": reference}
    if readers is None:
        return Op(name, forward, backward, alone, {})
    handed = {**calls(readers),
              "reference": lambda *inputs: readers((*inputs, "reference"), _tuple(reference(*inputs)))}
    return Op(name, forward, backward, alone, handed)


def unwatched(args: Sequence[Any], devices: Sequence[str] = ("cpu",)) -> bool:
    """Plain tensors on ``devices``, and nobody who wants to see the op: no compiler, no fakes, no dispatch mode."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type in devices for t in _tensors(args))


def _define(op: str, name: str, fake: Callable, modules: dict[str, Any], package: str, direction: str,
            flops: Callable | None, moved: Moved | None) -> Pass:
    at = list(inspect.signature(fake).parameters).index("impl")

    def run(*args: Any) -> Any:
        module = modules[args[at]]
        if isinstance(module, str):
            module = modules[args[at]] = importlib.import_module(module, package)
        return getattr(module, direction)(*args[:at], *args[at + 1 :])

    found = Pass(op, name, fake, run, flops, moved)
    PASSES[found.name] = found
    return found


def _function(forward: Pass, save: Callable, formula: Callable, select: Callable) -> Any:
    """The autograd function around an op whose results are ``select(inputs, outputs)``; profilers see the op's name."""
    # Not with a setup_context of its own: torch then inspects the signature at every call, at twice the cost.
    def run(ctx: Any, *inputs: Any) -> Any:
        outputs = _tuple(forward(*inputs))
        _keep(ctx, *save(inputs, outputs))
        return _apart(select(inputs, outputs), inputs)

    def backward(ctx: Any, *grads: Any) -> Any:
        return formula(ctx, grads)

    return type(forward.name, (torch.autograd.Function,), {
        "forward": staticmethod(run), "backward": staticmethod(once_differentiable(backward))})


def _register_autograd(forward: Pass, save: Callable, formula: Callable, results: int) -> None:
    """The same formula for those who see the op itself."""
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        outputs = _tuple(output)
        ctx.mark_non_differentiable(*outputs[results:])
        _keep(ctx, *save(inputs, outputs))

    torch.library.register_autograd(forward.name, lambda ctx, *grads: formula(ctx, grads[:results]),
                                    setup_context=setup)


def _call(forward: Pass, function: Any, select: Callable, impl: str, *args: Any) -> Any:
    if not torch.compiler.is_compiling():
        return function.apply(*args, impl)
    # The compiler sees the op itself; where two readers share a result, it adds their gradients.
    return select((*args, impl), _tuple(forward.op(*args, impl)))


def _without_gradient(forward: Pass, impl: str, *args: Any) -> Any:
    with torch.no_grad():
        return (forward.op if torch.compiler.is_compiling() else forward)(*args, impl)


def _keep(ctx: Any, tensors: tuple[Any, ...], settings: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)  # else a launch fills zeros for a result that nobody reads
    ctx.save_for_backward(*tensors)
    ctx.settings = settings


def _formula(inputs: int, backward: Pass, gradients: Callable, ctx: Any, grads: Sequence[Tensor | None]
             ) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs, and products in their own dtype where ``loss.backward()`` is called inside autocast."""
    given = [g for g in grads if g is not None]
    if not given:
        return (None,) * inputs
    # The saved tensors once: checkpointing gives them out a single time.
    kept = Kept(ctx.saved_tensors, ctx.settings, ctx.needs_input_grad)
    with _outside_autocast(given[0].device.type):
        found = gradients(backward, kept, *grads)
    return *found, *(None,) * (inputs - len(found))


def _outside_autocast(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _apart(found: Any, inputs: Sequence[Any]) -> Any:
    """``found`` with an alias for each input or repetition: autograd wants results to be tensors of their own."""
    if isinstance(found, Tensor):
        return found
    seen, apart = {id(t) for t in inputs if isinstance(t, Tensor)}, []
    for t in found:
        apart.append(t.detach() if id(t) in seen else t)
        seen.add(id(t))
    return tuple(apart)


def _tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found += [t for t in arg if isinstance(t, Tensor)]
    return found
