"""What tells of a collapse beside the teacher's entropy: of a few rows, at log steps; nothing waits for the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.rows import statistics_dtype


@torch.no_grad()
def view_agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Share of the rows of (…, K) whose largest logit has the same place (iBOT's ``acc``, of two different views).

    1 from the start on is a collapse to one code, 1/K one to noise; 0-d, float32.
    """
    return (student.argmax(-1) == teacher.argmax(-1)).float().mean()


@torch.no_grad()
def mean_target_entropy(teacher: Tensor, centre: Tensor, teacher_temp: float | Tensor) -> Tensor:
    """Entropy of the mean over the rows of (…, K) of ``softmax((t − c) / τ_t)``, in nats; 0-d, float32 or better.

    e to its power is the number of codes in use, log K less it the divergence of the mean from the uniform
    distribution. Near 0 with a small entropy of each row: one code for everything.
    """
    wide = statistics_dtype(teacher.dtype)
    logits = (teacher.to(wide) - centre.reshape(-1).to(wide)) / teacher_temp
    mean = torch.softmax(logits, -1).reshape(-1, teacher.shape[-1]).mean(0)
    return torch.special.entr(mean).sum()
