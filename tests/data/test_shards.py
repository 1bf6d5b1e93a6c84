"""Tar shards: listing, indices, untrusted archives, packing, and the same batches as the folder."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import build_loader, check_images, index_shards, pack_images
from fastmim.data.shards import expand_braces, find_tars, open_shards, scan_tar
from fastmim.data.source import open_index
from fastmim.data.tar_index import index_path, read_index, write_index

KINDS = ("jpg", "mask.png", "seg.png")


def load(path, **kwargs):
    options = {"path": path, "img_size": (32, 32), "micro_batch_size": 4, "num_workers": 0, "seed": 5}
    return build_loader(**(options | kwargs))


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.sample_ids, b.sample_ids)
        for a, b in zip(left, right, strict=True)
    )


def write_tar(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    with tarfile.open(path, "w:", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "shards"
    report = pack_images(photos, target, shard_bytes=20_000)
    assert report.images == 37 and not report.bad and len(report.shards) > 2
    return target


# Packing.


def test_packed_shards_hold_the_same_bytes_and_give_the_same_batches(photos, packed):
    index, files = open_index(packed), sorted(photos.iterdir())
    assert [bytes(index.read(i)) for i in range(37)] == [file.read_bytes() for file in files]
    assert (packed / "names.txt").read_text().splitlines() == [str(file) for file in files]
    assert all(os.path.getsize(tar) <= 20_000 + 10_240 for tar in find_tars(str(packed)))
    with load(photos) as folder, load(packed) as shards:
        for epoch in (0, 3):
            assert same(list(folder.epoch(epoch)), list(shards.epoch(epoch)))


def test_packing_twice_gives_the_same_bytes(photos, packed, tmp_path):
    pack_images(photos, tmp_path / "again", shard_bytes=20_000, num_threads=1)
    for path in packed.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_short_side_makes_large_images_smaller_and_copies_the_others(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    ramp = np.linspace(0, 255, 300)[None, :, None].repeat(120, 0).repeat(3, 2).astype(np.uint8)
    Image.fromarray(ramp).save(source / "a.png")
    Image.new("RGB", (40, 60), (10, 20, 30)).save(source / "b.png")
    stages = []
    report = pack_images(
        source, tmp_path / "out", short_side=60, quality=95, progress=lambda *told: stages.append(told)
    )
    index = open_index(tmp_path / "out")
    small = Image.open(io.BytesIO(index.read(0)))
    assert (small.format, small.size) == ("JPEG", (150, 60))
    want = np.asarray(Image.fromarray(ramp).resize((150, 60), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(np.asarray(small).astype(int) - want).max() <= 6
    assert bytes(index.read(1)) == (source / "b.png").read_bytes()
    assert stages == [("pack", 1, 2), ("pack", 2, 2), ("verify", 1, 2), ("verify", 2, 2)]
    assert report.total_bytes == os.path.getsize(report.shards[0])


def test_bad_files_are_left_out_of_a_pack_and_named(zoo, tmp_path):
    report = pack_images(zoo.root, tmp_path / "out")
    assert {os.path.relpath(path, zoo.root) for path in report.bad} == set(zoo.bad)
    assert report.images == len(zoo.truth)
    assert check_images(tmp_path / "out") == (report.images, {})


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"short_side": 4}, "--short-side 4"),
        ({"quality": 0}, "--quality 0"),
        ({"shard_bytes": 0}, "--shard-mb"),
        ({"source": "/no/such"}, "DIR=/no/such"),
    ),
)
def test_wrong_pack_arguments(photos, tmp_path, options, message):
    options = {"source": photos, "target": tmp_path / "out"} | options
    with pytest.raises(ValueError, match=message):
        pack_images(options.pop("source"), options.pop("target"), **options)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        pack_images(photos, tmp_path / "full")


# Listing.


def test_patterns(tmp_path):
    for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b.tar"):
        write_tar(tmp_path / name, [("x.jpg", b"x")])
    base = [str(tmp_path / f"a-{i:02d}.tar") for i in range(3)]
    assert find_tars(str(tmp_path / "a-{00..02}.tar")) == base
    assert find_tars(str(tmp_path / "a-0[01].tar")) == base[:2]
    assert find_tars(str(tmp_path)) == [*base, str(tmp_path / "b.tar")]
    assert find_tars(str(tmp_path / "{b,a-01}.tar")) == [str(tmp_path / "b.tar"), base[1]]
    with pytest.raises(ValueError, match=r"no such shard .*a-03.tar"):
        find_tars(str(tmp_path / "a-{02..03}.tar"))
    with pytest.raises(ValueError, match="nothing matches"):
        find_tars(str(tmp_path / "z*.tar"))
    with pytest.raises(ValueError, match="no random access"):
        find_tars(str(tmp_path / "a.tar.gz"))
    with pytest.raises(ValueError, match="million|more than"):
        expand_braces("{0..999999999}.tar")
    (tmp_path / "loose.jpg").touch()
    with pytest.raises(ValueError, match="4 .tar shards and 1 loose image;"):
        find_tars(str(tmp_path))


def test_a_sample_is_its_only_image_and_other_members_are_passed_over(tmp_path):
    members = [("d/1.json", b"{}"), ("d/1.jpg", b"one"), ("d/2.cls", b"3"), ("d/2.JPEG", b"two"), ("d/3.txt", b"")]
    tar = write_tar(tmp_path / "a.tar", members)
    for _ in range(2):  # from the headers, then from the index
        index = open_index(tmp_path)
        assert [bytes(index.read(i)) for i in range(len(index))] == [b"one", b"two"]
        assert index.label(1) == f"{tar}!d/2.JPEG"
        assert index_shards(str(tmp_path)) == {str(tar): 2}


def test_which_of_several_images_is_asked_not_guessed(tmp_path, caplog):
    members = [("1.depth.png", b"far"), ("1.jpg", b"one"), ("2.depth.png", b"near"), ("2.jpg", b"two")]
    write_tar(tmp_path / "a.tar", [*members, ("3.JPG", b"three"), ("4.png", b"four"), ("5.raw", b"five")])
    for _ in range(2):  # from the headers, then from the index
        with pytest.raises(ValueError, match=r"2 images \(1.depth.png; 1.jpg\).* data.component=jpg") as caught:
            open_index(tmp_path)
        assert "\n" not in str(caught.value)
        for component, wanted in (
            ("jpg", [b"one", b"two", b"three"]),
            (".JPG", [b"one", b"two", b"three"]),
            ("jpg;png", [b"one", b"two", b"three", b"four"]),
            ("depth.png", [b"far", b"near"]),
            ("raw", [b"five"]),
        ):
            index = open_index(tmp_path, component=component)
            assert [bytes(index.read(i)) for i in range(len(index))] == wanted
        with pytest.raises(ValueError, match=r"no images in 1 shard \(extensions there: .*depth.png: 2"):
            open_index(tmp_path, component="webp")
        index_shards(str(tmp_path))
    assert "left out 2 samples without a component jpg" in caplog.text


def test_names_with_dots_are_not_dropped_as_one_sample(tmp_path):
    write_tar(tmp_path / "a.tar", [("shot.1.jpg", b"one"), ("shot.2.jpg", b"two"), ("b.cls", b"3")])
    with pytest.raises(ValueError, match=r"2 images.*data.component=\* to take each"):
        open_index(tmp_path)
    index = open_index(tmp_path, component="*")
    assert [bytes(index.read(i)) for i in range(len(index))] == [b"one", b"two"]


def test_a_photograph_with_masks(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [(f"{i}.{kind}", kind.encode()) for i in range(3) for kind in KINDS])
    with pytest.raises(ValueError, match=r"3 images \(0.jpg; 0.mask.png; 0.seg.png\).*data.component=jpg"):
        open_index(tmp_path)
    for kind in KINDS:
        index = open_index(tmp_path, component=kind.upper())
        assert [bytes(index.read(i)) for i in range(len(index))] == [kind.encode()] * 3


def test_an_index_that_lists_one_image_of_a_sample_does_not_choose_it(tmp_path, caplog):
    """As some writers make them, this package's earlier ones too."""
    tar = write_tar(tmp_path / "a.tar", [(f"{i}.{kind}", kind.encode()) for i in range(3) for kind in KINDS])
    write_index(str(tar), [sample[1:2] for sample in scan_tar(str(tar))])
    with pytest.raises(ValueError, match="a sample holds 3 images"):
        open_index(tmp_path)
    index = open_index(tmp_path, component="jpg")
    assert [bytes(index.read(i)) for i in range(len(index))] == [b"jpg"] * 3
    assert "1 of 1 shard without an index that fits" in caplog.text


