"""``accelerate(model)``: timm's modules become their drop-ins in place."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field

import timm.layers
from timm.models import register_notrace_module
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from timm.models import vision_transformer as vit
from torch import nn

from ..common.arguments import explained, shown
from ..common.dispatch import check_impl
from .parts import DropIn, Mlp, adopt
from .swin import (
    PadsMaps,
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    SwinTransformerStage,
    SwinTransformerV2Block,
    SwinTransformerV2Stage,
)
from .vit import VitBlock

DROP_INS: dict[type[nn.Module], type[DropIn]] = {
    v1.SwinTransformerStage: SwinTransformerStage,
    v2.SwinTransformerV2Stage: SwinTransformerV2Stage,
    v1.SwinTransformerBlock: SwinTransformerBlock,
    v2.SwinTransformerV2Block: SwinTransformerV2Block,
    v1.PatchMerging: PatchMerging,
    v2.PatchMerging: PatchMergingV2,
    vit.Block: VitBlock,
    timm.layers.Mlp: Mlp,
}
"""By timm's class. A block brings its window attention, which takes a map where timm's takes windows."""

_PART = re.compile(r"(Block|Bottleneck|Mlp|Attention\w*|Merging)$")
"""Names of timm's classes that a report mentions although nothing here stands in for them."""
_WINDOW_ATTENTION = v1.WindowAttention, v2.WindowAttention

for _kind in DROP_INS.values():
    register_notrace_module(_kind)  # a leaf for torch.fx, where timm extracts features with it


@dataclass
class Report:
    """What :func:`accelerate` did; printed, one line for each kind."""

    replaced: dict[str, list[str]] = field(default_factory=dict)
    """Drop-in class → paths of the modules."""
    already: dict[str, list[str]] = field(default_factory=dict)
    """The same, of modules that an earlier call replaced."""
    left: dict[str, str] = field(default_factory=dict)
    """Path → class and why it stays as it is."""
    notes: dict[str, str] = field(default_factory=dict)
    """Path of a replaced module → why it runs timm's own forward all the same, always or in training."""

    def __str__(self) -> str:
        lines = [f"{head} {name}: {len(paths)}" for head, found in (("replaced", self.replaced),
                                                                   ("already replaced", self.already))
                 for name, paths in found.items()] or ["replaced nothing"]
        for head, reasons in (("left", self.left), ("note", self.notes)):
            for reason, count in Counter(reasons.values()).items():
                first = next(path for path, own in reasons.items() if own == reason)
                lines.append(f"{head} {reason}: {count} ({first}{', …' if count > 1 else ''})")
        return "\n".join(lines)


@explained()
def accelerate(model: nn.Module, *, impl: str = "auto", policy: str = "parity") -> Report:
    """Let a timm Swin, SwinV2 or ViT, or a model that contains one, compute on the kernels, in place.

    Stages, blocks (with their window attention), MLPs and patch mergings become instances of subclasses in
    :mod:`fastmim_kernels.nn`: the same objects with the same parameters, buffers, hooks and state dict, so that
    optimisers and references made before stay valid. Outputs and gradients differ by rounding, and stochastic depth
    draws what timm's draws. What a rule of :mod:`.rules` does not know stays as it is.

    A module inside a block that is replaced or given a hook later is called as timm calls it. Calling ``accelerate``
    again is harmless, and sets ``impl`` and ``policy`` anew.

    Args:
        model: Any module that holds modules of timm; ``features_only=True`` wrappers, and backbones in a model of
            one's own, included.
        impl: Of every op: "auto", "triton", "torch" or "reference".
        policy: Of Swin's shifted windows on a map that they do not divide. "parity" computes what timm computes: it
            shifts the map before it pads it, and some tokens attend to the opposite edge. "default" pads before, as
            the paper's windows ask (Liu et al. 2021, section 3.2), also where a replaced module runs timm's own
            forward; what is left stays timm's in this too.

    Returns:
        What was replaced, and what was left and why. A warning names those left whose kind has a drop-in.

    Raises:
        ValueError: ``impl`` or ``policy`` is unknown, or nothing in ``model`` is of timm.
    """
    check_impl(impl)
    if policy not in ("parity", "default"):
        raise ValueError(f"accelerate: policy={shown(policy)}: must be 'parity' or 'default'")
    if not any(_of_timm(type(module)) for module in model.modules()):
        raise ValueError(f"accelerate: model={type(model).__name__} holds no module of timm; pass what "
                         "timm.create_model made, or a model that contains it")
    report, before = Report(), {id(module) for module in model.modules() if isinstance(module, DropIn)}
    for path, module in list(model.named_modules()):
        if isinstance(module, DropIn):
            module.settle(impl)
        elif reason := _swap(module, impl):
            report.left[path] = f"{type(module).__name__}: {reason}"
        if isinstance(module, PadsMaps):
            module.policy = policy
    for path, module in model.named_modules():
        if isinstance(module, DropIn):
            found = report.already if id(module) in before else report.replaced
            found.setdefault(type(module).__name__, []).append(path)
            if reason := module.rule() or module.dropout():
                report.notes[path] = f"{type(module).__name__}: {reason}"
    _warn(report, model)
    return report


def _swap(module: nn.Module, impl: str) -> str:
    """Put the drop-in of ``module`` in its place, or say why not; nothing of what is no part of a transformer."""
    kind = type(module)
    if kind in DROP_INS:
        reason = DROP_INS[kind].rule(module)
        if not reason:
            adopt(module, DROP_INS[kind], impl)
        return reason
    known = next((own.__name__ for own in DROP_INS if isinstance(module, own)), "")
    if known:
        return f"a subclass of {known}, which may compute something else"
    if isinstance(module, _WINDOW_ATTENTION):
        return "its block stays, and hands it windows"
    if isinstance(module, vit.Attention):
        return "torch's scaled_dot_product_attention is its kernel"
    return "no drop-in" if _of_timm(kind) and _PART.search(kind.__name__) else ""


def _of_timm(kind: type) -> bool:
    return any(base.__module__.split(".")[0] == "timm" for base in kind.__mro__)


def _warn(report: Report, model: nn.Module) -> None:
    refused = [path for path in report.left if isinstance(model.get_submodule(path), tuple(DROP_INS))]
    if refused:
        reasons = "; ".join(sorted({report.left[path] for path in refused}))
        warnings.warn(f"accelerate: {len(refused)} modules stay timm's own ({reasons})", stacklevel=3)
    elif not report.replaced and not report.already:
        warnings.warn(f"accelerate: nothing in {type(model).__name__} has a drop-in; it stays as it is", stacklevel=3)
