"""Random masks: exact counts, uniformity, and dependence on nothing but (seed, epoch, sample id)."""

from __future__ import annotations

import math

import pytest
import torch

from fastmim.objectives.keys import random_keys
from fastmim.objectives.masks import masked_units
from fastmim.objectives.unit_masks import UnitMasks


def masks(size, unit, ratio=0.6, patch=1):
    return UnitMasks(size, patch, kind="random", mask_ratio=ratio, unit=unit)


def splitmix64(seed, count):
    """Plain-integer SplitMix64, to check the tensor version word for word."""
    word, out = (1 << 64) - 1, []
    for i in range(1, count + 1):
        z = (seed + i * 0x9E3779B97F4A7C15) & word
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("image, patch, count", [(192, 4, 22), (224, 16, 30)])
def test_published_counts(image, patch, count):
    mask = masks(image, 32, patch=patch)(torch.arange(7))
    units = mask[:, :: 32 // patch, :: 32 // patch]
    assert units.sum((1, 2)).tolist() == [count] * 7
    assert torch.equal(mask, units.repeat_interleave(32 // patch, 1).repeat_interleave(32 // patch, 2))


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.44, 0.6, 0.9])
@pytest.mark.parametrize("units", [4, 9, 36, 49, 196])
def test_count_is_the_ceiling(ratio, units):
    if math.ceil(units * ratio) < units:
        assert masked_units(ratio, units) == math.ceil(units * ratio)
    else:
        with pytest.raises(ValueError, match="masks all"):
            masked_units(ratio, units)


def test_a_mask_depends_on_its_keys_alone():
    ids, draw = torch.tensor([3, 1_281_166, 2**40]), masks(48, 8)
    batch = draw(ids, seed=5, epoch=9)
    for i, one in enumerate(ids):
        assert torch.equal(draw(one[None], seed=5, epoch=9)[0], batch[i])
    assert torch.equal(draw(ids[:2].int()), draw(ids[:2]))
    for other in (dict(seed=6, epoch=9), dict(seed=5, epoch=10), dict(seed=9, epoch=5)):
        assert not torch.equal(draw(ids, **other), batch)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    draw(ids)
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_are_splitmix64():
    """The per-image stream equals an integer implementation started from the same state."""
    keys = random_keys(torch.tensor([12, 13]), 9, seed=3, epoch=4)
    again = random_keys(torch.tensor([13]), 9, seed=3, epoch=4)
    assert torch.equal(keys[1], again[0])
    # The state is one mixing step away from the ids; recover it from the first output by brute inversion of +γ.
    word = (1 << 64) - 1
    outputs = [k & word for k in keys[0].tolist()]
    state = _invert_mix(outputs[0]) - 0x9E3779B97F4A7C15
    assert splitmix64(state & word, 9) == outputs


def _invert_mix(z):
    word = (1 << 64) - 1

    def unshift(value, bits):
        result = value
        for _ in range(64 // bits + 1):
            result = value ^ (result >> bits)
        return result

    z = unshift(z, 31) * pow(0x94D049BB133111EB, -1, 1 << 64) & word
    z = unshift(z, 27) * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & word
    return unshift(z, 30)


def test_uniform_without_replacement():
    """Each unit, and each pair of units, is masked as often as hypergeometric sampling says (5 σ)."""
    n, images, count = 36, 20000, 22
    mask = masks(6, 1)(torch.arange(images)).flatten(1).double()
    p = count / n
    assert (mask.mean(0) - p).abs().max() < 5 * math.sqrt(p * (1 - p) / images)
    pairs = (mask.T @ mask / images)[~torch.eye(n, dtype=torch.bool)]
    q = p * (count - 1) / (n - 1)
    assert (pairs - q).abs().max() < 5 * math.sqrt(q * (1 - q) / images)
    # Consecutive epochs are independent: the overlap of two masks has the hypergeometric mean and variance.
    other = masks(6, 1)(torch.arange(images), epoch=1).flatten(1).double()
    overlap = (mask * other).sum(1)
    variance = count * p * (1 - p) * (n - count) / (n - 1)
    assert abs(overlap.mean().item() - count * p) < 5 * math.sqrt(variance / images)
    assert overlap.var().item() == pytest.approx(variance, rel=0.06)


def test_units_cut_by_the_edge():
    mask = masks((25, 15), 8, 0.5)(torch.arange(50))
    assert mask.shape == (50, 25, 15)
    assert mask[:, ::8, ::8].sum((1, 2)).tolist() == [4] * 50  # 4×2 units, half of them


@pytest.mark.parametrize("ids", [torch.zeros(2, 2, dtype=torch.long), torch.zeros(3)])
def test_ids_must_be_a_vector_of_integers(ids):
    with pytest.raises(ValueError, match="vector of integers"):
        masks(48, 8)(ids)
