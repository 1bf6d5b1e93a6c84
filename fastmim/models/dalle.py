"""The discrete autoencoder of DALL·E (Ramesh et al. 2021, appendix A.1), on the parameter names of its published files.

Encoder 53.8 and decoder 43.8 million parameters. Its files are pickled modules, which fastmim does not unpickle: of
their ``state_dict()`` every name and shape is the one here.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dvae import Autoencoder

GROUPS = 4
BLOCKS = 2
LOW = 0.1


class Conv(nn.Module):
    """A convolution that keeps the size, with weight ``w`` (out, in, k, k) and bias ``b``."""

    def __init__(self, n_in: int, n_out: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.zeros(n_out))
        nn.init.normal_(self.w, std=1 / math.sqrt(n_in * kernel**2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.w.shape[-1] // 2)


class Block(nn.Module):
    """id(x) + gain · four convolutions, each behind a ReLU; the encoder's last is the 1×1, the decoder's first."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        self.gain, hidden = gain, n_out // 4
        self.id_path = Conv(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = (n_in, hidden, hidden, hidden, n_out)
        layers: list[tuple[str, nn.Module]] = []
        for i, kernel in enumerate(kernels, start=1):
            layers += [(f"relu_{i}", nn.ReLU()), (f"conv_{i}", Conv(widths[i - 1], widths[i], kernel))]
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.id_path(x) + self.gain * self.res_path(x)
        return out


class Stack(nn.Module):
    """``blocks``: an input convolution, groups of blocks with ``between`` them, an output convolution."""

    def __init__(
        self, n_in: int, first: int, widths: list[int], n_out: int, *, kernel: int,
        kernels: tuple[int, int, int, int], between: nn.Module,
    ) -> None:  # fmt: skip
        super().__init__()
        parts: list[tuple[str, nn.Module]] = [("input", Conv(n_in, first, kernel))]
        gain = 1 / (GROUPS * BLOCKS) ** 2
        for group, (before, width) in enumerate(zip([first, *widths], widths, strict=False), start=1):
            blocks: list[tuple[str, nn.Module]] = [
                (f"block_{i + 1}", Block(width if i else before, width, kernels, gain)) for i in range(BLOCKS)
            ]
            blocks += [("between", between)] if group < GROUPS else []
            parts.append((f"group_{group}", nn.Sequential(OrderedDict(blocks))))
        last = OrderedDict(relu=nn.ReLU(), conv=Conv(widths[-1], n_out, 1))
        self.blocks = nn.Sequential(OrderedDict([*parts, ("output", nn.Sequential(last))]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class DalleVAE(Autoencoder):
    """DALL·E's.

    Args:
        img_size, in_chans, codes: See :class:`.dvae.Autoencoder`; a code is of 8 × 8 pixels.
        patch_size: 8.
        embed_dim: Channels of the encoder's first group and of the decoder's last; each further one has twice as many.
        code_dim: Dimensions of a code.
        impl: Taken like every encoder's; there is one implementation.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 112,
        patch_size: int = 8,
        in_chans: int = 3,
        embed_dim: int = 256,
        codes: int = 8192,
        code_dim: int = 128,
        impl: str = "auto",
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, codes)
        widths = [embed_dim * 2**i for i in range(GROUPS)]
        self.encoder = Stack(
            in_chans, embed_dim, widths, codes, kernel=7, kernels=(3, 3, 3, 1), between=nn.MaxPool2d(2)
        )
        self.decoder = Stack(
            codes,
            code_dim,
            widths[::-1],
            2 * in_chans,
            kernel=1,
            kernels=(1, 3, 3, 3),
            between=nn.Upsample(scale_factor=2),
        )

    def logits(self, images: Tensor) -> Tensor:
        """See :meth:`.dvae.Autoencoder.logits`; pixels go in as 0.8·x + 0.1."""
        logits: Tensor = self.encoder(images * (1 - 2 * LOW) + LOW)
        return logits

    def decode(self, weights: Tensor) -> Tensor:
        """See :meth:`.dvae.Autoencoder.decode`: the sigmoid of the first half of what comes out, the means."""
        means = self.decoder(weights)[:, : self.in_chans].sigmoid()
        return (means - LOW) / (1 - 2 * LOW)
