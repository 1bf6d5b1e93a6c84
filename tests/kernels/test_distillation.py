"""iBOT's and DINO's loss in torch: against the published formula, the golden run of iBOT's own loss, and float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmim.plan.counter import DispatchCounter
from fastmim_kernels import distillation, distillation_and_entropy
from fastmim_kernels.common import dispatch
from fastmim_kernels.distillation import on_torch
from fastmim_kernels.distillation.centre import centre_sum, moved_centre
from fastmim_kernels.distillation.monitors import mean_target_entropy, view_agreement
from fastmim_kernels.distillation.op import OP, traffic
from tests.kernels.oracle import check, watched

GOLDEN = Path(__file__).parents[1] / "golden" / "ibot_loss.safetensors"
TEMPS = {"student_temp": 0.1, "teacher_temp": 0.05}

# Student, teacher, weights or not, and why.
SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "rows": ((11, 300), (11, 300), False),  # no chunk is full
    "rows with weights": ((2, 7, 65), (2, 7, 65), True),  # rows with axes; an odd number of codes
    "views": ((5, 3, 257), (2, 3, 257), False),  # two global crops and three local ones; one code too many
    "views with weights": ((4, 3, 40), (3, 3, 40), True),  # three teacher views fill no power of two
    "global crops alone": ((2, 5, 128), (2, 5, 128), False),
    "one global crop": ((3, 2, 40), (1, 2, 40), False),  # its own student view has no pair
    "one code": ((3, 1), (3, 1), True),  # a loss of 0
}


def inputs_for(name: str, scale: float = 1.0, seed: int = 0) -> dict[str, Any]:
    student, teacher, weighted = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    given = {"student": normal(*student), "teacher": normal(*teacher), "centre": normal(1, student[-1]),
             "pairs": "views" if student != teacher or "crop" in name else "rows", **TEMPS}
    if weighted:  # one row of 0, one below it
        weight = torch.rand(student[:-1], generator=generator)
        weight.view(-1)[:2] = torch.tensor([0.0, -0.5])
        given["weight"] = weight
    return given


def check_all(name: str, impl: str, dtype: torch.dtype, scale: float = 1.0) -> None:
    inputs = inputs_for(name, scale)
    inputs["centre"] = inputs["centre"].float()
    check(partial(distillation, impl=impl), partial(distillation, impl="reference"), inputs,
          {"student": dtype, "teacher": dtype}, wrt=["student"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
def test_against_float64(name: str, dtype: torch.dtype) -> None:
    check_all(name, "torch", dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_op_against_float64(name: str) -> None:
    """A CPU makes the gradient with the loss where nobody watches; compilers see this."""
    inputs = inputs_for(name)
    inputs["centre"] = inputs["centre"].float()
    check(watched(partial(distillation, impl="torch")), partial(distillation, impl="reference"), inputs,
          {"student": torch.float32, "teacher": torch.float32}, wrt=["student"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rows", "views"])
def test_huge_logits(name: str, dtype: torch.dtype) -> None:
    check_all(name, "torch", dtype, scale=1e4)


def published(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, views: bool) -> list[Tensor]:
    """(Σ w·CE, Σ w·H) code by code and pair by pair, from DINO's equations in float64."""
    if not views:
        student, teacher = student.reshape(1, -1, student.shape[-1]), teacher.reshape(1, -1, student.shape[-1])
    pairs = [(v, u) for u in range(len(teacher)) for v in range(len(student)) if not views or u != v]
    loss = entropy = torch.zeros((), dtype=torch.float64)
    for v, u in pairs:
        for b in range(student.shape[1]):
            exponentials = ((teacher[u, b] - centre.flatten()) / TEMPS["teacher_temp"]).exp()
            target = exponentials / exponentials.sum()
            exponentials = (student[v, b] / TEMPS["student_temp"]).exp()
            w = 1 / (len(pairs) * student.shape[1]) if weight is None else weight.reshape(student.shape[:2])[v, b]
            loss = loss - w * (target * (exponentials / exponentials.sum()).log()).sum()
            entropy = entropy - w * (target * target.log()).sum()
    return [loss, entropy]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_published_formula(name: str, impl: str) -> None:
    inputs = inputs_for(name)
    inputs["student"].requires_grad_()
    found = distillation_and_entropy(**inputs, impl=impl)
    truth = published(inputs["student"], inputs["teacher"], inputs["centre"], inputs.get("weight"),
                      inputs["pairs"] == "views")
    torch.testing.assert_close(list(found), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs["student"]) for loss in (found[0], truth[0])),
                               rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["rows with weights", "views"])
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    inputs = {n: v[..., :9] if n in ("student", "teacher", "centre") else v for n, v in inputs_for(name).items()}
    student = inputs.pop("student").contiguous().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: distillation(s, **inputs, impl="torch"), student)


