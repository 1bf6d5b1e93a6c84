"""A whole training step captured once as a CUDA graph: the host then makes one launch a step instead of hundreds.

The graph holds forward, backward, clipping, the guard against bad numbers and the update. What changes from step to
step reaches it through memory whose address stays: images and masks are copied into buffers, the learning rate is a
tensor of each group, an objective's schedules are 0-d buffers, and steps are counted on the device. Random numbers
come from the generator that the graph advances. So a replayed step gives the bits of the plain one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmim._version import __version__
from fastmim.engine.base import Phase, unmarked
from fastmim.engine.distributed import World
from fastmim.engine.local import LocalEngine
from fastmim.wording import first_line
from fastmim_kernels.common.user_cache import cache_file, read_cache, write_cache

log = logging.getLogger("fastmim")

WARM_UP = 3
"""Plain steps before the capture: kernels are compiled and tested, and tables made, that a capture cannot make."""


class CudaGraph:
    """torch's, with a stream of its own on which the plain steps before it run too."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream()

    def beside(self, run: Callable[[], None]) -> None:
        """``run`` on the stream of the capture, where torch's nodes that sum gradients then expect it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> None:
        """Record the work of ``run`` without doing it. Other threads, which load images, go on meanwhile."""
        state = torch.cuda.get_rng_state()
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            run()
        torch.cuda.set_rng_state(state)

    def replay(self) -> None:
        """Do the work, in the current stream."""
        self._graph.replay()


class GraphEngine(LocalEngine):
    """:class:`LocalEngine` whose :meth:`train_on` replays a graph, after some plain steps; for one GPU.

    A batch of another shape takes a plain step.

    Args:
        objective, optimizer, options: As of :class:`LocalEngine`; see :func:`why_not`.
        graph: Makes the graph.
        wanted: "auto" goes on with plain steps, and a warning, where a step cannot be captured.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        graph: Callable[[], Any] = CudaGraph,
        wanted: bool | str = True,
        **options: Any,
    ) -> None:
        super().__init__(objective, optimizer, check_every_step=False, **options)
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=self.device)
            group["capturable"] = True
        self._make_graph, self._wanted, self._refused = graph, wanted, False
        self._forget()

    def _forget(self) -> None:
        self._graph, self._captured, self._plain_steps = self._make_graph(), False, 0
        self._inputs: tuple[Tensor, ...] = ()

    def train_on(self, images: Any, mask: Tensor, phase: Phase = unmarked) -> None:
        """See :meth:`Engine.train_on`.

        Raises:
            RuntimeError: the step cannot be captured, and was to be; it names the reason and the setting.
        """
        given = (images, mask)
        if self._captured and _alike(given, self._inputs):
            for own, new in zip(self._inputs, given, strict=True):
                own.copy_(new)
        elif not self._may_capture(images) or not self._capture(given):
            self._plain_steps += 1
            self._graph.beside(lambda: super(GraphEngine, self).train_on(images, mask, phase))
            return
        with phase("step"):
            self._graph.replay()
        self._count += 1
        self.steps += 1
        self._after_update()

    def _may_capture(self, images: Any) -> bool:
        return not self._captured and not self._refused and isinstance(images, Tensor) and self._plain_steps >= WARM_UP

    def _capture(self, given: tuple[Tensor, ...]) -> bool:
        """Whether it was possible; what was recorded has not happened yet."""
        self._inputs = tuple(t.clone() for t in given)
        count = self._count
        try:
            self._graph.capture(self._device_step)
        except Exception as error:
            reason = f"the step cannot be captured as a CUDA graph: {first_line(error)}"
            if self._wanted is True:
                raise RuntimeError(f"efficiency.cuda_graph=true: {reason}; use efficiency.cuda_graph=false") from error
            log.warning("efficiency.cuda_graph=auto: %s; the steps stay plain", reason)
            self._forget()
            self.optimizer.zero_grad(set_to_none=True)
            self._refused = True
        self._count = count
        self._captured = not self._refused
        return self._captured

    def _device_step(self) -> None:
        """All that the device does in a step."""
        images, mask = self._inputs
        self.backward(self(images, mask)["loss"])
        self._step(True)

    def load(self, folder: Path) -> None:
        """See :meth:`LocalEngine.load`; a graph of the replaced moments is forgotten."""
        super().load(folder)
        self._forget()


