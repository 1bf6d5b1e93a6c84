"""Find the module that made a number non-finite, by running the bad batch again under hooks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastmim.engine import distributed
from fastmim.engine.stream import inputs_of, stream

log = logging.getLogger("fastmim")


class NonFiniteError(FloatingPointError):
    """Update ``step`` (from 1) met a non-finite gradient. The weights are still those before it.

    Args:
        step: the update.
        where: the module to blame.
        resume: the ``train.resume`` that goes back further, where the newest checkpoint has the weights that failed.
    """

    def __init__(self, step: int, where: str | None = None, resume: str | None = None) -> None:
        self.step = step
        place = f": {where}" if where else ""
        back = f"; if the weights of step {step - 1} are spoilt already, go back with train.resume={resume}"
        super().__init__(
            f"non-finite loss or gradient at step {step}{place}; "
            "lower optim.lr or set optim.clip_grad (a run that resumes takes them with train.resume_changes=allow), "
            f"or use efficiency.precision=fp32{back if resume else ''}"
        )


def _bad(tensors: Any) -> bool:
    floats = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return any(not bool(torch.isfinite(tensor).all()) for tensor in floats)


def _bad_name(named: Iterable[tuple[str, Tensor | None]]) -> str | None:
    return next((name for name, tensor in named if tensor is not None and _bad(tensor)), None)


class _Watch:
    """Remembers the first non-finite value that passes a module in the forward and in the backward pass."""

    def __init__(self, objective: nn.Module) -> None:
        self.found: str | None = None
        self._names = {module: name or "(the objective)" for name, module in objective.named_modules()}
        self._stack: list[nn.Module] = []
        self._has_gaps = getattr(objective, "has_gaps", False)

    def entering(self, module: nn.Module, args: Any) -> None:
        gaps = self._has_gaps and not self._stack  # NaN in the images is no data
        if self.found is None and not gaps and _bad(args):
            # The submodules before were clean: the code between them, in the parent's forward, is to blame.
            parent = self._names[self._stack[-1]] if self._stack else "the input images"
            self.found = f"{parent}, before it calls {self._names[module]}"
        self._stack.append(module)

    def leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()
        if self.found is None and _bad(output):
            self.found = f"the output of module {self._names[module]}"

    def backward(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if self.found is None and _bad(grad_input) and not _bad(grad_output):
            self.found = f"the backward pass of module {self._names[module]}"

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles: list[Any] = []
        for module in self._names:
            handles.append(module.register_forward_pre_hook(self.entering))
            handles.append(module.register_forward_hook(self.leaving))
            handles.append(module.register_full_backward_hook(self.backward))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def find_nonfinite(
    objective: nn.Module,
    images: Tensor,
    mask: Tensor,
    autocast: AbstractContextManager[Any] | None = None,
    *,
    backward: bool = True,
) -> str | None:
    """Run forward and (if asked for) backward once more and name the first non-finite value.

    Looked for in the order: parameters, module inputs and outputs, the loss, gradients of module inputs in
        the
    order of the backward pass, gradients of parameters. Gradients of ``objective`` are cleared.

    Returns:
        A phrase such as ``the output of module encoder.layers.0.blocks.1.mlp``, or None if all is finite.
    """
    name = _bad_name(objective.named_parameters())
    if name is not None:
        return f"parameter {name} is already non-finite"
    watch = _Watch(objective)
    objective.zero_grad(set_to_none=True)
    with watch.attached(), warnings.catch_warnings():
        # Images need no gradient: torch remarks on it for every module that they enter.
        warnings.simplefilter("ignore", UserWarning)
        with autocast or nullcontext(), torch.set_grad_enabled(backward):
            loss = objective(images, mask)["loss"]
        if backward and watch.found is None and not _bad(loss):
            loss.backward()
    if watch.found is None:
        name = _bad_name((name, param.grad) for name, param in objective.named_parameters())
        watch.found = f"the gradient of parameter {name}" if name is not None else None
    objective.zero_grad(set_to_none=True)
    return watch.found


def find_culprit(engine: Any, loader: Any, *, step: int, seed: int) -> str | None:
    """Name the module behind a :class:`NonFiniteError` of ``step``; every rank calls it.

    The engine has kept the weights of that step and the loader can give its images again. (With dropout the
    repetition draws other numbers, and may find nothing.)
    """
    found = None
    accum = engine.grad_accum_steps
    try:
        for epoch, batch in stream(loader, start=step - 1, stop=step, grad_accum_steps=accum):
            images, mask = inputs_of(engine.objective, batch, seed=seed, epoch=epoch)
            place = engine.diagnose(images, mask)  # on every rank, even where something was found already
            found = found or place
    except Exception:
        log.warning("could not look for the module behind the non-finite step", exc_info=True)
    return next((place for place in distributed.gather(found) if place), None)