def test_what_lies_beside_shards_is_said(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [("1.jpg", b"one")])
    (tmp_path / "more").mkdir(), (tmp_path / "b.tar.gz").touch(), (tmp_path / "notes.txt").touch()
    assert len(open_index(tmp_path)) == 1
    assert "2 folders and archives beside them left out: b.tar.gz; more;" in caplog.text


def test_links_in_a_tar_are_counted_and_named(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w:") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
        for name, kind in (("hard.jpg", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE), ("soft.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            archive.addfile(info)
    assert len(open_index(tmp_path)) == 1
    assert "left out 2 members" in caplog.text and "hard.jpg; soft.png" in caplog.text
    assert "--hard-dereference" in caplog.text


@pytest.mark.parametrize("layout", (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
def test_every_tar_format_and_any_name(tmp_path, layout):
    names = ["a b.jpg", "x/" * 30 + "deep.jpg"]
    names += ["写真 ñ.jpg", "l" * 180 + ".jpg"] if layout != tarfile.USTAR_FORMAT else []
    tar = write_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names], format=layout)
    for _ in range(2):  # from the headers, then from the index
        index = open_index(tmp_path)
        assert [bytes(index.read(i)).decode() for i in range(len(index))] == names
        assert [index.label(i) for i in range(len(index))] == [f"{tar}!{name}" for name in names]
        assert index_shards(str(tmp_path)) == {str(tar): len(names)}


def test_the_index_is_the_one_dali_reads(packed):
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    from nvidia.dali import fn, pipeline_def

    tars = find_tars(str(packed))

    @pipeline_def(batch_size=37, num_threads=1, device_id=None)
    def read():
        return fn.readers.webdataset(paths=tars, index_paths=[index_path(tar) for tar in tars], ext=["jpg"])

    (out,) = read().run()
    index = open_index(packed)
    assert [out.at(i).tobytes() for i in range(37)] == [bytes(index.read(i)) for i in range(37)]


def test_an_index_that_does_not_fit_is_not_used(tmp_path, caplog):
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"one"), ("2.jpg", b"two")])
    index_shards(str(tar))
    good = Path(index_path(str(tar))).read_text()
    assert [sample[0].name for sample in read_index(str(tar))] == ["1.jpg", "2.jpg"]
    for text in (
        "",
        "v9 2\n",
        good.replace(" 2\n", " 3\n", 1),
        good.replace(" 512 ", " 513 "),
        good.replace(" 512 ", " 9999872 "),
        good.replace(" 512 ", " -512 "),
        good.replace(" 3 1.jpg", " -3 1.jpg"),
        good.replace(" 3 1.jpg", " 99999999 1.jpg"),
        "\0" * 100,
    ):
        Path(index_path(str(tar))).write_text(text)
        assert read_index(str(tar)) is None, text
        assert len(open_index(tmp_path)) == 2
    assert "fastmim data index" in caplog.text
    Path(index_path(str(tar))).write_text(good)
    os.utime(index_path(str(tar)), (1, 1))  # older than the shard
    assert read_index(str(tar)) is None


