"""``distillation`` in torch: as many rows at a time as stay in cache, softmax computed again for the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..common.define_op import autograd_function
from ..common.rows import cast
from .layout import mean_weight, teachers_of

VALUES = 1 << 19
"""Logits of one view that are worked on at a time."""


def forward(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, student_temp: Tensor,
            teacher_temp: Tensor, own: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of the op ``fastmim::distillation``; nothing is kept for backward but the inputs."""
    loss, entropy = _losses(student, teacher, centre, weight, student_temp, teacher_temp, own)
    return loss, entropy, centre.new_empty(0), centre.new_empty(0)


def composed(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, student_temp: Tensor,
             teacher_temp: Tensor, own: bool) -> tuple[Tensor, Tensor] | None:
    """Loss and entropy with a gradient that is made on the way, on a CPU, and kept in place of all logits.

    Backward would repeat every softmax. Not in float16, where what the scale of the loss would lift is lost.
    """
    if not (student.is_cpu and student.requires_grad and torch.is_grad_enabled()) or student.dtype == torch.float16:
        return None
    found: tuple[Tensor, Tensor] = _WITH_GRADIENT.apply(student, teacher, centre, weight, student_temp, teacher_temp,
                                                        own)
    return found


def _with_gradient(ctx: Any, student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None,
                   student_temp: Tensor, teacher_temp: Tensor, own: bool) -> tuple[Tensor, Tensor]:
    gradient = _empty_gradient(student, weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)
    return _losses(student, teacher, centre, weight, student_temp, teacher_temp, own, gradient)


def _with_gradient_backward(ctx: Any, grad: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient, = ctx.saved_tensors
    if grad is None:
        return (None,) * 7
    if grad.item() != 1:  # as it is where this loss is the one that is minimised
        gradient = cast(cast(gradient, grad.dtype) * grad, gradient.dtype)
    return gradient, *(None,) * 6


_WITH_GRADIENT = autograd_function("distillation_with_gradient", _with_gradient, _with_gradient_backward)


def _losses(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, student_temp: Tensor,
            teacher_temp: Tensor, own: bool, gradient: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(Loss, entropy), and the gradient of the loss into ``gradient``."""
    given = weight is not None
    weight = _weights(student, teacher, centre, weight, own)
    factor = weight / student_temp
    loss, entropies = centre.new_zeros(()), centre.new_zeros(())
    for groups in _chunks(weight, student.shape[2]):
        logits = _centred(teacher[:, groups], centre, teacher_temp)
        logits -= logits.amax(-1, keepdim=True)
        target = torch.softmax(logits, -1)
        # Of the largest, e⁰ / Σ: without exponentials of their own, which subnormal numbers make slow on a CPU.
        each = -target.amax(-1).log() - torch.linalg.vecdot(target, logits)
        for view, w in enumerate(weight[:, groups]):
            others = teachers_of(view, len(target), own)
            if others:
                wanted = _sum(target, others)
                logarithm = torch.log_softmax(_scaled(student[view, groups], student_temp), -1)
                loss -= _weighted(torch.linalg.vecdot(wanted, logarithm), w)
                entropies += _weighted(each[others].sum(0), w)
                if gradient is not None:
                    slope = _slope(logarithm.exp_(), wanted, len(others), factor[view, groups])
                    gradient[view, groups] = _shown(slope, w, given, gradient.dtype)
            elif gradient is not None:
                gradient[view, groups] = 0
    return loss, entropies


def backward(grad: Tensor, student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None,
             student_temp: Tensor, teacher_temp: Tensor, student_rows: Tensor, teacher_rows: Tensor, own: bool
             ) -> Tensor:
    """Arguments and result of ``fastmim::distillation_backward``: grad·w/τ_s · (n·softmax(s/τ_s) − Σ target)."""
    given = weight is not None
    weight = _weights(student, teacher, centre, weight, own)
    factor = weight * (grad / student_temp)
    out = _empty_gradient(student, weight if given else None)
    for groups in _chunks(weight, student.shape[2]):
        target = torch.softmax(_centred(teacher[:, groups], centre, teacher_temp), -1)
        for view in range(len(student)):
            others = teachers_of(view, len(target), own)
            if not others:
                out[view, groups] = 0
                continue
            slope = torch.softmax(_scaled(student[view, groups], student_temp), -1)
            slope = _slope(slope, _sum(target, others), len(others), factor[view, groups])
            out[view, groups] = _shown(slope, weight[view, groups], given, out.dtype)
    return out


def _empty_gradient(student: Tensor, weight: Tensor | None) -> Tensor:
    # Rows that no chunk visits have weight 0.
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    return out if weight is None else out.zero_()


def _slope(softmax: Tensor, wanted: Tensor, others: int, factor: Tensor) -> Tensor:
    """(n·softmax − Σ target)·factor of the rows, in place of the softmax."""
    softmax = softmax.mul_(others) if others > 1 else softmax
    return softmax.sub_(wanted).mul_(factor.unsqueeze(-1))


def _shown(slope: Tensor, weight: Tensor, given: bool, dtype: torch.dtype) -> Tensor:
    # Never 0·NaN.
    return cast(slope.masked_fill_((weight == 0).unsqueeze(-1), 0) if given else slope, dtype)


def _weights(student: Tensor, teacher: Tensor, centre: Tensor, weight: Tensor | None, own: bool) -> Tensor:
    views, groups = student.shape[:2]
    return centre.new_full((views, groups), mean_weight(views, len(teacher), groups, own)) if weight is None else weight


def _chunks(weight: Tensor, codes: int) -> Iterator[Tensor | slice]:
    """Groups that are worked on together; on a CPU without those whose weights are 0: elsewhere the host would wait."""
    size = max(1, VALUES // codes)
    groups = weight.shape[1]
    if weight.is_cpu:
        shown = weight.ne(0).any(0)
        if not shown.all():
            yield from (rows for rows in shown.nonzero().squeeze(1).split(size) if len(rows))
            return
    else:
        size *= 16
    for start in range(0, groups, size):
        yield slice(start, start + size)


def _centred(teacher: Tensor, centre: Tensor, temp: Tensor) -> Tensor:
    return (teacher - centre).div_(temp)


def _scaled(student: Tensor, temp: Tensor) -> Tensor:
    # A tensor of one value would be rounded to the dtype of the logits: widen first.
    return student / temp if student.dtype == temp.dtype else student.to(temp.dtype).div_(temp)


def _sum(target: Tensor, others: list[int]) -> Tensor:
    """(n, K) of the rows of (U, n, K) that ``others`` names."""
    found = target[others[0]]
    for other in others[1:]:
        found = found + target[other]
    return found


def _weighted(rows: Tensor, weight: Tensor) -> Tensor:
    # Never 0·NaN.
    return torch.where(weight == 0, 0, rows * weight).sum()
