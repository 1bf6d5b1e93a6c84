"""Which files of a folder are images, and what was left out: counted, named, and what to do about it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastmim.data.names import (
    ARCHIVES,
    ARRAYS,
    OTHER_IMAGES,
    extensions,
    is_image,
    printable,
    shown,
    starts_like_an_image,
)
from fastmim.wording import plural

_LOG = logging.getLogger("fastmim")
#: Files without an image's name of which the first bytes are read.
_SNIFFED = 1000
_HEAD = 32


class Found(NamedTuple):
    """What lies below a folder; all names are relative to it."""

    images: list[str]
    links: list[str]  # images and folders behind links that were not followed
    dead: list[str]  # links that lead nowhere
    special: list[str]  # named like images, and neither files nor folders
    others: list[str]  # files not named like images


def scan_folder(root: str, field: str, follow_links: bool = False, pixels: str = "uint8") -> list[str]:
    """The image names below `root`, sorted as bytes. Hidden files and folders are skipped.

    What is left out is said: links that lead to folders or out of `root` without `follow_links`, links that lead
    nowhere, names like images that are no files, and files that are images but not by name. `pixels` says which names
    are those of images (``names.py``).

    Raises:
        ValueError: no images; the message says what there is instead.
    """
    found = Found([], [], [], [], [])
    _walk(root, follow_links, pixels, found)
    notes = _left_out(root, found)
    if not found.images:
        why = "; ".join([f"no images here or below (looked for {' '.join(extensions(pixels))})", *notes])
        raise ValueError(f"{field}={printable(root)}: {why}")
    for note in notes:
        # Several keys may lead here: that of the one who looks first is said.
        _LOG.warning("%s=%s: %s", field, printable(root), note, extra={"fact": (os.path.realpath(root), note)})
    return sorted(found.images, key=os.fsencode)


def _left_out(root: str, found: Found) -> list[str]:
    notes = []
    if found.links:
        what = f"did not follow {plural(len(found.links), 'link')}: {shown(found.links)}"
        notes.append(f"{what}; data.follow_links=true follows them, a data.file_list may name linked files")
    if found.dead:
        lead = "leads" if len(found.dead) == 1 else "lead"
        notes.append(f"{plural(len(found.dead), 'link')} {lead} nowhere: {shown(found.dead)}")
    if found.special:
        count = plural(len(found.special), "name")
        notes.append(f"left out {count} like an image's behind which there is no file: {shown(found.special)}")
    unnamed, unread, archives = _sorted_out(root, found.others)
    if unnamed:
        most = f" of the {_SNIFFED} looked into" if len(found.others) > _SNIFFED else ""
        count = f"{plural(len(unnamed), 'file')}{most}"
        what = f"left out {count} starting like an image but not named so: {shown(unnamed)}"
        notes.append(f"{what}; give an extension, or a data.file_list, which takes any name")
    if unread:
        count = plural(len(unread), "image")
        what = f"left out {count} in a format that is not read ({_kinds(unread)}): {shown(unread)}"
        arrays = ", or set data.pixels=float32, which reads .npy and .npz" * any(map(_is_array, unread))
        notes.append(f"{what}; convert to PNG or TIFF{arrays}")
    if archives:
        what = f"left out {plural(len(archives), 'archive')} ({_kinds(archives)}): {shown(archives)}"
        notes.append(f"{what}; unpack, or give a folder of tar shards alone")
    return notes


def _sorted_out(root: str, others: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    unread = [name for name in others if name.lower().endswith(OTHER_IMAGES)]
    archives = [name for name in others if name.lower().endswith(ARCHIVES)]
    rest = sorted(set(others).difference(unread, archives), key=lambda name: (_extension(name) != "", name))
    return [name for name in rest[:_SNIFFED] if _like_an_image(os.path.join(root, name))], unread, archives


def _is_array(name: str) -> bool:
    return name.lower().endswith(ARRAYS)


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(f"{kind}: {count}" for kind, count in Counter(map(_extension, names)).most_common(6))


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _like_an_image(path: str) -> bool:
    try:
        with open(path, "rb", buffering=0) as file:
            return starts_like_an_image(file.read(_HEAD) or b"")
    except OSError:
        return False


def _walk(root: str, follow_links: bool, pixels: str, found: Found) -> None:
    """Real folders first, so that a folder reached in two ways is listed under its own name."""
    inside = os.path.join(os.path.realpath(root), "")
    visited: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        linked: list[str] = []
        for top in sorted(waiting, key=os.fsencode):
            for entry, name in _entries(root, top, visited):
                _take(entry, name, inside, follow_links, is_image(name, pixels), linked, found)
        waiting = linked


def _entries(root: str, top: str, visited: set[tuple[int, int]]) -> Iterator[tuple[os.DirEntry[str], str]]:
    stack = [top]
    while stack:
        folder = stack.pop()
        try:
            stat = os.stat(os.path.join(root, folder))
            if (stat.st_dev, stat.st_ino) in visited:
                continue
            visited.add((stat.st_dev, stat.st_ino))
            entries = list(os.scandir(os.path.join(root, folder)))
        except OSError as err:
            _LOG.warning("cannot list %s (%s)", printable(os.path.join(root, folder)), err.strerror)
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                stack.append(name)
            else:
                yield entry, name


def _take(
    entry: os.DirEntry[str], name: str, inside: str, follow_links: bool, named: bool, linked: list[str], found: Found
) -> None:
    """Put an entry where it belongs; ``named``: like an image."""
    if entry.is_symlink():
        if entry.is_dir():
            (linked if follow_links else found.links).append(name)
            return
        if not os.path.exists(entry.path):
            found.dead.append(name)
            return
        if named and not follow_links and not os.path.realpath(entry.path).startswith(inside):
            found.links.append(name)
            return
    if not entry.is_file():
        if named:
            found.special.append(name)
    elif named:
        found.images.append(name)
    else:
        found.others.append(name)
