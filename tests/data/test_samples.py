"""Ranges of values, alpha, fourth bands and orientation, against arithmetic on the arrays that were written."""

from __future__ import annotations

import io
from itertools import product

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from fastmim.data import build_loader, check_images, pack_images
from fastmim.data.decode import DecodeError, decode_image
from fastmim.data.source import open_index
from fastmim.data.survey import survey

TWELVE = np.random.default_rng(0).integers(0, 4096, (17, 23, 3)).astype(np.uint16)  # odd edges: no whole tile
EIGHT = (TWELVE >> 4).astype(np.uint8)


def tiff(samples: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, **options)
    return file.getvalue()


def levels(samples: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.rint(((samples.astype(np.float64) - low) * 255 / (high - low)).clip(0, 255)).astype(int)


def pixels(data: bytes, in_chans: int = 3, **options: object) -> np.ndarray:
    got = decode_image(data, in_chans=in_chans, **options)
    assert got.dtype == torch.uint8 and got.shape[0] == in_chans
    return got.permute(1, 2, 0).numpy().astype(int)


# Range.


@pytest.mark.parametrize("loader", ("auto", "pil"))
def test_twelve_bits_in_sixteen_keep_256_levels(make, loader):
    grey, ramp = TWELVE[..., 0], np.arange(4096, dtype=np.uint16).reshape(64, 64)
    files = [make["encode_png"](TWELVE, bits=16, colour=2), make["encode"](Image.fromarray(grey), "PNG")]
    files += [tiff(TWELVE, photometric="rgb"), tiff(grey)]
    files.append(b"P6\n23 17\n65535\n" + TWELVE.astype(">u2").tobytes())
    for data, truth in zip(files, (TWELVE, grey, TWELVE, grey, TWELVE), strict=True):
        options = {"in_chans": 3 if truth.ndim == 3 else 1, "loader": loader}
        truth = truth.reshape(17, 23, -1)
        assert (pixels(data, value_range=(0, 4095), **options) == levels(truth, 0, 4095)).all()
        assert (pixels(data, **options) == truth >> 8).all()
    assert len(np.unique(pixels(tiff(ramp), 1, value_range=(0, 4095)))) == 256


@pytest.mark.parametrize("order, big", (("<", False), (">", False), ("<", True)))
@pytest.mark.parametrize("compression", (None, "zlib"))
@pytest.mark.parametrize("tile", (None, (16, 16)))
def test_every_layout_of_a_deep_tiff(order, compression, tile, big):
    options = {"byteorder": order, "compression": compression, "tile": tile, "bigtiff": big, "photometric": "rgb"}
    assert (pixels(tiff(TWELVE, **options), value_range=(0, 4095)) == levels(TWELVE, 0, 4095)).all()
    band = np.concatenate([TWELVE, TWELVE[..., :1] // 3], -1)
    data = tiff(band, extrasamples=["unspecified"], **options)
    assert (pixels(data, 4, value_range=(0, 4095)) == levels(band, 0, 4095)).all()


@pytest.mark.parametrize(
    "kind, low, high, order",
    (("i2", -1024, 3071, "<"), ("i2", -1024, 3071, ">"), ("i4", -1024, 3071, "<"), ("u4", 0, 4095, "<"),
     ("f4", -0.5, 2, "<"), ("f4", -0.5, 2, ">")),
)  # fmt: skip
def test_types_without_a_range_need_one(kind, low, high, order):
    values = (TWELVE[..., 0] / 4095 * (high - low) + low).astype(kind)
    data = tiff(values, byteorder=order)
    with pytest.raises(DecodeError, match=r"data.value_range=\[low, high\]"):
        decode_image(data)
    assert np.abs(pixels(data, 1, value_range=(low, high))[..., 0] - levels(values, low, high)).max() <= (kind == "f4")


def test_signed_bytes_are_signed():
    values = (TWELVE[..., 0] >> 4).astype(np.uint8).view(np.int8)
    assert (pixels(tiff(values), 1, value_range=(-128, 127))[..., 0] == values.astype(int) + 128).all()
    with pytest.raises(DecodeError, match="value_range"):
        decode_image(tiff(values))


@pytest.mark.parametrize("bits", (10, 12, 14, 15))
def test_the_range_that_a_warning_names_is_that_of_the_bits(tmp_path, caplog, bits):
    for number in range(3):
        values = np.random.default_rng(number).integers(0, 2**bits, (16, 16)).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    assert check_images(tmp_path, in_chans=1) == (3, {})
    # of 15 bits the upper half is empty, as in a dark picture
    assert (f"data.value_range=[0, {2**bits - 1}]" in caplog.text) == (bits < 15)


def test_one_bright_picture_does_not_hide_many_of_twelve_bits(tmp_path, caplog):
    for number in range(9):
        Image.fromarray(TWELVE[..., 0] * np.uint16(16 if number < 4 else 1)).save(tmp_path / f"{number}.png")
    check_images(tmp_path, in_chans=1)
    assert "5 of 9 such images" in caplog.text and "[0, 4095] and keep the others apart" in caplog.text
    caplog.clear()
    (tmp_path / "8.png").unlink(), (tmp_path / "7.png").unlink()
    check_images(tmp_path, in_chans=1)
    assert not caplog.text


def test_floats_of_a_stated_range():
    share = TWELVE[..., 0].astype(np.float32) / 4095
    for low, high in ((0, 1), (0, 65535), (-1, 1)):
        data = tiff((share * (high - low) + low).astype(np.float32))
        assert np.abs(pixels(data, 1, value_range=(low, high))[..., 0] - levels(share, 0, 1)).max() <= 1
    for kind in ("f2", "f8"):
        values = share.astype(kind)
        with pytest.raises(DecodeError, match=f"TIFF with 1 {values.dtype} sample a pixel.*or 1 of float32"):
            decode_image(tiff(values), value_range=(0, 1))


def test_unsigned_numbers_of_32_bits_are_not_taken_for_signed_ones():
    values = TWELVE[..., 0].astype(np.uint32) << 20
    assert (pixels(tiff(values), 1, value_range=(0, 2**32 - 1))[..., 0] == levels(values, 0, 2**32 - 1)).all()


def test_values_outside_are_clipped_and_types_that_end_below_are_refused(make):
    assert (pixels(tiff(TWELVE, photometric="rgb"), value_range=(1000, 2000)) == levels(TWELVE, 1000, 2000)).all()
    jpeg = make["encode"](Image.fromarray(EIGHT), "JPEG")
    with pytest.raises(DecodeError, match="8-bit samples end at 255, below the 4095 of data.value_range"):
        decode_image(jpeg, value_range=(0, 4095))
    nan = np.full((9, 9), np.nan, np.float32)
    with pytest.raises(DecodeError, match="not finite"):
        decode_image(tiff(nan), value_range=(0, 1))


def test_a_range_that_the_file_states_is_kept():
    grey = TWELVE[..., 0]
    data = b"P5\n23 17\n4095\n" + grey.astype(">u2").tobytes()
    for options in ({}, {"value_range": (0, 4095)}):
        assert np.abs(pixels(data, 1, **options)[..., 0] - levels(grey, 0, 4095)).max() <= 1


@pytest.mark.parametrize("wrong", ((1, 1), (5, 2), (0, float("nan")), (1, 2, 3)))
def test_what_is_no_range_is_one_line(wrong):
    with pytest.raises(ValueError, match="data.value_range="):
        decode_image(b"x", value_range=wrong)
    with pytest.raises(ValueError, match="data.alpha=pink: expected one of"):
        decode_image(b"x", alpha="pink")


def test_deep_samples_in_separate_planes_are_refused_not_misread():
    planes = TWELVE.transpose(2, 0, 1).copy()
    for compression in (None, "zlib"):
        data = tiff(planes, photometric="rgb", planarconfig="separate", compression=compression)
        with pytest.raises(DecodeError, match="interleaved"):
            decode_image(data)


# Alpha and fourth bands.


def over(colour: np.ndarray, alpha: np.ndarray, background: int) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(colour * share + background * (1 - share)).astype(int)


@pytest.mark.parametrize("loader", ("auto", "pil"))
@pytest.mark.parametrize("name, background", (("white", 255), ("black", 0)))
def test_what_is_under_transparent_pixels_does_not_show(make, loader, name, background):
    rng = np.random.default_rng(1)
    alpha = rng.choice(np.array([0, 255, 100], np.uint8), EIGHT.shape[:2])
    rgba = Image.fromarray(np.dstack([EIGHT, alpha]))
    files = [make["encode"](rgba, fmt, **more) for fmt, more in (("PNG", {}), ("TIFF", {}), ("TGA", {}))]
    files.append(make["encode"](rgba, "WEBP", lossless=True, exact=True))
    files.append(make["encode_png"](np.dstack([EIGHT, alpha]).astype(int) * 257, bits=16, colour=6))
    for data in files:
        assert np.abs(pixels(data, loader=loader, alpha=name) - over(EIGHT, alpha, background)).max() <= 1
        assert (pixels(data, loader=loader, alpha="drop") == EIGHT).all()
        assert (pixels(data, 4, loader=loader) == np.dstack([EIGHT, alpha])).all()


@pytest.mark.parametrize("loader", ("auto", "pil"))
def test_a_colour_that_a_png_calls_transparent(make, loader):
    for bits, colour, samples in ((8, 2, EIGHT), (16, 2, TWELVE), (16, 0, TWELVE[..., 0])):
        samples = samples.astype(int)
        key = samples[3, 4]
        trns = np.atleast_1d(key).astype(">u2").tobytes()
        data = make["encode_png"](samples, bits=bits, colour=colour, trns=trns)
        hit = (samples.reshape(17, 23, -1) == key).all(-1)
        truth = (samples.reshape(17, 23, -1) >> (bits - 8)).repeat(3 if colour == 0 else 1, -1)
        assert (pixels(data, loader=loader) == np.where(hit[..., None], 255, truth)).all()
        assert (pixels(data, 4, loader=loader)[..., 3] == np.where(hit, 0, 255)).all()


def test_transparent_gif_shows_its_first_frame_over_white():
    frames = [Image.new("P", (20, 10), colour) for colour in (1, 2)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    frames[0].paste(0, (0, 0, 10, 10))
    file = io.BytesIO()
    frames[0].save(file, "GIF", transparency=0, save_all=True, append_images=frames[1:])
    got = pixels(file.getvalue())
    assert (got[:, :10] == 255).all() and (got[:, 10:] == [0, 255, 0]).all()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", ("unspecified", "assocalpha", "unassalpha"))
def test_the_fourth_samples_of_a_tiff_are_kept_as_stored(kind, order):
    band = np.dstack([EIGHT // 2, 255 - EIGHT[..., 0]])
    data = tiff(band, photometric="rgb", extrasamples=[kind], byteorder=order)
    assert (pixels(data, 4) == band).all()
    if kind == "unspecified":  # a band hides nothing
        assert (pixels(data) == band[..., :3]).all()
    if kind == "assocalpha":
        assert (pixels(data) == (band[..., :3].astype(int) + 255 - band[..., 3:]).clip(0, 255)).all()
    planes = tiff(band.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate", extrasamples=[kind])
    assert (pixels(planes, 4) == band).all()


@pytest.mark.parametrize("order, big", (("<", False), (">", False), ("<", True)))  # PIL reads no other
@pytest.mark.parametrize("compression, tile", ((None, None), ("zlib", None), ("zlib", (16, 16))))
@pytest.mark.parametrize("kind", (np.uint8, np.uint16))
def test_bands_that_are_called_grey_and_extra_ones_are_read(order, big, compression, tile, kind, capfd):
    """As GDAL writes deep ones: PHOTOMETRIC=MINISBLACK, all bands but the first unspecified."""
    bands = np.dstack([TWELVE, TWELVE[::-1, :, :1]]).astype(kind)
    options = {"byteorder": order, "bigtiff": big, "compression": compression, "tile": tile}
    stated = {"value_range": (0, 4095)} if kind is np.uint16 else {}
    truth = levels(bands, 0, 4095) if stated else bands
    four = tiff(bands, photometric="minisblack", planarconfig="contig", **options)
    assert (pixels(four, 4, **stated) == truth).all()
    assert (pixels(four, 3, **stated) == truth[..., :3]).all()
    three = tiff(bands[..., :3].copy(), photometric="minisblack", planarconfig="contig", **options)
    assert (pixels(three, 3, **stated) == truth[..., :3]).all()
    assert (pixels(three, 4, **stated)[..., 3] == 255).all()
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_byte_order_that_is_not_read_is_not_called_damage():
    with pytest.raises(DecodeError, match="BigTIFF in big-endian byte order: not a kind that is read"):
        decode_image(tiff(EIGHT, photometric="rgb", byteorder=">", bigtiff=True))


def test_ink_is_no_fourth_channel(make, tmp_path, caplog):
    cmyk = Image.fromarray(EIGHT).convert("CMYK")
    for fmt, more in (("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})):
        got = pixels(make["encode"](cmyk, fmt, **more), 4)
        assert (got[..., 3] == 255).all() and np.abs(got[..., :3] - EIGHT).mean() < 8
    cmyk.save(tmp_path / "ink.tif")
    check_images(tmp_path, in_chans=4)
    assert "1 of the images looked at has no fourth channel" in caplog.text


def test_grey_with_alpha(make):
    alpha = np.where(EIGHT[..., 1] > 128, 255, 0).astype(np.uint8)
    grey = Image.merge("LA", [Image.fromarray(EIGHT[..., 0].copy()), Image.fromarray(alpha)])
    files = [make["encode"](grey, fmt) for fmt in ("PNG", "TIFF", "TGA", "JPEG2000")]
    for data, loader in product(files, ("auto", "pil")):
        assert (pixels(data, 1, loader=loader) == over(EIGHT[..., :1], alpha, 255)).all()
        assert (pixels(data, 3, loader=loader, alpha="drop") == EIGHT[..., :1]).all()
        assert (pixels(data, 4, loader=loader)[..., 2:] == np.dstack([EIGHT[..., 0], alpha])).all()


def test_five_bands_are_refused_not_cut():
    data = tiff(np.dstack([EIGHT, EIGHT[..., :2]]), photometric="rgb", extrasamples=["unspecified"] * 2)
    for in_chans in (1, 3, 4):
        with pytest.raises(DecodeError, match="TIFF with 5 uint8 samples a pixel"):
            decode_image(data, in_chans=in_chans)


# Orientation: the pixels are those stored, whoever decodes.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_no_orientation_is_applied(make, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(EIGHT)
    files = [make["encode"](image, "PNG", exif=exif), make["encode"](image, "WEBP", lossless=True, exif=exif)]
    files.append(tiff(EIGHT, photometric="rgb", extratags=[(274, "H", 1, orientation, True)]))
    files.append(tiff(EIGHT, photometric="rgb", compression="zlib", extratags=[(274, "H", 1, orientation, True)]))
    for data, loader in product(files, ("auto", "pil")):
        assert (pixels(data, loader=loader) == EIGHT).all()
    plain, turned = (make["encode"](image, "JPEG", **more) for more in ({}, {"exif": exif}))
    for loader in ("auto", "torchvision", "pil"):
        assert (pixels(plain, loader=loader) == pixels(turned, loader=loader)).all()


@pytest.mark.parametrize("loader", ("torchvision", "pil", "dali"))
def test_no_loader_turns_a_picture(tmp_path, make, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    y, x = np.mgrid[:32, :48]
    picture = Image.fromarray(np.dstack([5 * x, 8 * y, 0 * x]).astype(np.uint8))
    for orientation, (suffix, fmt) in product(range(1, 9), (("jpg", "JPEG"), ("png", "PNG"), ("tif", "TIFF"))):
        exif = Image.Exif()
        exif[274] = orientation
        (tmp_path / f"{orientation}.{suffix}").write_bytes(make["encode"](picture, fmt, exif=exif))
    whole = {"scale": (1.0, 1.0), "ratio": (1.5, 1.5), "hflip": 0.0, "num_workers": 0, "verify": "none"}
    with build_loader(path=tmp_path, img_size=(32, 48), micro_batch_size=24, loader=loader, **whole) as images:
        batch = next(iter(images.epoch(0))).images.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(batch - np.asarray(picture).astype(int)).max() <= 12  # of JPEG, where the colours are coarse


# Through the loaders.


@pytest.fixture
def deep(tmp_path):
    """8 smooth grey images of 12 bits in 16."""
    y, x = np.mgrid[:32, :32]
    for i in range(8):
        values = (2048 + 2000 * np.sin((i + 1) * x / 32 + y / 20)).astype(np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", values)
    return tmp_path


@pytest.mark.parametrize("loader", ("torchvision", "pil", "dali"))
def test_every_loader_keeps_the_range(deep, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0}
    options = dict(path=deep, img_size=(32, 32), in_chans=1, micro_batch_size=8, num_workers=0, loader=loader, **whole)
    with build_loader(value_range=(0, 4095), **options) as images:
        batch = next(iter(images.epoch(0)))
    for image, file in zip(batch.images, batch.sample_ids.tolist(), strict=True):
        truth = levels(tifffile.imread(deep / f"{file}.tif"), 0, 4095)
        assert np.abs(image[0].numpy().astype(int) - truth).max() <= 1


def test_dali_reads_a_jpeg_in_the_range_as_the_others_do(photos):
    pytest.importorskip("nvidia.dali", reason="DALI has no wheel for this platform")
    batches = []
    for loader in ("torchvision", "dali"):
        options = dict(path=photos, img_size=(32, 32), micro_batch_size=8, num_workers=0, loader=loader)
        with build_loader(value_range=(50, 200), **options) as images:
            batches.append(next(iter(images.epoch(0))).images.float())
    assert (batches[0] - batches[1]).abs().mean() < 1


def test_a_range_that_is_not_used_is_said_with_the_fix(deep, caplog):
    assert check_images(deep, in_chans=1) == (8, {})
    assert "data.value_range=[0, 4095]" in caplog.text and "16 of 256 levels" in caplog.text
    caplog.clear()
    check_images(deep, in_chans=1, value_range=(0, 4095))
    assert not caplog.text
    check_images(deep, in_chans=1, value_range=(0, 65535))
    assert "less than a quarter" in caplog.text
    check_images(deep, in_chans=1, value_range=(0, 1000))
    assert "are clipped" in caplog.text
    caplog.clear()
    with build_loader(path=deep, img_size=(32, 32), in_chans=1, micro_batch_size=4, num_workers=0, verify="none"):
        assert "data.value_range=[0, 4095]" in caplog.text


def test_what_is_done_to_channels_and_frames_is_said(tmp_path):
    Image.fromarray(np.dstack([EIGHT, EIGHT[..., :1]])).save(tmp_path / "alpha.png")
    band = np.dstack([EIGHT, EIGHT[..., :1]])
    tifffile.imwrite(tmp_path / "band.tif", band, photometric="rgb", extrasamples=["unspecified"])
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([EIGHT, EIGHT]), photometric="rgb")
    Image.fromarray(EIGHT).save(tmp_path / "plain.jpg")
    index = open_index(tmp_path)
    three = "\n".join(survey(index, {}, in_chans=3))
    assert "laid over white (data.alpha=white)" in three and "model.in_chans=4 keeps it" in three
    assert "only the first is used" in three and "plain.jpg" not in three
    assert "under transparent pixels shows" in "\n".join(survey(index, {}, in_chans=3, alpha="drop"))
    four = "\n".join(survey(index, {}, in_chans=4))
    assert "2 of the images looked at have no fourth channel" in four


def test_packing_smaller_keeps_what_a_jpeg_cannot_hold(deep, tmp_path):
    Image.fromarray(np.dstack([EIGHT, EIGHT[..., :1]])).save(deep / "alpha.png")
    pack_images(deep, tmp_path / "out", short_side=8)
    index = open_index(tmp_path / "out")
    assert [bytes(index.read(i)) for i in range(9)] == [path.read_bytes() for path in sorted(deep.glob("*.*"))]
