"""Heads that predict pixels, or what stands for them, and what makes the tokens that they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from fastmim_kernels.common.rows import cast, statistics_dtype
from fastmim_kernels.reference import pixel_shuffle

from ..models import SIZES
from ..models.inverse_swin import InverseSwin
from ..models.layers import to_pair
from .arguments import one_of

HeadName = Literal["linear", "mlp", "swin_tiny", "swin_base"]
"""Of :class:`PixelHead`; the last two are a Swin backwards of that size (SimMIM, section 4.1.3 and table 3)."""

_WINDOW = 7
"""Swin's own, for an encoder that has none."""


class PixelHead(nn.Linear):
    """A linear map from a token to its ``stride`` × ``stride`` predicted pixels (SimMIM, section 3.3).

    Args:
        dim: Channels of the tokens.
        values: Numbers for each pixel, ordered (value, row, column).
        stride: Pixels per edge of a token.
        before: Makes these tokens from the encoder's, if it does not get them as they are.
    """

    def __init__(self, dim: int, values: int, stride: int, before: nn.Module | None = None) -> None:
        super().__init__(dim, values * stride**2)
        self.values, self.stride, self.before = values, stride, before

    @property
    def mixes(self) -> bool:
        """Whether what is predicted for a token depends on other tokens."""
        return isinstance(self.before, InverseSwin)

    def tokens(self, tokens: Tensor) -> Tensor:
        """(B, h, w, …) tokens of the encoder → those that the linear map reads."""
        return tokens if self.before is None else self.before(tokens)


def make_head(
    name: HeadName,
    settings: Mapping[str, Any],
    dim: int,
    grid: tuple[int, int],
    *,
    values: int,
    stride: int,
    target_stride: int,
    impl: str,
) -> PixelHead:
    """A head by its name.

    Args:
        settings: Of :func:`fastmim.models.encoder_settings`: an inverse Swin takes the encoder's window.
        dim, grid, stride: Channels, (rows, columns), and pixels per edge of the tokens.
        values: Numbers for each predicted pixel.
        target_stride: Edge of a predicted pixel, in pixels of the image.
    """
    if name == "linear":
        return PixelHead(dim, values, stride // target_stride)
    if name == "mlp":
        return PixelHead(dim, values, stride // target_stride, nn.Sequential(nn.Linear(dim, dim), nn.GELU()))
    size = {key: SIZES[name][key] for key in ("embed_dim", "depths", "num_heads")}
    window = to_pair(settings.get("window_size", _WINDOW), "window_size")
    how: dict[str, Any] = dict(residual_dtype=settings["residual_dtype"], impl=impl)
    before = InverseSwin(dim, grid, window_size=window, **size, **how)
    return PixelHead(size["embed_dim"], values, stride // _splits(name) // target_stride, before)


def check_head(name: str, stride: int, target_stride: int) -> None:
    """The tokens that its linear map reads are whole predicted pixels; arguments as of :func:`make_head`.

    Raises:
        ValueError: Names what fits.
    """
    one_of("head", name, get_args(HeadName))
    splits = _splits(name)
    if stride % (splits * target_stride) == 0:
        return
    fits = [t for t in (1, 2, 4, 8, 16) if stride % (splits * t) == 0]
    fix = f"use target_stride={fits[-1]}, or head=linear or mlp" if fits else "use linear or mlp"
    raise ValueError(
        f"head={name}: cuts each token of the encoder, of {stride} pixels, into {splits} × {splits}, which are no "
        f"whole predicted pixels of target_stride={target_stride}; {fix}"
    )


def _splits(name: str) -> int:
    """Tokens per edge that a head makes of one of the encoder's."""
    return 2 ** (len(SIZES[name]["depths"]) - 1) if name in SIZES else 1


def predict_pixels(tokens: Tensor, head: nn.Linear, stride: int, size: tuple[int, int]) -> Tensor:
    """(B, h, w, D) tokens → (B, C, *size) in float32 at least; the far edge of a map beyond the image is cut."""
    prediction = pixel_shuffle(F.linear(tokens, head.weight, head.bias), stride)[:, :, : size[0], : size[1]]
    return cast(prediction, statistics_dtype(prediction.dtype))
