"""The captured step, on a stand-in of a CUDA graph that replays operations with all that the host said frozen."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import fastmim_kernels
from fastmim.engine import graph as module
from fastmim.engine.graph import WARM_UP, GraphEngine, use_graph, why_not
from fastmim.engine.local import LocalEngine
from fastmim.engine.loop import train_step
from fastmim.engine.nonfinite import NonFiniteError
from fastmim.engine.optim import build_optimizer, param_groups

RATES = [2.0**-i for i in (10, 9, 8, 7, 8, 9, 10, 11)]
"""Exact in float32."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shape follows the mask's values; on a CPU the last block would take the rows that are read."""
    monkeypatch.setattr(fastmim_kernels, "shape_may_follow", lambda data: False)


class Recorder(TorchDispatchMode):
    """Keeps each operation with its arguments: tensors by their memory, numbers by their value."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.tape.append(tree_map_only(Tensor, Tensor.detach, (func, args, kwargs or {}, found)))
        return found


class Tape:
    """As :class:`fastmim.engine.graph.CudaGraph`. A capture must do the work too, which the first replay then skips."""

    def __init__(self) -> None:
        self._recorder, self._done = Recorder(), False

    def beside(self, run: Any) -> None:
        run()

    def capture(self, run: Any) -> None:
        with self._recorder:
            run()
        self._done = True

    @torch.no_grad()
    def replay(self) -> None:
        if self._done:
            self._done = False
            return
        for func, args, kwargs, kept in self._recorder.tape:
            found = func(*args, **kwargs)
            for old, new in zip(tree_leaves(kept), tree_leaves(found), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def engine_of(objective: Any, kind: type, **options: Any) -> Any:
    optimizer = build_optimizer("adamw", param_groups(objective, 0.05), RATES[0], fused=True)
    if kind is LocalEngine:
        return LocalEngine(objective, optimizer, check_every_step=False, clip_grad=0.5, **options)
    return GraphEngine(objective, optimizer, graph=Tape, clip_grad=0.5, **options)


def batches(sizes: list[int], spoilt: int = -1) -> Any:
    generator = torch.Generator().manual_seed(1)
    for i, size in enumerate(sizes):
        images = torch.randn(size, 3, 32, 32, generator=generator)
        yield 0, SimpleNamespace(images=images * (math.inf if i == spoilt else 1),
                                 sample_ids=torch.arange(size) + 4 * i)


def train(engine: Any, sizes: list[int], spoilt: int = -1) -> list[dict[str, float]]:
    torch.manual_seed(5)
    data, read = batches(sizes, spoilt), []
    for i, _ in enumerate(sizes):
        train_step(engine, data, lr=RATES[i], seed=3, total=len(sizes), steps_per_epoch=2)
        if i % 2:
            read.append(engine.read())
    return read


class Paced(torch.nn.Module):
    """The objective, with a scale that a schedule sets and a count of the updates."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective
        self.register_buffer("scale", torch.ones(()))
        self.updates: list[int] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.objective, name)

    def set_step(self, step: int, total: int, steps_per_epoch: int) -> None:
        self.scale.fill_(1 + step / total)

    def after_step(self) -> None:
        self.updates.append(len(self.updates))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        loss = self.objective(images, mask)["loss"] * self.scale
        return {"loss": loss, "scale": self.scale.clone()}


def equal_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("paced", [False, True])
def test_replayed_steps_give_the_bits_of_plain_ones(objective: Any, paced: bool) -> None:
    objective = Paced(objective) if paced else objective
    plain, graphed = engine_of(copy.deepcopy(objective), LocalEngine), engine_of(objective, GraphEngine)
    sizes = [4] * len(RATES)
    assert train(graphed, sizes) == train(plain, sizes)
    assert equal_weights(plain.objective, objective)
    assert graphed.steps == plain.steps == len(RATES)
    assert graphed._captured and len(graphed._graph._recorder.tape) > 50
    if paced:
        assert objective.updates == list(range(len(RATES)))


def test_a_batch_of_another_shape_takes_a_plain_step(objective: Any) -> None:
    plain, graphed = engine_of(copy.deepcopy(objective), LocalEngine), engine_of(objective, GraphEngine)
    sizes = [4, 4, 4, 4, 2, 4, 3, 4]
    assert train(graphed, sizes) == train(plain, sizes)
    assert equal_weights(plain.objective, objective)


