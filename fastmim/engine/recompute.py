"""What the backward pass computes again instead of keeping: memory for time, the same bits.

Every policy works block by block with torch's non-reentrant checkpointing, which repeats a block under the same
random state and autocast, and inside which ZeRO-3 gathers weights as in any forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastmim.models.layers import Mlp
from fastmim.models.recomputed import inside_repeated
from fastmim.models.swin import SwinBlock
from fastmim.models.vit import VitBlock

POLICIES = ("none", "fc1", "fc1_qkv", "gemm", "full")

# Kept under the selective policies: what is dear to compute again for what it takes to keep.
_KEPT = {
    "fastmim::linear",
    "fastmim::mlp",
    "fastmim::window_attention",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}


def apply_recompute(objective: nn.Module, policy: str, *, every: int = 1, offload: bool = False) -> int:
    """Let the blocks of an objective be recomputed in the backward pass.

    Args:
        objective: with Swin or ViT blocks somewhere inside.
        policy: ``"none"``; ``"fc1"``: the first layer of each MLP; ``"fc1_qkv"``: that, the qkv projection and
            everything but matrix products and attention; ``"gemm"``: everything but matrix products and
            attention; ``"full"``: the whole block, of which only the input is kept.
        every: apply it to every n-th block, from the first on.
        offload: keep the inputs of recomputed blocks in (pinned) CPU memory.

    Returns:
        The number of blocks that it applies to.

    Raises:
        ValueError: unknown policy, or ``offload`` with another than ``"full"``.
    """
    if policy not in POLICIES:
        raise ValueError(f"efficiency.recompute={policy!r}: unknown; use one of {', '.join(POLICIES)}")
    if offload and policy != "full":
        raise ValueError(f"efficiency.recompute_offload=true: not with recompute={policy}; use full")
    blocks = [part for part in objective.modules() if isinstance(part, (SwinBlock, VitBlock))][::every]
    if policy == "none":
        return 0
    for block in blocks:
        if policy in ("fc1", "fc1_qkv"):
            for part in block.modules():
                if isinstance(part, Mlp):
                    part.recompute_fc1 = True
        if policy != "fc1":
            block.forward = _recomputed(block.forward, policy, offload)  # type: ignore[method-assign]
    return len(blocks)


def _recomputed(forward: Callable[..., Any], policy: str, offload: bool) -> Callable[..., Any]:
    contexts = functools.partial(_contexts, policy == "fc1_qkv")
    selective: dict[str, Any] = {} if policy == "full" else {"context_fn": contexts}

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or inside_repeated():
            return forward(*args, **kwargs)
        # Without the early stop a repetition ends as a forward pass does: ZeRO-3's hooks come in pairs.
        with _offloaded(offload, args), set_checkpoint_early_stop(False):
            return checkpoint(forward, *args, use_reentrant=False, **selective, **kwargs)

    return run


def _offloaded(offload: bool, args: Any) -> AbstractContextManager[Any]:
    if not offload:
        return nullcontext()
    on_gpu = any(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
    return save_on_cpu(pin_memory=on_gpu)


def _contexts(again_qkv: bool) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    kept: list[tuple[str, Any]] = []
    return _Keep(kept, again_qkv), _Reuse(kept, again_qkv)


class _Keep(TorchDispatchMode):
    """Remembers the results of the operations that are not to be repeated.

    torch's own selective contexts want every operation to occur in both passes; ZeRO-3 gathers weights inside a
    block, and not always at the same places.
    """

    def __init__(self, kept: list[tuple[str, Any]], again_qkv: bool) -> None:
        super().__init__()
        self.kept, self.again_qkv = kept, again_qkv

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_kept(func._schema.name, args, self.again_qkv):
            # Aliases: what is returned itself becomes part of the autograd graph.
            self.kept.append((func._schema.name, tree_map_only(Tensor, Tensor.detach, result)))
        return result


class _Reuse(_Keep):
    """Gives the remembered results, in order."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if not _is_kept(name, args, self.again_qkv):
            return func(*args, **(kwargs or {}))
        expected, result = self.kept.pop(0)
        if name != expected:
            raise RuntimeError(f"recompute: the forward pass ran {expected} where its repetition runs {name}")
        return result


def _is_kept(name: str, args: Any, again_qkv: bool) -> bool:
    return name in _KEPT and not (again_qkv and _is_qkv(name, args))


def _is_qkv(name: str, args: Any) -> bool:
    """Whether a product has three times as many outputs as inputs."""
    if name == "fastmim::linear":
        outputs, inputs = args[1].shape
    elif name in ("aten::mm", "aten::addmm"):
        inputs, outputs = args[-1].shape
    else:
        return False
    return outputs == 3 * inputs
