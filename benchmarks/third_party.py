"""SimMIM as lightly and mmpretrain build it, where they are installed."""
from __future__ import annotations
from typing import Any
from torch import nn
def lightly_objective(encoder: dict[str, Any], norm_target: int, source: nn.Module) -> nn.Module:
    raise ImportError("not installed")
def mmpretrain_objective(encoder: dict[str, Any], norm_target: int, source: nn.Module) -> nn.Module:
    raise ImportError("not installed")
