"""RankMe: how many directions features use, without labels (Garrido et al. 2023, arXiv:2210.02885)."""

from __future__ import annotations

import torch
from torch import Tensor

_EPS = 1e-7


def rankme(features: Tensor) -> float:
    """Effective rank: exp(-Σ p log p) with p = σ / Σσ + 1e-7 of the singular values σ (equation 1 there).

    1 where all features lie on one line (a collapse), min(N, D) where all directions are used alike. Features are
    neither centred nor normalised, as there. In float64, from the triangle of a QR decomposition.

    Args:
        features: (N, D).
    """
    z = features.double()
    tall = z if z.shape[0] >= z.shape[1] else z.T
    sigma = torch.linalg.svdvals(torch.linalg.qr(tall, mode="r").R)
    p = sigma / sigma.sum().clamp(min=torch.finfo(sigma.dtype).tiny) + _EPS
    return float((-(p * p.log()).sum()).exp())
