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
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from .arguments import check_devices
from .caches import in_memory_of_others
from .device import on_device_of
from .direct import Plain, as_given, check_whole, dtype_of, plain_to_all, tensors_of, unwatched
from .dispatch import Unavailable, resolve
from .saved import save as save_tensors
from .saved import saved

NAMESPACE = "fastmim"

R = TypeVar("R")
Moved = Callable[[Sequence[Any], float], tuple[int, int]]


class Kept(NamedTuple):
    """What the forward pass left for the backward pass."""

    tensors: tuple[Any, ...]
    settings: tuple[Any, ...]
    needs: tuple[bool, ...]
    """Which inputs want a gradient."""


class Pass:
    """One direction of an op, with the arguments of its schema: ``op`` as torch knows it, or its plain functions."""

    def __init__(self, op: str, name: str, fake: Callable, functions: _Functions, flops: Callable | None,
                 moved: Moved | None) -> None:
        self.of, self.name, self.functions, self.moved = op, f"{NAMESPACE}::{name}", functions, moved
        self._impl = list(inspect.signature(fake).parameters).index("impl")
        schema = torch.library.infer_schema(fake, mutates_args=())
        definition = torch.library.custom_op(self.name, self._run_apart, mutates_args=(), schema=schema)
        definition.register_fake(fake)
        self.op = definition._opoverload
        # An op without a formula has no matrix product inside; torch's counter counts nothing else.
        register_flop_formula(self.op.overloadpacket)(lambda *args, **_: flops(*args) if flops else 0)
        PASSES[self.name] = self

    def run(self, *args: Any) -> Any:
        """The function of the implementation that ``args`` names."""
        at = self._impl
        return self.functions[args[at]](*(args[:at] + args[at + 1 :]))

    def _run_apart(self, *args: Any) -> Any:
        """The same for torch, which wants every result to be a new tensor: :func:`.rows.nothing` gives one to many, and
        a gradient that was kept may be what is asked for."""
        with in_memory_of_others(), on_device_of(tensors_of(args)[0]):
            found, given = self.run(*args), set(map(id, args))
        if not isinstance(found, tuple):
            return found
        return tuple(t.clone() if id(t) in given else t if t.numel() else torch.empty_like(t) for t in found)


class _Functions(dict[str, Callable]):
    """Implementation → its function of one direction; a module given by name is imported when it is asked for."""

    def __init__(self, modules: dict[str, Any], package: str, direction: str) -> None:
        super().__init__()
        self._modules, self._package, self._direction = modules, package, direction
        self.names = {impl: impl for impl in modules}

    def __missing__(self, impl: str) -> Callable:
        module = self._modules[impl]
        module = importlib.import_module(module, self._package) if isinstance(module, str) else module
        self[impl] = getattr(module, self._direction)
        return self[impl]


PASSES: dict[str, Pass] = {}
"""Every op that is registered, forward and backward, by its full name."""


class Formulas(NamedTuple):
    """What an op's declaration says of its gradient, see :func:`define_op`."""

    save: Callable
    gradients: Callable
    select: Callable
    """(inputs, outputs) → results."""


