"""Who wants to see the call of a module."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def hooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs anything but its forward: hooks, or what ``module.compile()`` has made."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or module._compiled_call_impl is not None)


def seen_by_nobody(module: nn.Module) -> bool:
    """Whether it may be computed through without a call, for all that hooks of its own or of every module tell."""
    return not (hooked(module) or _has_any_global_hook())
