"""Discrete autoencoders: images in [0, 1] to logits of codes, one a square of ``patch_size`` pixels, and back.

What a trained one says of an image are the targets of BEiT. Both families have the same four verbs: ``logits``,
``decode``, ``forward`` (the codes) and ``pixels`` (of codes); encoder and decoder are exported in one file.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import to_pair
from .rules import check_power, patch_grid


class Autoencoder(nn.Module):
    """What the families share.

    Args:
        img_size: Pixels, an integer or (height, width); ``patch_size`` divides both. Other sizes that it divides work.
        patch_size: Pixels of a code's edge, a power of two.
        in_chans: Channels.
        codes: Size of the vocabulary.
    """

    #: What it was built from, of :func:`fastmim.models.encoder_settings`.
    settings: dict[str, Any]

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, codes: int) -> None:
        super().__init__()
        self.img_size = to_pair(img_size, "img_size")
        check_power("patch_size", patch_size)
        self.grid = patch_grid(self.img_size, patch_size)
        self.patch_size = self.stride = patch_size
        self.in_chans, self.codes, self.num_features = in_chans, codes, codes

    def logits(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] → (B, codes, H/p, W/p)."""
        raise NotImplementedError

    def decode(self, weights: Tensor) -> Tensor:
        """(B, codes, h, w) shares of each code, which sum to 1 → (B, C, h·p, w·p); may leave [0, 1] a little."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] → (B, H/p, W/p) int64, the likeliest codes."""
        return self.logits(images).argmax(1)

    def pixels(self, ids: Tensor) -> Tensor:
        """(B, h, w) codes → (B, C, h·p, w·p) in [0, 1]."""
        return self.decode(self.one_hot(ids)).clamp(0, 1)

    def one_hot(self, ids: Tensor) -> Tensor:
        """(B, h, w) → (B, codes, h, w), in the dtype of the weights."""
        shape = (len(ids), self.codes, *ids.shape[1:])
        first = next(self.parameters())
        return torch.zeros(shape, dtype=first.dtype, device=ids.device).scatter_(1, ids[:, None], 1.0)

    def set_micro_batch(self, index: int, count: int) -> None:
        """Nothing is kept from one forward pass to the next, see :class:`.swin.SwinTransformer`."""


class ResidualBlock(nn.Module):
    """x + conv 1×1(relu(conv 3×3(relu(conv 3×3(x)))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class DiscreteVAE(Autoencoder):
    """A small one: strided 4×4 convolutions and residual blocks around a codebook (van den Oord et al. 2017, section
    4.1; Ramesh et al. 2021, section 2.1, for the relaxation that trains it).

    6.0 million parameters as it stands.

    Args:
        img_size, patch_size, in_chans, codes: See :class:`Autoencoder`.
        embed_dim: Channels.
        depth: Residual blocks of the encoder, and of the decoder.
        code_dim: Dimensions of a code.
        impl: Taken like every encoder's; there is one implementation.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 112,
        patch_size: int = 8,
        in_chans: int = 3,
        embed_dim: int = 64,
        depth: int = 6,
        codes: int = 8192,
        code_dim: int = 512,
        impl: str = "auto",
    ) -> None:
        super().__init__(img_size, patch_size, in_chans, codes)
        halvings = int(math.log2(patch_size))
        down: list[nn.Module] = []
        for i in range(halvings):
            down += [nn.Conv2d(embed_dim if i else in_chans, embed_dim, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(
            *down, *(ResidualBlock(embed_dim) for _ in range(depth)), nn.Conv2d(embed_dim, codes, 1)
        )
        self.codebook = nn.Embedding(codes, code_dim)
        up: list[nn.Module] = []
        for _ in range(halvings):
            up += [nn.ConvTranspose2d(embed_dim, embed_dim, 4, stride=2, padding=1), nn.ReLU()]
        self.decoder = nn.Sequential(
            nn.Conv2d(code_dim, embed_dim, 1),
            *(ResidualBlock(embed_dim) for _ in range(depth)),
            *up,
            nn.Conv2d(embed_dim, in_chans, 1),
        )

    def logits(self, images: Tensor) -> Tensor:
        """See :meth:`Autoencoder.logits`; pixels go in as [-1, 1]."""
        logits: Tensor = self.encoder(images * 2 - 1)
        return logits

    def decode(self, weights: Tensor) -> Tensor:
        """See :meth:`Autoencoder.decode`."""
        mixed = F.linear(weights.permute(0, 2, 3, 1), self.codebook.weight.T).permute(0, 3, 1, 2)
        pixels: Tensor = self.decoder(mixed)
        return pixels * 0.5 + 0.5
