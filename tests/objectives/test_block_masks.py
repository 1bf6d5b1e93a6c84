"""Block-wise masks: bit by bit those of a plain loop, in distribution the public code's; rows of a fixed number."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import fastmim_kernels as fk
from fastmim.objectives.block_masks import beit_mask, ibot_mask, masked_rows, most_masked, most_rows
from fastmim.objectives.keys import PHOTOMETRIC, crop_keys, random_keys

GOLDEN = Path(__file__).parents[1] / "golden" / "block_masks.safetensors"
WORD = (1 << 64) - 1
RANDOM = ((0.0, 0.0), (0.65, 0.75))


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def splitmix(sample, seed, epoch, crop, purpose=1):
    """The hashes of a crop of a sample, in plain integers."""
    gamma = 0x9E3779B97F4A7C15
    base = mix(mix(mix(seed & WORD) ^ mix((epoch + gamma) & WORD)) ^ mix(purpose))
    state = mix(mix((sample * gamma & WORD) ^ base) ^ (crop * 0xBF58476D1CE4E5B9 & WORD))
    while True:
        state = (state + gamma) & WORD
        yield mix(state)


def plain_mask(keys, grid, target, smallest):
    """BEiT's algorithm in plain Python, as often as it goes on; a hash holds area, aspect, top, left from below."""
    rows, columns = grid
    mask = [[False] * columns for _ in range(rows)]
    count, stopped = 0, False
    while count < target and not stopped:
        tries, left, stopped = [next(keys) for _ in range(10)], target - count, True
        for key in tries:
            area, aspect, top, start = ((key >> 16 * i) & 0xFFFF for i in range(4))
            area = smallest + (left - smallest) * ((area + 0.5) / 65536)
            aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * ((aspect + 0.5) / 65536))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (height < rows and width < columns):
                continue
            top, start = top * (rows - height + 1) >> 16, start * (columns - width + 1) >> 16
            cells = [(y, x) for y in range(top, top + height) for x in range(start, start + width)]
            gain = sum(not mask[y][x] for y, x in cells)
            if 0 < gain <= left:
                for y, x in cells:
                    mask[y][x] = True
                count, stopped = count + gain, False
                break
    return mask


