"""The one rule by which an op is judged: its error against float64 is at most twice that of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

FLOOR = 5e-7
"""Relative error (a few float32 roundings) that is always forgiven: plain torch may be exact by luck."""

Op = Callable[..., Any]


class _Nobody(TorchDispatchMode):
    """Looks on, which is enough."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def watched(op: Op) -> Op:
    """``op`` by the dispatcher, as compilers and counters see it, not by the short ways of plain tensors."""
    def run(**kwargs: Any) -> Any:
        with _Nobody():
            return op(**kwargs)
    return run


def relative_error(value: Tensor, oracle: Tensor) -> float:
    """RMS of the difference over the RMS of the oracle (over 1 where the oracle is zero)."""
    assert value.shape == oracle.shape and torch.isfinite(value).all(), "wrong shape or not finite"
    scale = oracle.double().square().mean().sqrt().item()
    return (value.double() - oracle.double()).square().mean().sqrt().item() / (scale or 1.0)


def run(op: Op, inputs: dict[str, Any], dtypes: dict[str, torch.dtype], wrt: Sequence[str], seed: int = 0
        ) -> list[Tensor]:
    """Outputs and gradients (of a fixed random cotangent) of ``op(**inputs)`` with inputs cast by ``dtypes``."""
    args = dict(inputs)
    for name, dtype in dtypes.items():
        args[name] = args[name].detach().to(dtype).requires_grad_(name in wrt)
    outputs = op(**args)
    outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o is not None]
    if not wrt:
        return [o.detach() for o in outputs]
    generator = torch.Generator().manual_seed(seed)
    # float32 cotangents for every precision, so that all sides see the same one.
    cotangents = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, [args[n] for n in wrt], cotangents)
    return [o.detach() for o in outputs] + list(grads)


def check(op: Op, oracle: Op, inputs: dict[str, Any], dtypes: dict[str, torch.dtype], wrt: Sequence[str] = (),
          factor: float = 2.0, plain: Op | None = None, floor: float = FLOOR) -> None:
    """Assert the rule for every output and every gradient, and that repeated runs are bitwise equal.

    Args:
        op, oracle: Called with the same keyword arguments; ``plain`` (default: the oracle) is what a user
            would write and gives the error to compare with.
        inputs: Arguments; tensors in ``dtypes`` are cast, and rounded to that dtype also for the oracle.
        wrt: Names of the inputs whose gradients are compared.
        floor: Error that is forgiven; relative, but absolute where the truth is zero.
    """
    inputs = {k: v.to(dtypes[k]).double() if k in dtypes else v for k, v in inputs.items()}
    truth = run(oracle, inputs, {k: torch.float64 for k in dtypes}, wrt)
    base = run(plain or oracle, inputs, dtypes, wrt)
    ours = run(op, inputs, dtypes, wrt)
    again = run(op, inputs, dtypes, wrt)
    names = [f"output {i}" for i in range(len(truth) - len(wrt))] + [f"d {n}" for n in wrt]
    for name, t, b, o, a in zip(names, truth, base, ours, again, strict=True):
        assert torch.equal(o, a), f"{name}: two runs differ"
        error, limit = relative_error(o, t), factor * relative_error(b, t) + floor
        assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g}"
