"""What a call with a wrong argument is told: the op, the argument, what it takes and what it got, in one line.

Shapes and dtypes are checked by the op itself, by comparisons that a right call makes anyway (:func:`wrong`,
:func:`floating`). Types and devices are looked at when a call has failed (:func:`explained`): a right call pays for a
``try``, and a wrong one does not end in the words of whatever stumbled over it. Values are looked at on a CPU alone
(:func:`within`, :func:`as_mask`), and of small tensors.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .direct import plain_to_all
from .dispatch import IMPLS, Unavailable

P = ParamSpec("P")
R = TypeVar("R")

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES: dict[str, tuple[str, Callable[[torch.dtype], bool]]] = {
    "floating": ("of float16, bfloat16, float32 or float64", FLOATING.__contains__),
    "mask": ("of bool or 0 and 1", lambda dtype: not dtype.is_complex),
    "pixels": ("floating point or of uint8", (*FLOATING, torch.uint8).__contains__),
    "index": ("of int64", (torch.int64,).__contains__),
    "any": ("of any dtype", lambda dtype: True),
}
"""Kind of a tensor → how a message says it, and whether a dtype is one."""

_STUMBLES = (ValueError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError)
"""What a wrong argument may end in. Neither a compiler's errors nor the signals of checkpointing."""
_WORDS = {Tensor: "a tensor", int: "a whole number", float: "a number", bool: "True or False", str: "a string",
          torch.dtype: "a torch.dtype", types.NoneType: "None"}  # fmt: skip
_INSTANCES: dict[Any, Any] = {
    int: (numbers.Integral, torch.SymInt), float: (numbers.Real, torch.SymFloat, torch.SymInt),
    bool: (bool, torch.SymBool),
}  # fmt: skip