def _alike(given: tuple[Any, ...], own: tuple[Tensor, ...]) -> bool:
    return all(
        isinstance(a, Tensor) and a.shape == b.shape and a.dtype == b.dtype for a, b in zip(given, own, strict=True)
    )


def why_not(
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    compile: bool,
    zero_stage: int | None,
    grad_accum_steps: int,
    recompute: str,
    crops: int = 1,
    decay_varies: bool = False,
) -> str:
    """Why a step cannot be one CUDA graph; empty where it can."""
    if world.device.type != "cuda":
        return f"the device is {world.device.type}, not a CUDA GPU"
    if world.size > 1:
        return f"there are {world.size} ranks, and it is for one GPU"
    if zero_stage is not None:
        return f"efficiency.zero_stage={zero_stage} keeps an engine of its own"
    if compile:
        return "with efficiency.compile=true a step is not captured"
    if grad_accum_steps > 1:
        return f"a step has {grad_accum_steps} micro-batches, and the graph is of one"
    if crops > 1:
        return f"the objective takes {crops} crops of an image"
    if decay_varies:
        return "optim.weight_decay_end changes a number that the graph would keep"
    if recompute not in ("none", "fc1"):
        return f"efficiency.recompute={recompute} asks the generator for its state; use none or fc1"
    if not isinstance(optimizer, torch.optim.AdamW) or not all(g.get("fused") for g in optimizer.param_groups):
        return "the optimiser is not torch's fused AdamW; use optim.name=adamw and efficiency.fused_optimizer=auto"
    return ""


def use_graph(wanted: bool | str, reason: str, device: torch.device, kind: str) -> bool:
    """Whether ``efficiency.cuda_graph`` takes effect: "auto" where nothing forbids it and this machine has proved it.

    Args:
        wanted: The setting.
        reason: Of :func:`why_not`.
        device: Of the run.
        kind: Of :func:`kind_of`.

    Raises:
        ValueError: it is asked for, and something forbids it.
    """
    if wanted is True and reason:
        raise ValueError(f"efficiency.cuda_graph=true: {reason}; use efficiency.cuda_graph=auto or false")
    return wanted is True or (wanted == "auto" and not reason and is_proven(device, kind))


def kind_of(objective: nn.Module) -> str:
    """What a proof holds for beside the machine: an objective with an encoder, by their classes."""
    return f"{type(objective).__name__} of {type(getattr(objective, 'encoder', None)).__name__}"


def _machine(device: torch.device) -> dict[str, str]:
    try:
        import triton

        compiler = str(triton.__version__)
    except ImportError:
        compiler = "none"
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": str(torch.__version__),
        "cuda": str(torch.version.cuda),
        "triton": compiler,
        "fastmim": __version__,
    }


def _proofs() -> Path:
    return cache_file("cuda_graph.json")


def record_proof(device: torch.device, kind: str) -> Path:
    """Note that replayed steps of this kind have given the bits of plain ones on ``device``; returns the file.

    Raises:
        OSError: it cannot be written.
    """
    proof = _machine(device) | {"kind": kind}
    path, found = _proofs(), [other for other in _read_proofs() if other != proof]
    write_cache(path, [*found, proof])
    return path


def withdraw_proof(device: torch.device, kind: str) -> None:
    """Forget what :func:`record_proof` noted of this kind on this machine, as sources may have changed since.

    Raises:
        OSError: it cannot be written.
    """
    proof, found = _machine(device) | {"kind": kind}, _read_proofs()
    if proof in found:
        write_cache(_proofs(), [other for other in found if other != proof])


def is_proven(device: torch.device, kind: str) -> bool:
    """Whether :func:`record_proof` was called for this kind on this machine with this GPU and these versions."""
    return _machine(device) | {"kind": kind} in _read_proofs()


def _read_proofs() -> list[Any]:
    found = read_cache(_proofs())
    return found if isinstance(found, list) else []
