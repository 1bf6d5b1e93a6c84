"""Listing, file lists, verification and their messages."""

from __future__ import annotations

import io
import os
import sys
import types

import pytest
from PIL import Image, PngImagePlugin

from fastmim.data import check_images, pack_images, plugins
from fastmim.data.decode import decode_image
from fastmim.data.source import FileIndex, check_bad_fraction, find_bad_files, open_index


def names(index: FileIndex) -> list[str]:
    return [os.path.relpath(index.path(i), index.root) for i in range(len(index))]


def test_folder_is_listed_recursively_in_byte_order(tmp_path):
    wanted = ["B.PNG", "a/b c/1.jpeg", "a/x.webp", "a.jpg", "é.JpG", "z/写真.bmp"]
    for name in [*wanted, ".hidden.jpg", ".git/x.jpg", "a/notes.txt", "jpg"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.jpg").mkdir()
    assert names(open_index(tmp_path)) == sorted(wanted, key=os.fsencode)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_name_that_is_not_utf8_can_be_opened_and_printed(tmp_path):
    raw = os.fsencode(tmp_path) + b"/\xff\xfe.jpg"
    Image.new("RGB", (1, 1)).save(os.fsdecode(raw), "JPEG")
    index = open_index(tmp_path)
    assert os.fsencode(index.path(0)) == raw
    index.label(0).encode("utf-8")
    assert list(check_images(tmp_path)[1]) == [index.label(0)]


def test_links_are_not_followed_out_and_said(tmp_path, caplog):
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir(), outside.mkdir()
    (inside / "a.jpg").touch(), (outside / "b.jpg").touch()
    (inside / "out.jpg").symlink_to(outside / "b.jpg")
    (inside / "loop").symlink_to(inside)
    (inside / "same.jpg").symlink_to("a.jpg")
    (inside / "readme").symlink_to(outside)
    assert names(open_index(inside)) == ["a.jpg", "same.jpg"]
    assert "3 links" in caplog.text and "out.jpg" in caplog.text


def test_a_linked_root_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").touch()
    (tmp_path / "link").symlink_to("real")
    assert names(open_index(tmp_path / "link")) == ["a.jpg"]


def test_linked_folders_are_followed_when_asked_each_once(tmp_path):
    (tmp_path / "real/inner").mkdir(parents=True), (tmp_path / "real/a.jpg").touch()
    (tmp_path / "real/inner/b.jpg").touch(), (tmp_path / "real/inner/up").symlink_to(tmp_path)
    subset = tmp_path / "subset"
    subset.mkdir()
    (subset / "class1").symlink_to(tmp_path / "real")
    (subset / "again").symlink_to(tmp_path / "real" / "inner")
    (subset / "c.jpg").symlink_to(tmp_path / "real" / "a.jpg")
    with pytest.raises(ValueError, match="did not follow 3 links.*class1.*data.follow_links=true") as caught:
        open_index(subset)
    assert "\n" not in str(caught.value)
    # "again" comes before "class1", and the link back to the top ends where it was
    assert names(open_index(subset, follow_links=True)) == ["again/b.jpg", "c.jpg", "class1/a.jpg"]


def test_what_is_left_out_is_counted_and_named(tmp_path, caplog):
    image = Image.new("RGB", (16, 16), (10, 20, 30))
    read = ["a.jpg", "b.gif", "c.jp2", "d.tga", "e.webp", "f.dib"]
    for name in read:
        image.save(tmp_path / name)
    image.save(tmp_path / "without_extension", "JPEG")
    image.save(tmp_path / "photo.jpg.part", "PNG")
    (tmp_path / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "volume.npy").write_bytes(b"x"), (tmp_path / "more.tgz").write_bytes(b"x")
    (tmp_path / "labels.txt").write_text("words")
    os.mkfifo(tmp_path / "pipe.png")
    assert check_images(tmp_path) == (len(read), {})
    for part in (
        "1 link leads nowhere: dead.png",
        "left out 2 files starting like an image but not named so: without_extension; photo.jpg.part",
        "left out 1 image in a format that is not read (.npy: 1): volume.npy",
        "left out 1 archive (.tgz: 1): more.tgz",
        "left out 1 name like an image's behind which there is no file: pipe.png",
    ):
        assert part in caplog.text
    assert "labels.txt" not in caplog.text
    (tmp_path / "list.txt").write_text("without_extension\nphoto.jpg.part")
    assert check_images(tmp_path, file_list=tmp_path / "list.txt") == (2, {})


def test_names_in_capitals_are_images_and_other_formats_are_found_by_their_first_bytes(tmp_path, caplog):
    image = Image.new("RGB", (16, 16), (10, 20, 30))
    kinds = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "QOI")
    kinds = [kind for kind in kinds if kind in Image.SAVE]
    for kind in kinds:
        image.save(tmp_path / f"no_extension_{kind}", kind)
    for name in ("A.JPG", "B.Tif", "C.GIF"):
        image.save(tmp_path / name)
    assert check_images(tmp_path) == (3, {})
    assert f"left out {len(kinds)} files starting like an image" in caplog.text
    (tmp_path / "list.txt").write_text("\n".join(f"no_extension_{kind}" for kind in kinds))
    assert check_images(tmp_path, file_list=tmp_path / "list.txt") == (len(kinds), {})


