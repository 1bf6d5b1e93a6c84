"""Random numbers that are pure functions of (seed, epoch, sample id, crop), computed where the ids live.

Integers first: additions, products and shifts of int64 are the same on every device. What draws depend on is then
neither the worker, the rank, the world size, the batch, the device nor a restart.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB

# Purposes that draw for a crop of a sample: one must not repeat the numbers of another.
BLOCK_MASKS = 1
PHOTOMETRIC = 2
MIXING = 3
ERASING = 4


def check_ids(sample_ids: Tensor) -> None:
    """Raise ValueError unless ``sample_ids`` is a vector of integers."""
    if sample_ids.ndim != 1 or sample_ids.dtype.is_floating_point:
        raise ValueError(f"sample_ids must be a vector of integers, got {sample_ids.dtype} {tuple(sample_ids.shape)}")


def random_keys(sample_ids: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """(B, count) int64 hashes: SplitMix64 (Steele et al. 2014) seeded by (seed, epoch, sample id)."""
    return _sequence(_states(sample_ids, seed, epoch, 0), count)


def crop_keys(sample_ids: Tensor, count: int, *, seed: int, epoch: int, crop: int | Tensor, purpose: int) -> Tensor:
    """(B, count) int64 hashes as of :func:`random_keys`, of one crop of each sample and for one purpose.

    Args:
        sample_ids: (B,) integer.
        count: Numbers per row.
        seed, epoch: Keys.
        crop: Number of the crop of its sample, the same for all rows or (B,) integer.
        purpose: A positive constant of this module.

    Raises:
        ValueError: ``sample_ids`` or ``crop`` is not a vector of integers, or their lengths differ.
    """
    check_ids(sample_ids)
    if isinstance(crop, Tensor):
        if crop.shape != sample_ids.shape or crop.dtype.is_floating_point:
            shape = tuple(crop.shape)
            raise ValueError(f"crop must be a number or {len(sample_ids)} integers, got {crop.dtype} {shape}")
        step = crop.long() * _signed(_MIX1)
    else:
        step = torch.full_like(sample_ids, _signed(crop * _MIX1), dtype=torch.int64)
    state = _states(sample_ids, seed, epoch, purpose)
    return _sequence(_mix(state ^ step[:, None]), count)


def unit_floats(keys: Tensor) -> Tensor:
    """float32 in [0, 1) of the upper 24 bits of int64 keys: every value is exact, on every device."""
    return (keys >> 40 & 0xFFFFFF).float() * 2.0**-24


def _states(sample_ids: Tensor, seed: int, epoch: int, purpose: int) -> Tensor:
    base = _mix_int(_mix_int(seed) ^ _mix_int(epoch + _GAMMA))
    if purpose:
        base = _mix_int(base ^ _mix_int(purpose))
    return _mix(sample_ids.long()[:, None] * _signed(_GAMMA) ^ _signed(base))


def _sequence(state: Tensor, count: int) -> Tensor:
    steps = torch.arange(1, count + 1, device=state.device) * _signed(_GAMMA)
    return _mix(state + steps)


def _signed(value: int) -> int:
    value &= _WORD
    return value - (1 << 64) if value >> 63 else value


def _mix_int(z: int) -> int:
    z &= _WORD
    z = ((z ^ (z >> 30)) * _MIX1) & _WORD
    z = ((z ^ (z >> 27)) * _MIX2) & _WORD
    return z ^ (z >> 31)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # int64 has only the arithmetic shift: clear the copies of the sign bit.
    return (z >> bits) & ((1 << (64 - bits)) - 1)
