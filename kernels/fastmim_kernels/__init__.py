"""fastmim_kernels: the ops of masked image modelling, each with several interchangeable implementations.

Every op takes ``impl="auto" | "triton" | "torch" | "reference"``; an explicit name never falls back.
This package never imports ``fastmim``.
"""

from typing import TYPE_CHECKING
from typing import Any as _Any

import torch as _torch

from .common import dispatch as _dispatch
from .common.dispatch import IMPLS, check_impl
from .distillation.op import distillation, distillation_and_entropy
from .fusion import Fusion, fusion, shape_may_follow
from .linear.op import linear, linear_and_input
from .local_norm.op import local_norm_target
from .low_copies.op import low_copies
from .mask_tokens.op import mask_tokens, mask_tokens_twice
from .masked_loss.linear_op import linear_masked_l1
from .masked_loss.op import masked_l1
from .mlp.gelu import gelu
from .mlp.op import mlp, mlp_and_input
from .patch_merge.op import patch_merge
from .position_bias.op import bias_plan, cpb_bias, position_bias
from .residual_norm.op import layer_norm, residual_norm
from .unshuffle.op import unshuffle
from .visible_attention.op import visible_attention
from .window_attention.op import window_attention

if TYPE_CHECKING:
    from . import nn
    from .nn import accelerate

__all__ = [
    "IMPLS",
    "Fusion",
    "accelerate",
    "bias_plan",
    "check_impl",
    "cpb_bias",
    "distillation",
    "distillation_and_entropy",
    "fusion",
    "gelu",
    "layer_norm",
    "linear",
    "linear_and_input",
    "linear_masked_l1",
    "local_norm_target",
    "low_copies",
    "mask_tokens",
    "mask_tokens_twice",
    "masked_l1",
    "mlp",
    "mlp_and_input",
    "nn",
    "patch_merge",
    "position_bias",
    "residual_norm",
    "shape_may_follow",
    "unshuffle",
    "visible_attention",
    "window_attention",
]


def __getattr__(name: str) -> _Any:
    # These import timm, which no op needs.
    if name not in ("accelerate", "nn"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.nn")
    return module if name == "nn" else module.accelerate


def _self_test(op: str, dtype: _torch.dtype, device: _torch.device) -> str:
    # The test runs the ops, so that it stands above them; it is loaded when a GPU asks for it.
    from .check.self_test import failure

    return failure(op, dtype, device)


_dispatch.self_test = _self_test
