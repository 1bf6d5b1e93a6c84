"""What a load of weights does and says: every tensor is used, or the error names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class LoadReport:
    """What a load did.

    Attributes:
        names: Foreign name → own parameter name, of every tensor loaded.
        skipped: Foreign names that hold no weights of this model (buffers, classifier heads).
        initialised: Own parameters that the source does not have and that keep their initial values.
        place: Where in the file the tensors were, such as ``teacher`` or ``model``; empty at its top.
        prefix: What stood before the names of the encoder, such as ``backbone.``.
        not_read: What else the file holds, by its key or by the kind of object.
        notes: What the file says of its weights that differs here.
    """

    names: dict[str, str] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    place: str = ""
    prefix: str = ""
    not_read: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        under = "".join([f" from {self.place}" if self.place else "", f" under {self.prefix}" if self.prefix else ""])
        parts = [f"{len(self.names)} tensors loaded{under}"]
        for what, names in (("new", self.initialised), ("skipped", self.skipped), ("not read", self.not_read)):
            parts.append(f"{len(names)} {what}" + (f" ({some_of(names)})" if names else ""))
        return ", ".join(parts)


def some_of(names: list[str], most: int = 4) -> str:
    """The first names."""
    return ", ".join(name[:80] for name in names[:most]) + (", …" if len(names) > most else "")


def copy_strictly(
    objective: nn.Module, tensors: Mapping[str, Tensor], report: LoadReport, optional: Sequence[str] = ()
) -> None:
    """Copy what ``report.names`` says; every parameter that is not ``optional`` must be there, in its shape.

    Persistent buffers (centres, statistics of BatchNorm) may be there too, then all of them.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named.
    """
    check_strictly(objective, tensors, report, optional)
    own = objective.state_dict(keep_vars=True)
    report.initialised = [k for k in own if k in optional]
    with torch.no_grad():
        for key, name in report.names.items():
            own[name].copy_(tensors[key].reshape(own[name].shape))


def check_strictly(
    objective: nn.Module, tensors: Mapping[str, Tensor], report: LoadReport, optional: Sequence[str] = ()
) -> None:
    """What :func:`copy_strictly` refuses, without a copy; ``objective`` may be on the meta device.

    Raises:
        ValueError: A tensor is unknown, missing or of another shape; all are named. Or it holds no finite numbers.
    """
    own = objective.state_dict(keep_vars=True)
    buffers = {name for name in own if not isinstance(own[name], nn.Parameter)}
    given = set(report.names.values())
    none = optional if given.intersection(buffers) else {*optional, *buffers}
    _check_numbers({key: tensors[key] for key, name in report.names.items() if name not in buffers})
    unknown = [k for k, v in report.names.items() if v not in own]
    missing = [k for k in own if k not in given and k not in none]
    shapes = [
        f"{k} {tuple(tensors[k].shape)} against {tuple(own[v].shape)}"
        for k, v in report.names.items()
        if v in own and not _same_shape(tensors[k], own[v])
    ]
    problems = [("unknown", unknown), ("missing", missing), ("of another shape", shapes)]
    if any(names for _, names in problems):
        raise ValueError(
            "weights do not fit the model: "
            + "; ".join(f"{len(names)} {what} ({', '.join(names)})" for what, names in problems if names)
        )


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    """Weights are floating-point numbers, all of them finite."""
    integers = [key for key, tensor in tensors.items() if not tensor.is_floating_point()]
    if integers:
        raise ValueError(f"{integers[0]} is of {tensors[integers[0]].dtype}: expected floating-point weights")
    bad = [key for key, tensor in tensors.items() if not tensor.is_meta and not bool(torch.isfinite(tensor).all())]
    if bad:
        count = f"{len(bad)} tensors, the first of them {bad[0]}, hold" if len(bad) > 1 else f"{bad[0]} holds"
        raise ValueError(f"{count} numbers that are not finite: the file is damaged or its run failed; use another")


def _same_shape(source: Tensor, target: Tensor) -> bool:
    # The head is a 1×1 convolution there and a matrix here.
    return tuple(s for s in source.shape if s != 1) == tuple(s for s in target.shape if s != 1)