# Untrusted archives.


def test_names_that_lead_out_are_labels_only_and_links_are_no_images(tmp_path, make):
    inside = make["encode"](Image.fromarray(make["smooth_rgb"](20, 20, 0)), "JPEG")
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(make["encode"](Image.fromarray(make["smooth_rgb"](20, 20, 1)), "JPEG"))
    shards = tmp_path / "shards"
    shards.mkdir()
    names = ["../secret.jpg", str(secret), "ok.jpg", "../../etc/x.jpg"]
    with tarfile.open(shards / "a.tar", "w:") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(inside)
            archive.addfile(info, io.BytesIO(inside))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"link{kind!r}.jpg")
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    before = sorted(tmp_path.rglob("*"))
    index = open_index(shards)
    assert [bytes(index.read(i)) for i in range(len(index))] == [inside] * 4
    assert sorted(tmp_path.rglob("*")) == before
    report = pack_images(shards, tmp_path / "out")
    assert report.images == 4 and {p.parent for p in (tmp_path / "out").iterdir()} == {tmp_path / "out"}


def test_what_is_no_plain_tar_is_one_line(tmp_path):
    with tarfile.open(tmp_path / "gz.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    (tmp_path / "text.tar").write_text("not a tar at all" * 100)
    write_tar(tmp_path / "none.tar", [("readme.txt", b"x")])
    for name, message in (("gz", "not an uncompressed tar"), ("text", "not an uncompressed"), ("none", "no images")):
        with pytest.raises(ValueError, match=message) as caught:
            open_index(tmp_path / f"{name}.tar")
        assert "\n" not in str(caught.value)


def test_a_shard_cut_short_loses_its_end_only(photos, packed, tmp_path, caplog):
    tar = find_tars(str(packed))[0]
    members = [sample[0] for sample in scan_tar(tar)]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(tar).read_bytes()[: members[2].offset + members[2].size // 2])
    usable, bad = check_images(tmp_path)
    assert usable == 2 and list(bad.values()) == ["the shard ends inside this member (truncated)"]
    assert "damaged" in caplog.text
    # a header whose size field lies: nothing of that size is allocated or read
    huge = tmp_path / "huge" / "a.tar"
    huge.parent.mkdir()
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 60
    huge.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024)
    assert check_images(huge.parent)[0] == 0


def test_damaged_archives_never_raise_anything_else(packed, tmp_path):
    rng = random.Random(0)
    whole = Path(find_tars(str(packed))[0]).read_bytes()
    path = tmp_path / "a.tar"
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 40)):
            data[rng.randrange(min(len(data), rng.choice((600, len(data)))))] = rng.randrange(256)
        path.write_bytes(bytes(data))
        try:
            index = open_shards(str(path), [str(path)])
        except ValueError as err:
            assert "a.tar" in str(err) and "\n" not in str(err)
            continue
        check_images(path)
        assert len(index) > 0


