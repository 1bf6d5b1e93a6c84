"""Samples as they are stored: any number of bands, no data, and what is done to them, against NumPy."""

from __future__ import annotations

import importlib.util
import inspect
import io
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from fastmim.config import Config, DataSection
from fastmim.data import build_loader, check_images, pack_images
from fastmim.data.arrays import MAX_SAMPLES
from fastmim.data.augment import Crop, View, apply_crop, check_views, draw_crop
from fastmim.data.decode import DecodeError, decode_image
from fastmim.data.order import augment_random
from fastmim.data.reading import KEYS, OPENING
from fastmim.data.source import open_index
from fastmim.data.survey import survey
from fastmim.data.worker import EncodedDataset
from fastmim.engine.train import run_identity
from fastmim.plan.own_facts import look

# Odd, and unequal: no axis can be taken for another. 14 bits: 8 would not hold them.
BANDS = np.random.default_rng(0).integers(0, 1 << 14, (13, 17, 23)).astype(np.uint16)
LAST = np.ascontiguousarray(BANDS.transpose(1, 2, 0))
FLOAT = {"pixels": "float32"}


def tiff(samples: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def npy(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, samples)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def bands(data: bytes, in_chans: int = 13, **options: object) -> np.ndarray:
    got = decode_image(data, in_chans=in_chans, pixels="float32", **options)
    assert got.dtype == torch.float32 and got.is_contiguous()
    return got.numpy()


GREY = {"photometric": "minisblack"}
STORED = {
    "one page, interleaved": tiff(LAST, planarconfig="contig", **GREY),
    "one page, in planes": tiff(BANDS, planarconfig="separate", **GREY),
    "a page a band": tiff(BANDS, **GREY),
    "tiles, deflate, predictor": tiff(LAST, planarconfig="contig", tile=(16, 16), compression="zlib", predictor=2),
    "planes of tiles": tiff(BANDS, planarconfig="separate", tile=(16, 16), compression="zlib", **GREY),
    "BigTIFF, big-endian": tiff(LAST, planarconfig="contig", bigtiff=True, byteorder=">", **GREY),
    "npy": npy(BANDS),
    "npy, bands last": npy(LAST),
    "npy, Fortran, big-endian": npy(np.asfortranarray(BANDS.astype(">u2"))),
    "npz": npz(image=LAST),
}


@pytest.mark.parametrize("kind", STORED)
def test_every_layout_gives_the_samples(kind):
    assert (bands(STORED[kind]) == BANDS).all()


def test_types_and_numbers_of_bands(make):
    for dtype in (np.uint8, np.int16, np.int32, np.float16, np.float32, np.float64):
        for count in (1, 2, 3, 4, 20):
            low = 0 if np.dtype(dtype).kind == "u" else -50
            truth = (np.arange(count * 99).reshape(count, 9, 11) % 100 + low).astype(dtype)
            for data in (npy(truth), tiff(truth, planarconfig="separate" if count > 1 else None, **GREY)):
                assert (bands(data, count) == truth).all()
    assert (bands(npy(BANDS[0]), 1) == BANDS[:1]).all()
    for channels, mode in ((1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")):
        levels = BANDS[:channels].astype(np.uint8)
        image = Image.fromarray(levels.transpose(1, 2, 0).squeeze(), mode)
        assert (bands(make["encode"](image, "PNG"), channels) == levels).all()


def test_which_array_and_which_axis():
    two = npz(image=BANDS, label=BANDS[:1])
    assert (bands(two, array="image") == BANDS).all()
    square = BANDS[:, :13, :13]
    assert (bands(npy(square), channel_order="first") == square).all()
    assert (bands(npy(square), channel_order="last") == square.transpose(2, 0, 1)).all()
    assert (bands(tiff(LAST, **GREY)) == BANDS).all()  # tifffile makes a page of every row of it


def pretended(samples: np.ndarray, shape: tuple[int, ...]) -> bytes:
    """An .npy whose header claims another shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": samples.dtype.str, "fortran_order": False, "shape": shape})
    return file.getvalue() + samples.tobytes()


def bomb() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", pretended(BANDS, (13, 1 << 15, 1 << 15)))
    return file.getvalue()


def spoilt(value: float) -> np.ndarray:
    samples = BANDS.astype(np.float32)
    samples[3, 4, 5] = value
    return samples


REFUSED = (
    (npy(BANDS[:12]), {}, r"array of shape 12x17x23: neither its first nor its last axis is model.in_chans=13"),
    (npy(BANDS[:12]), {"channel_order": "first"}, "has 12 bands, and model.in_chans=13"),
    (npy(BANDS[:, :13, :13]), {}, "either axis may be the bands; give data.channel_order=first or last"),
    (tiff(LAST[..., :4], planarconfig="contig", **GREY), {}, "has 4 bands, and model.in_chans=13"),
    (npy(spoilt(np.nan)), {}, "1 sample NaN or infinite; data.no_data=nan"),
    (npy(spoilt(np.nan)), {"no_data": 0}, "1 sample NaN or infinite$"),
    (npy(spoilt(np.inf)), {"no_data": "nan"}, "1 sample NaN or infinite"),
    (npy(BANDS.astype(np.float64) * 1e300), {}, "5,083 samples NaN or infinite"),
    (npy(np.full_like(BANDS, 7)), {"no_data": 7}, r"every sample is no data \(data.no_data=7\)"),
    (npz(image=BANDS, label=BANDS), {}, r"holds 2 arrays \(image, label\); say which with data.array"),
    (npz(image=BANDS), {"array": "img"}, r"no array named data.array=img \(there: image\)"),
    (npy(BANDS.astype(complex)), {}, "samples of type complex128: must be integers or floats"),
    (npy(np.array([object()])), {}, "samples of type object"),
    (npy(BANDS[None]), {}, "array of shape 1x13x17x23: must be rows x columns"),
    (pretended(BANDS, (13, 17, 24)), {}, "damaged: the array's bytes do not make 13x17x24"),
    (pretended(BANDS, (13, 17, 22)), {}, "damaged: the array's bytes do not make 13x17x22"),
    (pretended(BANDS, (13, 1 << 15, 1 << 15)), {}, f"are more than {MAX_SAMPLES}"),
    (bomb(), {}, f"are more than {MAX_SAMPLES}"),
    (pretended(BANDS, (13, -17, -23)), {}, "must be rows x columns"),
    (npz(image=BANDS)[:-30], {}, "damaged"),
    (tiff(LAST, planarconfig="contig", **GREY)[:-500], {}, "."),
    (tiff(LAST, planarconfig="contig", compression="zlib", **GREY)[:900], {}, "."),
    (npy(BANDS), {"min_size": 18}, "23x17 px is smaller than data.min_size=18"),
    (b"", {}, "empty file"),
    (b"II*\0" + bytes(30), {}, "damaged TIFF: it has no page"),
)


@pytest.mark.parametrize("data, options, reason", REFUSED)
def test_what_cannot_be_used_is_refused_in_one_line(data, options, reason):
    with pytest.raises(DecodeError, match=reason) as refusal:
        bands(data, **options)
    assert "\n" not in str(refusal.value)


def test_a_compression_that_tifffile_lacks():
    file = io.BytesIO()
    Image.fromarray(BANDS[0]).save(file, "TIFF", compression="tiff_lzw")
    if importlib.util.find_spec("imagecodecs"):
        assert (bands(file.getvalue(), 1) == BANDS[:1]).all()
    else:
        with pytest.raises(DecodeError, match=r"LZW.* requires the 'imagecodecs' package: .*\[bands\]"):
            bands(file.getvalue(), 1)


def test_pages_that_are_no_bands():
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(LAST, planarconfig="contig", subifds=0, **GREY)
        writer.write(LAST[::2, ::2], planarconfig="contig", subfiletype=1, **GREY)  # an overview, as GDAL's
        writer.write(LAST[..., 0] > 0, subfiletype=4, **GREY)  # and its mask, of one bit
    assert (bands(file.getvalue()) == BANDS).all()
    for second, reason in ((LAST[::2], "2 pages of different sizes"), (LAST, "2 pages of 13 bands each")):
        file = io.BytesIO()
        with tifffile.TiffWriter(file) as writer:
            for page in (LAST, second):
                writer.write(page, planarconfig="contig", **GREY)
        with pytest.raises(DecodeError, match=reason):
            bands(file.getvalue())


def test_no_data_is_nan_in_its_band_alone():
    mean, std = np.arange(13.0) * 50, np.arange(13.0) + 20
    for dtype, value in ((np.uint16, 7), (np.float32, -3.4028235e38), (np.float64, "nan")):
        stored, gaps = BANDS.astype(dtype), BANDS < 900
        stored[gaps] = np.nan if value == "nan" else value
        truth = (stored.astype(np.float64) - mean[:, None, None]) / std[:, None, None]
        got = bands(npy(stored), no_data=value, mean=mean, std=std)
        assert (np.isnan(got) == (gaps | (stored == value))).all()
        assert np.allclose(got[~np.isnan(got)], truth[~np.isnan(got)], rtol=1e-6, atol=1e-5)
    assert not np.isnan(bands(npy(BANDS), no_data=7.5)).any() and not np.isnan(bands(npy(BANDS), no_data=1e9)).any()


# Crops.


def weights(old: int, new: int) -> np.ndarray:
    """float64 (new, old): the triangle filter of an antialiased resize, by its definition."""
    scale = max(old / new, 1.0)
    centres = (np.arange(new) + 0.5) * old / new
    found = np.clip(1 - np.abs(np.arange(old) + 0.5 - centres[:, None]) / scale, 0, None)
    return found / found.sum(1, keepdims=True)


@pytest.mark.parametrize("size", ((9, 10), (40, 31)))
def test_a_resized_pixel_is_the_mean_of_what_is_there(size):
    values = BANDS.astype(np.float32) / 1000
    values[BANDS % 3 == 0] = np.nan
    values[2, 3:12, 5:15] = np.nan  # a hole, of which the middle stays
    box = values[:, 1:16, 2:22]
    rows, columns = weights(15, size[0]), weights(20, size[1])
    there = ~np.isnan(box)
    share = rows @ there @ columns.T
    truth = (rows @ np.where(there, box, 0).astype(np.float64) @ columns.T) / np.maximum(share, 1e-9)
    got = apply_crop(torch.from_numpy(values), Crop(1, 2, 15, 20, True), size, "bilinear").numpy()[..., ::-1]
    clear = np.abs(share - 0.5) > 1e-4
    assert (np.isnan(got) == (share < 0.5))[clear].all() and np.isnan(got).any() and clear.mean() > 0.9
    both = clear & (share > 0.5)
    assert np.allclose(got[both], truth[both], rtol=1e-5)


def test_quarter_turns():
    how = dict(scale=(0.3, 0.8), ratio=(1, 1), hflip=0.5)
    plain = [draw_crop(90, 70, **how, rng=augment_random(1, 0, i)) for i in range(400)]
    turned = [draw_crop(90, 70, **how, rot90=True, rng=augment_random(1, 0, i)) for i in range(400)]
    assert [crop[:5] for crop in turned] == [crop[:5] for crop in plain] and {crop.turns for crop in plain} == {0}
    assert all(70 < count < 130 for count in np.bincount([crop.turns for crop in turned]))
    image = torch.from_numpy(BANDS.astype(np.float32))
    for turns in range(4):
        got = apply_crop(image, Crop(2, 3, 12, 12, True, turns), (12, 12), "bilinear")
        truth = np.rot90(BANDS[:, 2:14, 3:15][..., ::-1], turns, (1, 2))
        assert np.allclose(got.numpy(), truth, rtol=1e-6)
    with pytest.raises(ValueError, match=r"data.rot90=true: needs square crops, not model.img_size=\[8, 16\]"):
        check_views([View((8, 16), rot90=True)])


# Orientation and what is behind transparent pixels, of 8 bits.


@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_heeded_where_asked_for(orientation):
    image = Image.fromarray(LAST[..., :3].astype(np.uint8))
    exif = Image.Exif()
    exif[274] = orientation
    files = [io.BytesIO() for _ in range(3)]
    for file, kind in zip(files, ("PNG", "TIFF", "WEBP"), strict=True):
        image.save(file, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    truth = np.asarray(ImageOps.exif_transpose(Image.open(files[0])))
    for file in files:
        stored = decode_image(file.getvalue())
        assert np.array_equal(stored.permute(1, 2, 0), image)
        for pixels in ("uint8", "float32"):
            got = decode_image(file.getvalue(), exif_orientation=True, pixels=pixels)
            assert np.array_equal(got.permute(1, 2, 0).numpy(), truth)


def test_another_decoder_gets_turned_jpegs_decoded(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(LAST[..., :3].astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    options = dict(views=[View((8, 8))], in_chans=3, seed=0, decoder="auto", train=True)
    as_stored = EncodedDataset(open_index(tmp_path), frozenset(), **options).encode(0)
    assert as_stored == ((tmp_path / "a.jpg").read_bytes(), 17, 23)
    data, *size = EncodedDataset(open_index(tmp_path), frozenset(), exif_orientation=True, **options).encode(0)
    turned = decode_image(as_stored[0]).numpy().transpose(1, 2, 0)[::-1].transpose(1, 0, 2)
    assert size == [23, 17] and (np.asarray(Image.open(io.BytesIO(data))) == turned).all()


def test_a_colour_behind_transparent_pixels(make):
    rng = np.random.default_rng(3)
    colour, alpha = rng.integers(0, 256, (9, 11, 3)).astype(np.uint8), rng.integers(0, 256, (9, 11, 1)).astype(np.uint8)
    under = np.array([0x10, 0x80, 0xF0])
    truth = np.rint((colour * (alpha / 255.0)) + under * (1 - alpha / 255.0))
    rgba = make["encode"](Image.fromarray(np.concatenate([colour, alpha], -1)), "PNG")
    got = decode_image(rgba, alpha="#1080f0").permute(1, 2, 0).numpy()
    assert np.abs(got - truth).max() <= 1 and (got == truth).mean() > 0.99
    grey = make["encode"](Image.fromarray(np.concatenate([colour[..., :1], alpha], -1), "LA"), "PNG")
    got = decode_image(grey, alpha="#1080f0").permute(1, 2, 0).numpy()
    assert np.abs(got - np.rint(colour[..., :1] * (alpha / 255.0) + under * (1 - alpha / 255.0))).max() <= 1
    luma = round(0.299 * 0x10 + 0.587 * 0x80 + 0.114 * 0xF0)
    got = decode_image(grey, in_chans=1, alpha="#1080f0").numpy()[0]
    assert np.abs(got - np.rint((colour[..., :1] * (alpha / 255.0) + luma * (1 - alpha / 255.0))[..., 0])).max() <= 1


# Sets of images.


@pytest.fixture
def folder(tmp_path):
    """Twelve images of 13 bands in six kinds of files, without data where a band is 0, and three that are bad."""
    rng = np.random.default_rng(5)
    for i in range(12):
        image = rng.integers(1, 9000, (13, 40, 44)).astype(np.uint16)
        image[:, : 2 * i, :9] = 0
        data = (tiff(image, **GREY), npy(image), npz(image=image))[i % 3]
        (tmp_path / f"{i:02d}.{('tif', 'npy', 'npz')[i % 3]}").write_bytes(data)
    (tmp_path / "few.npy").write_bytes(npy(BANDS[:4]))
    (tmp_path / "nan.npy").write_bytes(npy(np.full((13, 40, 44), np.nan, np.float32)))
    (tmp_path / "text.tif").write_bytes(b"not an image")
    return tmp_path


MEAN, STD = tuple(4000.0 + i for i in range(13)), tuple(2000.0 + i for i in range(13))
READING = dict(FLOAT, in_chans=13, no_data=0.0, mean=MEAN, std=STD)


def load(path, **options):
    how = dict(READING, path=path, img_size=(16, 16), micro_batch_size=4, num_workers=0, seed=5) | options
    return build_loader(**how)


def images_of(batch):
    return batch.views if hasattr(batch, "views") else [batch.images]


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.sample_ids, b.sample_ids)
        and all(torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
                for x, y in zip(images_of(a), images_of(b), strict=True))
        for a, b in zip(left, right, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize("views", (None, [View((16, 16), 2, (0.4, 1.0), rot90=True), View((8, 8), 3, (0.1, 0.4))]))
def test_the_loader_gives_the_crops_of_what_is_stored(folder, views):
    with load(folder, views=views, hflip=0.5) as loader:
        assert loader.num_images == 15
        batches = list(loader.epoch(0))
        assert {reason.split(",")[0] for reason in loader.bad_files.values()} == {
            "array of shape 4x17x23: neither its first nor its last axis is model.in_chans=13",
            "22",  # 22,880 samples NaN or infinite
            "not an image (it starts with b'not an image')",
        }
        tail = list(loader.epoch(0, start=1))
    index = open_index(folder, pixels="float32")
    assert len(index) == 15
    kinds = views or [View((16, 16))]
    for batch in batches:
        for place, (sample, file) in enumerate(zip(batch.sample_ids.tolist(), batch.files.tolist(), strict=True)):
            image = decode_image(index.read(file), **READING)
            rng = augment_random(5, 0, sample)
            for kind, got in zip(kinds, images_of(batch), strict=True):
                own = [got] if views is None else got
                for k in range(kind.count):
                    crop = draw_crop(40, 44, scale=kind.scale, ratio=kind.ratio, hflip=kind.hflip, rot90=kind.rot90,
                                     rng=rng)  # fmt: skip
                    truth = apply_crop(image, crop, kind.size, "bilinear")
                    assert torch.allclose(own[k][place], truth, rtol=0, atol=0, equal_nan=True)
    assert any(images.isnan().any() for batch in batches for images in images_of(batch))
    assert same(tail, batches[1:])
    with load(folder, views=views, hflip=0.5, num_workers=2, verify="none") as loader:
        assert same(list(loader.epoch(0)), batches)


def test_shards_of_arrays_are_the_folder(folder, tmp_path_factory):
    shards = tmp_path_factory.mktemp("packed") / "shards"
    report = pack_images(folder, shards, in_chans=13, no_data=0.0, **FLOAT)
    assert report.images == 12 and len(report.bad) == 3
    with load(folder, train=False, verify="full") as loose, load(shards, train=False) as packed:
        left = [image for batch in loose.epoch(0) for image in batch.images]
        right = [image for batch in packed.epoch(0) for image in batch.images]
    assert len(left) == 12
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(left, right, strict=True))
    with pytest.raises(ValueError, match="--short-side 16: makes JPEGs, which do not hold data.pixels=float32"):
        pack_images(folder, shards / "new", in_chans=13, short_side=16, **FLOAT)


def test_arrays_are_images_of_floats_alone(folder, caplog):
    (folder / "photo.png").write_bytes((folder / "text.tif").read_bytes())
    assert len(open_index(folder)) == 6 and len(open_index(folder, pixels="float32")) == 16
    assert "left out 10 images in a format that is not read (.npy: 6, .npz: 4)" in caplog.text
    assert "or set data.pixels=float32, which reads .npy and .npz" in caplog.text
    heads = look(open_index(folder, pixels="float32"), bands=READING)
    assert [tuple(head) for head in heads] == [(40, 44, False, False)] * 12
    usable, bad = check_images(folder, in_chans=13, no_data=0.0, **FLOAT)
    assert usable == 12 and {path.rpartition("/")[2] for path in bad} == {"few.npy", "nan.npy", "text.tif", "photo.png"}
    with pytest.raises(DecodeError, match="a NumPy array; data.pixels=float32 reads"):
        decode_image(npy(BANDS[:3]))
    with pytest.raises(DecodeError, match="TIFF with 13 uint16 samples a pixel.* data.pixels=float32"):
        decode_image(STORED["one page, interleaved"])


def test_what_cannot_be_loaded_is_said_in_one_line(folder):
    for options, message in (
        (dict(loader="dali"), "data.loader=dali: "),
        (dict(pixels="uint8", no_data=None), "model.in_chans=13: image files give 1 .* set data.pixels=float32"),
        (dict(value_range=(0, 9)), "data.value_range=.*: not with data.pixels=float32"),
        (dict(rot90=True, img_size=(8, 16)), "data.rot90=true: needs square crops"),
        (dict(views=[View((8, 8), auto_augment="rand-m9")], in_chans=3), "is for 8-bit colours, not data.pixels="),
        (dict(in_chans=12, verify="full"), "15 of 15 files cannot be used .* last axis is model.in_chans=12"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            load(folder, **({"verify": "none"} | options))
        assert "\n" not in str(refusal.value)


def test_noise_of_any_number_of_bands():
    for pixels, dtype in (("float32", torch.float32), ("uint8", torch.uint8)):
        how = dict(img_size=(8, 8), in_chans=13, micro_batch_size=4, loader="synthetic", pixels=pixels)
        batch = next(build_loader(**how).epoch(0))
        assert batch.images.shape == (4, 13, 8, 8) and batch.images.dtype == dtype


def test_one_list_says_how_images_are_read(photos):
    fields, known = set(DataSection.model_fields), set(inspect.signature(decode_image).parameters)
    assert set(KEYS) <= fields & known and set(OPENING) <= fields & set(inspect.signature(open_index).parameters)
    with pytest.raises(TypeError, match="unknown arguments: no_date"):
        build_loader(path=photos, img_size=(8, 8), micro_batch_size=1, no_date=0)
    # A run that reads otherwise is another run, and one of before these keys is the same.
    own = {"pixels": "float32", "mean": (2.0,), "std": (3.0,)}
    changes = {"no_data": 0.0, "rot90": True, "exif_orientation": True, "array": "x", "channel_order": "last"}
    plain, base = (run_identity(Config(data=data), 8, None) for data in ({}, own))
    assert base != plain and not {f"data.{key}" for key in (*changes, "pixels")} & set(plain)
    for key, value in changes.items():
        assert run_identity(Config(data=own | {key: value}), 8, None) == base | {f"data.{key}": value}


def test_gdals_no_data_is_told_of(tmp_path):
    tag = [(42113, "s", 0, "-9999", True)]
    for name in ("a", "b"):
        (tmp_path / f"{name}.tif").write_bytes(tiff(LAST, planarconfig="contig", extratags=tag, **GREY))
    index = open_index(tmp_path)
    (line,) = survey(index, {}, in_chans=13, **FLOAT)
    assert line.startswith("2 of the images looked at state -9999 as the value of no data; give data.no_data=-9999")
    assert survey(index, {}, in_chans=13, no_data=-9999.0, **FLOAT) == []