def golden_rows(impl: str) -> tuple[list[list[float]], list[Tensor], np.ndarray, list[Tensor]]:
    """Losses, norms of gradients and both centres of iBOT's own loss over four steps, ours and the stored ones."""
    with safe_open(GOLDEN, "pt") as file:
        meta = {k: json.loads(v) for k, v in file.metadata().items()}
        stored = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    b, n, d, crops = meta["batch"], meta["num_patches"], meta["out_dim"], meta["local_crops"]
    rng, edge, rows = np.random.default_rng(meta["seed"]), math.isqrt(n), []
    centre, patch_centre = torch.zeros(1, d), torch.zeros(1, 1, d)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    for step in range(meta["steps"]):
        student, patches, teacher, patch_teacher, local = (
            normal(*shape) for shape in ((2 * b, d), (2 * b, n, d), (2 * b, d), (2 * b, n, d), (crops * b, d)))
        mask = torch.from_numpy(np.stack([rng.random((b, edge, edge)) < 0.3 for _ in range(2)])).reshape(2 * b, n)
        student.requires_grad_()
        patches.requires_grad_()
        share = min(step / 2, 1.0)  # linear over three epochs, of one step each
        call = partial(distillation, student_temp=torch.tensor(0.1), impl=impl)
        of_views = call(torch.cat([student, local]).view(2 + crops, b, d), teacher.view(2, b, d), centre,
                        teacher_temp=torch.tensor(0.04 + share * 0.03), pairs="views")
        # Masked rows alone, of both views; each image counts once.
        weight = (1 / (2 * b * mask.sum(1, keepdim=True).clamp(min=1))).expand(2 * b, n)
        of_patches = call(patches[mask], patch_teacher[mask], patch_centre,
                          teacher_temp=torch.tensor(0.04 + share * 0.02), weight=weight[mask])
        grads = torch.autograd.grad(of_views + of_patches, [student, patches])
        rows.append([x.item() for x in (of_views, of_patches, of_views + of_patches, *(g.norm() for g in grads))])
        centre = moved_centre(centre, *centre_sum(teacher))
        patch_centre = moved_centre(patch_centre, *centre_sum(patch_teacher))
    return rows, [centre, patch_centre], stored["rows"].numpy(), [stored["center"], stored["center2"]]


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_golden_run_of_ibots_loss(impl: str) -> None:
    rows, centres, stored, stored_centres = golden_rows(impl)
    np.testing.assert_allclose(rows, stored, rtol=1e-5)
    torch.testing.assert_close(centres, stored_centres, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_only_the_student_learns(impl: str) -> None:
    inputs = inputs_for("views with weights")
    leaves = {n: inputs[n].requires_grad_() for n in ("student", "teacher", "centre", "weight")}
    temps = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in TEMPS.items()}
    loss, entropy = distillation_and_entropy(**inputs | temps, impl=impl)
    loss.backward()
    assert not entropy.requires_grad and leaves["student"].grad.ne(0).any()
    assert all(t.grad is None for t in (leaves["teacher"], leaves["centre"], leaves["weight"], *temps.values()))
    inputs["student"] = inputs["student"].detach()
    assert not distillation(**inputs, impl=impl).requires_grad


