"""A CUDA graph of a whole step: forward, backward, clipping and fused AdamW, replayed beside the plain step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.proof import model
from benchmarks.proof.part import Outcome, Setting
from benchmarks.train_step import CLIP, LR, WEIGHT_DECAY
from fastmim.engine.graph import CudaGraph, GraphEngine, kind_of, record_proof, withdraw_proof
from fastmim.engine.local import LocalEngine
from fastmim.engine.optim import build_optimizer, param_groups

WARM, STEPS = 3, 6
COUNTS = (16, 8)
"""Images of the two graphs, which share weights and moments and are replayed in turns."""


class StaticStep:
    """A step whose inputs stay where they are; :meth:`capture` puts it into a graph.

    Args:
        objective, optimizer: What it trains.
        count: Images.
        device: "cuda" or "cpu".
    """

    def __init__(self, objective: Any, optimizer: torch.optim.Optimizer, count: int, device: str) -> None:
        self.objective, self.optimizer, self.device, self.count = objective, optimizer, device, count
        images, mask = model.batch(objective, count, device)
        self.images, self.mask = images.clone(), mask.clone()
        self.run: Callable[[], None] = self.eager

    def eager(self) -> None:
        """The step itself, all of it on the device."""
        with torch.autocast(self.device, torch.bfloat16, cache_enabled=False):
            self.loss: Tensor = self.objective(self.images, self.mask)["loss"]
        self.loss.backward()
        nn.utils.clip_grad_norm_(self.objective.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def capture(self) -> None:
        """Record the step; nothing is computed."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.eager()
        self.run = graph.replay

    def __call__(self, step: int) -> Tensor:
        """Take the step on its own images; its loss."""
        images, mask = model.batch(self.objective, self.count, self.device, step)
        self.images.copy_(images)
        self.mask.copy_(mask)
        self.run()
        return self.loss.detach().clone()


def graph(setting: Setting, outcome: Outcome) -> None:
    """Two graphs of different batches in turns beside plain steps: losses, weights and moments, bit for bit."""
    if setting.dry:
        outcome.leave_out("the capture: there is no GPU; the step with inputs in place beside one with fresh inputs")
    for size in ("swinv2_base", "swin_base"):
        kind = "" if setting.dry else kind_of(model.ours(model.encoder(size, tiny=True), "torch", "cpu"))
        if kind:  # first: whatever the part ends in, "auto" is on only where this proof has passed
            withdraw_proof(torch.device("cuda", torch.cuda.current_device()), kind)
        proved = bool(kind)
        for title, run in (("graphs in turns", history), ("efficiency.cuda_graph, stochastic depth", trained)):
            plain, again = (run(size, setting, captured) for captured in (False, True))
            apart = model.bits_apart(plain, again)
            outcome.check(f"{size} bf16, {title}: tensors of {len(plain)} that differ", apart, "0", not apart)
            proved = proved and not apart
        if proved:
            _record(kind, outcome)


def _record(kind: str, outcome: Outcome) -> None:
    try:
        path = record_proof(torch.device("cuda", torch.cuda.current_device()), kind)
    except OSError as error:  # what was proved holds
        outcome.leave_out(f"efficiency.cuda_graph=auto stays off for {kind}, where nothing can be noted: {error}")
    else:
        outcome.note(f"efficiency.cuda_graph=auto is on from now for {kind}; noted in", path)


class PlainSteps:
    """As :class:`fastmim.engine.graph.CudaGraph` on a machine without one: a replay runs the step."""

    def beside(self, run: Callable[[], None]) -> None:
        run()

    def capture(self, run: Callable[[], None]) -> None:
        self.replay = run


def trained(size: str, setting: Setting, captured: bool) -> list[Tensor]:
    """Weights and moments after steps of the engine, with the rate that changes, and one batch of another size."""
    kwargs = model.encoder(size, setting.dry, **({} if setting.dry else {"drop_path_rate": 0.2}))
    objective = model.ours(kwargs, model.kernels_of(setting.device), setting.device)
    groups, options = param_groups(objective, WEIGHT_DECAY), {"clip_grad": CLIP, "precision": "bf16"}
    optimizer = build_optimizer("adamw", groups, LR, fused=True)
    engine: LocalEngine
    if captured:
        made: Any = PlainSteps if setting.dry else CudaGraph
        engine = GraphEngine(objective, optimizer, graph=made, **options)
    else:
        engine = LocalEngine(objective, optimizer, check_every_step=False, **options)
    torch.manual_seed(1)
    for i in range(WARM + STEPS):
        count = (2 if setting.dry else 16) // (1 + (i == WARM + 2))
        engine.set_lr(2.0 ** -(10 + i % 3))  # exact in float32, in which a graph keeps it
        engine.train_on(*model.batch(objective, count, setting.device, i))
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*objective.parameters(), *moments)]


def history(size: str, setting: Setting, captured: bool) -> list[Tensor]:
    """Losses of all steps, then weights and moments."""
    objective = model.ours(model.encoder(size, setting.dry), model.kernels_of(setting.device), setting.device)
    capturable = setting.device == "cuda"
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True,
                                  capturable=capturable)  # fmt: skip
    counts = (2, 1) if setting.dry else COUNTS
    steps = [StaticStep(objective, optimizer, count, setting.device) for count in counts]
    losses = _on_a_side_stream(lambda: [step(i) for i in range(WARM) for step in steps], setting.device)
    if captured and capturable:
        for step in steps:
            step.capture()
    if captured and not capturable:
        for step in steps:
            step.images, step.mask = step.images.clone(), step.mask.clone()
    losses += [steps[i % 2](WARM + i) for i in range(STEPS)]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*losses, *objective.parameters(), *moments)]


def _on_a_side_stream(run: Callable[[], list[Tensor]], device: str) -> list[Tensor]:
    """As torch asks for before a capture, so that nothing of the default stream is waited for in it."""
    if device != "cuda":
        return run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        losses = run()
    torch.cuda.current_stream().wait_stream(stream)
    return losses
