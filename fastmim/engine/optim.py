"""The optimiser, and the groups of parameters that it updates."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fastmim.objectives import Objective
from fastmim.objectives.groups import split_freezable, split_parameters
from fastmim.wording import install_extra


def param_groups(obj: nn.Module, weight_decay: float, policy: str = "parity") -> list[dict[str, Any]]:
    """The groups that an objective asks for, freezable parameters apart, or those of any other module's parameters.

    Arguments, groups and errors are those of :func:`fastmim.objectives.groups.split_parameters`.
    """
    if isinstance(obj, Objective):
        return split_freezable(obj.groups(weight_decay, policy), obj.freezable())
    return split_parameters(obj, weight_decay, policy)


def build_optimizer(
    name: str,
    groups: Iterable[dict[str, Any]],
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    fused: str | bool = "auto",
) -> torch.optim.Optimizer:
    """Build the optimiser over parameter groups.

    Args:
        name: ``"adamw"``, or ``"lamb"`` (You et al. 2020, for very large batches; the engine clips, LAMB does not).
        groups: groups of :func:`param_groups`.
        lr: first learning rate; the engine sets it again before every update.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        fused: ``"auto"`` takes torch's fused kernel where the parameters' device and dtype have one;
            ``True`` demands it; ``False`` takes the foreach loop; ``"apex"`` takes NVIDIA apex' FusedAdam or
            FusedLAMB, and ``"cpu_adam"`` DeepSpeed's for states in CPU memory (compiled at first use). LAMB is
            apex' or, otherwise, timm's.

    Raises:
        ValueError: unknown optimiser, or a kernel that is not there.
    """
    groups = list(groups)
    if name == "lamb":
        return _lamb(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=fused)
    if name != "adamw":
        raise ValueError(f"optim.name={name!r}: unknown optimiser; use adamw or lamb")
    if fused == "apex":
        return _from_apex("FusedAdam")(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, adam_w_mode=True)
    if fused == "cpu_adam":
        return _cpu_adam()(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, adamw_mode=True)
    params = [param for group in groups for param in group["params"]]
    available = all(param.device.type in ("cpu", "cuda") and param.is_floating_point() for param in params)
    if fused is True and not available:
        raise ValueError("efficiency.fused_optimizer=true: torch has no fused AdamW here; use auto")
    use_fused = available if fused == "auto" else bool(fused)
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=use_fused)


def _lamb(groups: list[dict[str, Any]], *, fused: str | bool, **options: Any) -> torch.optim.Optimizer:
    if fused == "apex":
        # By default it clips, after the engine did.
        return _from_apex("FusedLAMB")(groups, max_grad_norm=math.inf, **options)
    if fused is True or fused == "cpu_adam":
        shown = "true" if fused is True else fused
        raise ValueError(f"efficiency.fused_optimizer={shown}: there is no such LAMB; use auto, or apex")
    from timm.optim import Lamb

    return Lamb(groups, max_grad_norm=None, **options)


def _from_apex(name: str) -> Any:
    try:
        # PyPI's "apex" is an unrelated package without these.
        return getattr(importlib.import_module("apex.optimizers"), name)
    except (ImportError, AttributeError):
        raise ValueError(
            "efficiency.fused_optimizer=apex: NVIDIA's apex is not installed (it is not the apex of PyPI); "
            "build it from github.com/NVIDIA/apex, or use auto"
        ) from None


def _cpu_adam() -> Any:
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        how = install_extra("zero")
        raise ValueError(f"efficiency.fused_optimizer=cpu_adam: needs DeepSpeed; {how}") from None
    return DeepSpeedCPUAdam
