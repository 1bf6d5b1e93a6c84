"""Tensors on cuda:1 while cuda:0 is current: which device each kernel would be launched on, found without a GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from triton.runtime.interpreter import InterpretedFunction

from fastmim_kernels.common import arrival, device, direct
from fastmim_kernels.low_copies import on_triton as low_copies
from tests.kernels.triton.examples import EXAMPLES, Example, names, run

KERNELS = Path(device.__file__).parents[1]


def moved(tree: Any, place: str) -> Any:
    return tree_map_only(
        Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=place), tree)


class OnSecondGpu(TorchDispatchMode):
    """Runs the bodies of our ops with their tensors on cuda:1. (Autograd, which needs a GPU, sees a CPU's.)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastmim":
            return func(*args, **(kwargs or {}))
        with torch.no_grad():
            return moved(OPDEFS[func._schema.name]._init_fn(*moved(args, "cuda:1")), "cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """(kernel, current device) of every launch of the test, none of which is executed; cuda:0 is current."""
    current, found = [0], []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    def counters(count: int, device: torch.device) -> Tensor:
        found.append(("counters", current[-1]))
        return torch.empty(count, dtype=torch.int32, device=device)

    properties = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    patches: dict[str, Any] = {
        "is_initialized": lambda: True, "current_device": lambda: current[-1], "device": Device,
        "get_device_properties": lambda device=None: properties, "get_device_capability": lambda device=None: (9, 0)}
    for name, value in patches.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(arrival, "counters", counters)
    monkeypatch.setattr(low_copies, "table", lambda tensors: torch.empty(1, 3, dtype=torch.int64, device="cuda:1"))
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, **kwargs: found.append(
        (self.fn.__name__, current[-1])))
    yield found
    assert current == [0], "the device that was current is current again"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_kernels_run_where_their_tensors_are(example: Example, launches: list[tuple[str, int]]) -> None:
    given = example.build()
    with FakeTensorMode(), OnSecondGpu():
        run(example, "triton", moved(given, "cpu"), torch.empty_like)
    assert launches and {where for _, where in launches} == {1}, launches


NO_OPS = {"IMPLS", "Fusion", "accelerate", "bias_plan", "check_impl", "fusion", "nn", "shape_may_follow"}


def test_the_examples_are_of_every_op() -> None:
    import fastmim_kernels as fk
    assert {e.op for e in EXAMPLES} >= set(fk.__all__) - NO_OPS - {"cpb_bias"}
    assert len(set(names(EXAMPLES))) == len(EXAMPLES)


def test_nothing_is_done_where_the_device_is_current_already(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        first, second = (torch.empty(1, device=f"cuda:{i}") for i in range(2))
    assert device.on_device_of(second) is device.on_device_of(torch.empty(1)), "no GPU: fake tensors and a CPU's"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert device.on_device_of(first) is device.on_device_of(torch.empty(1))
    assert isinstance(device.on_device_of(second), torch.cuda.device)


def test_the_direct_way_makes_the_device_current_too(launches: list[tuple[str, int]]) -> None:
    with FakeTensorMode():
        x = torch.empty(1, device="cuda:1")
    assert direct.as_given(x, torch.cuda.current_device) == 1


def imported(source: str, package: str) -> set[str]:
    """Modules of our own, ``package.module``, that the ``source`` of one in ``package`` imports, by whatever form."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            at = [p for p in [package][: 2 - node.level] if p] + (node.module.split(".") if node.module else [])
            found |= {".".join(at)} | {".".join([*at, name.name]) for name in node.names}
    return found


def launches_or_brings(sources: dict[str, str]) -> set[str]:
    """Modules that launch (``kernel.run(…, grid=…)``, or ``kernel[grid](…)``) or import one that does."""
    def launches(call: ast.Call) -> bool:
        return isinstance(call.func, ast.Subscript) or "grid" in [word.arg for word in call.keywords]

    found = {name for name, source in sources.items() if "import triton" in source and any(
        isinstance(c, ast.Call) and launches(c) for c in ast.walk(ast.parse(source)))}
    while more := {n for n, source in sources.items() if imported(source, n.partition(".")[0]) & found} - found:
        found |= more
    return found


def test_only_ops_come_to_a_launcher() -> None:
    """Also to those that are written later: an op makes the device current, and is given its launchers by name."""
    sources = {f"{path.parent.name}.{path.stem}": path.read_text() for path in sorted(KERNELS.glob("*/*.py"))
               if path.parent.name != "check"}
    named = {f"{name.partition('.')[0]}.{call.args[2].value.strip('.')}" for name, source in sources.items()
             for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call)
             and getattr(call.func, "id", "") == "define_op" and isinstance(call.args[2], ast.Constant)}
    # What only describes kernels for compilation ahead of time takes no launcher from their modules.
    for name in [name for name in sources if name.endswith("_cases")]:
        taken = {one.rpartition(".")[2] for one in imported(sources.pop(name), name.partition(".")[0])}
        assert not taken & {"forward", "backward", "rows_backward"}, name
    launching = launches_or_brings(sources)
    brought = {to for name in launching for to in imported(sources[name], name.partition(".")[0])}
    assert len(named) > 10 and launching <= named | brought, launching - named - brought
    top = {m for path in KERNELS.glob("*.py") if path.stem != "triton" for m in imported(path.read_text(), "")}
    assert not top & launching
    made = {"a.kernel": "import triton\ndef f(x):\n    k.run(x, grid=(1,))\n", "a.op": "from . import kernel\n",
            "b.op": ""}
    assert launches_or_brings(made) == {"a.kernel", "a.op"}, "a.op would be found"