def test_a_folder_of_other_things_says_what_is_there(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "x", "PNG")
    (tmp_path / "scan.dcm").touch()
    with pytest.raises(ValueError, match="no images here or below.*starting like an image.*: x;.*scan.dcm"):
        open_index(tmp_path)


def test_formats_of_plugins_that_are_missing_name_the_package(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(50))
    (tmp_path / "b.jxl").write_bytes(b"\xff\x0a" + bytes(50))
    usable, bad = check_images(tmp_path)
    reasons = [bad[str(tmp_path / name)] for name in ("a.heic", "b.jxl")]
    assert usable == 0 and "pip install pillow-heif" in reasons[0] and "pip install pillow-jxl-plugin" in reasons[1]


def test_an_installed_plugin_is_used(tmp_path, monkeypatch):
    """A stand-in that registers as pillow_heif does and reads a PNG behind HEIC's first bytes."""
    head = b"\0\0\0\x18ftypheic"
    image = Image.new("RGB", (16, 16), (1, 2, 3))
    image.save(tmp_path / "inner.png")
    (tmp_path / "a.heic").write_bytes(head + (tmp_path / "inner.png").read_bytes())
    plugin = types.ModuleType("pillow_heif")

    def register() -> None:
        class Heic(PngImagePlugin.PngImageFile):
            format = "HEIF"

            def _open(self) -> None:
                self.fp = io.BytesIO(self.fp.read()[len(head) :])
                super()._open()

        Image.register_open("HEIF", Heic, lambda start: start.startswith(head))

    plugin.register_heif_opener = register
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    plugins._register.cache_clear()
    try:
        assert decode_image((tmp_path / "a.heic").read_bytes())[:, 0, 0].tolist() == [1, 2, 3]
    finally:
        plugins._register.cache_clear()
        Image.OPEN.pop("HEIF", None), Image.ID.remove("HEIF")


def test_several_folders_are_one_set(tmp_path):
    for folder, count in (("a", 3), ("b", 2)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16)).save(tmp_path / folder / f"{i}.png")
    pack_images(tmp_path / "a", tmp_path / "shards")
    index = open_index([tmp_path / "b", tmp_path / "shards"])
    assert len(index) == 5 and index.label(1) == str(tmp_path / "b/1.png") and "!" in index.label(2)
    assert bytes(index.read(4)) == (tmp_path / "a/2.png").read_bytes()
    assert open_index([tmp_path / "a"]).fingerprint == open_index(tmp_path / "a").fingerprint
    orders = ([tmp_path / "a", tmp_path / "b"], [tmp_path / "b", tmp_path / "a"])
    assert len({open_index(paths).fingerprint for paths in orders}) == 2
    assert check_images(orders[0]) == (5, {})
    with pytest.raises(ValueError, match="data.path="):
        open_index([])


