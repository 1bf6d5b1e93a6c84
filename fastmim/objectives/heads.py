"""What turns tokens into predictions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastmim_kernels.reference import pixel_shuffle

from ..models import Encoder


def pixel_head(encoder: Encoder) -> nn.Linear:
    """A linear map from a token to its ``stride`` × ``stride`` pixels, C·stride² (SimMIM, section 3.3)."""
    return nn.Linear(encoder.num_features, encoder.stride**2 * encoder.in_chans)


def predict_pixels(tokens: Tensor, head: nn.Linear, stride: int, size: tuple[int, int]) -> Tensor:
    """(B, h, w, D) tokens → (B, C, *size) float32; the far edge of a map that exceeds the image is cut."""
    prediction = pixel_shuffle(F.linear(tokens, head.weight, head.bias), stride)
    return prediction[:, :, : size[0], : size[1]].float()
