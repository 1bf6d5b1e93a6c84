"""A share of the images held out by their names: which ones, and that every loader and rank agrees."""

from __future__ import annotations

import hashlib

import pytest
import torch

from fastmim.data import build_loader, pack_images
from fastmim.data.held_out import split
from fastmim.data.source import FileIndex, open_index

FRACTION = 0.3


def load(path, **kwargs):
    return build_loader(**dict(path=path, img_size=(16, 16), micro_batch_size=4, num_workers=0) | kwargs)


def expected_side(name: str) -> bool:
    """The rule written out again: the first 8 bytes of BLAKE2b of the name, as a fraction of 2^64."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") < FRACTION * 2**64


def names(loader) -> list[str]:
    return [loader.index.name(i).decode() for i in range(loader.num_images)]


def test_both_sides_of_a_folder(photos):
    everything = sorted(path.name for path in photos.iterdir())
    with load(photos, val_fraction=FRACTION) as kept, load(photos, val_fraction=FRACTION, train=False) as held_out:
        assert names(held_out) == [name for name in everything if expected_side(name)] != []
        assert sorted(names(kept) + names(held_out)) == everything
        assert kept.fingerprint != held_out.fingerprint
        pixels = next(held_out.epoch(0)).images
    with load(photos, train=False, micro_batch_size=37) as whole:
        wanted = next(whole.epoch(0)).images
        assert (pixels[0] == wanted[everything.index(names(held_out)[0])]).all()


def test_the_share_is_about_what_was_asked_for():
    index = FileIndex("/nowhere", [f"{i}.jpg" for i in range(10_000)])
    assert len(split(index, 0.1, held_out=True)) == pytest.approx(1000, abs=100)  # over three standard deviations


def test_an_image_stays_on_its_side_when_others_come(photos, tmp_path):
    new = [f"new-{i}.jpg" for i in range(50)]
    old = [path.name for path in photos.iterdir()]

    def held_out(listed):
        side = split(FileIndex("/x", sorted(listed)), FRACTION, held_out=True)
        return {side.name(i).decode() for i in range(len(side))}

    assert held_out(old + new) & set(old) == held_out(old)


def test_lists_and_shards_are_split_by_their_names(photos, tmp_path):
    everything = sorted(path.name for path in photos.iterdir())
    (tmp_path / "list.txt").write_text("\n".join([*everything, everything[0]]))  # a file listed twice: on one side
    with load(photos, file_list=tmp_path / "list.txt", val_fraction=FRACTION, train=False) as listed:
        assert set(names(listed)) == {name for name in everything if expected_side(name)}
        assert names(listed).count(everything[0]) == 2 * expected_side(everything[0])
    pack_images(photos, tmp_path / "shards", shard_bytes=20_000)
    with load(tmp_path / "shards", val_fraction=FRACTION, train=False) as packed:
        index = open_index(tmp_path / "shards")
        whole = [index.name(i).decode() for i in range(len(index))]
        assert all(".tar!" in name and "/" not in name for name in whole)
        assert names(packed) == [name for name in whole if expected_side(name)]


def test_ranks_read_every_held_out_image_once(photos):
    ids = []
    for rank in (0, 1):
        with load(photos, val_fraction=FRACTION, train=False, rank=rank, world_size=2) as loader:
            ids += [int(i) for batch in loader.epoch(0) for i in batch.sample_ids]
            count = loader.num_images
    assert sorted(ids) == list(range(count))


def test_several_folders_keep_their_weights(photos, tmp_path):
    (tmp_path / "other").mkdir()
    for path in sorted(photos.iterdir())[:20]:
        (tmp_path / "other" / f"x-{path.name}").write_bytes(path.read_bytes())
    both, share = [photos, tmp_path / "other"], dict(val_fraction=FRACTION, weights=[1, 1])
    with load(both, **share) as kept, load(both, **share, train=False) as held_out:
        assert kept.num_images + held_out.num_images == 57
        own = len(kept.index.parts[0])
        ids = torch.cat([batch.sample_ids for batch in kept.epoch(0)]) % kept.num_images
        assert abs(int((ids < own).sum()) - int((ids >= own).sum())) <= 4  # an incomplete batch is dropped
    with pytest.raises(ValueError, match=r"data.val_fraction=0.3: what is in .* could be held out of one alone"):
        load([photos, photos], **share)


def test_a_side_with_nothing_on_it(photos):
    with pytest.raises(ValueError, match=r"^data.val_fraction=1e-09: holds out none of the 37 images.*give a larger"):
        load(photos, val_fraction=1e-9, train=False)
    with pytest.raises(ValueError, match=r"leaves none to train on of the 37 images.*give a smaller one, or null$"):
        load(photos, val_fraction=1 - 1e-9)
    with pytest.raises(ValueError, match="data.path=null: give a folder"):
        load(None, val_fraction=0.1, train=False, loader="synthetic")
