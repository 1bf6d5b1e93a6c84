"""The residual stream, and the inputs that a step gives a block which adds to it.

A stream has two readers, a product and an addition, and comes twice, once for each: so the passes that make it also
add the gradients of both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels.branches import Norm, add_branches
from fastmim_kernels.common.hooks import seen_by_nobody
from fastmim_kernels.linear.op import product_dtype

from .read_rows import take
from .visible import Windows

RESIDUAL_DTYPES = ("auto", "fp32")


def check_residual_dtype(residual_dtype: str) -> str:
    """Return it unchanged, or raise ``ValueError`` when it is not one of :data:`RESIDUAL_DTYPES`."""
    if residual_dtype not in RESIDUAL_DTYPES:
        raise ValueError(f"residual_dtype={residual_dtype!r}: must be one of {', '.join(RESIDUAL_DTYPES)}")
    return residual_dtype


def stream_dtype(x: Tensor, residual_dtype: str) -> torch.dtype:
    """Dtype of the residual stream.

    "auto" is that of the products, for half the traffic of everything between them; every norm still has
    float32 statistics, and what is rounded to bfloat16 is the stored stream alone. The range of float16 is too
    small for a stream, and "fp32" is what the references have under autocast: both keep float32.
    """
    dtype = product_dtype(x)
    if residual_dtype == "fp32" or dtype == torch.float16:
        return torch.promote_types(dtype, torch.float32)
    return dtype


def start_stream(
    x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype, impl: str, merge: bool = False
) -> tuple[Tensor, Tensor]:
    """``norm(x)`` as a residual stream in ``dtype`` and for the next product."""
    return fk.residual_norm(
        None, x, norm.weight, norm.bias, order="post", eps=norm.eps, stream_dtype=dtype, merge=merge, impl=impl
    )


def normalise(x: Tensor, norm: nn.LayerNorm, impl: str) -> tuple[Tensor, Tensor]:
    """The stream x, and ``norm(x)`` for the next product."""
    return fk.residual_norm(x, None, norm.weight, norm.bias, order="pre", eps=norm.eps, impl=impl)


def weight_and_bias(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Of a linear layer or a norm: ``layer.weight, layer.bias`` without the detour of ``nn.Module.__getattr__``.

    A step reads some hundred parameters, each of which would cost the host as much as a small tensor does.
    """
    own = layer._parameters
    try:
        return own["weight"], own["bias"]  # type: ignore[return-value]
    except KeyError:  # made of others, by a parametrisation
        return layer.weight, layer.bias  # type: ignore[return-value]


class Step(NamedTuple):
    """What one step gives one block: its share of what is computed for all blocks at once, and what follows it."""

    impl: str = "auto"
    fusion: fk.Fusion = fk.Fusion()
    bias: Tensor | None = None
    """(heads, N, N) additive attention bias."""
    drop_attn: Tensor | None = None
    """(B,) factor of stochastic depth of each sample, or with ``rows`` of each row; None for 1."""
    drop_mlp: Tensor | None = None
    qkv_bias: Tensor | None = None
    """(3C,), where it is made of others; None where the projection has its own."""
    low_qkv_bias: Tensor | None = None
    """This and the following: copies in the dtype of the products; None where the products cast themselves."""
    low_qkv: Tensor | None = None
    low_proj: Tensor | None = None
    low_fc1: Tensor | None = None
    low_fc2: Tensor | None = None

    next_norm: nn.LayerNorm | None = None
    """Pre-norm blocks: the norm that reads the block's result, done in the pass that makes it."""
    merge: bool = False
    """SwinV2: the result is wanted as patch merging gathers it."""
    windows: Windows | None = None
    """Where the tokens stand that the stream holds, if it holds the visible ones alone."""
    rows: Tensor | None = None
    """Numbers of the only tokens whose results are wanted; these come as (rows, C)."""

    def only(self, rows: Tensor, tokens: int) -> Step:
        """With these ``rows`` of samples of so many tokens."""
        samples = rows.div(tokens, rounding_mode="floor")
        drops = self.drop_attn, self.drop_mlp
        attn, mlp = (None if drop is None else drop.index_select(0, samples) for drop in drops)
        return self._replace(rows=rows, drop_attn=attn, drop_mlp=mlp)

    def alone(self) -> Step:
        """For a product that no norm follows at once."""
        return self._replace(fusion=self.fusion._replace(norm_adds_bias=False))

    def take(self, x: Tensor) -> Tensor:
        """Of a map, the tokens whose results are wanted."""
        return x if self.rows is None else take(x, self.rows)

    def hands_on(self, y: Tensor, stream: Tensor | None) -> bool:
        """Whether the product that reads y, which is the stream too, adds the gradient of the stream's other reader."""
        return stream is not None and self.fusion.product_adds_gradients and stream.dtype == y.dtype

    def product_bias(self, layer: nn.Linear) -> Tensor | None:
        """The bias of a block's last products as they add it: None where the norm behind them does."""
        return None if self.fusion.norm_adds_bias else layer.bias

    def add(self, x: Tensor, branch: Tensor, drop: Tensor | None) -> Tensor:
        """``x + drop·branch``, where no norm follows at once."""
        return x + (branch if drop is None else branch * drop.view(-1, *[1] * (x.ndim - 1)).to(branch.dtype))

    def behind(
        self,
        norm: nn.LayerNorm,
        layer: nn.Linear,
        drop: Tensor | None,
        order: str,
        gamma: Tensor | None = None,
        merge: bool = False,
    ) -> Norm:
        """The residual norm behind a branch whose last layer is ``layer``.

        "pre": ``x + drop·gamma·branch``, and ``norm`` of it; "post": ``x + drop·norm(branch)``, twice.
        """
        branch_bias = weight_and_bias(layer)[1] if self.fusion.norm_adds_bias else None
        weight, bias = weight_and_bias(norm)
        return Norm(weight, bias, branch_bias, drop, gamma, order, norm.eps, merge)

    def add_branches(self, x: Tensor, y: Tensor, *branches: tuple[Any, Norm]) -> tuple[Tensor, Tensor]:
        """The stream x with the branch of each module added, the first of which reads y, by the norm behind it."""
        if self.fusion.one_node and all(seen_by_nobody(module) for module, _ in branches):
            links = [(module.branch(y, self), norm) for module, norm in branches]
            one_stream = self.hands_on(y, x if branches[0][1].order == "post" else None)
            if all(branch is not None for branch, _ in links):
                found = add_branches(x, y, links, one_stream=one_stream, impl=self.impl)
                if found is not None:
                    return found
        for module, norm in branches:
            x, y = self._add_branch(x, y, module, norm)
        return x, y

    def _add_branch(self, x: Tensor, y: Tensor, module: Any, norm: Norm) -> tuple[Tensor, Tensor]:
        """Op by op."""
        found = module(y, step=self, stream=x if norm.order == "post" else None)
        branch, x = found if isinstance(found, tuple) else (found, x)
        # The branch may have come as the rows that are wanted.
        x = x if branch.ndim == x.ndim else self.take(x)
        how = norm._asdict()
        return fk.residual_norm(x, branch, how.pop("weight"), how.pop("bias"), **how, impl=self.impl)

    def add_norm(
        self,
        x: Tensor,
        branch: Tensor,
        norm: nn.LayerNorm,
        layer: nn.Linear,
        drop: Tensor | None,
        gamma: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """With a branch that ``layer`` has made, in "pre" order."""
        how = self.behind(norm, layer, drop, "pre", gamma)._asdict()
        return fk.residual_norm(x, branch, how.pop("weight"), how.pop("bias"), **how, impl=self.impl)
