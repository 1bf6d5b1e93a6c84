"""Which of timm's modules may be computed through: each rule returns why not, or nothing.

Asked once by :func:`.swap.accelerate`, for its report, and again at every forward pass: a submodule that has been
replaced since (a LoRA layer, a parametrised weight), or that carries a hook, must still be called as a module.
"""

from __future__ import annotations

from timm.layers import DropPath, LayerNorm, Mlp
from timm.layers.activations import GELU
from timm.models.vision_transformer import LayerScale
from torch import nn

from ..common.hooks import hooked

NORMS = (nn.LayerNorm, LayerNorm)
PATHS = (nn.Identity, DropPath)
SCALES = (nn.Identity, LayerScale)


def hooked_inside(module: nn.Module) -> bool:
    """Whether a module anywhere below ``module`` is :func:`hooked`."""
    return any(child is not None and (hooked(child) or hooked_inside(child)) for child in module._modules.values())


def exact(name: str, module: nn.Module, kinds: tuple[type, ...]) -> str:
    """Unless ``module`` is of one of ``kinds`` itself, not of a subclass, and has no hook."""
    if type(module) not in kinds:
        return f"{name} is {type(module).__name__}"
    return f"{name} has a hook" if hooked(module) else ""


def norm(name: str, module: nn.Module) -> str:
    """Unless it is a LayerNorm over the channels with weight and bias."""
    if reason := exact(name, module, NORMS):
        return reason
    affine = module.weight is not None and module.bias is not None and module.weight.ndim == 1
    return "" if affine else f"{name} has no weight and bias over the channels"


def mlp(module: Mlp) -> str:
    """Unless it is linear, exact GELU, linear."""
    gelu = (nn.GELU, GELU)
    if getattr(module.act, "approximate", "none") != "none":
        return f"act is GELU with approximate={module.act.approximate!r}"
    return (exact("fc1", module.fc1, (nn.Linear,)) or exact("act", module.act, gelu)
            or exact("norm", module.norm, (nn.Identity,)) or exact("fc2", module.fc2, (nn.Linear,))
            or exact("drop1", module.drop1, (nn.Dropout,)) or exact("drop2", module.drop2, (nn.Dropout,)))


def attention(module: nn.Module) -> str:
    """Of Swin's and SwinV2's window attention."""
    if hooked_inside(module):
        return "a module in attn has a hook"
    head_dim = module.qkv.weight.shape[0] // (3 * module.num_heads)
    if getattr(module, "scale", head_dim**-0.5) != head_dim**-0.5:
        return f"attn.scale is {module.scale}"
    return (exact("attn.qkv", module.qkv, (nn.Linear,)) or exact("attn.proj", module.proj, (nn.Linear,))
            or exact("attn.attn_drop", module.attn_drop, (nn.Dropout,))
            or exact("attn.proj_drop", module.proj_drop, (nn.Dropout,))
            or (continuous_bias(module.cpb_mlp) if hasattr(module, "cpb_mlp") else ""))


def continuous_bias(module: nn.Sequential) -> str:
    """Of the MLP that makes SwinV2's position bias."""
    kinds = [type(layer) for layer in module]
    return "" if kinds == [nn.Linear, nn.ReLU, nn.Linear] else "attn.cpb_mlp is not linear, ReLU, linear"


def residuals(block: nn.Module) -> str:
    """Of the norms and stochastic depths of a block, and of LayerScale where it has any."""
    return (norm("norm1", block.norm1) or norm("norm2", block.norm2)
            or exact("drop_path1", block.drop_path1, PATHS) or exact("drop_path2", block.drop_path2, PATHS)
            or (exact("ls1", block.ls1, SCALES) or exact("ls2", block.ls2, SCALES) if hasattr(block, "ls1") else ""))


def merging(module: nn.Module) -> str:
    """Of patch merging."""
    return norm("norm", module.norm) or exact("reduction", module.reduction, (nn.Linear,))


def dropout(*layers: nn.Module) -> str:
    """Unless none of the dropout layers draws anything in training; the kernels draw nothing."""
    rates = [layer.p for layer in layers if isinstance(layer, nn.Dropout)]
    return f"dropout of {max(rates)} runs timm's own forward in training" if any(rates) else ""
