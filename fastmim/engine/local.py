"""Training on one device per process, with gradients averaged over processes by DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastmim.engine.base import Engine
from fastmim.engine.checkpoint.shards import MODEL_FILE, OPTIMIZER_FILE, STEP, WEIGHT, Shards, is_sharded
from fastmim.engine.distributed import World
from fastmim.engine.nonfinite import NonFiniteError
from fastmim.objectives import Objective

# torch 2.13 has renamed the argument and warns of the older name.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


@torch.no_grad()
def clip_each_(grads: list[Tensor], most: float) -> None:
    """Scale each gradient by most/(its norm + 1e-6) where that is below 1, as DINO and iBOT do."""
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((most / (norms + 1e-6)).clamp(max=1.0).unbind()))


class LocalEngine(Engine):
    """Forward, backward and update of an objective that every rank holds whole.

    Nothing waits for the device except :meth:`read` and :meth:`state`.

    An update with a non-finite gradient is not applied, nor is any after it; the first such step is
    remembered on the device and reported as :class:`NonFiniteError` by :meth:`read`, or by :meth:`step`
    itself with ``check_every_step``. A non-finite loss makes every gradient of its step non-finite, on every
    rank. (Without the check the host does not know, and calls the objective's ``after_step`` all the same; no state
    of such a run is ever saved.)

    Args:
        objective: module with ``forward(images, mask) -> {"loss": scalar, …}``, on its device.
        optimizer: a torch optimiser over its parameters. Unless it is fused, each update is checked on the
            host.
        grad_accum_steps: micro-batches per update; the loss is their mean.
        clip_grad: norm that gradients are clipped to; None switches clipping off.
        clip_each: clip the gradient of every tensor by itself, instead of all of them together.
        precision: ``"fp32"`` or ``"bf16"`` (autocast).
        compile: compile the forward pass with ``torch.compile``.
        world: this process among all; None means alone, on the objective's device.
        check_every_step: look for non-finite values after every update; None: only on the CPU, where it is
            free.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        grad_accum_steps: int = 1,
        clip_grad: float | None = None,
        clip_each: bool = False,
        precision: str = "fp32",
        compile: bool = False,
        world: World | None = None,
        check_every_step: bool | None = None,
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"efficiency.precision={precision!r}: unknown; use fp32 or bf16")
        self._params = [param for param in objective.parameters() if param.requires_grad]
        device = self._params[0].device
        super().__init__(objective, optimizer, grad_accum_steps=grad_accum_steps, precision=precision, device=device)
        self.clip_grad, self.clip_each = clip_grad, clip_each
        # Updates, counted where the guard against bad numbers needs them.
        self._now = torch.zeros((), dtype=torch.int64, device=device)
        self._fused = all(bool(group.get("fused")) for group in optimizer.param_groups)
        self.check_every_step = device.type == "cpu" if check_every_step is None else check_every_step
        self._module = self._wrap(compile, world)

    def _wrap(self, compile: bool, world: World | None) -> nn.Module:
        module: nn.Module = self.objective
        if compile:
            # Not Module.compile(): validation and pictures call the plain objective with other shapes.
            module = torch.compile(module, dynamic=False)  # type: ignore[assignment]
        if world is not None and world.size > 1:
            ids = [self.device] if self.device.type == "cuda" else None
            buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
            module = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, **buffers)
        return module

    @contextmanager
    def _around_forward(self) -> Iterator[None]:
        module = self._module
        ddp = isinstance(module, DistributedDataParallel) and not self.at_boundary
        with module.no_sync() if ddp else nullcontext(), self.autocast():
            yield

    def _backward(self, loss: Tensor) -> None:
        (loss / self.grad_accum_steps).backward()

    def _step(self, update: bool) -> bool:
        if not update:
            return False
        grads = [param.grad for param in self._params if param.grad is not None]
        # Into memory that stays: a captured step writes there.
        self._grad_norm.copy_(get_total_norm(grads))
        if self.clip_grad and not self._within_clip():
            if self.clip_each:
                clip_each_(grads, self.clip_grad)
            else:
                clip_grads_with_norm_(self._params, self.clip_grad, self._grad_norm)
        for param in self.objective.frozen() if isinstance(self.objective, Objective) else ():
            param.grad = None
        self._now.add_(1)
        bad = ~torch.isfinite(self._grad_norm) & (self._first_bad < 0)
        self._first_bad.copy_(torch.where(bad, self._now, self._first_bad))
        is_bad = self._first_bad >= 0
        if self.check_every_step or not self._fused:
            if bool(is_bad):
                self.optimizer.zero_grad(set_to_none=True)
                raise NonFiniteError(int(self._first_bad))
        else:
            # The fused kernel itself leaves everything as it is where found_inf is 1.
            self.optimizer.found_inf = is_bad.float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _within_clip(self) -> bool:
        """Whether clipping would multiply by 1: a pass over all gradients that a host that waits anyway can spare."""
        assert self.clip_grad is not None
        return self.check_every_step and float(self.clip_grad / (self._grad_norm + 1e-6)) >= 1

    def state(self) -> dict[str, Any]:
        """See :meth:`Engine.state`."""
        # LAMB and apex' optimisers count updates in the group, torch's in the state of each parameter.
        counts = [int(group["step"]) for group in self.optimizer.param_groups if "step" in group]
        return super().state() | ({"group_steps": counts} if counts else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        super().load_state(state)
        self._now.fill_(self.steps)
        if counts := state.get("group_steps"):
            current = self.optimizer.state_dict()
            for group, count in zip(current["param_groups"], counts, strict=True):
                group["step"] = count
            self.optimizer.load_state_dict(current)

    def save(self, folder: Path) -> None:
        """Write weights and optimiser moments into ``folder``; rank 0 alone calls it."""
        save_model(self.objective, str(folder / MODEL_FILE))
        names: dict[Tensor, str] = {param: name for name, param in self.objective.named_parameters()}
        tensors = {
            f"{names[param]}|{key}": torch.as_tensor(value).contiguous()
            for param, state in self.optimizer.state.items()
            for key, value in state.items()
        }
        save_file(tensors, folder / OPTIMIZER_FILE)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote; every rank calls it.

        Raises:
            RuntimeError: a weight is missing, left over or has another shape.
        """
        moments = self._load_shards(folder) if is_sharded(folder) else self._load_whole(folder)
        names: dict[Tensor, str] = {param: name for name, param in self.objective.named_parameters()}
        current = self.optimizer.state_dict()
        order = [param for group in self.optimizer.param_groups for param in group["params"]]
        # Groups, rates and flags stay those of this run; the moments are found by name, not by position.
        current["state"] = {i: moments[names[p]] for i, p in enumerate(order) if names[p] in moments}
        self.optimizer.load_state_dict(current)

    def _load_whole(self, folder: Path) -> dict[str, dict[str, Tensor]]:
        load_model(self.objective, folder / MODEL_FILE, strict=True)
        moments: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(folder / OPTIMIZER_FILE).items():
            name, _, slot = key.rpartition("|")
            moments.setdefault(name, {})[slot] = tensor
        return moments

    def _load_shards(self, folder: Path) -> dict[str, dict[str, Tensor]]:
        """What ``ZeroEngine`` has written, on any number of ranks."""
        shards = Shards(folder)
        model = self.objective.state_dict()
        shards.check({name: tensor.shape for name, tensor in model.items()})
        moments: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for name, tensor in model.items():
                tensor.copy_(shards.tensor(name))
                slots = [slot for slot in shards.slots(name) if slot not in (WEIGHT, STEP)]
                whole = {slot: shards.read(name, slot, 0, tensor.numel()).view_as(tensor) for slot in slots}
                if whole:
                    moments[name] = whole | {STEP: torch.tensor(shards.scalar(name, STEP))}
        return moments
