"""The loader end to end: files in, uint8 micro-batches out, whatever the workers, restarts and bad files."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import Batch, Loader, build_loader
from fastmim.data.loader import PREFETCH


def load(path, **kwargs) -> Loader:
    options = {"path": path, "img_size": (32, 32), "micro_batch_size": 4, "num_workers": 0, "seed": 5}
    return build_loader(**(options | kwargs))


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.sample_ids, b.sample_ids)
        for a, b in zip(left, right, strict=True)
    )


def names_of(loader: Loader, root) -> list[str]:
    index = loader.index
    return [os.path.relpath(index.path(i), root) for i in range(len(index))]


# Bad and unusual files.


@pytest.mark.parametrize("decoder", ("auto", "pil"))
@pytest.mark.parametrize(("workers", "verify"), ((0, "auto"), (2, "none")))
def test_zoo_in_training(zoo, decoder, workers, verify):
    # crop = whole image, no flip: the pixels that come out must be those that went in
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    options = {"num_workers": workers, "verify": verify, "loader": decoder, **whole}
    with load(zoo.root, micro_batch_size=5, **options) as loader:
        names = names_of(loader, zoo.root)
        assert loader.num_images == len(zoo.truth) + len(zoo.bad) == 15
        batches = list(loader.epoch(0))
        bad = {os.path.relpath(path, zoo.root): reason for path, reason in loader.bad_files.items()}
    assert set(bad) == set(zoo.bad)
    assert all(zoo.bad[name] in reason for name, reason in bad.items())
    seen = []
    for batch in batches:
        for image, sample_id in zip(batch.images, batch.sample_ids.tolist(), strict=True):
            pixels = image.permute(1, 2, 0).numpy().astype(int)
            fits = [n for n, (truth, bound) in zoo.truth.items() if np.abs(pixels - truth).max() <= bound]
            assert len(fits) == 1
            # the file itself, or some good file in the place of a bad one
            assert names[sample_id] in zoo.bad or fits == [names[sample_id]]
            seen.append(sample_id)
    assert sorted(seen) == list(range(15))


def test_batches_do_not_depend_on_when_bad_files_are_found(zoo):
    runs = []
    for verify, workers in (("full", 0), ("none", 0), ("none", 2)):
        with load(zoo.root, verify=verify, num_workers=workers) as loader:
            runs.append([batch for epoch in range(3) for batch in loader.epoch(epoch)])
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_zoo_in_validation_leaves_bad_files_out(zoo):
    for verify in ("auto", "none"):
        with load(zoo.root, train=False, verify=verify) as loader:
            names, batches = names_of(loader, zoo.root), list(loader.epoch(0))
        ids = torch.cat([batch.sample_ids for batch in batches]).tolist()
        assert [names[i] for i in ids] == [name for name in names if name in zoo.truth]
        for batch in batches:
            for image, sample_id in zip(batch.images, batch.sample_ids.tolist(), strict=True):
                truth, bound = zoo.truth[names[sample_id]]
                assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - truth).max() <= bound


@pytest.mark.parametrize("workers", (0, 1))
def test_too_many_bad_files_is_one_line(zoo, tmp_path, workers):
    with pytest.raises(ValueError, match="4 of 15 files cannot be used .*tiny.png|truncated.jpg") as caught:
        load(zoo.root, max_bad_fraction=0.2)
    assert "\n" not in str(caught.value) and "data.max_bad_fraction=0.2" in str(caught.value)
    with (
        load(zoo.root, max_bad_fraction=0.2, verify="none", num_workers=workers) as loader,
        pytest.raises(ValueError, match="of 15 files cannot be used"),
    ):
        list(loader.epoch(0))
    for i in range(300):
        (tmp_path / f"{i}.jpg").write_text("no image")
    with load(tmp_path, verify="none", num_workers=workers) as loader:
        with pytest.raises(ValueError, match="64 files in a row cannot be used") as caught:
            next(loader.epoch(0))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", ("torchvision", "dali"))
def test_mostly_bad_data_stops_a_run_long_before_every_file_was_met(photos, tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    good = (photos / "000.jpg").read_bytes()
    for i in range(4000):
        (tmp_path / f"{i:04d}.jpg").write_bytes(b"no image" if i % 5 else good)  # 80 % bad
    options = {"verify": "none", "loader": loader, "img_size": (8, 8), "micro_batch_size": 20}
    with load(tmp_path, **options) as images:
        with pytest.raises(ValueError, match=r"\d+ of the first 1\d\d\d files read cannot be used") as caught:
            list(images.epoch(0))
        assert "\n" not in str(caught.value) and len(images.bad_files) < 1200
    with load(tmp_path, max_bad_fraction=0.9, **options) as images:
        batches = images.epoch(0)
        assert sum(len(next(batches).images) for _ in range(30)) == 600


def test_file_list(photos, tmp_path):
    (tmp_path / "list.txt").write_text("005.jpg\n001.jpg\n")
    with load(photos, file_list=tmp_path / "list.txt", train=False) as loader:
        assert loader.num_images == 2 and names_of(loader, photos) == ["005.jpg", "001.jpg"]
        assert next(loader.epoch(0)).sample_ids.tolist() == [0, 1]


# Order, sharding, restart.


@pytest.mark.parametrize("workers", (0, 1, 2))
def test_restart_gives_the_tail_bit_for_bit(photos, workers):
    with load(photos) as loader:
        reference = {epoch: list(loader.epoch(epoch)) for epoch in (0, 1, 2)}
    assert not same(reference[0], reference[1])
    with load(photos, num_workers=workers) as loader:
        for epoch, start in ((1, 0), (1, 4), (2, 9), (0, 3), (2, 0)):  # 9 = the end: nothing is left
            assert same(list(loader.epoch(epoch, start=start)), reference[epoch][start:])
        half = loader.epoch(0)
        taken = [next(half) for _ in range(5)]
        assert same(taken, reference[0][:5])
        assert same(list(loader.epoch(0, start=5)), reference[0][5:])  # goes on with what is in flight
        assert same(list(loader.epoch(1)), reference[1])


def test_every_rank_gets_its_share(photos):
    def steps(world: int, micro: int) -> list[dict[int, torch.Tensor]]:
        out: list[dict[int, torch.Tensor]] = []
        for rank in range(world):
            with load(photos, rank=rank, world_size=world, micro_batch_size=micro) as loader:
                assert loader.steps_per_epoch == 4
                for i, batch in enumerate(loader.epoch(2)):
                    out.extend({} for _ in range(i + 1 - len(out)))
                    out[i].update(zip(batch.sample_ids.tolist(), batch.images, strict=True))
        return out

    whole = steps(1, 8)
    assert all(len(step) == 8 for step in whole)
    for world, micro in ((2, 4), (4, 2)):
        for one, other in zip(whole, steps(world, micro), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[i], other[i]) for i in one)


def test_accumulation_and_small_folders(photos, tmp_path):
    with load(photos, grad_accum_steps=3) as loader:
        assert loader.steps_per_epoch == 3 and len(list(loader.epoch(0))) == 9
    for i in range(3):
        Image.open(photos / f"{i:03d}.jpg").save(tmp_path / f"{i}.png")
    with load(tmp_path, micro_batch_size=8, num_workers=1) as loader:
        batches = list(loader.epoch(0))
    assert loader.steps_per_epoch == 1 and [len(batch.images) for batch in batches] == [8]
    assert len(set(batches[0].sample_ids.tolist())) == 8
    repeats = [image for image, i in zip(*batches[0], strict=True) if i % 3 == 0]
    assert not torch.equal(repeats[0], repeats[1])  # another crop of the same file


def test_validation_keeps_the_short_last_batch_and_repeats_itself(photos):
    with load(photos, train=False, micro_batch_size=10, num_workers=2) as loader:
        first = list(loader.epoch(0))
        assert [len(batch.images) for batch in first] == [10, 10, 10, 7]
        next(loader.epoch(0))  # left half way
        assert same(list(loader.epoch(0)), first) and same(list(loader.epoch(1)), first)


def test_seed_and_epoch_change_everything_else_nothing(photos):
    with load(photos) as a, load(photos, seed=6) as b, load(photos, verify="none", device="cpu") as c:
        first = list(a.epoch(0))
        assert not same(first, list(b.epoch(0)))
        assert same(first, list(c.epoch(0)))


# Batches.


@pytest.mark.parametrize("in_chans", (1, 3, 4))
def test_shapes_and_types(photos, in_chans):
    with load(photos, img_size=(24, 40), in_chans=in_chans, interpolation="bicubic") as loader:
        batch = next(loader.epoch(0))
    assert batch.images.shape == (4, in_chans, 24, 40) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    assert batch.sample_ids.shape == (4,) and batch.sample_ids.dtype == torch.int64


@pytest.mark.parametrize("workers", (0, 2))
def test_the_trainers_generators_are_neither_used_nor_heeded(photos, workers):
    def states():
        return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        before = states()
        with load(photos, num_workers=workers) as loader:
            runs.append([*loader.epoch(0), *loader.epoch(1, start=7), *loader.epoch(3)])
        after = states()
        assert torch.equal(before[0], after[0])
        assert (before[1] == after[1]).all() and before[2] == after[2]
    assert same(*runs)


# Workers.


def workers_of(loader: Loader, before: set[int]) -> list[int]:
    next(loader.epoch(0))
    return [child.pid for child in multiprocessing.active_children() if child.pid not in before]


def test_workers_outlive_ctrl_c_and_end_with_close(photos):
    before = {child.pid for child in multiprocessing.active_children()}
    loader = load(photos, num_workers=2)
    reference = list(loader.epoch(0))
    workers = workers_of(loader, before)
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert same(list(loader.epoch(0)), reference)
    loader.close()
    loader.close()
    assert not {child.pid for child in multiprocessing.active_children()} & set(workers)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader.epoch(0))


@pytest.mark.parametrize("loader", ("torchvision", "dali"))
def test_a_killed_worker_ends_the_run_with_its_cause(photos, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    before = {child.pid for child in multiprocessing.active_children()}
    with load(photos, num_workers=2, loader=loader) as images:
        pid, _ = workers_of(images, before)
        os.kill(pid, signal.SIGKILL)
        message = rf"pid {pid}.* killed by signal SIGKILL.*memory.*data\.num_workers"
        with pytest.raises(ChildProcessError, match=message) as caught:
            for epoch in range(100):
                list(images.epoch(epoch))
    assert "\n" not in str(caught.value)


def test_what_is_made_ahead_is_bounded_and_there(photos):
    # the micro-batches behind the one in use are under way, and no more than stated
    with load(photos, num_workers=2) as loader:
        next(loader.epoch(0))
        assert loader._pool.under_way == 2 * PREFETCH - 1  # the next is asked for when the next is taken
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    with load(photos, num_workers=1, loader="dali") as loader:
        batches = loader.epoch(0)
        for taken in range(1, 4):
            next(batches)
            assert loader._decoder._fed == taken + 1  # DALI works on the next one


# Messages.


@pytest.mark.parametrize(
    ("kwargs", "message"),
    (
        ({"img_size": (0, 32)}, "model.img_size"),
        ({"in_chans": 5}, "model.in_chans=5"),
        ({"loader": "fast"}, "data.loader='fast'"),
        ({"scale": (0.5, 0.2)}, "data.scale"),
        ({"scale": (0.0, 1.0)}, "data.scale"),
        ({"ratio": (-1.0, 1.0)}, "data.ratio"),
        ({"hflip": 1.5}, "data.hflip=1.5"),
        ({"interpolation": "nearest"}, "data.interpolation='nearest'"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"verify": "maybe"}, "data.verify='maybe'"),
        ({"path": "/no/such/folder"}, "data.path=/no/such/folder"),
    ),
)
def test_wrong_arguments(photos, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(**({"path": photos} | kwargs))
    assert "\n" not in str(caught.value)


def test_wrong_position(photos):
    with load(photos) as loader:
        for epoch, start in ((0, 10), (0, -1), (-1, 0)):
            with pytest.raises(ValueError, match="start must lie in"):
                loader.epoch(epoch, start=start)


@pytest.mark.cuda
@pytest.mark.parametrize("workers", (0, 2))
def test_cuda_batches_are_those_of_the_cpu(photos, workers):
    with load(photos, loader="torchvision", device="cuda", num_workers=workers) as gpu, load(photos) as cpu:
        for epoch in range(3):
            for a, b in zip(gpu.epoch(epoch), cpu.epoch(epoch), strict=True):
                doubled = a.images.int() * 2  # read by a kernel right behind the copy
                assert torch.equal(doubled.cpu(), b.images.int() * 2)
                assert torch.equal(a.sample_ids.cpu(), b.sample_ids)


def test_weighted_folders_resume_in_the_middle_and_stand_ins_keep_the_shares(photos, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(3):
        (few / f"{i}.jpg").write_bytes((photos / f"{i:03d}.jpg").read_bytes())
    (few / "bad.jpg").write_bytes(b"no image")
    options = dict(path=[photos, few], weights=[1, 1], img_size=(32, 32), micro_batch_size=5, seed=3, verify="none")
    with build_loader(num_workers=0, **options) as loader:
        whole = list(loader.epoch(1))
        assert loader.num_images == 41 and len(whole) == 8
        assert set(loader.bad_files) == {str(few / "bad.jpg")}
    ids = torch.cat([batch.sample_ids for batch in whole]) % 41
    assert abs(int((ids >= 37).sum()) - 20) <= 1  # 41 samples, of which the last one is dropped
    with build_loader(num_workers=2, **options) as loader:
        tail = list(loader.epoch(1, start=3))
    assert len(tail) == 5
    for left, right in zip(whole[3:], tail, strict=True):
        assert torch.equal(left.images, right.images) and torch.equal(left.sample_ids, right.sample_ids)
    for path, weights in ((photos, [1]), ([photos, few], [1, 2, 3]), ([photos, few], [1, 0])):
        with pytest.raises(ValueError, match="data.weights="):
            build_loader(num_workers=0, **options | {"path": path, "weights": weights})
