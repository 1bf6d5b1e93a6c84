"""decode_image against arrays that were encoded here."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fastmim.data.decode import MAX_PIXELS, DecodeError, decode_image

LOADERS = ("auto", "torchvision", "pil")


def pixels(data: bytes, loader: str, in_chans: int = 3, **options: object) -> np.ndarray:
    image = decode_image(data, loader=loader, in_chans=in_chans, **options)
    assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == in_chans
    return image.permute(1, 2, 0).numpy()


def worst(got: np.ndarray, truth: np.ndarray) -> int:
    assert got.shape == truth.shape
    return int(np.abs(got.astype(int) - truth.astype(int)).max())


@pytest.fixture(scope="module")
def jpeg(make) -> bytes:
    return make["encode"](Image.fromarray(make["smooth_rgb"](48, 64, 5)), "JPEG", quality=95)


@pytest.mark.parametrize("loader", LOADERS)
def test_zoo_pixels(zoo, loader):
    for name, (truth, bound) in zoo.truth.items():
        assert worst(pixels((zoo.root / name).read_bytes(), loader), truth) <= bound, name


@pytest.mark.parametrize("loader", LOADERS)
def test_zoo_reasons(zoo, loader):
    for name, reason in zoo.bad.items():
        if loader == "torchvision" and name == "text.jpg":
            reason = "not a JPEG or PNG"
        with pytest.raises(DecodeError, match=reason) as caught:
            decode_image((zoo.root / name).read_bytes(), loader=loader, min_size=8)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("keep", (0.3, 0.7, 0.99, -2, -1))
@pytest.mark.parametrize("progressive", (False, True))
def test_truncated_jpeg_is_never_half_grey(make, loader, keep, progressive):
    rgb = Image.fromarray(make["smooth_rgb"](64, 64, 3))
    data = make["encode"](rgb, "JPEG", quality=95, progressive=progressive)
    cut = data[: int(len(data) * keep)] if keep > 0 else data[:keep]
    with pytest.raises(DecodeError, match="(?i)truncated"):
        decode_image(cut, loader=loader)


def test_truncated_jpeg_where_the_process_lets_pil_fill_in(monkeypatch, jpeg):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DecodeError, match="truncated"):
        decode_image(jpeg[: len(jpeg) // 2])


@pytest.mark.parametrize("loader", LOADERS)
def test_truncated_png(make, loader):
    data = make["encode_png"](np.random.default_rng(0).integers(0, 256, (40, 40, 3)), bits=8, colour=2)
    with pytest.raises(DecodeError):
        decode_image(data[: len(data) // 2], loader=loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_ycck_jpeg(make, loader):
    # Adobe's transform flag 2 says that the first three channels are YCbCr of the inverted inks.
    target, black = make["smooth_rgb"](32, 32, 8), 200
    stored = np.asarray(Image.fromarray(255 - target).convert("YCbCr"))
    inks = np.concatenate([255 - stored, np.full((32, 32, 1), 255 - black, np.uint8)], -1)
    data = bytearray(make["encode"](Image.fromarray(inks, "CMYK"), "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2
    assert worst(pixels(bytes(data), loader), (target * (black / 255)).round().astype(np.uint8)) <= 5


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bits", (1, 2, 4, 8, 16))
def test_grey_png_of_every_depth(make, loader, bits):
    # 13 columns: the last byte of a row is not full at 1, 2 and 4 bits
    values = np.random.default_rng(bits).integers(0, 2**bits, (9, 13))
    truth = values >> 8 if bits == 16 else values * 255 // (2**bits - 1)
    data = make["encode_png"](values, bits=bits, colour=0)
    assert worst(pixels(data, loader, 1)[..., 0], truth) == 0
    assert worst(pixels(data, loader, 3), np.repeat(truth[..., None], 3, -1)) == 0


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bits", (8, 16))
def test_alpha(make, loader, bits):
    # For RGBA it is kept; what other channels make of it is in test_samples.py.
    samples = np.random.default_rng(0).integers(0, 2**bits, (10, 11, 4))
    truth = (samples >> (bits - 8)).astype(np.uint8)
    rgba = make["encode_png"](samples, bits=bits, colour=6)
    assert worst(pixels(rgba, loader, 3, alpha="drop"), truth[..., :3]) == 0
    assert worst(pixels(rgba, loader, 4), truth) == 0
    grey_alpha = make["encode_png"](samples[..., :2], bits=bits, colour=4)
    assert worst(pixels(grey_alpha, loader, 3, alpha="drop"), np.repeat(truth[..., :1], 3, -1)) == 0
    assert worst(pixels(grey_alpha, loader, 4), truth[..., [0, 0, 0, 1]]) == 0
    assert worst(pixels(grey_alpha, loader, 1, alpha="drop"), truth[..., :1]) == 0


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("bits", (1, 2, 4, 8))
def test_palette_with_transparency(make, loader, bits):
    palette = np.random.default_rng(1).integers(0, 256, (2**bits, 3))
    alpha = np.random.default_rng(2).integers(0, 256, 2**bits)
    picks = np.random.default_rng(3).integers(0, 2**bits, (9, 13))
    trns = alpha.astype(np.uint8).tobytes()
    data = make["encode_png"](picks, bits=bits, colour=3, palette=palette, trns=trns)
    assert worst(pixels(data, loader, 3, alpha="drop"), palette[picks]) == 0
    assert worst(pixels(data, loader, 4), np.concatenate([palette[picks], alpha[picks][..., None]], -1)) == 0


@pytest.mark.parametrize("loader", LOADERS)
def test_channels_of_a_jpeg(make, loader):
    rgb = make["smooth_rgb"](32, 32, 4)
    data = make["encode"](Image.fromarray(rgb), "JPEG", quality=100, subsampling=0)
    luma = rgb @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the Y of JFIF
    assert np.abs(pixels(data, loader, 1)[..., 0] - luma).max() <= 3
    rgba = pixels(data, loader, 4)
    assert worst(rgba[..., :3], rgb) <= 4 and (rgba[..., 3] == 255).all()
    grey = make["encode"](Image.fromarray(rgb[..., 0]), "JPEG", quality=100)
    assert worst(pixels(grey, loader, 3), np.repeat(rgb[..., :1], 3, -1)) <= 2


@pytest.mark.parametrize("fmt", ("BMP", "WEBP", "TIFF", "PPM"))
def test_other_formats_need_pil(make, fmt):
    rgb = make["smooth_rgb"](24, 20, 1)
    data = make["encode"](Image.fromarray(rgb), fmt, **({"lossless": True} if fmt == "WEBP" else {}))
    assert worst(pixels(data, "auto"), rgb) == 0
    with pytest.raises(DecodeError, match="data.loader=auto"):
        decode_image(data, loader="torchvision")


def test_float_tiff_is_refused_not_clipped(make):
    data = make["encode"](Image.fromarray(np.full((9, 9), 1e4, np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="32-bit"):
        decode_image(data)


@pytest.mark.parametrize("loader", ("auto", "pil"))
def test_decompression_bombs_are_named_before_any_pixel_is_made(make, jpeg, loader):
    png = bytearray(make["encode"](Image.new("L", (1, 1)), "PNG"))
    png[16:24] = struct.pack(">II", 60000, 50000)
    jpg = bytearray(jpeg)
    sof = jpg.index(b"\xff\xc0")
    jpg[sof + 5 : sof + 9] = struct.pack(">HH", 50000, 60000)
    bmp = bytearray(make["encode"](Image.new("L", (1, 1)), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60000, 50000)
    for data in (png, jpg, bmp):
        with pytest.raises(DecodeError, match="bomb"):
            decode_image(bytes(data), loader=loader)
    assert MAX_PIXELS < 60000 * 50000


def test_options_are_checked():
    with pytest.raises(ValueError, match="model.in_chans=2"):
        decode_image(b"x", in_chans=2)
    with pytest.raises(ValueError, match="data.loader='dali'"):
        decode_image(b"x", loader="dali")


def test_random_bytes_never_do_worse_than_decode_error(jpeg):
    rng = np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(jpeg)
        for position in rng.integers(2, len(data), 3):
            data[position] = rng.integers(256)
        try:
            image = decode_image(bytes(data))
        except DecodeError as err:
            assert "\n" not in str(err)
        else:
            assert image.dtype == torch.uint8 and image.shape[0] == 3


# Reasons.


def tiff(samples: np.ndarray, *, planar: bool = False) -> bytes:
    """An uncompressed little-endian TIFF of (H, W, C) samples of any type, by its specification: PIL writes few."""
    height, width, count = samples.shape
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[samples.dtype.kind]
    raw = (samples.transpose(2, 0, 1) if planar else samples).tobytes()
    plane = len(raw) // count
    strips = [8 + plane * k for k in range(count)] if planar else [8]
    sizes = [plane] * count if planar else [len(raw)]
    tags = [(256, 3, [width]), (257, 3, [height]), (258, 3, [samples.dtype.itemsize * 8] * count), (259, 3, [1])]
    tags += [(262, 3, [1]), (273, 4, strips), (277, 3, [count]), (278, 3, [height]), (279, 4, sizes)]
    tags += [(284, 3, [2 if planar else 1]), (339, 3, [kind] * count)]
    start = 8 + len(raw)
    extra, entries, tail = start + 2 + 12 * len(tags) + 4, b"", b""
    for tag, type_, values in tags:
        packed = struct.pack(f"<{len(values)}{'H' if type_ == 3 else 'I'}", *values)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", extra + len(tail))
        tail += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, type_, len(values)) + place
    return b"II*\0" + struct.pack("<I", start) + raw + struct.pack("<H", len(tags)) + entries + bytes(4) + tail


@pytest.mark.parametrize(
    ("dtype", "count", "planar", "reason"),
    (
        ("u2", 13, False, "13 uint16 samples a pixel (16-bit): not a kind"),
        ("u1", 13, True, "13 uint8 samples a pixel (8-bit, in planes): not a kind"),
        ("u1", 5, False, "5 uint8 samples a pixel (8-bit): not a kind"),
        ("i2", 3, False, "3 int16 samples a pixel (16-bit): not a kind"),
        ("f4", 3, False, "3 float32 samples a pixel (32-bit): not a kind"),
        ("f2", 1, False, "1 float16 sample a pixel (16-bit): not a kind"),
        ("f8", 1, False, "1 float64 sample a pixel (64-bit): not a kind"),
        ("c8", 1, False, "1 complex64 sample a pixel (64-bit): not a kind"),
    ),
)  # fmt: skip
def test_a_tiff_is_refused_for_what_it_holds(dtype, count, planar, reason):
    data = tiff(np.ones((9, 9, count), f"<{dtype}"), planar=planar)
    with pytest.raises(DecodeError) as caught:
        decode_image(data)
    assert str(caught.value).startswith(f"TIFF with {reason}")


@pytest.mark.parametrize("kind", ("int8", "int16", "int32", "uint32", "float32"))
def test_a_tiff_without_a_range_of_its_own_names_its_type_and_the_key(kind):
    data = tiff(np.ones((9, 9, 1), np.dtype(kind).newbyteorder("<")), planar=False)
    with pytest.raises(DecodeError, match=f"no range is defined for .*-bit samples .{kind}.; give data.value_range="):
        decode_image(data)


def test_a_tiff_of_one_unsigned_sample_is_read():
    samples = np.arange(81, dtype=np.uint8).reshape(9, 9, 1)
    assert np.array_equal(decode_image(tiff(samples), in_chans=1)[0], samples[..., 0])
    assert np.array_equal(decode_image(tiff(samples.astype("<u2") * 257), in_chans=1)[0], samples[..., 0])


def test_a_deep_pgm_keeps_its_high_byte():
    samples = np.random.default_rng(0).integers(0, 65536, (9, 9))
    data = b"P5 9 9 65535\n" + samples.astype(">u2").tobytes()
    assert np.array_equal(decode_image(data, in_chans=1)[0], samples >> 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("data", "reason"),
    (
        (b"GIF89a" + bytes(3), "damaged GIF"),
        (b"II*\0" + bytes(9), "damaged TIFF"),
        (b"MM\0*" + b"\xff" * 9, "damaged TIFF"),
        (b"BM" + bytes(3), "damaged BMP"),
        (b"\xff\xd8\xff\xe0", "damaged JPEG"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "not an image"),
        (b"<svg></svg>", "not an image"),
    ),
)
def test_a_damaged_image_is_not_called_something_else(data, reason):
    with pytest.raises(DecodeError, match=f"^{reason}"):
        decode_image(data, loader="pil")


@pytest.mark.parametrize("in_chans", (1, 3, 4))
@pytest.mark.parametrize("mode", ("LAB", "CMYK", "YCbCr", "RGB", "L", "RGBA", "P"))
def test_every_mode_gives_every_number_of_channels(mode, in_chans):
    rgb = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.new(mode, (9, 9), 7) if mode == "LAB" else Image.fromarray(rgb).convert(mode)
    out = io.BytesIO()
    image.save(out, "TIFF")
    try:
        Image.open(io.BytesIO(out.getvalue())).load()
    except OSError as error:  # 12.3, the last for Python 3.10, takes YCbCr without compression for four channels
        pytest.skip(f"this Pillow cannot read the {mode} TIFF that it wrote: {error}")
    got = decode_image(out.getvalue(), in_chans=in_chans)
    assert got.shape == (in_chans, 9, 9)
    if in_chans == 1 and mode != "L":
        through = Image.fromarray(decode_image(out.getvalue()).permute(1, 2, 0).numpy()).convert("L")
        assert np.abs(np.asarray(through).astype(int) - got[0].numpy()).max() <= 1