class Op:
    """What :func:`define_op` makes: call it with the inputs.

    Args:
        eager, compiled: Each implementation as a function of whether the tensors are plain and nobody watches, and of
            the inputs; for compilers, which see the op itself.
        formulas: None for an op through which no gradient flows.
        hand_on: The same op with the results that the declaration's ``readers`` hands out.
    """

    def __init__(self, name: str, forward: Pass, backward: Pass | None, eager: dict[str, Callable],
                 compiled: dict[str, Callable], formulas: Formulas | None = None, hand_on: Op | None = None) -> None:
        self.name, self.forward, self.backward, self.formulas = name, forward, backward, formulas
        self._eager, self._compiled = eager, compiled
        self.hand_on = self if hand_on is None else hand_on

    def __call__(self, *args: Any, impl: str) -> Any:
        """The results, by the implementation that ``impl`` stands for, outside autocast.

        Raises:
            ValueError: As :func:`.dispatch.resolve`, or Triton, which computes in float32, is asked for float64.
        """
        # The one place where a call leaves the direct way: for tensors that are not plain, for who wants to see the op.
        direct = plain_to_all(args)
        if direct is None:
            return self._by_dispatcher(args, impl)
        function = self.choose(impl, direct, self._eager)
        if not direct.like.numel():  # an empty batch: there is nothing to be fast at, and no kernel expects it
            function = self._eager["reference"]
        return as_given(direct.like, function, True, *args)

    def choose(self, impl: str, given: Plain, functions: Mapping[str, R]) -> R:
        """What ``impl`` stands for on ``given`` tensors, of one thing for each implementation."""
        functions = self._in_float64(functions, impl) if given.double else functions
        return resolve(self.name, impl, functions, given.like.device, given.dtype)

    def _by_dispatcher(self, args: tuple[Any, ...], impl: str) -> Any:
        """The same as torch and all who watch it see it."""
        tensors = tensors_of(args)
        functions: Mapping[str, Callable] = self._compiled
        if not is_compiling():
            functions = self._eager
            check_whole(tensors)
            check_devices(self.name, tensors)
            if impl != "reference":
                self._check_seen()
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            functions = self._in_float64(functions, impl)
        function = resolve(self.name, impl, functions, tensors[0].device, dtype_of(args))
        return as_given(tensors[0], function, False, *args)

    def _check_seen(self) -> None:
        """Raise ``RuntimeError`` where torch would have to look into the op, which the oracle alone allows."""
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(f"{self.name}: torch.func's transforms cannot look into this op; build the model with "
                               "impl='reference'")
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError(f"{self.name}: torch.jit.trace cannot record this op; build the model with "
                               "impl='reference', or use torch.export")

    def _in_float64(self, functions: Mapping[str, R], impl: str) -> Mapping[str, R]:
        if impl == "triton":
            raise Unavailable(self.name, "impl='triton': must be 'auto' or 'torch' for float64; the kernels "
                              "compute in float32")
        return {name: function for name, function in functions.items() if name != "triton"}


def define_op(
    name: str, on_torch: Any, on_triton: str | None = None, *, reference: Callable, fake: Callable,
    backward_fake: Callable | None = None, save: Callable | None = None, gradients: Callable | None = None,
    results: int = 1, readers: Callable | None = None, flops: Callable | None = None,
    backward_flops: Callable | None = None, moved: Moved | None = None, backward_moved: Moved | None = None) -> Op:
    """Make the op ``fastmim::<name>`` and, with ``backward_fake``, its gradient.

    Args:
        name: Of the op, as :func:`.dispatch.resolve` and messages have it.
        on_torch: Module whose ``forward`` and ``backward`` take the arguments of the fakes, but for ``impl``. Its
            ``composed``, where it has one, takes those of ``forward`` and returns the results (what ``readers`` hands
            out, if given) with a graph of its own, or None where that would keep or move more than the op's.
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
    forward = Pass(name, name, fake, _Functions(modules, package, "forward"), flops, moved)
    if backward_fake is None or save is None or gradients is None:
        functions: dict[str, Callable] = {impl: partial(_without_gradient, forward, impl) for impl in modules}
        functions["reference"] = partial(_true, reference)
        return Op(name, forward, None, functions, functions)
    backward = Pass(name, f"{name}_backward", backward_fake, _Functions(modules, package, "backward"), backward_flops,
                    backward_moved)
    formula = partial(_formula, len(forward.op._schema.arguments), backward, gradients)
    _register_autograd(forward, save, formula, results)

    def op(select: Callable, oracle: Callable, hand_on: Op | None = None, composed: Callable | None = None) -> Op:
        function = _function(forward, save, formula, select)
        eager: dict[str, Callable] = {impl: partial(_recorded, function, forward, select, impl) for impl in modules}
        if composed is not None:
            eager["torch"] = partial(_composed_or, composed, eager["torch"])
        compiled: dict[str, Callable] = {impl: partial(_compiled, forward, select, impl) for impl in modules}
        truth = {"reference": partial(_true, oracle)}
        formulas = Formulas(save, gradients, select)
        return Op(name, forward, backward, eager | truth, compiled | truth, formulas, hand_on)

    def chosen(_: tuple[Any, ...], outputs: tuple[Any, ...]) -> Any:
        return outputs[0] if results == 1 else outputs[:results]

    composed = getattr(on_torch, "composed", None)
    if readers is None:
        return op(chosen, reference, composed=composed)
    handed = op(readers, lambda *inputs: readers((*inputs, "reference"), tuple_of(reference(*inputs))),
                composed=composed)
    return op(chosen, reference, handed)


def _function(forward: Pass, save: Callable, formula: Callable, select: Callable) -> Any:
    """The autograd function around an op whose results are ``select(inputs, outputs)``; profilers see the op's name."""
    # Not with a setup_context of its own: torch then inspects the signature at every call, at twice the cost.
    def run(ctx: Any, impl: str, plain: bool, *args: Any) -> Any:
        inputs, ctx.plain = (*args, impl), plain
        outputs = tuple_of(forward.functions[impl](*args) if plain else forward.op(*inputs))
        tensors, settings = save(inputs, outputs)
        _keep(ctx, tensors, settings, ctx.needs_input_grad[2:])
        return apart(select(inputs, outputs), inputs)

    def backward(ctx: Any, *grads: Any) -> Any:
        return None, None, *formula(ctx, grads)[:-1]

    return autograd_function(forward.name, run, backward)