def test_a_folder_that_is_named_twice_is_said(tmp_path, caplog):
    for folder in ("a", "a/b", "ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").touch()
    (tmp_path / "link").symlink_to(tmp_path / "ab")
    assert len(open_index([tmp_path / "a", tmp_path / "ab"])) == 3 and not caplog.text
    for paths in (("a", "a"), ("a", "a/b"), ("a/b", "a"), ("link", "ab")):
        caplog.clear()
        open_index([tmp_path / one for one in paths])
        assert caplog.text.count("its images are in the set twice") == 1


def test_messages_for_folders(tmp_path):
    (tmp_path / "file.txt").touch()
    for path, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "no images here or below"),
        (tmp_path / "file.txt", "is a file, not a folder"),
        (None, "data.path=null"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            open_index(path)
        assert "\n" not in str(caught.value)


def test_file_list_keeps_its_order_and_may_repeat(tmp_path):
    for name in ("a.jpg", "b.jpg", "sub/ü x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    entries = ["sub/ü x.png", "b.jpg", "", str(tmp_path / "a.jpg"), "sub/../b.jpg"]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(entries), encoding="utf-8")
    index = open_index(tmp_path, tmp_path / "list.txt")
    assert names(index) == ["sub/ü x.png", "b.jpg", "a.jpg", "b.jpg"]
    assert names(open_index(None, tmp_path / "list.txt")) == names(index)


@pytest.mark.parametrize(
    ("content", "message"),
    (
        ("a.jpg\n../b.jpg\n", r"line 2: \.\./b\.jpg lies outside"),
        ("sub/../../b.jpg", "lies outside"),
        ("/etc/passwd", "lies outside"),
        ("a.jpg\nmissing.jpg\n", "1 of 2 entries not a file .*missing.jpg"),
        ("..", "lies outside"),
        ("\n\n", "the list is empty"),
    ),
)
def test_messages_for_file_lists(tmp_path, content, message):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.jpg").touch(), (tmp_path / "b.jpg").touch()
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_index(root, tmp_path / "list.txt")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        open_index(root, tmp_path / "other.txt")


def test_fingerprint_sees_names_and_order():
    one = FileIndex("/x", ["ab", "c"])
    assert one.fingerprint == FileIndex("/y", ["ab", "c"]).fingerprint
    for other in (["a", "bc"], ["c", "ab"], ["ab"]):
        assert FileIndex("/x", other).fingerprint != one.fingerprint


def test_check_images_names_every_bad_file(zoo):
    good, bad = check_images(zoo.root)
    assert good == len(zoo.truth)
    assert {os.path.relpath(path, zoo.root) for path in bad} == set(zoo.bad)
    for path, reason in bad.items():
        assert zoo.bad[os.path.relpath(path, zoo.root)] in reason


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_bad(tmp_path):
    (tmp_path / "a.jpg").touch(mode=0)
    assert "cannot be read" in next(iter(check_images(tmp_path)[1].values()))


def test_verify_modes(zoo, monkeypatch):
    index = open_index(zoo.root)
    assert len(find_bad_files(index, verify="auto")) == len(zoo.bad)
    assert find_bad_files(index, verify="none") == {}
    monkeypatch.setattr("fastmim.data.source.VERIFY_AUTO_LIMIT", 3)
    assert find_bad_files(index, verify="auto") == {}
    assert len(find_bad_files(index, verify="full")) == len(zoo.bad)
    with pytest.raises(ValueError, match="data.verify='yes'"):
        find_bad_files(index, verify="yes")


def test_bad_fraction():
    bad = {f"{i}.jpg": "empty file" for i in range(8)}
    check_bad_fraction(bad, 16, 0.5)  # exactly the limit is allowed
    check_bad_fraction({}, 16, 0.0)
    with pytest.raises(ValueError, match=r"8 of 15 files cannot be used \(0.jpg: empty file; .*and 3 more\)"):
        check_bad_fraction(bad, 15, 0.5)
    with pytest.raises(ValueError, match="none is left"):
        check_bad_fraction(bad, 8, 1.0)
