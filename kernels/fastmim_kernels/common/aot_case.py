"""One kernel in one shipped configuration: what each kernel file states of itself for :mod:`fastmim_kernels.check`."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@dataclasses.dataclass(frozen=True)
class AotCase:
    """One kernel in one shipped configuration.

    Attributes:
        name: "op/direction/shape", unique in its module.
        kernel: The ``triton.jit`` function.
        signature: Type of each run-time argument ("*bf16", "i32", "fp32", …).
        constexprs: Value of each constexpr; an optional pointer that is absent is a constexpr None.
        divisible: Arguments (pointers and integers) that are multiples of 16, as the JIT would find.
        quick: Part of the subset that every test run compiles.
        wide_target: Smallest share of global bytes that 128-bit accesses must carry; below 0.95 only where
            the rows do not allow it.
        dot: The kernel must contain tensor-core instructions.
        persistent: One block an SM is intended.
        archs: Architectures (90 for sm_90) on which this configuration is ever launched.
        others: Precisions in which a quick case is compiled too; not fp32 where that has tiles of its own.
        maxnreg: Registers that a thread may have at most, where the launch says so.
        trips: From all arguments of a launch, and its ``grid``, how often the body of each loop of the machine code,
            by its first instruction, runs within one run of the loop around it: the mean over the programs. What
            depends on data is estimated by the most that it can be. None: no loop, but for those in which the last
            program to arrive adds partial sums. See ``check.issue_slots``.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    divisible: tuple[str, ...] = ()
    quick: bool = False
    wide_target: float = 0.95
    dot: bool = False
    persistent: bool = False
    archs: tuple[int, ...] = (80, 90, 100)
    others: tuple[str, ...] = ("fp16", "fp32")
    maxnreg: int | None = None
    trips: Callable[[Mapping[str, Any]], Sequence[float]] | None = None

    @property
    def aligned(self) -> tuple[str, ...]:
        """Of ``divisible`` what the JIT tells the compiler: not the sizes of which the kernel says that it may not."""
        hidden = {parameter.name for parameter in self.kernel.params if parameter.do_not_specialize}
        return tuple(name for name in self.divisible if name not in hidden and name not in self.constexprs)

    def key(self, arch: int) -> str:
        """Of the machine code: equal for cases that differ only in the values of run-time arguments.

        It changes with the text of the kernel and of what it calls, and with Triton's version; not, as Triton's own
        key does, with the line on which a function stands.
        """
        parts = (sources(self.kernel), sorted(self.signature.items()), sorted(self.constexprs.items()),
                 sorted(self.aligned), self.num_warps, self.num_stages, self.maxnreg, arch, triton.__version__)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def sources(kernel: JITFunction) -> list[tuple[str, str]]:
    """(name, text) of a kernel, of every Triton function that it reaches, and of the constants that these read."""
    found: dict[str, str] = {}
    waiting = [(kernel.fn.__name__, kernel)]
    while waiting:
        name, value = waiting.pop()
        if name in found:
            continue
        found[name] = value.src if isinstance(value, JITFunction) else repr(value)
        if isinstance(value, JITFunction):
            scope = value.fn.__globals__
            read = {node.id for node in ast.walk(ast.parse(value.src)) if isinstance(node, ast.Name)}
            kinds = (JITFunction, tl.constexpr, int, float, str)
            waiting += [(key, scope[key]) for key in read & scope.keys() if isinstance(scope[key], kinds)]
    return sorted(found.items())


def in_dtype(case: AotCase, dtype: str) -> AotCase:
    """``case`` with every bf16 pointer one to ``dtype``, on sm_80 and sm_90."""
    signature = {name: f"*{dtype}" if kind == "*bf16" else kind for name, kind in case.signature.items()}
    return dataclasses.replace(case, name=f"{case.name}-in-{dtype}", signature=signature,
                               archs=tuple(arch for arch in case.archs if arch < 100))