def test_a_bad_step_among_replayed_ones_is_named_and_changes_nothing(objective: Any) -> None:
    graphed = engine_of(objective, GraphEngine)
    train(graphed, [4] * 6)
    before = copy.deepcopy(objective)
    with pytest.raises(NonFiniteError, match="8"):
        train(graphed, [4] * 2, spoilt=1)
    after_one = engine_of(before, GraphEngine)
    assert not equal_weights(before, objective) and after_one.steps == 0
    kept = copy.deepcopy(objective)
    graphed.train_on(torch.randn(4, 3, 32, 32), objective.random_mask(torch.arange(4)))
    assert equal_weights(kept, objective), "no update after the bad one"


def test_going_on_from_a_checkpoint_is_exact(objective: Any, tmp_path: Any) -> None:
    start = copy.deepcopy(objective)
    whole = engine_of(objective, GraphEngine)
    train(whole, [4] * 5)
    whole.save(tmp_path)
    state = whole.state()
    resumed = engine_of(start, GraphEngine)
    resumed.load(tmp_path)
    resumed.load_state(state)
    found = [train(engine, [4] * 6) for engine in (whole, resumed)]
    assert found[0] == found[1] and equal_weights(objective, start)
    assert resumed.steps == whole.steps == 11 and resumed._captured


def test_a_step_that_cannot_be_captured_says_why(objective: Any) -> None:
    graphed = engine_of(objective, GraphEngine)

    def refuse(run: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphed._graph.capture = refuse
    with pytest.raises(RuntimeError, match="cuda_graph=true: .* not permitted when stream is capturing; use"):
        train(graphed, [4] * (WARM_UP + 1))


def test_auto_goes_on_with_plain_steps(objective: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Also where the capture ends behind the gradients, of which nothing has happened."""
    plain = engine_of(copy.deepcopy(objective), LocalEngine)
    graphed = engine_of(objective, GraphEngine, wanted="auto")

    def refuse(run: Any) -> None:
        for weight in objective.parameters():
            weight.grad = torch.full_like(weight, math.nan)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    graphed._graph.capture = refuse
    sizes = [4] * (WARM_UP + 3)
    assert train(graphed, sizes) == train(plain, sizes) and equal_weights(plain.objective, objective)
    assert graphed.steps == plain.steps and not graphed._captured
    said = [record.getMessage() for record in caplog.records if "cuda_graph=auto" in record.getMessage()]
    assert len(said) == 1 and "not permitted when stream is capturing; the steps stay plain" in said[0]


KIND = "SimMIM of SwinTransformer"
GPU = SimpleNamespace(device=torch.device("cuda", 0), size=1)
FREE: dict[str, Any] = {"world": GPU, "compile": False, "zero_stage": None, "grad_accum_steps": 1, "recompute": "none"}


@pytest.mark.parametrize("change, word", [
    ({}, ""), ({"recompute": "fc1"}, ""), ({"world": SimpleNamespace(device=torch.device("cpu"), size=1)}, "cpu"),
    ({"world": SimpleNamespace(device=torch.device("cuda", 0), size=2)}, "2 ranks"), ({"compile": True}, "compile"),
    ({"zero_stage": 1}, "zero_stage=1"), ({"grad_accum_steps": 4}, "4 micro-batches"),
    ({"recompute": "full"}, "recompute=full")], ids=str)
def test_what_forbids_it(objective: Any, change: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch,
                         tmp_path: Any) -> None:
    optimizer = build_optimizer("adamw", param_groups(objective, 0.05), 1e-3, fused=True)
    reason = why_not(optimizer, **{**FREE, **change})
    assert word in reason and bool(word) == bool(reason)
    assert why_not(build_optimizer("adamw", param_groups(objective, 0.05), 1e-3, fused=False), **FREE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    module.record_proof(GPU.device, KIND)
    assert use_graph("auto", reason, GPU.device, KIND) is not bool(word)
    assert not use_graph(False, reason, GPU.device, KIND)
    if word:
        with pytest.raises(ValueError, match=rf"cuda_graph=true: .*{word}"):
            use_graph(True, reason, GPU.device, KIND)


def test_auto_needs_a_proof_of_this_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = ["one"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name[0])
    assert not use_graph("auto", "", GPU.device, KIND) and use_graph(True, "", GPU.device, KIND)
    path = module.record_proof(GPU.device, KIND)
    assert use_graph("auto", "", GPU.device, KIND)
    assert not use_graph("auto", "", GPU.device, "MAE of VisionTransformer"), "of which nothing was proved"
    name[0] = "another"
    assert not use_graph("auto", "", GPU.device, KIND)
    module.record_proof(GPU.device, KIND)
    name[0] = "one"
    assert use_graph("auto", "", GPU.device, KIND), "a second proof keeps the first"
    path.write_text("{")
    assert not use_graph("auto", "", GPU.device, KIND)
