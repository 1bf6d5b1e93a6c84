"""Cross-entropy between a teacher's centred, sharpened softmax and a student's (DINO, section 3.1; iBOT, section 3).

One pass over the logits forward and one backward: no probability is ever in memory. Both temperatures and the centre
are tensors, so that a schedule changes them without a new kernel and without the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..common.arguments import at_hand, explained, floating, shown, wrong
from ..common.define_op import Kept, define_op
from . import on_torch
from .layout import mean_weight, teachers_of

PAIRS = ("rows", "views")


@explained()
def distillation(student: Tensor, teacher: Tensor, centre: Tensor, *, student_temp: float | Tensor,
                 teacher_temp: float | Tensor, pairs: str = "rows", weight: Tensor | None = None,
                 impl: str = "auto") -> Tensor:
    """``Σ w_i · Σ_j CE(softmax((t_j − c) / τ_t), softmax(s_i / τ_s))`` over student rows i and their teacher rows j.

    The gradient is the student's alone: teacher, centre, weights and temperatures are constants.

    Args:
        student: Logits over K codes; with ``pairs="rows"`` (…, K), with "views" (V, B, K), views outermost.
        teacher: "rows": as many rows as the student has; "views": (U, B, K).
        centre: K values in any shape, subtracted from every teacher row.
        student_temp, teacher_temp: τ_s and τ_t, positive and finite; a number, or a tensor of one value on the device
            of the logits where it changes from step to step: ``torch.compile`` and CUDA graphs keep numbers as they
            are.
        pairs: "rows": row i of the student with row i of the teacher (iBOT's patches, of which those that are masked
            are given). "views": row (v, b) with the rows (u, b) of all u ≠ v (class tokens: global crops first, in
            the teacher's order, then the local ones).
        weight: w_i for every student row, in the shape of ``student`` but for K. Rows of weight 0 are not read, their
            gradient is an exact zero: a fixed number of rows holds any number of masked patches. Default: 1 over the
            number of pairs, which makes the mean.
        impl: See :mod:`fastmim_kernels.common.dispatch`.

    Returns:
        Scalar, float32 (float64 if one of the logits is). 0 for no rows.

    Raises:
        ValueError: An argument is not what is said here.
    """
    prepared = _prepared("distillation", student, teacher, centre, student_temp, teacher_temp, pairs, weight)
    loss: Tensor = OP(*prepared, impl=impl)[0]
    return loss


@explained()
def distillation_and_entropy(student: Tensor, teacher: Tensor, centre: Tensor, *, student_temp: float | Tensor,
                             teacher_temp: float | Tensor, pairs: str = "rows", weight: Tensor | None = None,
                             impl: str = "auto") -> tuple[Tensor, Tensor]:
    """:func:`distillation` and the teacher's entropy, the same weighted sum over the same pairs, from the same pass.

    Their difference is the divergence KL(teacher ‖ student). A collapse shows in the entropy of the mean of rows (DINO,
    section 5.3): towards 0 it is to one code, towards log K to the uniform distribution. No gradient flows through it.
    """
    prepared = _prepared("distillation_and_entropy", student, teacher, centre, student_temp, teacher_temp, pairs,
                         weight)
    loss, entropy = OP(*prepared, impl=impl)
    return loss, entropy.detach()


def traffic(views: int, teachers: int, groups: int, codes: int, *, weighted: bool = True, shown: float = 1.0,
            itemsize: int = 2, teacher_itemsize: int = 2) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Least (bytes read, bytes written, FLOPs of products) of forward and of backward.

    Args:
        views, teachers, groups: V, U and B of ``pairs="views"``; 1, 1 and the number of rows of "rows".
        codes: K.
        weighted: Weights are given.
        shown: Share of the rows whose weight is not 0; only those are read.
        itemsize, teacher_itemsize: Bytes of a logit of the student and of the teacher.
    """
    rows, seen, targets = views * groups, round(views * groups * shown), round(teachers * groups * shown)
    logits = codes * (seen * itemsize + targets * teacher_itemsize)
    constants = 4 * codes + 8 + (4 * rows if weighted else 0)
    # Of each row maximum and logarithm of the sum are kept.
    kept = 8 * (seen + targets)
    return (logits + constants, kept + 8, 0), (logits + constants + kept + 4, rows * codes * itemsize, 0)


def _prepared(op: str, student: Tensor, teacher: Tensor, centre: Tensor, student_temp: float | Tensor,
              teacher_temp: float | Tensor, pairs: str, weight: Tensor | None) -> tuple[Any, ...]:
    """Arguments of the op: logits (V, B, K) and (U, B, K), constants without gradients in the dtype of the loss."""
    _check(op, student, teacher, centre, pairs, weight)
    wide, codes = wide_dtype(student.dtype, teacher.dtype), student.shape[-1]
    temps = (_temperature(op, name, value, student.device, wide)
             for name, value in (("student_temp", student_temp), ("teacher_temp", teacher_temp)))
    if pairs == "rows":
        rows = math.prod(student.shape[:-1])
        student, teacher = student.reshape(1, rows, codes), teacher.reshape(1, rows, codes)
    weight = None if weight is None else weight.detach().reshape(student.shape[:2]).to(wide)
    return (student, teacher.detach(), centre.detach().reshape(-1).to(wide), weight, *temps, pairs == "rows")


def _check(op: str, student: Tensor, teacher: Tensor, centre: Tensor, pairs: str, weight: Tensor | None) -> None:
    floating(op, student, teacher, centre, weight)
    if pairs not in PAIRS:
        raise ValueError(f"{op}: pairs={shown(pairs)}: must be one of {', '.join(PAIRS)}")
    shape, targets = student.shape, teacher.shape
    if not shape or not shape[-1]:
        raise wrong(op, "student", "(…, K) with K of 1 or more", student)
    if pairs == "rows" and targets != shape:
        raise wrong(op, "teacher", f"{tuple(shape)} as student, a row for each of its rows, with pairs='rows'", teacher)
    if pairs == "views":
        _check_views(op, student, teacher)
    if centre.numel() != shape[-1]:
        raise wrong(op, "centre", f"{shape[-1]} values, one a code of student", centre)
    if weight is not None and weight.shape != shape[:-1]:
        raise wrong(op, "weight", f"{tuple(shape[:-1])} for student of {tuple(shape)}", weight)


def _check_views(op: str, student: Tensor, teacher: Tensor) -> None:
    shape, targets = student.shape, teacher.shape
    if len(shape) != 3 or not shape[0]:
        raise wrong(op, "student", "(V, B, K) with pairs='views'", student)
    if len(targets) != 3 or not targets[0] or targets[1:] != shape[1:]:
        raise wrong(op, "teacher", f"(U, {shape[1]}, {shape[2]}) with pairs='views' and student of {tuple(shape)}",
                    teacher)
    if shape[0] == targets[0] == 1:
        raise wrong(op, "pairs", "'rows' where student and teacher have one view each: the same view makes no pair",
                    "views")


def _temperature(op: str, name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        if not 0 < value < math.inf:
            raise wrong(op, name, "a number above 0, for example 0.1", value)
        # torch.full would take a whole number for an int64.
        return torch.full((), float(value) if isinstance(value, int) else value, dtype=dtype, device=device)
    floating(op, value)
    if value.numel() != 1 or value.device != device:
        raise wrong(op, name, f"a number, or a tensor of one value on {device}", value)
    # On a GPU the host would have to wait for it.
    if at_hand(value) and not 0 < value.item() < math.inf:
        raise wrong(op, name, "above 0, for example 0.1", value.item())
    return value.detach().reshape(()).to(dtype)


def wide_dtype(student: torch.dtype, teacher: torch.dtype) -> torch.dtype:
    """Of softmax and sums: float64 where one of the two is, else float32."""
    return torch.float64 if torch.float64 in (student, teacher) else torch.float32


def _fake(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, student_temp: Tensor,
          teacher_temp: Tensor, own: bool, impl: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, entropy, maximum and log-sum of each student row and of each teacher row, which torch does not keep)."""
    scalar = centre.new_empty(())
    shapes = [(2, *t.shape[:2]) if impl == "triton" else (0,) for t in (student, teacher)]
    return scalar, torch.empty_like(scalar), centre.new_empty(shapes[0]), centre.new_empty(shapes[1])


def _backward_fake(grad: Tensor, student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None,
                   student_temp: Tensor, teacher_temp: Tensor, student_rows: Tensor, teacher_rows: Tensor, own: bool,
                   impl: str) -> Tensor:
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save(inputs: Any, outputs: Any) -> Any:
    *tensors, own, impl = inputs
    return (*tensors, *outputs[2:]), (own, impl)


def _gradients(backward: Callable, kept: Kept, grad: Tensor | None, of_entropy: Tensor | None
               ) -> tuple[Tensor | None, ...]:
    return (None if grad is None else backward(grad, *kept.tensors, *kept.settings),)


def _moved(args: Sequence[Any], shown: float) -> tuple[int, int]:
    return _traffic(args[0], args[1], args[3], shown)[0][:2]


def _backward_moved(args: Sequence[Any], shown: float) -> tuple[int, int]:
    return _traffic(args[1], args[2], args[4], shown)[1][:2]


def _traffic(student: Tensor, teacher: Tensor, weight: Tensor | None, shown: float) -> Any:
    weighted = weight is not None  # else every row is read
    return traffic(student.shape[0], teacher.shape[0], *student.shape[1:], weighted=weighted,
                   shown=shown if weighted else 1.0, itemsize=student.element_size(),
                   teacher_itemsize=teacher.element_size())


def _reference(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, student_temp: Tensor,
               teacher_temp: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    (views, groups), teachers, wide = student.shape[:2], teacher.shape[0], centre.dtype
    if weight is None:
        weight = centre.new_full((views, groups), mean_weight(views, teachers, groups, own))
    pairs = [(v, u) for v in range(views) for u in teachers_of(v, teachers, own)]
    return reference.distillation(student.to(wide), teacher.to(wide), centre, weight, student_temp, teacher_temp, pairs)


OP = define_op("distillation", on_torch, ".on_triton", reference=_reference, fake=_fake, backward_fake=_backward_fake,
               save=_save, gradients=_gradients, results=2, moved=_moved, backward_moved=_backward_moved)
