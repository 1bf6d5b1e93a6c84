"""The random generators of a rank: their states, and seeds that differ between ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """States of torch's CPU generator and of the device's, as byte tensors by device type."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what :func:`rng_state` returned."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def seed_rank(seed: int, rank: int) -> None:
    """Give every rank its own dropout, from a seed that is the same for all."""
    torch.manual_seed((seed * 1_000_003 + rank + 1) % 2**63)