def explained(**kinds: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A public op whose failed calls are explained: a ``ValueError`` where an argument is wrong.

    Args:
        kinds: Argument → kind of its tensors by :data:`DTYPES`, where that is not "floating".
    """
    def decorate(op: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(op)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if is_compiling():  # which would have to trace the explanation
                return op(*args, **kwargs)
            try:
                return op(*args, **kwargs)
            except _STUMBLES as error:
                explanation = _explanation(op, kinds, args, kwargs, error)
                if explanation is None:
                    raise
            raise explanation

        return call

    return decorate


def wrong(op: str, argument: str, takes: str, got: Any) -> ValueError:
    """The error of an argument, to be raised."""
    return ValueError(f"{op}: {argument} must be {takes}, got {shown(got)}")


def floating(op: str, *tensors: Tensor | None) -> None:
    """Raise ``ValueError`` for a tensor of no dtype that ops compute in; which it is, :func:`explained` finds."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in FLOATING:
            raise ValueError(f"{op}: tensors must be {DTYPES['floating'][0]}, got {shown(tensor)}")


def whole(value: Any) -> Any:
    """A whole number of numpy as one of Python, which kernels and schemas take; anything else as it is."""
    # Not 0-d tensors: the host would wait for one of a GPU. Nor what a compiler knows by a symbol.
    return operator.index(value) if type(value) is not int and isinstance(value, numbers.Integral) else value


def within(op: str, argument: str, values: Tensor, least: int, most: int, what: str) -> None:
    """Raise ``ValueError`` unless all whole ``values``, which are ``what``, lie from ``least`` to ``most``.

    One pass, on a CPU. On a GPU the host would have to wait for the values, and compilers and fakes have none.
    """
    if not at_hand(values) or not values.numel():
        return
    low, high = (int(end) for end in torch.aminmax(values))
    if low < least or high > most:
        raise ValueError(f"{op}: {argument} must hold {what}, {least} to {most}, got {low} to {high}")


def as_mask(op: str, mask: Tensor) -> Tensor:
    """``mask`` in bool.

    Raises:
        ValueError: It holds values other than 0 and 1. These are looked at as :func:`within` does; elsewhere all but 0
            count as 1.
    """
    if mask.dtype == torch.bool:
        return mask
    found = mask != 0
    if at_hand(mask) and not torch.equal(found.to(mask.dtype), mask):
        raise ValueError(f"{op}: mask must hold 0 and 1 alone, got others in {shown(mask)}")
    return found


def at_hand(values: Tensor) -> bool:
    """Whether ``values`` can be looked at without waiting: plain ones on a CPU, and nobody who looks into the op."""
    return values.is_cpu and plain_to_all((values,)) is not None


def check_product(op: str, x: Tensor, name: str, weight: Tensor, weight_name: str, bias: Tensor | None, bias_name: str
                  ) -> None:
    """Raise ``ValueError`` unless ``x·weightᵀ + bias`` are (…, K), (N, K) and (N,) or None; ``name`` is that of x."""
    shape, columns = weight.shape, x.shape[-1:]
    if not columns or not columns[0]:
        raise wrong(op, name, "(…, K) with K of 1 or more", x)
    if len(shape) != 2 or shape[1:] != columns or not shape[0]:
        raise wrong(op, weight_name, f"(N, {columns[0]}) for {name} of {tuple(x.shape)}", weight)
    if bias is not None and bias.shape != shape[:1]:
        raise wrong(op, bias_name, f"{tuple(shape[:1])} for {weight_name} of {tuple(shape)}", bias)


def check_devices(op: str, tensors: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` for tensors on several devices; which is elsewhere is found by :func:`explained`."""
    if len(devices := {str(t.device): None for t in tensors}) > 1:
        raise ValueError(f"{op}: all tensors must be on one device, got {' and '.join(devices)}")


def check_norm(op: str, eps: float, **dtypes: torch.dtype | None) -> None:
    """Raise ``ValueError`` unless ``eps`` of a LayerNorm is positive and finite, and results are floating point."""
    if not 0 < eps < math.inf:
        raise wrong(op, "eps", "a number above 0, for example 1e-5", eps)
    for argument, dtype in dtypes.items():
        if dtype is not None and dtype not in FLOATING:
            raise wrong(op, argument, "float16, bfloat16, float32, float64 or None", dtype)


def shown(value: Any) -> str:
    """A value in a few words, without its data."""
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f", {value.layout}"
        shape = "nested" if value.is_nested else tuple(value.shape)
        return f"{shape} ({str(value.dtype).removeprefix('torch.')} on {value.device}{layout})"
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named one
        return f"a {type(value).__name__}"
    if isinstance(value, list | tuple) and not all(isinstance(v, int | float | str | None) for v in value):
        few = ", ".join(map(shown, value[:3]))
        return f"a {type(value).__name__} of {len(value)}: {few}{', …' if len(value) > 3 else ''}"
    if isinstance(value, int | float | str | list | tuple | torch.dtype | None):
        text = " ".join(repr(value).split())
        return text if len(text) < 80 else f"{text[:77]}…"
    kind, of = f"{type(value).__module__.partition('.')[0]}.{type(value).__qualname__}", getattr(value, "shape", None)
    return f"a {kind} of shape {tuple(of)}" if isinstance(of, tuple) else f"a {kind}"


def _explanation(op: Callable, kinds: dict[str, str], args: Sequence[Any], kwargs: dict[str, Any], error: Exception
                 ) -> ValueError | None:
    """What to raise in place of ``error``, if anything."""
    # Tensors without values explain what others stumbled over, and no words of ours: some ops take them.
    if fault := _fault(op, kinds, args, kwargs, isinstance(error, ValueError)):
        return ValueError(fault)
    # In the name of the op that was called, which may run another.
    return Unavailable(op.__name__, error.why) if isinstance(error, Unavailable) else None


def _fault(op: Callable, kinds: dict[str, str], args: Sequence[Any], kwargs: dict[str, Any], empty: bool) -> str:
    """What is wrong with the arguments of ``op`` by their types, dtypes and devices; empty where nothing is.

    Args:
        empty: Tensors may be.
    """
    try:
        given = inspect.signature(op).bind(*args, **kwargs).arguments
    except TypeError:  # one too many or too few, as Python's own message says
        return ""
    hints = typing.get_type_hints(op)
    impl = given.get("impl", "auto")
    if not isinstance(impl, str) or impl not in IMPLS:  # an array would compare its values
        return f"{op.__name__}: impl={shown(impl)}: must be one of {', '.join(IMPLS)}"
    for name, value in given.items():
        takes = _must_be(value, hints[name], kinds.get(name, "floating"))
        if takes:
            return str(wrong(op.__name__, name, takes, value))
    tensors = [(name, tensor) for name, value in given.items() for tensor in _tensors(value)]
    return _misplaced(op.__name__, tensors, empty)


def _misplaced(op: str, tensors: list[tuple[str, Tensor]], empty: bool) -> str:
    """Which of the named ``tensors`` is on another device than the others, or ``empty`` and must not be."""
    for name, tensor in tensors:
        first, one = tensors[0]
        if tensor.device.type == "meta":
            return str(wrong(op, name, "on a CPU or a GPU (for shapes alone, use FakeTensorMode)", tensor))
        if tensor.device != one.device:
            return str(wrong(op, name, f"on {one.device} as {first}", tensor))
        if not empty and not tensor.numel():
            return str(wrong(op, name, "a tensor with values", tensor))
    return ""


def _must_be(value: Any, hint: Any, kind: str) -> str:
    """What ``value`` must be and is not; empty where it is."""
    if not _is(value, hint):
        return _said(hint)
    if float in (hint, *typing.get_args(hint)) and isinstance(value, int) and abs(value) > sys.float_info.max:
        return "a number that a float can hold"
    words, is_one = DTYPES[kind]
    if any(not is_one(t.dtype) or t.layout is not torch.strided or t.is_nested for t in _tensors(value)):
        return f"dense and {words}"
    return ""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple):  # not a plan, whose tensors are of kinds of their own
        for part in value:
            yield from _tensors(part)


def _is(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the annotation ``hint`` says."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is None:
        return isinstance(value, _INSTANCES.get(hint, hint)) and not (hint in (int, float) and isinstance(value, bool))
    if isinstance(value, str) or not isinstance(value, Sequence | torch.nn.ParameterList):
        return False
    if origin is tuple and parts[-1] is not ...:
        return len(value) == len(parts) and all(map(_is, value, parts))
    return all(_is(v, parts[0]) for v in value)


def _said(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_said, parts))
    if origin is tuple and parts[-1] is not ...:
        return f"a tuple of {len(parts)} of which each is {_said(parts[0])}"
    if origin is not None:
        return f"a sequence of which each is {_said(parts[0])}"
    return _WORDS.get(hint, f"a {getattr(hint, '__name__', hint)}")
