"""Listing, file lists, verification and their messages."""

from __future__ import annotations

import os
import sys

import pytest
from PIL import Image

from fastmim.data import check_images
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
        ("a.jpg\nmissing.jpg\n", "1 of 2 entries are not files .*missing.jpg"),
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
