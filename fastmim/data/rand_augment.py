"""timm's automatic augmentation of crops, drawn from a generator per sample.

timm draws from the generators of the process: they are set to the sample's own numbers for the call, and put back.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_FILL = (124, 116, 104)  # ImageNet's mean, as timm has it
_REACH = 0.45


def check_augmentation(policy: str, in_chans: int, pixels: str = "uint8") -> None:
    """Refuse a policy that timm does not know, or images that it is not made for.

    Raises:
        ValueError: says which policies there are.
    """
    if pixels != "uint8":
        raise ValueError(f"objective.auto_augment={policy}: is for 8-bit colours, not data.pixels={pixels}; use none")
    if in_chans != 3:
        raise ValueError(f"objective.auto_augment={policy}: changes colours of 3 channels, not of {in_chans}; use none")
    try:
        _transform(policy, 224)
    except (AssertionError, ValueError, KeyError, IndexError):
        raise ValueError(
            f"objective.auto_augment={policy}: no policy of timm's, for example rand-m9-mstd0.5-inc1; or none"
        ) from None


def rand_augment(image: Tensor, policy: str, rng: random.Random) -> Tensor:
    """uint8 (3, H, W) → the same shape.

    Args:
        policy: such as "rand-m9-mstd0.5-inc1" (Cubuk et al. 2020 in timm's notation).
        rng: the sample's.
    """
    transform = _transform(policy, min(image.shape[-2:]))
    python, numpy, seed = random.getstate(), np.random.get_state(), rng.getrandbits(32)
    random.seed(seed)
    np.random.seed(seed)
    try:
        changed = transform(Image.fromarray(image.permute(1, 2, 0).numpy()))
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


@functools.cache
def _transform(policy: str, size: int) -> Any:
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    how = {"translate_const": int(_REACH * size), "img_mean": _FILL, "interpolation": Image.Resampling.BICUBIC}
    make: Any = rand_augment_transform if policy.startswith("rand") else auto_augment_transform
    return make(policy, how)
