"""Who sees which sample when."""

from __future__ import annotations

import pytest
import torch

from fastmim.data.order import EpochOrder, Span, augment_random, shares, substitute_file


def ids_of(order: EpochOrder, epoch: int) -> list[torch.Tensor]:
    ids = order.sample_ids(epoch)
    return [ids[order.slice_of(i)] for i in range(order.micro_batches)]


def step_unions(world: int, accum: int, micro: int, epoch: int = 3, num_images: int = 40) -> list[list[int]]:
    """Sorted ids of every optimiser step over all ranks."""
    orders = [
        EpochOrder(
            num_images=num_images, micro_batch_size=micro, grad_accum_steps=accum, rank=rank, world_size=world
        )
        for rank in range(world)
    ]
    assert len({order.steps_per_epoch for order in orders}) == 1
    batches = [ids_of(order, epoch) for order in orders]
    steps = []
    for step in range(orders[0].steps_per_epoch):
        mine = [torch.cat(rank[step * accum : (step + 1) * accum]) for rank in batches]
        steps.append(sorted(torch.cat(mine).tolist()))
    return steps


def test_steps_are_the_same_for_every_split_of_a_global_batch():
    whole = step_unions(world=1, accum=1, micro=8)
    for world, accum, micro in ((2, 1, 4), (4, 1, 2), (1, 4, 2), (2, 2, 2), (4, 2, 1), (8, 1, 1)):
        assert step_unions(world, accum, micro) == whole
    assert sorted(sum(whole, [])) == list(range(40))  # 8 divides 40: every file exactly once


def test_the_incomplete_last_global_batch_is_dropped():
    # 43 images, global batch 8: 5 steps, 3 images wait for another epoch's shuffle
    steps = step_unions(world=2, accum=2, micro=2, num_images=43)
    seen = sum(steps, [])
    assert len(steps) == 5 and len(set(seen)) == len(seen) == 40
    ever = set()
    for epoch in range(4):
        ever |= set(sum(step_unions(world=2, accum=2, micro=2, num_images=43, epoch=epoch), []))
    assert ever == set(range(43))


def test_fewer_images_than_a_global_batch(caplog):
    order = EpochOrder(num_images=5, micro_batch_size=4, grad_accum_steps=3)
    assert "5 images, fewer than one global batch of 12" in caplog.text
    assert (order.steps_per_epoch, order.micro_batches) == (1, 3)
    ids = torch.cat(ids_of(order, 0))
    assert len(ids) == 12 and len(set(ids.tolist())) == 12
    files = (ids % 5).reshape(-1)
    assert sorted(files[:5].tolist()) == sorted(files[5:10].tolist()) == list(range(5))
    assert files[:5].tolist() != files[5:10].tolist()  # another permutation
    assert set((ids // 5).tolist()) == {0, 1, 2}


def test_order_depends_on_seed_and_epoch_only():
    def first(**kwargs):
        options = {"num_images": 100, "micro_batch_size": 10, "seed": 1} | kwargs
        return EpochOrder(**options).sample_ids

    assert torch.equal(first()(7), first()(7))
    assert torch.equal(first()(7), first(micro_batch_size=3, world_size=2, rank=1)(7))
    others = [first()(8), first(seed=2)(7), first(seed=7)(1), first(seed=2**32 + 1)(7)]
    assert not any(torch.equal(first()(7), other) for other in others)


def test_validation_order_covers_every_file_once_on_every_world_size():
    for world in (1, 2, 3, 4):
        orders = [
            EpochOrder(num_images=10, micro_batch_size=3, rank=r, world_size=world, train=False)
            for r in range(world)
        ]
        batches = [batch for order in orders for batch in ids_of(order, 0)]
        assert all(len(batch) for batch in batches)
        assert sorted(torch.cat(batches).tolist()) == list(range(10))
        assert {order.steps_per_epoch for order in orders} == {max(order.micro_batches for order in orders)}
    assert torch.cat(ids_of(EpochOrder(num_images=10, micro_batch_size=3, train=False), 5)).tolist() == list(
        range(10)
    )


def test_random_keys_are_pure_and_distinct():
    draws = {augment_random(s, e, i).random() for s in range(5) for e in range(5) for i in range(40)}
    assert len(draws) == 1000
    assert augment_random(1, 2, 3).random() == augment_random(1, 2, 3).random()
    picks = [substitute_file(0, 0, i, a, 7) for i in range(500) for a in (1, 2)]
    assert set(picks) == set(range(7))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    (
        ({"micro_batch_size": 0}, "train.micro_batch_size=0"),
        ({"grad_accum_steps": 0}, "train.grad_accum_steps=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seed": -1}, "train.seed=-1"),
    ),
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EpochOrder(**({"num_images": 10, "micro_batch_size": 1} | kwargs))


# Several folders with weights.

SPANS = [Span(0, 30, 1.0), Span(30, 6, 2.0), Span(36, 4, 1.0)]


def test_each_folder_gives_its_share_and_its_files_evenly():
    order = EpochOrder(num_images=40, micro_batch_size=8, spans=SPANS)
    assert shares(SPANS, 40) == [10, 20, 10] and sum(shares(SPANS, 7)) == 7
    epochs = [order.sample_ids(epoch) for epoch in (0, 1)]
    for ids in epochs:
        assert len(set(ids.tolist())) == 40  # a file that comes again comes as another sample
        files = ids % 40
        used = torch.bincount(files, minlength=40)
        for span, share in zip(SPANS, (10, 20, 10), strict=True):
            mine = used[span.start : span.start + span.files]
            assert mine.sum() == share and mine.max() - mine.min() <= 1
        assert files[:20].unique().tolist() != files[20:].unique().tolist() and (files[:10] >= 30).any()
    assert epochs[0].tolist() != epochs[1].tolist()
    # a function of seed and epoch alone
    again = EpochOrder(num_images=40, micro_batch_size=2, rank=1, world_size=4, spans=SPANS)
    assert again.sample_ids(1).tolist() == epochs[1].tolist()
    other = EpochOrder(num_images=40, micro_batch_size=8, seed=1, spans=SPANS)
    assert other.sample_ids(1).tolist() != epochs[1].tolist()


def test_weighted_samples_are_the_same_for_every_split_of_a_global_batch():
    def unions(world: int, accum: int, micro: int) -> list[list[int]]:
        steps: list[list[int]] = [[] for _ in range(5)]
        for rank in range(world):
            order = EpochOrder(
                num_images=40, micro_batch_size=micro, grad_accum_steps=accum, rank=rank, world_size=world, spans=SPANS
            )
            for i, ids in enumerate(ids_of(order, 2)):
                steps[i // accum] += ids.tolist()
        return [sorted(step) for step in steps]

    assert unions(1, 1, 8) == unions(4, 1, 2) == unions(2, 2, 2) == unions(1, 8, 1)


def test_a_weight_too_small_for_one_sample_is_said(caplog):
    EpochOrder(num_images=40, micro_batch_size=8, spans=[Span(0, 30, 1.0), Span(30, 10, 1e-6)])
    assert "data.weights: 1e-06 of 1 gives no sample an epoch: its 10 images are not used" in caplog.text


def test_weights_with_fewer_files_than_a_batch():
    order = EpochOrder(num_images=40, micro_batch_size=100, spans=SPANS)
    ids = torch.cat(ids_of(order, 0))
    assert len(ids) == len(set(ids.tolist())) == 100
