"""Building an objective for ZeRO-3 without ever holding the whole of it.

The objective is constructed on the meta device while its random and filling operations are recorded. They are
then replayed in the same order, one parameter in memory at a time, each cut among the ranks as soon as its last
operation is done. So every rank gets its share of exactly the weights that a plain construction from the same
seed gives, however the constructors initialise. (DeepSpeed's own ``zero.Init`` cuts each parameter at the end
of its module's constructor: whatever an outer module initialises afterwards is lost.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastmim.engine.zero.config import import_deepspeed


class _Operation:
    """One recorded call, on tensors that are known by their storage."""

    def __init__(self, function: Any, args: Any, kwargs: Any, target: int) -> None:
        self.function, self.args, self.kwargs, self.target = function, args, kwargs, target


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Recorder(TorchDispatchMode):
    """Records what creates or changes meta tensors; everything else runs as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        # Storages are known by address: one that was freed must not lend its address to another.
        self._alive: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.device.type != "meta":
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        is_view = any(_storage(leaf) == _storage(result) for leaf in inputs) and not func._schema.is_mutable
        if not is_view:
            self.operations.append(_Operation(func, args, kwargs or {}, _storage(result)))
            self._alive.append(result)
        return result


class _Replay:
    """Runs recorded operations on real CPU tensors and hands each parameter over when it is complete."""

    def __init__(self, operations: list[_Operation], names: dict[int, str]) -> None:
        self.operations, self.names = operations, names
        self.most_held = 0
        self._real: dict[int, Tensor] = {}
        # What is overwritten later need not be kept until then: it only moves the random generator on.
        useless = self._overwritten()
        order = self._copies_first(useless)
        self.operations = [operations[i] for i in order]
        self._useless = {place for place, i in enumerate(order) if i in useless}
        self._last = {
            key: i for i, op in enumerate(self.operations) if i not in self._useless for key in self._touched(op)
        }

    def _copies_first(self, useless: set[int]) -> list[int]:
        """The operations in an order with each copy of a whole tensor right behind the last change of its source.

        A teacher copies its student when all of both is there; so they need not wait for each other.
        """
        last: dict[int, int] = {}
        places = []
        for i, op in enumerate(self.operations):
            copies = op.function._schema.name == "aten::copy_" and self._overwrites(op)
            places.append((max(last.get(key, -1) for key in self._touched(op)), 1) if copies else (i, 0))
            if i not in useless:
                last |= dict.fromkeys(self._touched(op), i)
        return sorted(range(len(places)), key=places.__getitem__)

    def _touched(self, op: _Operation) -> set[int]:
        return {op.target, *map(_storage, self._tensors(op))}

    @staticmethod
    def _tensors(op: _Operation) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((op.args, op.kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]

    def _overwritten(self) -> set[int]:
        useless: set[int] = set()
        fresh: set[int] = set()
        for i in range(len(self.operations) - 1, -1, -1):
            op = self.operations[i]
            if op.target in fresh:
                useless.add(i)
            elif self._overwrites(op):
                fresh.add(op.target)
            for leaf in self._tensors(op):
                if _storage(leaf) != op.target:
                    fresh.discard(_storage(leaf))
        return useless

    @staticmethod
    def _overwrites(op: _Operation) -> bool:
        if not op.function._schema.is_mutable:
            return True
        name = op.function._schema.name.split("::")[1]
        whole = isinstance(op.args[0], Tensor) and op.args[0].numel() * op.args[0].element_size() == (
            op.args[0].untyped_storage().nbytes()
        )
        return whole and name in ("uniform_", "normal_", "zero_", "fill_", "random_", "copy_")

    def run(self, complete: Callable[[str, Tensor], None]) -> None:
        """Call ``complete(name, tensor)`` for every named tensor, in the order in which they become complete."""
        with torch.no_grad():
            for i, op in enumerate(self.operations):
                self._one(i, op)
                for target in self._touched(op):
                    if self._last.get(target) == i and target in self._real:
                        tensor = self._real.pop(target)
                        if target in self.names:
                            complete(self.names[target], tensor)

    def _one(self, i: int, op: _Operation) -> None:
        scratch = i in self._useless
        if scratch and torch.Tag.nondeterministic_seeded not in op.function.tags:
            return

        def real(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and leaf.is_meta):
                return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "meta" else leaf
            if scratch or (_storage(leaf) == op.target and op.target not in self._real):
                if not scratch:
                    self._real[op.target] = torch.empty(leaf.untyped_storage().nbytes(), dtype=torch.uint8)
                    base = self._real[op.target] = self._real[op.target].view(leaf.dtype)
                else:
                    base = torch.empty(leaf.untyped_storage().nbytes(), dtype=torch.uint8).view(leaf.dtype)
            else:
                base = self._real[_storage(leaf)]
            return torch.as_strided(base, leaf.shape, leaf.stride(), leaf.storage_offset())

        args, kwargs = tree_map(real, (op.args, op.kwargs))
        if not op.function._schema.is_mutable and "device" in {a.name for a in op.function._schema.arguments}:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        result = op.function(*args, **kwargs)
        if not op.function._schema.is_mutable and not scratch:
            self._real[op.target] = result
        self.most_held = max(self.most_held, sum(t.numel() * t.element_size() for t in self._real.values()))


def build_partitioned(
    build: Callable[[], nn.Module],
    load: Callable[[nn.Module], None] = lambda module: None,
    *,
    config: dict[str, Any],
    precision: str,
    device: torch.device,
) -> nn.Module:
    """The module that ``build()`` gives, with its parameters cut among the ranks for ZeRO-3.

    Args:
        build: constructs the module; draws from torch's CPU generator as it would otherwise. Buffers that hold
            values must be made with ``device="cpu"``.
        load: fills the module with stored weights.
        config: DeepSpeed's, from :func:`fastmim.engine.zero.config.deepspeed_config`.
        precision: ``"bf16"`` and ``"fp16"`` store the weights so; the values are drawn in fp32.
        device: of this rank.

    Returns:
        The module on ``device``; trainable and frozen parameters are DeepSpeed's partitioned ones.
    """
    deepspeed = import_deepspeed(device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    with _Recorder() as recorder:
        with torch.device("meta"):
            module = build()
        load(module)
    # An empty module: only the conversion of single parameters is wanted, with this configuration.
    cut = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=dtype)
    places = {name: _place(module, name) for name, _ in module.named_parameters()}
    names = {_storage(param): name for name, param in module.named_parameters()}

    def complete(name: str, value: Tensor) -> None:
        home, last = places[name]
        meta = home._parameters[last]
        assert meta is not None
        full = torch.as_strided(value, meta.shape, meta.stride()).to(device=device, dtype=dtype)
        param = home._parameters[last] = nn.Parameter(full, requires_grad=meta.requires_grad)
        cut._convert_to_zero_parameters([param])

    _Replay(recorder.operations, names).run(complete)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{left[0]}: nothing has filled it; a buffer must be made with device='cpu'")
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    return module


def _place(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path), last