def autograd_function(name: str, forward: Callable, backward: Callable) -> Any:
    """The autograd function of this name, once differentiable."""
    once = once_differentiable(backward)

    def checked(ctx: Any, *grads: Any) -> Any:
        # Who asks for a graph of the gradient is told that there is none; the others need not pay for the question.
        return once(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(checked)})


def _recorded(function: Any, forward: Pass, select: Callable, impl: str, plain: bool, *args: Any) -> Any:
    """The autograd function, which costs the host as much as a small op; without a graph its forward pass alone."""
    if not plain or torch.is_grad_enabled():
        return function.apply(impl, plain, *args)
    return apart(select((*args, impl), tuple_of(forward.functions[impl](*args))), args)


def _register_autograd(forward: Pass, save: Callable, formula: Callable, results: int) -> None:
    """The same formula for those who see the op itself."""
    def setup(ctx: Any, inputs: Any, output: Any) -> None:
        outputs = tuple_of(output)
        ctx.mark_non_differentiable(*outputs[results:])
        tensors, settings = save(inputs, outputs)
        _keep(ctx, tensors, settings, ctx.needs_input_grad)

    torch.library.register_autograd(forward.name, lambda ctx, *grads: formula(ctx, grads[:results]),
                                    setup_context=setup)


def _composed_or(composed: Callable, apart: Callable, plain: bool, *args: Any) -> Any:
    """Results with a graph that costs a CPU less than the op's, where there is one; who watches still sees the op."""
    found = composed(*args) if plain else None
    return apart(plain, *args) if found is None else found


def _compiled(forward: Pass, select: Callable, impl: str, plain: bool, *args: Any) -> Any:
    """The compiler sees the op itself; where two readers share a result, it adds their gradients."""
    return select((*args, impl), tuple_of(forward.op(*args, impl)))


def _without_gradient(forward: Pass, impl: str, plain: bool, *args: Any) -> Any:
    with torch.no_grad():
        return (forward.run if plain else forward.op)(*args, impl)


def _true(oracle: Callable, plain: bool, *args: Any) -> Any:
    return oracle(*args)


def _keep(ctx: Any, tensors: tuple[Any, ...], settings: tuple[Any, ...], needs: tuple[bool, ...]) -> None:
    save_tensors(ctx, tensors)
    ctx.settings, ctx.needs = settings, needs


def _formula(inputs: int, backward: Pass, gradients: Callable, ctx: Any, grads: Sequence[Tensor | None]
             ) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs, and products in their own dtype where ``loss.backward()`` is called inside autocast."""
    for given in grads:
        if given is not None:
            break
    else:
        return (None,) * inputs
    kept = Kept(saved(ctx), ctx.settings, ctx.needs)
    call = backward.run if getattr(ctx, "plain", False) and unwatched(grads) else backward.op
    found = as_given(given, gradients, call, kept, *grads)
    return *found, *(None,) * (inputs - len(found))


def apart(found: Any, inputs: Sequence[Any]) -> Any:
    """``found`` with an alias for each input or repetition: autograd wants results to be tensors of their own."""
    if isinstance(found, Tensor):
        return found
    seen, apart = set(map(id, inputs)), []
    for t in found:
        apart.append(t.detach() if id(t) in seen else t)
        seen.add(id(t))
    return tuple(apart)


def tuple_of(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