def plain_ibot(sample, grid, seed, epoch, crop):
    keys = splitmix(sample, seed, epoch, crop)
    masked = (next(keys) & 0xFFFF) * 2 >> 16
    share = 0.1 + (0.5 - 0.1) * ((next(keys) >> 11) * 2.0**-53)
    return plain_mask(keys, grid, share * (grid[0] * grid[1]) if masked else 0, (min(grid) // 3) ** 2)


@pytest.mark.parametrize("grid", [(14, 14), (7, 7), (12, 16), (9, 5), (2, 2)])
def test_ibot_masks_are_those_of_a_plain_loop(grid):
    mask = ibot_mask(torch.arange(90), grid=grid, seed=-3, epoch=7, crop=1)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [plain_ibot(i, grid, -3, 7, 1) for i in range(90)]


@pytest.mark.parametrize("grid, count, smallest", [((14, 14), 75, 16), ((24, 20), 200, 16), ((6, 6), 14, 4)])
def test_beit_masks_are_those_of_a_plain_loop(grid, count, smallest):
    mask = beit_mask(torch.arange(50), grid=grid, count=count, smallest=smallest)
    assert mask.tolist() == [plain_mask(splitmix(i, 0, 0, 0), grid, count, smallest) for i in range(50)]


DRAWN = {
    "ibot_14x14": lambda ids: ibot_mask(ids, grid=(14, 14)),
    "ibot_7x7_swin": lambda ids: ibot_mask(ids, grid=(7, 7)),
    "ibot_12x16": lambda ids: ibot_mask(ids, grid=(12, 16)),
    "ibot_14x14_ratio0.3_fixed": lambda ids: ibot_mask(ids, grid=(14, 14), ratios=((0.3, 0.3),)),
    "ibot_14x14_rand_ratio_0_or_0.7pm0.05": lambda ids: ibot_mask(ids, grid=(14, 14), ratios=RANDOM, shape="random"),
    "beit_14x14_75_min16": lambda ids: beit_mask(ids, grid=(14, 14)),
    "beit_24x24_230_min16": lambda ids: beit_mask(ids, grid=(24, 24), count=230),
    "beit_6x6_14_min4": lambda ids: beit_mask(ids, grid=(6, 6), count=14, smallest=4),
}


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        maps = {k.removeprefix("probability."): f.get_tensor(k).double() for k in f.keys()}  # noqa: SIM118
        return json.loads(f.metadata()["stats"]), maps


@pytest.mark.parametrize("case", DRAWN)
def test_statistics_are_those_of_the_public_code(case, golden):
    """Four standard errors of the difference, as the golden file says; five for the largest of a whole map."""
    stats, probability = golden[0][case], golden[1][case]
    mask = DRAWN[case](torch.arange(6000)).double()
    count = mask.sum((1, 2))
    some = count > 0
    mask, count, theirs = mask[some], count[some], stats["masks"] * (1 - stats["share_unmasked"])

    def close(ours, golden_value, deviation, ours_of, theirs_of, errors=4.0):
        return abs(ours - golden_value) <= errors * deviation * (1 / ours_of + 1 / theirs_of) ** 0.5 + 1e-4

    assert close((~some).double().mean(), stats["share_unmasked"], 0.5, len(some), stats["masks"])
    spread = stats["count_std_masked"]
    assert close(count.mean(), stats["count_mean_masked"], spread, len(count), theirs)
    fourth = ((count - count.mean()) ** 4).mean() / count.var() ** 2  # of the standard error of a deviation
    error_of_spread = spread * ((fourth - 1) / 4) ** 0.5
    assert close(count.std(), spread, error_of_spread, len(count), theirs)
    limit = 98 if case == "ibot_14x14" else 96 if case == "ibot_12x16" else stats["count_max"]
    assert count.max() <= limit
    quantiles = count.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64))
    assert (quantiles - torch.tensor(stats["count_quantiles_masked"])).abs().max() <= 2
    deviation = (probability * (1 - probability)).sqrt()
    far = (mask.mean(0) - probability).abs() / (deviation * (1 / len(count) + 1 / theirs) ** 0.5)
    assert far.max() < 5
    assert far.square().mean() < 2  # one on average; neighbours go together, so that it scatters
    neighbour = (mask[:, :, 1:] * mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()
    assert abs(neighbour - stats["right_neighbour_masked"]) < 0.01


def test_a_mask_depends_on_its_keys_alone():
    ids = torch.tensor([3, 4, 10**12, -5])
    args = dict(grid=(14, 14), ratios=((0.2, 0.4),), seed=5, epoch=9)
    batch = ibot_mask(ids, **args, crop=2)
    for i in range(4):
        assert torch.equal(ibot_mask(ids[i : i + 1], **args, crop=2)[0], batch[i])
    crops = torch.tensor([0, 2, 1, 2])
    mixed = ibot_mask(ids[[1, 1, 1, 3]], **args, crop=crops)
    assert torch.equal(mixed[1], batch[1]) and torch.equal(mixed[3], batch[3])
    assert torch.equal(ibot_mask(ids[:2].int(), **args, crop=2), batch[:2])
    for other in (dict(seed=6), dict(epoch=10), dict(crop=1)):
        assert (ibot_mask(ids, **args | dict(crop=2) | other) != batch).flatten(1).any(1).all()
    keys = crop_keys(ids, 50, seed=5, epoch=9, crop=0, purpose=PHOTOMETRIC)
    others = [random_keys(ids, 50, 5, 9), *(crop_keys(ids, 50, seed=5, epoch=9, crop=c, purpose=1) for c in range(3))]
    everything = torch.cat([keys, *others]).flatten()
    assert len(everything.unique()) == len(everything)


def test_nothing_looks_at_values_where_that_would_wait(monkeypatch):
    """What stops early on a CPU gives the bits of what runs to its end elsewhere, and nothing of it reads a value."""
    ids = torch.arange(64)
    early = ibot_mask(ids, grid=(12, 16)), beit_mask(ids, grid=(14, 14))
    monkeypatch.setattr(fk, "shape_may_follow", lambda data: False)
    assert torch.equal(ibot_mask(ids, grid=(12, 16)), early[0]) and torch.equal(beit_mask(ids, grid=(14, 14)), early[1])
    mask = ibot_mask(torch.arange(6, device="meta"), grid=(12, 16))  # which has no values to look at
    rows, weights = masked_rows(mask, 6 * most_masked((12, 16)))
    assert mask.is_meta and mask.shape == (6, 12, 16) and rows.shape == weights.shape == (6 * 96,)


@pytest.mark.cuda
def test_a_gpu_draws_the_same_bits_and_never_waits():
    ids = torch.arange(500)
    on_cpu = ibot_mask(ids, grid=(12, 16)), beit_mask(ids, grid=(14, 14))
    expected = masked_rows(on_cpu[0], 500 * 96)
    ids = ids.cuda()
    for mode in ("default", "error"):  # the first use of a kernel may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            on_gpu = ibot_mask(ids, grid=(12, 16)), beit_mask(ids, grid=(14, 14))
            rows = masked_rows(on_gpu[0], 500 * 96)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(on_gpu[0].cpu(), on_cpu[0]) and torch.equal(on_gpu[1].cpu(), on_cpu[1])
    assert torch.equal(rows[0].cpu(), expected[0]) and torch.equal(rows[1].cpu(), expected[1])


def test_rows_and_weights_give_the_mean_over_images_of_the_mean_over_masked_rows():
    mask = ibot_mask(torch.arange(40), grid=(7, 9))
    losses = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
    rows, weights = masked_rows(mask, 40 * most_masked((7, 9)))
    assert len(rows) == 40 * 31 and rows.dtype == torch.int64 and weights.dtype == torch.float32
    assert len(rows.unique()) == len(rows)  # every place has a row of its own: they can be written back
    hidden = int(mask.sum())
    assert torch.equal(rows[:hidden], mask.flatten().nonzero().squeeze(1)) and (weights[hidden:] == 0).all()
    assert 0 < (mask.flatten(1).sum(1) == 0).sum() < 40
    expected = [image[m].mean() if m.any() else torch.tensor(0.0) for image, m in zip(losses, mask, strict=True)]
    found = (losses.flatten()[rows] * weights).view(-1).sum() / 40
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(masked_rows(mask.int(), 40 * 31)[1], weights, rtol=0, atol=0)


@pytest.mark.parametrize("mask, capacity, rows, weights", [
    ([[0, 1, 1], [1, 0, 0]], 2, [1, 2], [0.5, 0.5]),  # full: the last masked row is left out
    ([[0, 1, 1], [1, 0, 0]], 3, [1, 2, 3], [0.5, 0.5, 1]),
    ([[0, 1, 1], [1, 0, 0]], 6, [1, 2, 3, 0, 4, 5], [0.5, 0.5, 1, 0, 0, 0]),
    ([[0, 0, 0], [0, 0, 0]], 2, [0, 1], [0, 0]),
    ([[1, 1, 1], [1, 1, 1]], 6, [0, 1, 2, 3, 4, 5], [1 / 3] * 6),
])  # fmt: skip
def test_rows_at_the_limits_of_a_capacity(mask, capacity, rows, weights):
    found = masked_rows(torch.tensor(mask) == 1, capacity)
    assert found[0].tolist() == rows
    torch.testing.assert_close(found[1], torch.tensor(weights, dtype=torch.float32))


def test_a_mask_holds_what_its_capacity_says_at_most():
    """Also where the share is the upper end of its range, and the number of cells no whole one."""
    for grid, high in (((14, 14), 0.5), ((7, 7), 0.5), ((9, 5), 0.3), ((2, 2), 0.9)):
        count = ibot_mask(torch.arange(500), grid=grid, ratios=((high, high),)).flatten(1).sum(1)
        assert count.max() <= most_masked(grid, ((0.0, 0.0), (high, high))) == int(high * grid[0] * grid[1])
        assert (count > 0).any()


@pytest.mark.parametrize("call, message", [
    (lambda ids: ibot_mask(ids.float(), grid=(4, 4)), "sample_ids must be a vector of integers"),
    (lambda ids: ibot_mask(ids, grid=(4, 4), crop=torch.arange(3)), r"4 integers, got torch.int64 \(3"),
    (lambda ids: ibot_mask(ids, grid=(4, 4), crop=torch.zeros(4)), "got torch.float32"),
    (lambda ids: ibot_mask(ids, grid=(1, 8)), r"grid=\(1, 8\): blocks need two cells"),
    (lambda ids: ibot_mask(ids, grid=(4, 4), ratios=((0.5, 0.2),)), "ratios=.*0 <= low <= high < 1"),
    (lambda ids: ibot_mask(ids, grid=(4, 4), ratios=((0.5, 1.0),)), "ratios="),
    (lambda ids: ibot_mask(ids, grid=(4, 4), ratios=()), r"ratios=\(\): "),
    (lambda ids: ibot_mask(ids, grid=(4, 4), shape="square"), "shape='square': must be block or random"),
    (lambda ids: beit_mask(ids, grid=(4, 4), count=16), "count=16: must lie between 1 and 15"),
    (lambda ids: beit_mask(ids, grid=(4, 4), count=8, smallest=-1), "smallest=-1"),
    (lambda ids: masked_rows(ids[None] == 0, 0), "capacity=0: must lie between 1 and the 4 rows"),
    (lambda ids: masked_rows(ids[None] == 0, 5), "capacity=5"),
])  # fmt: skip
def test_wrong_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(4))


def test_places_for_the_rows_of_a_batch():
    """Enough for each of 300 batches of 64 crops, by some standard deviations (33.5 cells of a crop); for few crops as
    many as their masks could hold."""
    mask = ibot_mask(torch.arange(64 * 300), grid=(14, 14), shape="random")
    most = mask.flatten(1).sum(1).unflatten(0, (300, 64)).sum(1).max()
    mean, deviation = 64 * 29.4, 8 * 33.5
    assert most < most_rows(64, (14, 14)) < 64 * most_masked((14, 14))
    assert mean + 7 * deviation < most_rows(64, (14, 14)) < mean + 8.5 * deviation
    assert most_rows(2, (14, 14)) == 2 * most_masked((14, 14)) == 196
    assert most_rows(8, (4, 4), ((0.0, 0.0),)) == 1