@pytest.mark.parametrize("host_waits", [True, False])
def test_rows_of_weight_0_are_not_read(host_waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is a teacher row all of whose student rows have it; what they hold is in neither loss nor gradient."""
    if not host_waits:  # as on a GPU without Triton, where it is read but does not count
        monkeypatch.setattr(on_torch, "_chunks", lambda weight, codes: iter([slice(0, 2), slice(2, None)]))
    for name in ("rows", "views"):
        inputs = {n: v.float() if isinstance(v, Tensor) else v for n, v in inputs_for(name).items()}
        weight = torch.ones(inputs["student"].shape[:-1])
        weight[..., 1] = 0  # one row, or all views of one image
        if name == "views":
            weight[3, 2] = 0
        expected, expected_entropy = distillation_and_entropy(**inputs, weight=weight, impl="reference")
        inputs["student"][weight == 0] = float("nan")
        inputs["teacher"][..., 1, :] = float("nan")
        student = inputs["student"].requires_grad_()
        loss, entropy = distillation_and_entropy(**inputs, weight=weight, impl="torch")
        (grad,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close((loss, entropy), (expected, expected_entropy))
        assert grad[weight == 0].eq(0).all() and grad[weight != 0].ne(0).any(-1).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    pairs = "rows" if len(shape) == 2 else "views"
    student = torch.zeros(shape, requires_grad=True)
    for impl in ("torch", "reference"):
        loss = distillation(student, torch.zeros(shape), torch.zeros(8), pairs=pairs, **TEMPS, impl=impl)
        assert loss.item() == 0 and torch.autograd.grad(loss, student)[0].shape == shape


def test_loss_is_entropy_and_divergence() -> None:
    """A student with the teacher's distribution: the divergence is 0, its gradient too."""
    teacher, centre = torch.randn(6, 50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    student = ((teacher - centre) / 0.05 * 0.1).requires_grad_()
    loss, entropy = distillation_and_entropy(student, teacher, centre, **TEMPS, impl="torch")
    assert loss.item() == pytest.approx(entropy.item(), rel=1e-12)
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-15


def operands(name: str = "views", impl: str = "torch") -> tuple[Any, ...]:
    given = {n: v.float() if isinstance(v, Tensor) else v for n, v in inputs_for(name).items()}
    return (given["student"].requires_grad_(), given["teacher"], given["centre"].flatten(), given.get("weight"),
            torch.tensor(0.1), torch.tensor(0.05), given["pairs"] == "rows", impl)


def test_opcheck() -> None:
    torch.library.opcheck(OP.forward.op, operands())


def test_a_schedule_compiles_once() -> None:
    """Temperatures that are tensors change without a new graph, and without a break in it."""
    student, teacher, centre, *_ = operands()
    graphs: list[Any] = []

    def backend(graph: Any, example: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    call = partial(distillation, student, teacher, centre, pairs="views")
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    for temp in (0.04, 0.05, 0.07):
        temps = {"student_temp": torch.tensor(0.1), "teacher_temp": torch.tensor(temp)}
        assert torch.equal(compiled(**temps), call(**temps))
        assert torch.equal(call(**temps), call(student_temp=0.1, teacher_temp=temp))
    assert len(graphs) == 1


def test_a_schedule_launches_one_kernel() -> None:
    """Neither temperatures nor numbers of rows are part of what Triton compiles."""
    pytest.importorskip("triton")
    from fastmim_kernels.check.compile_ahead import specialisation
    from fastmim_kernels.check.launches import launches_of

    def kernels(rows: int, temp: float, pairs: str) -> set[Any]:
        def step() -> None:
            shape = (5, rows, 8192) if pairs == "views" else (rows, 8192)
            student = torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
            teacher = torch.empty((2, *shape[1:]) if pairs == "views" else shape, dtype=torch.bfloat16)
            distillation(student, teacher, torch.empty(8192), student_temp=0.1, teacher_temp=temp, pairs=pairs,
                         weight=torch.empty(shape[:-1])).backward()

        return set(map(specialisation, launches_of(step)))

    for pairs in ("rows", "views"):
        first = kernels(640, 0.04, pairs)
        assert len(first) == 2 and first == kernels(640, 1.0, pairs) == kernels(37, 0.07, pairs) == kernels(1, 1, pairs)


def test_what_is_kept_for_backward() -> None:
    """Of logits in bfloat16 the gradient alone, 2·K·R bytes; of float16, and as an op, the logits as they came."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for dtype, least, most in ((torch.bfloat16, 1, 0), (torch.float16, 2, 4 * 300 + 8 + 16 * 40)):
            kept.clear()
            student, teacher = (torch.randn(40, 300).to(dtype) for _ in range(2))
            distillation(student.requires_grad_(), teacher, torch.zeros(300), **TEMPS, impl="torch")
            assert 0 <= sum(kept.values()) - least * 2 * 40 * 300 <= most


def test_no_products_are_counted() -> None:
    with FlopCounterMode(display=False) as counter:
        OP.forward.op(*operands())
    assert counter.get_total_flops() == 0


def test_closed_forms() -> None:
    """objectives-design: forward 2K(R_s + R_t), backward 2K(2·R_s + R_t), and vectors."""
    k, rows = 8192, 640
    forward, backward = traffic(1, 1, rows, k)
    assert forward == (2 * k * 2 * rows + 4 * k + 8 + 4 * rows, 8 * 2 * rows + 8, 0)
    assert sum(backward[:2]) == 2 * k * 3 * rows + 4 * k + 8 + 4 * rows + 16 * rows + 4
    (read, *_), (_, written, _) = traffic(12, 2, 10, k, weighted=False, itemsize=2, teacher_itemsize=4)
    assert read == k * (120 * 2 + 20 * 4) + 4 * k + 8 and written == k * 120 * 2
    # Half of the rows hidden: of those, zeros are written and nothing is read.
    (read, *_), (_, written, _) = traffic(1, 1, rows, k, shown=0.5)
    assert read == 2 * k * rows + 4 * k + 8 + 4 * rows and written == 2 * k * rows


def test_the_planner_counts_the_closed_forms() -> None:
    """Of rows (with the share that is shown) and of views, whatever scratch the launches are given."""
    pytest.importorskip("triton")
    for shape, teachers, weighted in (((640, 8192), (640, 8192), True), ((12, 64, 8192), (2, 64, 8192), False)):
        with FakeTensorMode(), dispatch.as_on_a_gpu(), DispatchCounter(shares={"distillation": 0.5 if weighted else 1}
                                                                       ) as counter:
            distillation(torch.empty(shape, dtype=torch.bfloat16, requires_grad=True),
                         torch.empty(teachers, dtype=torch.bfloat16), torch.empty(8192),
                         student_temp=torch.empty(()), teacher_temp=torch.empty(()),
                         pairs="rows" if weighted else "views", weight=torch.empty(shape[:-1]) if weighted else None
                         ).backward()
        found = [launch.bytes for launch in counter.launches if "/triton." in launch.op]
        sizes = (1, 1, 640) if weighted else (12, 2, 64)
        assert found == [sum(way[:2]) for way in traffic(*sizes, 8192, weighted=weighted, shown=0.5 if weighted else 1)]


@pytest.mark.parametrize("change, word", [
    ({"pairs": "all"}, "pairs='all': must be one of rows, views"), ({"student_temp": 0.0}, "student_temp must be"),
    ({"teacher_temp": -0.1}, "teacher_temp must be"), ({"teacher_temp": torch.ones(2)}, "a tensor of one value on cpu"),
    ({"teacher": torch.zeros(10, 300)}, r"teacher must be \(11, 300\) as student, a row for each of its rows"),
    ({"teacher": torch.zeros(11, 30)}, r"teacher must be \(11, 300\)"), ({"centre": torch.zeros(3)}, "300 values"),
    ({"weight": torch.ones(3)}, r"weight must be \(11,\)"), ({"pairs": "views"}, r"student must be \(V, B, K\)"),
    ({"pairs": "views", "student": torch.zeros(1, 2, 300), "teacher": torch.zeros(1, 2, 300)}, "pairs must be 'rows'"),
    ({"pairs": "views", "student": torch.zeros(3, 2, 300), "teacher": torch.zeros(2, 300)}, r"teacher must be \(U, 2"),
    ({"teacher": torch.zeros(())}, "teacher must be"), ({"student": torch.zeros(())}, r"student must be \(…, K\)"),
])
def test_wrong_arguments_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        distillation(**inputs_for("rows") | change)


def test_centre_over_micro_batches_is_that_of_the_whole_batch() -> None:
    logits, centre = torch.randn(12, 5, 30, dtype=torch.float64), torch.randn(1, 1, 30, dtype=torch.float64)
    parts = [centre_sum(part) for part in logits.split((3, 4, 5))]
    total, count = sum(p[0] for p in parts), sum(p[1] for p in parts)
    expected = 0.9 * centre + 0.1 * logits.mean((0, 1), keepdim=True)
    for number in (count, torch.tensor(float(count))):
        torch.testing.assert_close(moved_centre(centre, total, number), expected, rtol=1e-14, atol=1e-14)
        assert torch.equal(moved_centre(centre, 0 * total, number * 0), centre)
    assert centre_sum(logits.bfloat16())[0].dtype == torch.float32


def test_monitors() -> None:
    k = 16
    logits, centre = torch.full((32, k), -100.0), torch.zeros(k)
    logits[torch.arange(32), torch.arange(32) % 8] = 100.0  # 8 codes, equally often
    assert mean_target_entropy(logits, centre, 0.05).exp().item() == pytest.approx(8)
    assert mean_target_entropy(torch.zeros(3, k), centre, torch.tensor(0.05)).item() == pytest.approx(math.log(k))
    one = torch.zeros(32, k)
    one[:, 3] = 1
    assert mean_target_entropy(one, torch.zeros(1, k), 0.01).item() == pytest.approx(0, abs=1e-6)
    assert view_agreement(logits, logits).item() == 1 and view_agreement(one, logits).item() == pytest.approx(1 / 8)
