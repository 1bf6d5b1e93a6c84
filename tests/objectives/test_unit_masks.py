"""Masks of units: every set that a rule allows equally often, published counts, and shares by enumeration."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch

from fastmim.objectives import create_objective, unit_masks
from fastmim.objectives.block_masks import beit_mask
from fastmim.objectives.unit_masks import UnitMasks, block_units

KINDS = {"random": 0.6, "block": 0.6, "square": 0.25}
ENCODER = dict(name="swin", patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=2)


def drawn(masks, count, **keys):
    """How often each set of hidden units came up."""
    units = masks.of_units(torch.arange(count), **keys).flatten(1)
    return Counter(tuple(row.nonzero().squeeze(1).tolist()) for row in units)


def equally_likely(found, expected):
    """Exactly the expected sets, each as often as the others (5 σ)."""
    assert set(found) == set(expected)
    total, p = sum(found.values()), 1 / len(expected)
    assert max(abs(n / total - p) for n in found.values()) < 5 * math.sqrt(p * (1 - p) / total)


def squares(rows, columns, edge):
    """Every place of a square, as the numbers of its units."""
    for top, left in itertools.product(range(rows - edge + 1), range(columns - edge + 1)):
        yield tuple(y * columns + x for y in range(top, top + edge) for x in range(left, left + edge))


@pytest.mark.parametrize(
    "size, unit, ratio, edge", [((24, 40), 8, 4 / 15, 2), ((30, 25), 8, 0.56, 3), ((8, 32), 8, 0.25, 1)]
)
def test_every_place_of_a_square_is_equally_likely(size, unit, ratio, edge):
    masks = UnitMasks(size, 4 if size[0] % 4 == 0 else 1, kind="square", mask_ratio=ratio, unit=unit)
    equally_likely(drawn(masks, 6000), list(squares(*masks.grid, edge)))


def test_every_set_of_random_units_is_equally_likely():
    masks = UnitMasks((16, 24), 4, kind="random", mask_ratio=0.45, unit=8)
    equally_likely(drawn(masks, 6000), list(itertools.combinations(range(6), 3)))


def test_what_blocks_leave_short_is_filled_beside_them(monkeypatch):
    """A block of 2 × 2 in the corner of 4 × 4 has four neighbours, numbers 2, 6, 8 and 9."""
    corner = torch.zeros(4, 4, dtype=torch.bool)
    corner[:2, :2] = True
    monkeypatch.setattr(unit_masks, "beit_mask", lambda ids, **_: corner.expand(len(ids), 4, 4))

    def found(count):
        units = block_units(torch.arange(4000), (4, 4), count).flatten(1)
        return Counter(tuple(sorted(set(row.nonzero().squeeze(1).tolist()) - {0, 1, 4, 5})) for row in units)

    near, far = (2, 6, 8, 9), sorted(set(range(16)) - {0, 1, 4, 5, 2, 6, 8, 9})
    equally_likely(found(6), list(itertools.combinations(near, 2)))
    equally_likely(found(10), [tuple(sorted((*near, *two))) for two in itertools.combinations(far, 2)])


@pytest.mark.parametrize("unit", [16, 32])
@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.8])
def test_blocks_are_beits_and_the_published_count_is_full(unit, ratio):
    masks = UnitMasks(192, 4, kind="block", mask_ratio=ratio, unit=unit)
    count, ids = math.ceil((192 // unit) ** 2 * ratio), torch.arange(300)
    units = masks.of_units(ids, seed=2, epoch=3)
    assert units.shape == (300, 192 // unit, 192 // unit) and units.sum((1, 2)).tolist() == [count] * 300
    smallest = round(16 / 75 * count)
    blocks = beit_mask(ids, grid=masks.grid, count=count, smallest=smallest, seed=2, epoch=3)
    assert not (blocks & ~units).any() and (units & ~blocks).double().mean() < 0.02
    # They hang together: many more hidden neighbours than of units drawn one by one.
    random = UnitMasks(192, 4, kind="random", mask_ratio=ratio, unit=unit).of_units(ids)
    pairs = [
        (m[:, 1:] & m[:, :-1]).double().mean() + (m[..., 1:] & m[..., :-1]).double().mean() for m in (units, random)
    ]
    assert pairs[0] > 1.1 * pairs[1]


@pytest.mark.parametrize("ratio, edge", [(0.11, 2), (0.25, 3), (0.44, 4)])
def test_published_squares(ratio, edge):
    masks = UnitMasks(192, 4, kind="square", mask_ratio=ratio, unit=32)
    assert (masks.hidden, masks.shown) == (edge**2, 36 - edge**2)
    assert masks(torch.arange(9)).sum((1, 2)).tolist() == [edge**2 * 64] * 9


@pytest.mark.parametrize("unit", [4, 8, 16, 32, 64])
def test_published_random_counts(unit):
    for tenths in range(1, 10):
        if (masked := -(-((192 // unit) ** 2) * tenths // 10)) < (192 // unit) ** 2:
            masks = UnitMasks(192, 4, kind="random", mask_ratio=tenths / 10, unit=unit)
            assert masks(torch.arange(3)).sum((1, 2)).tolist() == [masked * (unit // 4) ** 2] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_depends_on_its_keys_alone(kind):
    masks = UnitMasks((64, 144), 4, kind=kind, mask_ratio=KINDS[kind], unit=16)
    ids = torch.tensor([3, 1_281_166, 2**40, 17])
    batch = masks(ids, seed=5, epoch=9)
    assert batch.shape == (4, *(edge // 4 for edge in masks.img_size)) and batch.dtype == torch.bool
    assert torch.equal(masks(ids.flip(0), seed=5, epoch=9).flip(0), batch)
    assert torch.equal(masks(ids[2:3].long(), seed=5, epoch=9)[0], batch[2])
    for other in (dict(seed=6, epoch=9), dict(seed=5, epoch=10)):
        assert not torch.equal(masks(ids, **other), batch)


def tokens_touched(units, unit, size, stride):
    """Share of tokens with a hidden pixel, pixel by pixel."""
    rows, columns = size
    hit = [
        any(
            units[y // unit][x // unit]
            for y in range(top, min(top + stride, rows))
            for x in range(left, min(left + stride, columns))
        )
        for top in range(0, rows, stride)
        for left in range(0, columns, stride)
    ]
    return sum(hit) / len(hit)


@pytest.mark.parametrize("kind, ratio, unit, sets", [
    ("random", 0.25, 4, list(itertools.combinations(range(12), 3))),
    ("square", 1 / 3, 4, list(squares(3, 4, 2))),
    ("random", 0.25, 8, list(itertools.combinations(range(4), 1))),
])  # fmt: skip
def test_shares_are_those_of_all_masks(kind, ratio, unit, sets):
    """The plan counts patches that are read and tokens with a scored pixel; here over every mask there is."""
    size = (12, 16) if unit == 4 else (16, 16)
    masks = UnitMasks(size, 4, kind=kind, mask_ratio=ratio, unit=unit)
    columns = masks.grid[1]
    touched = []
    for hidden in sets:
        units = [[y * columns + x in hidden for x in range(columns)] for y in range(masks.grid[0])]
        touched.append(tokens_touched(units, unit, size, 8))
    found = masks.shares((2, 2), 8)
    assert found[0] == pytest.approx(masks.hidden / (masks.hidden + masks.shown))
    assert found[1] == pytest.approx(sum(touched) / len(touched), abs=0.04 if unit < 8 else 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_says_the_shares_of_its_masks(kind):
    encoder = dict(ENCODER, img_size=48)
    how = dict(mask=kind, mask_ratio=KINDS[kind], unit=8)
    objective = create_objective("simmim", encoder=encoder, **how)
    share = objective.masks.hidden / 36
    assert share == pytest.approx(math.ceil(36 * KINDS[kind]) / 36)
    assert objective.shares() == pytest.approx({"mask_tokens": 1 - share, "linear_masked_l1": share})
    everywhere = create_objective("simmim", encoder=encoder, loss_on="all", **how)
    assert everywhere.shares()["linear_masked_l1"] == 1.0


@pytest.mark.parametrize("key, options", [
    ("mask='blok': must be one of random, block, square", dict(kind="blok")),
    ("mask_ratio=0.6: mask=square hides no such share of 6 × 6 units; use 0.44 (4 × 4 units) or 0.69 (5 × 5 units)",
     dict(kind="square")),
    ("mask_ratio=1.0: mask=square hides no such share", dict(kind="square", mask_ratio=1.0)),
    ("mask=square: the image is one unit, and a square leaves some; use a smaller unit", dict(kind="square", unit=192)),
    ("mask=block: needs two units of 192 pixels", dict(kind="block", unit=192)),
    ("mask_ratio=0.99: masks all 36 units", dict(kind="block", mask_ratio=0.99)),
    ("unit=30: not a multiple of patch_size 4", dict(kind="square", unit=30)),
])  # fmt: skip
def test_mistakes_are_one_line(key, options):
    with pytest.raises(ValueError) as caught:
        UnitMasks(192, 4, **dict(kind="random", mask_ratio=0.6, unit=32) | options)
    assert key in str(caught.value) and "\n" not in str(caught.value)
