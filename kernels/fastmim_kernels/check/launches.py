"""Which launches a step will request, found without a GPU: ops run on fake tensors, and launches are written down.

The launchers see fake CUDA tensors of the shapes that the ops are given; what they launch is recorded with its
arguments and not executed. On a machine without a GPU the launchers choose as for :data:`H100`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime.jit import JITFunction, MockTensor

from ..common.caches import forget_caches
from ..common.define_op import PASSES
from ..common.device import H100, on_fake_cuda
from ..common.dispatch import as_on_a_gpu
from ..low_copies import on_triton as low_copies


class Launch(NamedTuple):
    """One launch: its kernel, positional arguments (tensors as ``MockTensor``), keyword arguments and grid."""

    kernel: JITFunction
    args: tuple[Any, ...]
    settings: dict[str, Any]
    grid: tuple[int, ...]
    op: str
    """Full name of the op that requested it, forward or backward."""

    @property
    def name(self) -> str:
        """Of the kernel, with its op."""
        return f"{self.op.partition('::')[2]}/{self.kernel.fn.__name__}"


class Pointer(MockTensor):
    """What Triton is told of a tensor: its dtype, and whether its first value lies at a multiple of 16 bytes."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor.dtype)
        self.offset = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        """Of memory that begins, as an allocator's does, at a multiple of 16 bytes."""
        return self.offset


class Recorder(TorchDispatchMode):
    """While it is on, every op of this package on fake tensors that takes its Triton kernels adds to ``launches``."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._op = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = PASSES.get(func._schema.name)
        if own is not None and "triton" in [arg for arg in args if isinstance(arg, str)]:
            self._op = own.name
            with torch.no_grad():
                own.run(*tree_map_only(Tensor, on_fake_cuda, args))
        return func(*args, **(kwargs or {}))

    def add(self, kernel: JITFunction, args: tuple[Any, ...], settings: dict[str, Any], grid: Any) -> None:
        """Called in place of a launch."""
        grid = grid({**dict(zip(kernel.arg_names, args, strict=False)), **settings}) if callable(grid) else grid
        pointers = tuple(Pointer(arg) if isinstance(arg, Tensor) else arg for arg in args)
        self.launches.append(Launch(kernel, pointers, settings, tuple(grid), self._op))


def launches_of(step: Callable[[], object]) -> list[Launch]:
    """The launches that ``step`` requests; it is called under a ``FakeTensorMode``, ops choose as on a GPU.

    Every tensor that it uses is made within, on the CPU.
    """
    forget_caches()
    recorder = Recorder()
    try:
        with FakeTensorMode(), as_on_a_gpu(), _written_down(recorder), recorder:
            step()
    finally:
        forget_caches()
    return recorder.launches


@contextmanager
def _written_down(recorder: Recorder) -> Iterator[None]:
    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        recorder.add(kernel, args, settings, grid)

    def table(tensors: Any) -> Tensor:
        return torch.empty(1, 3, dtype=torch.int64, device="cuda:0")

    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(JITFunction, "run", run))
        # Addresses, which fake tensors have none of; and nothing that is fake may be kept for later calls.
        stack.enter_context(patch(low_copies, "table", table))
        stack.enter_context(patch(torch.cuda, "is_current_stream_capturing", lambda: True))
        if not torch.cuda.is_available():
            stack.enter_context(patch(torch.cuda, "get_device_properties", lambda device=None: H100))
            stack.enter_context(patch(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        yield
