"""DALI: the same graph for CPU and GPU, the same boxes and files as torchvision, restarts, bad files, pixels."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import Loader, MultiBatch, View, build_loader, check_images
from fastmim.data.dali import DaliLoader, build_pipeline, regions_of
from fastmim.data.decode import decode_image

pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")

#: Bounds in levels of 255, from PIL on the same box; stated in the README. DALI repeats the pixels at the edge of the
#: box where PIL leaves them out of the mean: that reaches two rows in, and four with bicubic's wider filter.
INTERIOR, EDGE_ROWS, EDGE = {"bilinear": 1, "bicubic": 8}, 4, 24


def load(path, **kwargs) -> Loader:
    options = {"path": path, "img_size": (32, 32), "micro_batch_size": 4, "num_workers": 0, "seed": 5, "loader": "dali"}
    return build_loader(**(options | kwargs))


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.sample_ids, b.sample_ids)
        for a, b in zip(left, right, strict=True)
    )


# Pixels.


def one_box(path: Path, box: tuple[int, int, int, int], view: View, flip: bool) -> torch.Tensor:
    """(C, h, w) that DALI makes of one box (top, left, height, width) of one file."""
    pipeline = build_pipeline([view], batch_size=1, num_threads=1, device_id=None, on_gpu=False)
    for _ in range(2):
        pipeline.feed_input("data", [np.fromfile(path, np.uint8)])
        pipeline.feed_input("region", [np.array(box, np.int32)])
        pipeline.feed_input("crops", [np.array([[0, 0, *box[2:], flip]], np.int32)])
    (out,) = pipeline.run()
    return torch.from_numpy(np.array(out.as_array()))[0]


@pytest.mark.parametrize("interpolation", ("bilinear", "bicubic"))
@pytest.mark.parametrize(
    ("box", "size"),
    (
        ((7, 11, 203, 171), (96, 96)),  # smaller, odd edges
        ((0, 0, 240, 320), (96, 128)),  # the whole image, no square
        ((100, 100, 60, 50), (96, 96)),  # enlarged
    ),
)
def test_pixels_against_pil(tmp_path, interpolation, box, size):
    photograph = pytest.importorskip("skimage.data").astronaut()[:240, 60:380]
    path = tmp_path / "a.jpg"
    Image.fromarray(photograph).save(path, quality=90)
    top, left, height, width = box
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    cut = Image.open(path).crop((left, top, left + width, top + height)).resize(size[::-1], filters[interpolation])
    truth = np.asarray(cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).astype(int)
    ours = one_box(path, box, View(size, interpolation=interpolation), True).permute(1, 2, 0).numpy().astype(int)
    error = np.abs(ours - truth)
    inner = error[EDGE_ROWS:-EDGE_ROWS, EDGE_ROWS:-EDGE_ROWS]
    assert inner.max() <= INTERIOR[interpolation]
    assert error.max() <= EDGE and error.mean() < 0.5


@pytest.mark.parametrize("subsampling", (0, 2))
def test_decoding_is_pils(tmp_path, subsampling):
    # a box that keeps its size: what is left is the decoding, its region and the flip
    photograph = pytest.importorskip("skimage.data").astronaut()[:240, 60:380]
    path = tmp_path / "a.jpg"
    Image.fromarray(photograph).save(path, quality=90, subsampling=subsampling)
    truth = np.asarray(Image.open(path))[7:210, 11:182][:, ::-1]
    ours = one_box(path, (7, 11, 203, 171), View((203, 171)), True)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), truth)


def test_both_loaders_cut_the_same_boxes_for_the_same_ids(photos):
    with load(photos) as dali, load(photos, loader="torchvision") as torchvision:
        assert dali.fingerprint == torchvision.fingerprint
        for a, b in zip(dali.epoch(1), torchvision.epoch(1), strict=True):
            assert torch.equal(a.sample_ids, b.sample_ids)
            # smooth images: another box or flip would show as tens of levels
            assert (a.images.int() - b.images.int()).abs().max() <= 6


@pytest.mark.parametrize(
    "views",
    (
        (View((32, 32)),),
        (View((32, 24), scale=(0.2, 1.0), interpolation="bicubic"),),
        (
            View((32, 32), 2, (0.25, 1.0), interpolation="bicubic"),
            View((16, 16), 3, (0.05, 0.25), interpolation="bicubic"),
        ),
    ),
    ids=("simmim", "mae", "ibot"),
)
def test_every_augmentation_has_one_description(photos, views):
    with load(photos, views=views) as dali, load(photos, views=views, loader="torchvision") as torchvision:
        for a, b in zip(dali.epoch(0), torchvision.epoch(0), strict=True):
            if len(views) == 1:
                assert (a.images.int() - b.images.int()).abs().max() <= 12
                continue
            assert isinstance(a, MultiBatch) and torch.equal(a.crops, b.crops)
            assert [v.shape for v in a.views] == [(2, 4, 3, 32, 32), (3, 4, 3, 16, 16)]
            for x, y in zip(a.views, b.views, strict=True):
                assert (x.int() - y.int()).abs().max() <= 16
    if len(views) == 2:
        areas = a.crops[..., 2] * a.crops[..., 3]
        assert areas[:2].min() > areas[2:].max()  # global crops above the split, local ones below


def test_the_region_holds_every_crop():
    crops = np.array([[[5, 6, 10, 20, 1]], [[2, 9, 4, 30, 0]]], np.int32)  # (2 crops, 1 image, 5)
    regions, relative = regions_of(crops)
    assert regions.tolist() == [[2, 6, 13, 33]]
    assert relative.tolist() == [[[3, 0, 10, 20, 1], [0, 3, 4, 30, 0]]]


# Restart and ranks.


@pytest.mark.parametrize("workers", (0, 2))
def test_restart_gives_the_tail_bit_for_bit(photos, workers):
    with load(photos) as loader:
        assert isinstance(loader, DaliLoader)
        reference = {epoch: list(loader.epoch(epoch)) for epoch in (0, 1)}
    with load(photos, num_workers=workers) as loader:
        for epoch, start in ((1, 0), (1, 4), (0, 7), (0, 9)):
            assert same(list(loader.epoch(epoch, start=start)), reference[epoch][start:])
        taken = loader.epoch(0)
        assert same([next(taken) for _ in range(5)], reference[0][:5])
        assert same(list(loader.epoch(0, start=5)), reference[0][5:])
        assert same(list(loader.epoch(1)), reference[1])


def test_handed_out_batches_are_not_written_over(photos):
    with load(photos) as loader:
        kept = [(batch.images, batch.images.clone()) for batch in loader.epoch(0)]
    assert all(torch.equal(a, b) for a, b in kept)


@pytest.mark.parametrize("in_chans", (1, 3))
def test_shapes_and_types(photos, in_chans):
    with load(photos, img_size=(24, 40), in_chans=in_chans) as loader:
        batch = next(loader.epoch(0))
    assert batch.images.shape == (4, in_chans, 24, 40) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous() and batch.sample_ids.dtype == torch.int64


# Bad and unusual files.


@pytest.mark.parametrize("verify", ("auto", "none"))
def test_zoo(zoo, verify):
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    with load(zoo.root, micro_batch_size=5, verify=verify, **whole) as loader:
        names = [os.path.relpath(loader.index.path(i), zoo.root) for i in range(15)]
        batches = list(loader.epoch(0))
        bad = {os.path.relpath(path, zoo.root): reason for path, reason in loader.bad_files.items()}
    assert set(bad) == set(zoo.bad) and all(zoo.bad[name] in reason for name, reason in bad.items())
    seen = []
    for batch in batches:
        for image, sample_id in zip(batch.images, batch.sample_ids.tolist(), strict=True):
            pixels = image.permute(1, 2, 0).numpy().astype(int)
            fits = [n for n, (truth, bound) in zoo.truth.items() if np.abs(pixels - truth).max() <= bound]
            assert len(fits) == 1 and (names[sample_id] in zoo.bad or fits == [names[sample_id]])
            seen.append(sample_id)
    assert sorted(seen) == list(range(15))


def test_what_only_decoding_shows_is_found_named_and_replaced(photos, tmp_path, monkeypatch):
    rebuilt = []
    genuine = DaliLoader._find_culprits
    monkeypatch.setattr(DaliLoader, "_find_culprits", lambda *a: rebuilt.append(1) or genuine(*a))
    # DALI itself fails on these: their header and end look whole, so no check of ours stops them before.
    data = (photos / "003.jpg").read_bytes()
    for i in range(16):
        (tmp_path / f"{i:02d}.jpg").write_bytes((photos / f"{i:03d}.jpg").read_bytes())
    tables = data.index(b"\xff\xc4")  # a Huffman table of impossible length codes
    (tmp_path / "03.jpg").write_bytes(data[: tables + 5] + b"\xff" * 16 + data[tables + 21 :])
    with pytest.raises(ValueError):
        decode_image((tmp_path / "03.jpg").read_bytes())
    runs = []
    for loader_name in ("dali", "torchvision"):
        with load(tmp_path, loader=loader_name, verify="none") as loader:
            runs.append([batch for epoch in range(2) for batch in loader.epoch(epoch)])
            assert [os.path.basename(path) for path in loader.bad_files] == ["03.jpg"]
    assert len(rebuilt) == 1  # known from then on
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert (a.images.int() - b.images.int()).abs().max() <= 6


def test_huge_images_are_refused_before_they_are_decoded(photos, tmp_path):
    data = (photos / "003.jpg").read_bytes()
    for i in range(8):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    frame = data.index(b"\xff\xc0")
    bomb = data[: frame + 5] + b"\xff\xff\xff\xff" + data[frame + 9 :]  # 65535 x 65535 px
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    with load(tmp_path, verify="none", micro_batch_size=3) as loader:
        assert len(list(loader.epoch(0))) == 3
        ((path, reason),) = loader.bad_files.items()
    assert path.endswith("bomb.jpg") and "65535x65535 px is more than" in reason


def test_adobe_rgb_and_cmyk_jpegs_have_the_same_pixels_in_both_loaders(photos, tmp_path, make):
    for i in range(4):
        rgb = Image.fromarray(make["smooth_rgb"](40, 40, i))
        rgb.convert("CMYK").save(tmp_path / f"{i}.jpg", quality=95)
        rgb.save(tmp_path / f"{i}k.jpg", quality=95, keep_rgb=True)  # three components that are no YCbCr
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "img_size": (40, 40)}
    with load(tmp_path, **whole) as dali, load(tmp_path, loader="torchvision", **whole) as torchvision:
        assert same(list(dali.epoch(0)), list(torchvision.epoch(0)))
        assert not dali.bad_files


def test_what_only_dali_refuses_is_decoded_on_the_host(photos, monkeypatch):
    with load(photos) as loader:
        reference = list(loader.epoch(0))
    with load(photos) as loader:
        files = loader._dataset
        genuine, victim = type(files).encode, 7

        def encode(self, file, *, as_is=True):
            out = genuine(self, file, as_is=as_is)
            return (bytearray(b"\xff\xd8\xff"), *out[1:]) if file == victim and as_is else out

        monkeypatch.setattr(type(files), "encode", encode)
        batches = list(loader.epoch(0))
        assert not loader.bad_files
    assert same(batches, reference)


def test_which_jpegs_with_flipped_bits_are_bad(photos, tmp_path):
    # The rule: torchvision's verdict, wherever it is asked (data.verify, `fastmim data check`), binds both loaders.
    # Not asked, DALI uses what it can decode: some damaged files that torchvision refuses, and all that it takes.
    chance = random.Random(0)
    for i in range(60):
        data = bytearray((photos / f"{i % 37:03d}.jpg").read_bytes())
        if i % 2:
            for _ in range(4):
                data[chance.randrange(2, len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / f"{i:03d}.jpg").write_bytes(data)
    bad: dict[tuple[str, str], set[str]] = {}
    ids: dict[tuple[str, str], list[torch.Tensor]] = {}
    for loader in ("torchvision", "dali"):
        for verify in ("full", "none"):
            with load(tmp_path, loader=loader, verify=verify, num_workers=1, max_bad_fraction=1.0) as images:
                batches = [batch for epoch in range(3) for batch in images.epoch(epoch)]
                bad[loader, verify] = set(images.bad_files)
                ids[loader, verify] = [batch.sample_ids for batch in batches]
    truth = set(check_images(tmp_path)[1])
    assert 3 < len(truth) < 30 and all(int(Path(name).stem) % 2 for name in truth)
    assert bad["torchvision", "full"] == bad["dali", "full"] == truth
    assert bad["dali", "none"] <= bad["torchvision", "none"] <= truth
    assert len({tuple(torch.cat(each).tolist()) for each in ids.values()}) == 1


def test_mostly_bad_data_stops_the_run(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.jpg").write_text("no image")
    with load(tmp_path, verify="none", max_bad_fraction=0.1) as loader, pytest.raises(ValueError, match="of 40 files"):
        list(loader.epoch(0))


# The graph.


def operators(on_gpu: bool) -> list[tuple[str, str, str]]:
    """(operator, device of its first input, of its output) of a graph that was built and serialised, not run."""
    views = (View((64, 64), 2, (0.25, 1.0)), View((96, 96), 2, (0.05, 0.25)))
    pipeline = build_pipeline(views, batch_size=4, num_threads=1, device_id=None, on_gpu=on_gpu)
    pipeline._build_graph()
    graph = pipeline.serialize()
    for name in (b"ImageSlice", b"Resize", b"CropMirrorNormalize"):
        assert name in graph
    found = []
    for op in pipeline._ops:
        spec = op.spec
        takes = spec.InputDevice(0) if spec.NumInput() else ""
        found.append((op.name.strip("_").rstrip("0123456789").rstrip("_"), str(takes), str(spec.OutputDevice(0))))
    return found


def test_the_gpu_graph_differs_in_devices_only():
    cpu, gpu = operators(False), operators(True)
    assert [name for name, *_ in cpu] == [name for name, *_ in gpu]
    assert {device.lower().rpartition(".")[2] for _, *devices in cpu for device in devices} <= {"", "cpu"}
    by_name = {name: [d.lower().rpartition(".")[2] for d in devices] for name, *devices in gpu}
    assert by_name["ImageSlice"] == ["cpu", "gpu"]  # mixed: bytes on the host, pixels on the device
    for name in ("Slice", "Resize", "CropMirrorNormalize"):
        assert by_name[name] == ["gpu", "gpu"], name
    assert by_name["data"] == ["", "cpu"]


def test_a_wrong_device_is_caught_without_a_gpu():
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def wrong():
        return fn.resize(fn.external_source(name="x", ndim=3), size=[2, 2], nonsense=1)

    with pytest.raises(Exception, match="nonsense"):
        wrong()


def test_without_dali_the_message_says_how_to_get_it(photos, monkeypatch):
    from fastmim.data import dali

    monkeypatch.setattr(dali, "have_dali", lambda: False)
    with pytest.raises(ValueError, match=r"data.loader=dali: DALI is not installed: .*pip install") as caught:
        load(photos)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="in_chans=4"):
        monkeypatch.undo()
        load(photos, in_chans=4)


@pytest.mark.cuda
@pytest.mark.parametrize("workers", (0, 2))
def test_cuda_batches_are_those_of_the_cpu(photos, workers):
    # nvJPEG's inverse transform and chroma upsampling round differently: a few levels on smooth images
    with load(photos, device="cuda", num_workers=workers) as gpu, load(photos) as cpu:
        for a, b in zip(gpu.epoch(0), cpu.epoch(0), strict=True):
            assert a.images.is_cuda and torch.equal(a.sample_ids.cpu(), b.sample_ids)
            assert (a.images.cpu().int() - b.images.int()).abs().float().mean() < 1.5


@pytest.mark.cuda
def test_cuda_restart_and_zoo(photos, zoo):
    with load(photos, device="cuda") as loader:
        whole = list(loader.epoch(0))
        assert same(list(loader.epoch(0, start=4)), whole[4:])
    with load(zoo.root, device="cuda", verify="none") as loader:
        list(loader.epoch(0)), list(loader.epoch(1))
        assert {os.path.relpath(path, zoo.root) for path in loader.bad_files} <= set(zoo.bad)
