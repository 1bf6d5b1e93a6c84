"""CUDA's autocast policy on CPU tensors, so that a step traced without a GPU casts what a GPU would cast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Of the lists in torch/csrc/autocast_mode.cpp, what encoders and losses use and CPU autocast leaves alone.
TO_FLOAT32 = (
    "layer_norm",
    "native_layer_norm",
    "norm.Scalar",
    "norm.ScalarOpt_dim",
    "linalg_vector_norm",
    "exp",
    "log",
    "pow.Tensor_Scalar",
    "pow.Tensor_Tensor",
    "rsqrt",
    "reciprocal",
    "softplus",
    "cosine_similarity",
)
# These return float32, and most accumulate in it without a cast of their input.
RETURN_FLOAT32 = ("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum")


@contextlib.contextmanager
def cuda_autocast(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """``torch.autocast("cuda", dtype)`` for CPU tensors, fake ones included."""
    library = torch.library.Library("aten", "IMPL")
    for name in TO_FLOAT32:
        library.impl(name, _wide_inputs(_op(name)), "AutocastCPU")
    for name in RETURN_FLOAT32:
        library.impl(name, _wide_result(_op(name)), "AutocastCPU")
    try:
        with torch.autocast("cpu", dtype):
            yield
    finally:
        library._destroy()


def _op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _below_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU))


def _low(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _wide_inputs(op: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with _below_autocast():
            args, kwargs = tree_map_only(Tensor, lambda t: t.float() if _low(t) else t, (args, kwargs))
            return op(*args, **kwargs)

    return run


def _wide_result(op: Any) -> Any:
    position = [argument.name for argument in op._schema.arguments].index("dtype")

    def run(*args: Any, dtype: torch.dtype | None = None) -> Any:
        dtype = args[position] if len(args) > position else dtype
        with _below_autocast():
            return op(*args[:position], dtype=torch.float32 if dtype is None and _low(args[0]) else dtype)

    return run
