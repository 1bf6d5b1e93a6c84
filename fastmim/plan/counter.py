"""What a step launches and moves, counted op by op on fake tensors: no GPU, no arithmetic, no memory.

Every op that reaches the dispatcher costs max(FLOPs / peak, bytes / bandwidth) of a GPU, and, honestly, those at the
efficiency of public kernels and what the schedulers need to issue a Triton kernel's instructions; bytes are those of
its tensor inputs and outputs, each once, and a view costs nothing. A custom op of ours is opened: its body
runs on fake CUDA tensors, so that each copy and each matrix product inside counts by itself, and a Triton
kernel counts the tensors that it is given. Where these do not tell how much is read (the mask decides), the op's own
declaration says it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from fastmim_kernels.common.define_op import NAMESPACE, PASSES
from fastmim_kernels.common.device import on_fake_cuda

from .hardware import Gpu
from .launch import Launch, bound
from .live import LiveBytes
from .sites import caller, short
from .triton_launches import counted_by

VIEWS = {"_unsafe_view", "_reshape_alias", "lift_fresh", "detach", "alias"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
WRITE_ONLY = {"fill_", "zero_", "full_like", "zeros_like", "ones_like", "new_zeros", "new_ones", "new_full"}
OVERWRITES = {"copy_"}


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements: an expanded axis is read once."""
    count = math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0)
    return count * tensor.element_size()


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def op_bytes(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an aten op reads and writes."""
    name = func._schema.name.rpartition("::")[2]
    inputs = tensors_of((args, kwargs))
    if name in WRITE_ONLY:
        inputs = []
    elif name in OVERWRITES:
        inputs = inputs[1:]
    if _is_foreach(func):  # it returns nothing, and writes its first list
        out = args[0]
    return sum(map(tensor_bytes, inputs)) + sum(map(tensor_bytes, tensors_of(out)))


def _is_foreach(func: Any) -> bool:
    name = func._schema.name.rpartition("::")[2]
    return name.startswith("_foreach_") and name.endswith("_")


@functools.cache
def launches_nothing(func: Any) -> bool:
    """Views, allocations and questions about a tensor."""
    if _is_foreach(func):
        return False
    name = func._schema.name.rpartition("::")[2]
    returns = func._schema.returns
    view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return (
        view or not returns or name in VIEWS or name in ALLOCATIONS or not any("Tensor" in str(r.type) for r in returns)
    )


class DispatchCounter(TorchDispatchMode):
    """Records every :class:`Launch`; use it inside a ``FakeTensorMode``.

    Args:
        shares: Of its rows that an op ("mask_tokens") reads, by what the data say: 1 for those that are not here. It
            scales an op's FLOPs, and its bytes where the op has a formula of what it moves.
        watch: Called with (op, tensor) for every tensor that an op returns, also inside custom ops.
        sites: Find the source line of each forward op and, through autograd, of its backward (slower).
        live: Told what every op makes and, of a custom op, how much its body holds beyond that.
    """

    def __init__(
        self,
        shares: Mapping[str, float] | None = None,
        watch: Callable[[str, Tensor], None] | None = None,
        sites: bool = False,
        live: LiveBytes | None = None,
    ) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.phase = "forward"
        self.shares = shares or {}
        self.watch = watch
        self.sites = sites
        self.live = live
        self._inner: LiveBytes | None = None
        self._opened: dict[Any, tuple[list[Launch], int]] = {}
        self._inside = ""
        self._site = ""
        self._forward_sites: dict[int, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside and func.namespace == "aten":
            # Below autograd an op such as matmul arrives whole.
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        transient = 0
        if func.namespace == NAMESPACE and not self._inside:
            transient = self._launch(func, args, kwargs, out)
        elif not launches_nothing(func):
            self._record(
                func.name().removeprefix("aten::"),
                op_bytes(func, args, kwargs, out),
                _flops(func, args, kwargs, out),
                out,
            )
        live = self._inner if self._inside else self.live
        if live is not None:
            live.tick(tensors_of(out), transient)
        if self.watch is not None:
            for tensor in tensors_of(out):
                self.watch(self._inside or func.name(), tensor)
        return out

    def totals(self, phase: str | None = None) -> tuple[int, int, int]:
        """(launches, bytes, FLOPs)."""
        found = [x for x in self.launches if phase in (None, x.phase)]
        return len(found), sum(x.bytes for x in found), sum(x.flops for x in found)

    def seconds(self, gpu: Gpu) -> float:
        """Pure roof of everything, launches not overlapping and free of latency."""
        return sum(x.seconds(gpu) for x in self.launches)

    def bound(self, gpu: Gpu) -> dict[str, float]:
        """The same by three roofs at public efficiency: seconds of the launches that each roof binds."""
        return bound(self.launches, gpu)

    def _record(self, op: str, moved: int, flops: int, tree: Any, issued: float = 0.0) -> None:
        found = tensors_of(tree)
        shapes = f"{short(found[0])}" if found else ""
        name = f"{self._inside}/{op}" if self._inside else op
        site = self._site or (self._find_site() if self.sites else "")
        self.launches.append(Launch(self.phase, name, site, moved, flops, shapes, issued))

    def _launch(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        """Record what a custom op launches; the same op on the same shapes is opened once. Returns transient bytes."""
        key = (func, _signature((args, kwargs)))
        if self.watch is None and key in self._opened:
            launches, transient = self._opened[key]
            site = self._find_site() if self.sites else ""
            self.launches += [dataclasses.replace(x, phase=self.phase, site=site) for x in launches]
            return transient
        first = len(self.launches)
        try:
            transient = self._open(func, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            # A body that asks for values (the torch implementations may) counts as one launch, from outside.
            del self.launches[first:]
            transient = 0
            name = func._schema.name.partition("::")[2]
            self._record(name, op_bytes(func, args, kwargs, out), _flops(func, args, kwargs, out), out)
        self._opened[key] = self.launches[first:], transient
        return transient

    def _open(self, func: Any, args: Any, kwargs: Any) -> int:
        """Run the body of a custom op on fake CUDA tensors; returns the bytes that it holds beyond its outputs."""
        from torch._library.custom_ops import OPDEFS

        name = func._schema.name
        body = OPDEFS[name]._init_fn
        declared = PASSES[name]
        rows = self.shares.get(declared.of, 1)
        total = round(_flops(func, args, kwargs, None) * rows)
        args, kwargs = tree_map_only(Tensor, on_fake_cuda, (args, kwargs))
        self._site = self._find_site() if self.sites else ""
        self._inside, first = name.partition("::")[2], len(self.launches)
        self._inner = inner = LiveBytes(tensors_of((args, kwargs)))
        try:
            with self, torch.no_grad(), counted_by(self._kernel):
                out = body(*args, **kwargs)
        finally:
            self._inside = self._site = ""
            self._inner = None
        mine = self.launches[first:]
        kernels = [x for x in mine if "/triton." in x.op]
        if kernels:
            # What the op's formula says beyond what its matrix products and kernels state is its largest kernel's.
            largest = max(kernels, key=lambda x: (x.flops == 0, x.bytes))
            largest.flops += max(total - sum(x.flops for x in mine), 0)
            if total:
                # Programs whose rows are not read return at once.
                for launch in kernels:
                    launch.issued *= rows
            if declared.moved is not None:
                share = sum(declared.moved(args, rows)) / sum(x.bytes for x in kernels)
                for launch in kernels:
                    launch.bytes = round(launch.bytes * share)
        return inner.peak() - LiveBytes().tick(tensors_of(out))

    def _kernel(self, name: str, args: Any, flops: int, issued: float) -> None:
        found = tensors_of(args)
        # Each pointer once: a buffer that is passed twice is read and written.
        self._record(f"triton.{name}", sum(map(tensor_bytes, found)), flops, found[:1], issued)
        if self.watch is not None:
            for tensor in found:
                self.watch(self._inside, tensor)

    def _find_site(self) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._forward_sites.get(node._sequence_nr(), type(node).__name__)
        site = caller()
        # An op without a node of its own finds the number of the node before, which is taken.
        self._forward_sites.setdefault(torch.autograd._get_sequence_nr() - 1, site)
        return site


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _signature(tree: Any) -> Any:
    """What the launches of an op depend on: shapes, strides and dtypes, and plain arguments as they are."""
    return tuple(
        (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else repr(x)
        for x in tree_leaves(tree, is_leaf=lambda x: x is None)
    )
