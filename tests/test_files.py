"""Files appear whole or not at all, and an error of the system names them."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fastmim.errors import one_line
from fastmim.files import naming, replacing, write_text


def full(path: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO])
def test_an_error_without_a_name_gets_one(number: int) -> None:
    with pytest.raises(OSError) as caught, naming("/out/file"):
        raise OSError(number, os.strerror(number))
    reason = os.strerror(number)
    assert one_line(caught.value).startswith(f"/out/file: {reason[0].lower()}{reason[1:]}")


def test_a_name_that_is_known_stays() -> None:
    with pytest.raises(FileNotFoundError) as caught, naming("/out"):
        os.stat("/none/such")
    assert one_line(caught.value) == "/none/such: no such file or directory"


def test_text_without_a_number_is_kept() -> None:
    with pytest.raises(OSError) as caught, naming("/out/picture.png"):
        raise OSError("encoder error -2 when writing image file")
    assert one_line(caught.value) == "/out/picture.png: encoder error -2 when writing image file"


def test_what_was_there_stays_where_the_new_file_fails(tmp_path: Path) -> None:
    path = tmp_path / "table"
    write_text(path, "old")
    with pytest.raises(OSError) as caught, replacing(path) as partial:
        partial.write_text("ne")
        full(partial)
    assert caught.value.filename == str(path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "old"


def test_a_device_without_room(tmp_path: Path) -> None:
    """The kernel's own error, not one that a test made up."""
    device = tmp_path / "device"
    device.symlink_to("/dev/full")
    with pytest.raises(OSError) as caught, naming(device), device.open("w") as file:
        file.write("x")
    assert one_line(caught.value) == f"{device}: no space left on device"


@pytest.mark.parametrize("place, reason", [("file/table", "not a directory"), ("folder", "is a directory"),
                                           ("none/table", "no such file or directory"),
                                           ("x" * 300, "file name too long")])
def test_an_impossible_place_is_named_as_it_was_given(place: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / place, "text")
    line = one_line(caught.value)
    assert line.endswith(reason) and ".tmp" not in line and (place.split("/")[0] in line or "…" in line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_what_is_no_unicode_is_escaped(tmp_path: Path) -> None:
    write_text(tmp_path / "names", "caf\udce9 é")
    assert (tmp_path / "names").read_text(encoding="utf-8") == "caf\\udce9 é"
