"""fastmim_kernels: the ops of masked image modelling, each with several interchangeable implementations.

Every op takes ``impl="auto" | "triton" | "torch" | "reference"``; an explicit name never falls back.
This package never imports ``fastmim``.
"""

from .cpb import bias_plan, cpb_bias, position_bias
from .dispatch import IMPLS, check_impl
from .gelu import gelu
from .linear import linear, linear_and_input
from .local_norm import local_norm_target
from .low_copies import low_copies
from .mask_tokens import mask_tokens, mask_tokens_twice
from .masked_l1 import linear_masked_l1, masked_l1
from .mlp import mlp, mlp_and_input
from .patch_merge import patch_merge
from .residual_norm import layer_norm, residual_norm
from .window_attention import window_attention

__all__ = [
    "IMPLS",
    "bias_plan",
    "check_impl",
    "cpb_bias",
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
    "patch_merge",
    "position_bias",
    "residual_norm",
    "window_attention",
]