# Through the loaders.


@pytest.mark.parametrize("loader", ("torchvision", "dali"))
@pytest.mark.parametrize("workers", (0, 2))
def test_zoo_through_shards(zoo, tmp_path, loader, workers):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    names = sorted([*zoo.truth, *zoo.bad], key=os.fsencode)
    write_tar(tmp_path / "a.tar", [(name, (zoo.root / name).read_bytes()) for name in names[:6]])
    write_tar(tmp_path / "b.tar", [(name, (zoo.root / name).read_bytes()) for name in names[6:]])
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    options = {"verify": "none", "num_workers": workers, "loader": loader, "micro_batch_size": 5}
    with load(tmp_path, **options, **whole) as shards, load(zoo.root, **options, **whole) as folder:
        # bad files and their stand-ins are those of the folder
        assert same(list(shards.epoch(0)), list(folder.epoch(0)))
        found = {label.partition("!")[2]: reason for label, reason in shards.bad_files.items()}
    assert set(found) == set(zoo.bad) and all(zoo.bad[name] in reason for name, reason in found.items())


@pytest.mark.parametrize("kind", ("folder", "shards"))
@pytest.mark.parametrize("world", (1, 2, 4))
def test_an_epoch_is_every_file_once_in_the_stated_order(photos, packed, tmp_path, world, kind):
    # 32 files: the global batch of 8 divides them, so nothing is dropped
    for i in range(32):
        os.link(photos / f"{i:03d}.jpg", tmp_path / f"{i:03d}.jpg")
    path = tmp_path
    if kind == "shards":
        path = tmp_path / "shards"
        pack_images(tmp_path, path, shard_bytes=15_000)
    epochs = []
    for epoch in (0, 1):
        ranks = []
        for rank in range(world):
            with load(path, rank=rank, world_size=world, micro_batch_size=8 // world) as loader:
                assert (loader.steps_per_epoch, loader.num_images) == (4, 32)
                ranks.append([batch.sample_ids.tolist() for batch in loader.epoch(epoch)])
        epochs.append([i for step in zip(*ranks, strict=True) for part in step for i in part])
        assert sorted(epochs[-1]) == list(range(32))
    assert epochs[0] != epochs[1]
    with load(path, micro_batch_size=8) as alone:
        for epoch in (0, 1):
            assert torch.cat([batch.sample_ids for batch in alone.epoch(epoch)]).tolist() == epochs[epoch]


_READ = """
import sys, hashlib
from fastmim.data import build_loader
path, loader, start = sys.argv[1:]
with build_loader(path=path, img_size=(32, 32), micro_batch_size=4, num_workers=1, seed=5, loader=loader) as images:
    for i, batch in enumerate(images.epoch(1, start=int(start)), int(start)):
        digest = hashlib.sha256(batch.images.numpy().tobytes() + batch.sample_ids.numpy().tobytes())
        print(i, digest.hexdigest(), flush=True)
        if start == "0" and i == 5:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("loader", ("torchvision", "dali"))
def test_killed_and_resumed_gives_the_same_batches(packed, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}

    def lines(start: int) -> list[str]:
        command = [sys.executable, "-c", _READ, str(packed), loader, str(start)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return run.stdout.splitlines()

    killed, resumed = lines(0), lines(3)
    assert len(killed) == 6 and len(resumed) == 6
    assert killed[3:] == resumed[:3]


@pytest.mark.parametrize("loader", ("torchvision", "dali"))
def test_a_process_that_leaves_a_loader_open_ends(packed, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    code = (
        "import sys; from fastmim.data import build_loader\n"
        "options = dict(img_size=(32, 32), micro_batch_size=4, num_workers=1, loader=sys.argv[2])\n"
        "images = build_loader(path=sys.argv[1], **options)\n"
        "next(images.epoch(0))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(packed), loader], check=True, env=environment, timeout=600)
