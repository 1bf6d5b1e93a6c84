"""Choice of the implementation of an op: one place, no silent fall-back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TypeVar

import torch


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # a module blocked by a None in sys.modules
        return False


class Unavailable(ValueError):
    """An implementation that is known but cannot run what an op is given.

    Args:
        op: Whose it is. One op may run another's; who called is told by :func:`.arguments.explained`.
        why: The rest of the message.
    """

    def __init__(self, op: str, why: str) -> None:
        super().__init__(f"{op}: {why}")
        self.why = why


R = TypeVar("R")
HAS_TRITON = _installed("triton")
IMPLS = ("auto", "triton", "torch", "reference")
_as_on_a_gpu = False


_failed: dict[tuple[str, torch.dtype, torch.device], bool] = {}
"""What :data:`self_test` has found, so that a call costs one access."""


def self_test(op: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why ``op``'s Triton kernel must not compute in ``dtype`` on ``device``. The package puts its own test here."""
    return ""


def forget_self_tests() -> None:
    """Ask :data:`self_test` again at the next call of every op."""
    _failed.clear()


def check_impl(impl: str) -> str:
    """Return ``impl`` unchanged, or raise ``ValueError`` when it is not one of :data:`IMPLS`."""
    if not isinstance(impl, str) or impl not in IMPLS:  # an array would compare its values
        got = repr(impl) if isinstance(impl, str | int | float | None) else f"a {type(impl).__name__}"
        raise ValueError(f"impl={got}: must be one of {', '.join(IMPLS)}")
    return impl


def resolve(op: str, impl: str, implementations: Mapping[str, R], device: torch.device,
            dtype: torch.dtype = torch.float32) -> R:
    """Pick the function that runs ``op``.

    ``auto`` takes Triton on a CUDA device where the op has a Triton kernel that passed its self-test there, and
    torch elsewhere. An explicit name never falls back.

    Args:
        op: Name of the op, for messages.
        impl: One of :data:`IMPLS`.
        implementations: The functions this op has, by name; or whatever there is one of for each.
        device: Device of the op's inputs.
        dtype: In which the op computes; a kernel passes its self-test in each by itself.

    Raises:
        ValueError: ``impl`` is unknown, or this op has no such implementation.
    """
    if impl == "auto":
        picked = "triton" in implementations and not no_triton(device) and not failed_self_test(op, dtype, device)
        return implementations["triton" if picked else "torch"]
    check_impl(impl)
    if impl not in implementations:
        have = ", ".join(["auto", *implementations])
        raise Unavailable(op, f"impl={impl!r}: must be one of {have}; there is no other implementation")
    if impl == "triton" and (reason := no_triton(device)):
        raise Unavailable(op, f"impl='triton': must be 'auto' where no Triton kernel can run: {reason}")
    return implementations[impl]


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Inside, every device counts as one that runs Triton kernels: for tracing fake tensors, which execute nothing.

    Not the same as an active FakeTensorMode: ``torch.compile`` traces a CPU model under one, and runs the result.
    """
    global _as_on_a_gpu
    before, _as_on_a_gpu = _as_on_a_gpu, True
    try:
        yield
    finally:
        _as_on_a_gpu = before


def picks_triton(op: str, impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether ``op``, if it has Triton kernels, runs them for ``impl`` on ``device`` where it computes in ``dtype``."""
    return impl == "triton" or (impl == "auto" and not no_triton(device) and not failed_self_test(op, dtype, device))


def failed_self_test(op: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``op``'s Triton kernel gives wrong results in ``dtype`` on this GPU, as :data:`self_test` finds."""
    key = op, dtype, device
    found = _failed.get(key)
    if found is None:
        found = _failed[key] = bool(self_test(op, dtype, device))
    return found


# As ``torch.compiler.assume_constant_result`` would: the compiler runs it while it traces and keeps the answer. That
# function would import the compiler with this package.
failed_self_test._dynamo_marked_constant = True  # type: ignore[attr-defined]


def no_triton(device: torch.device) -> str:
    """Why Triton kernels cannot run on ``device``; empty when they can.

    On a CPU they run in Triton's interpreter only (``TRITON_INTERPRET=1``), which is for tests.
    """
    if not HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if not _as_on_a_gpu and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}, not on a CUDA GPU"
    return ""
