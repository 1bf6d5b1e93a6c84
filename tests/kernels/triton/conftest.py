"""Triton's interpreter, made exact, and what watches it: a byte counter, counters shared as on a stream, sanitizers.

The variable below must be set before triton is imported and holds for the whole process, so this folder
runs as its own pytest process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

TOO_LATE = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import triton.language as tl  # noqa: E402
import triton.runtime.interpreter as interpreter  # noqa: E402

from fastmim_kernels.check.interpreter import make_one_element_an_index  # noqa: E402

Builder = interpreter.InterpreterBuilder
_cast, _fp_to_fp, _dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if TOO_LATE:
        here = os.path.dirname(__file__)
        for item in items:
            if str(item.path).startswith(here):
                item.add_marker(pytest.mark.skip(
                    reason="triton was imported without TRITON_INTERPRET=1; run tests/kernels/triton by itself"))


def _float32(handle: interpreter.TensorHandle) -> np.ndarray:
    """The values of a bfloat16 handle, which holds their bits as uint16."""
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def exact_cast(self: Builder, src: interpreter.TensorHandle, dst_type: tl.dtype) -> interpreter.TensorHandle:
    """The interpreter truncates float32 to bfloat16; the hardware rounds to nearest, ties to even."""
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target != tl.bfloat16:
        wide = interpreter.TensorHandle(_float32(src), tl.float32)
        return wide if target == tl.float32 else _cast(self, wide, dst_type)
    if source.is_floating() and target == tl.bfloat16 and source != tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(src.data, dtype=np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
    return _cast(self, src, dst_type)


def exact_fp_to_fp(self: Builder, src: interpreter.TensorHandle, dst_type: tl.dtype, rounding_mode: object
                   ) -> interpreter.TensorHandle:
    if src.dtype.scalar.is_fp8() or dst_type.scalar.is_fp8():
        return _fp_to_fp(self, src, dst_type, rounding_mode)
    return exact_cast(self, src, dst_type)


def exact_dot(self: Builder, a: interpreter.TensorHandle, b: interpreter.TensorHandle, d: interpreter.TensorHandle,
              input_precision: object, max_num_imprecise_acc: object) -> interpreter.TensorHandle:
    """The interpreter multiplies the *bits* of bfloat16 operands."""
    a, b = (interpreter.TensorHandle(_float32(x), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, d, input_precision, max_num_imprecise_acc)


_atomic_rmw = Builder.create_atomic_rmw


def no_float_atomics(self: Builder, kind: object, pointers: interpreter.TensorHandle, *args: object
                     ) -> interpreter.TensorHandle:
    """Counting arrivals in integers is fine; a sum of floating-point values is not."""
    assert not pointers.get_element_ty().is_floating(), \
        "atomics make the order of a sum undefined: write partials and reduce them in order"
    return _atomic_rmw(self, kind, pointers, *args)


def no_cas(self: Builder, *args: object) -> None:
    raise AssertionError("compare-and-swap: no kernel needs it")


# At import: compiled kernels of this process, if any, do not pass through the interpreter.
make_one_element_an_index()
Builder.cast_impl = exact_cast
Builder.create_fp_to_fp = exact_fp_to_fp
Builder.create_dot = exact_dot
Builder.create_atomic_rmw, Builder.create_atomic_cas = no_float_atomics, no_cas


class ByteCounter:
    """Bytes that kernels request from global memory: ``read``, ``written``; ``sectors`` of 32 bytes touched.

    ``distinct``: bytes of the sectors, each counted once for reading and once for writing, however often it is
    touched: what passes between memory and caches that never forget.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.read = self.written = self.sectors = 0
        self._touched: dict[str, set[int]] = {"read": set(), "written": set()}

    @property
    def total(self) -> int:
        return self.read + self.written

    @property
    def distinct(self) -> int:
        return 32 * sum(map(len, self._touched.values()))

    def add(self, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle, kind: str) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        chosen = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        chosen = chosen[np.broadcast_to(mask.data, chosen.shape).astype(bool)]
        sectors = np.unique(chosen // 32)
        self.sectors += sectors.size
        self._touched[kind].update(sectors.tolist())
        setattr(self, kind, getattr(self, kind) + chosen.size * size)


@pytest.fixture
def byte_counter(monkeypatch: pytest.MonkeyPatch) -> ByteCounter:
    """Counts every masked load and store that runs in the interpreter during the test."""
    counter = ByteCounter()
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def counted_load(self: Builder, ptrs: interpreter.TensorHandle, mask: interpreter.TensorHandle, *args: object
                     ) -> interpreter.TensorHandle:
        counter.add(ptrs, mask, "read")
        return load(self, ptrs, mask, *args)

    def counted_store(self: Builder, ptrs: interpreter.TensorHandle, value: interpreter.TensorHandle,
                      mask: interpreter.TensorHandle, *args: object) -> None:
        counter.add(ptrs, mask, "written")
        store(self, ptrs, value, mask, *args)

    monkeypatch.setattr(Builder, "create_masked_load", counted_load)
    monkeypatch.setattr(Builder, "create_masked_store", counted_store)
    return counter


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what ``torch.empty``, ``empty_like`` and ``new_empty`` return with NaN (integers: their minimum)."""
    def poisoned(make):  # type: ignore[no-untyped-def]
        def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
            out = make(*args, **kwargs)
            if out.dtype.is_floating_point:
                return out.fill_(float("nan"))
            return out if out.dtype == torch.bool else out.fill_(torch.iinfo(out.dtype).min)
        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield


@pytest.fixture
def shared_counters(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The arrival counters of all launches of the test, in one memory as on a stream; each launch leaves zeros."""
    from fastmim_kernels.common import arrival

    memory = torch.zeros(4096, dtype=torch.int32)
    monkeypatch.setattr(arrival, "counters", lambda count, device: memory)
    launch = interpreter.GridExecutor.__call__

    def checked(self: interpreter.GridExecutor, *args: object, **kwargs: object) -> None:
        launch(self, *args, **kwargs)
        assert not memory.any(), f"{self.fn.__name__} leaves counts behind"

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked)
    return memory
