"""The index beside a tar shard (``a.tar`` -> ``a.idx``): which members there are, and where.

It is the plain text that DALI's ``wds2idx`` writes, version 1.2: one line a sample, four fields a component
(extension, offset, size, name). It is checked against the shard before it is used.
"""

from __future__ import annotations

import os
from typing import NamedTuple
from urllib.parse import quote, unquote

INDEX_VERSION = "v1.2"
_BLOCK = 512


class Member(NamedTuple):
    """One file inside a shard."""

    name: str
    offset: int  # of its data, in bytes
    size: int


def sample_key(name: str) -> str:
    """WebDataset's key: the name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def extension_of(name: str) -> str:
    """WebDataset's component: all behind the first dot of the last part of the name."""
    return name.rpartition("/")[2].partition(".")[2]


def index_path(tar: str) -> str:
    """Where the index of a shard lies."""
    return os.path.splitext(tar)[0] + ".idx"


def write_index(tar: str, samples: list[list[Member]]) -> str:
    """Write the index of a shard, every member of a sample in its line, in one move; returns its path."""
    path = index_path(tar)
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(f"{INDEX_VERSION} {len(samples)}\n")
        for sample in samples:
            file.write(" ".join(field for member in sample for field in _fields(member)) + "\n")
    os.replace(path + ".tmp", path)
    return path


def _fields(member: Member) -> tuple[str, str, str, str]:
    extension, name = quote(extension_of(member.name) or "bin"), quote(os.fsencode(member.name))
    return extension, str(member.offset), str(member.size), name


def read_index(tar: str) -> list[list[Member]] | None:
    """The members listed beside a shard, by sample; None where there is no index, or not of this shard.

    Checked: newer than the shard, the number of samples, every place on a block and inside the shard.
    """
    path = index_path(tar)
    try:
        stat = os.stat(tar)
        if not os.path.isfile(path) or os.stat(path).st_mtime_ns < stat.st_mtime_ns:
            return None
        with open(path, encoding="utf-8") as file:
            version, count = file.readline().split()
            lines = file.readlines()
        if version != INDEX_VERSION or int(count) != len(lines):
            return None
        return [_sample(line.split(), stat.st_size) for line in lines]
    except (OSError, ValueError):
        return None


def _sample(fields: list[str], tar_bytes: int) -> list[Member]:
    sample = []
    for place in range(0, len(fields), 4):
        _, offset, size, name = fields[place : place + 4]
        member = Member(os.fsdecode(_unquote(name)), int(offset), int(size))
        if member.offset % _BLOCK or member.offset < _BLOCK or not 0 <= member.size <= tar_bytes - member.offset:
            raise ValueError("not inside the shard")
        sample.append(member)
    return sample


def _unquote(name: str) -> bytes:
    return unquote(name, errors="surrogateescape").encode("utf-8", "surrogateescape")
