"""WebDataset tar shards with random access: every image is (shard, offset, size).

So the order of an epoch, its split over ranks and the restart are those of a folder. Nothing is ever extracted: a
member's name is a label, never a path, and only regular members are listed. A sample is what has one key
(``tar_index.py``), and one of its members is the image: the only one that is named like one, or the component asked
for.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import logging
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator

import numpy as np

from fastmim.data.decode import DecodeError, read_bytes
from fastmim.data.names import ARCHIVES, is_image, printable, shown
from fastmim.data.tar_index import Member, extension_of, read_index, sample_key, write_index
from fastmim.data.worker_error import MACHINE_ERRORS
from fastmim.wording import plural

#: One member larger than this is refused unread: no image is, and the size field of a tar is the writer's word.
MAX_MEMBER_BYTES = 1 << 30
#: The component that means every image.
EACH = "*"
_LOG = logging.getLogger("fastmim")
_MAX_BRACES = 1_000_000
_COMPARED = 8  # members of a shard with its index
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class ShardIndex:
    """The images of several shards, shard after shard in the order of the members.

    Names lie in one bytes object, numbers in arrays: forked workers share those pages.
    """

    def __init__(self, root: str, tars: list[str], members: list[list[Member]]) -> None:
        flat = [member for group in members for member in group]
        names = [os.fsencode(member.name) for member in flat]
        self.root, self._tars = root, tars
        self._blob, self._ends = b"".join(names), np.cumsum([len(name) for name in names], dtype=np.int64)
        self._first = np.cumsum([0] + [len(group) for group in members], dtype=np.int64)
        self._places = np.array([(m.offset, m.size) for m in flat], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._ends)

    def shard(self, index: int) -> str:
        """The path of the shard that holds image `index`."""
        return self._tars[int(np.searchsorted(self._first, index, side="right")) - 1]

    def _member(self, index: int) -> bytes:
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])]

    def name(self, index: int) -> bytes:
        """``shard.tar!member`` without the shard's folder, as bytes."""
        return os.fsencode(os.path.basename(self.shard(index))) + b"!" + self._member(index)

    def label(self, index: int) -> str:
        """``shard.tar!member``, safe to print."""
        return printable(f"{self.shard(index)}!{os.fsdecode(self._member(index))}")

    def read(self, index: int) -> bytearray:
        """The bytes of image `index`; DecodeError when the shard does not hold them in full."""
        offset, size = self._places[index].tolist()
        if size > MAX_MEMBER_BYTES:
            raise DecodeError(f"{size} bytes are more than {MAX_MEMBER_BYTES}")
        try:
            with open(self.shard(index), "rb", buffering=0) as file:
                # Sizes come from an untrusted header: nothing is allocated for bytes that are not there.
                if offset + size > os.fstat(file.fileno()).st_size:
                    raise DecodeError("the shard ends inside this member (truncated)")
                file.seek(offset)
                return read_bytes(file, size)
        except OSError as err:
            if err.errno in MACHINE_ERRORS:
                raise
            raise DecodeError(f"cannot be read: {err.strerror or err}") from None

    @property
    def fingerprint(self) -> str:
        """Hex digest of the shards' file names, the members' names and their order."""
        tars = "\0".join(os.path.basename(tar) for tar in self._tars)
        return hashlib.sha256(tars.encode("utf-8", "surrogateescape") + self._ends.tobytes() + self._blob).hexdigest()


def find_tars(path: str, field: str = "data.path", pixels: str = "uint8") -> list[str]:
    """The shards that `path` means: a folder's .tar files, one .tar, or a ``{000..127}`` or ``*`` pattern.

    Empty when `path` is a folder without .tar files.

    Raises:
        ValueError: a pattern without a match, a compressed archive, shards that are missing, tars beside images.
    """
    if os.path.isdir(path):
        entries = sorted(entry for entry in os.listdir(path) if not entry.startswith("."))
        tars = [os.path.join(path, entry) for entry in entries if entry.lower().endswith(".tar")]
        loose = [entry for entry in entries if is_image(entry, pixels)]
        if tars and loose:
            kinds = f"{plural(len(tars), '.tar shard')} and {plural(len(loose), 'loose image')}"
            raise ValueError(
                f"{field}={printable(path)}: holds {kinds}; give a"
                f" folder with one kind, or {field}={printable(os.path.join(path, '*.tar'))}"
            )
        beside = [one for one in entries if not one.lower().endswith(".tar") and _may_hold_images(path, one)]
        if tars and beside:
            _LOG.warning(
                "%s=%s: %s read, and %s left out: %s; name several as data.path=[a, b]", field, printable(path),
                plural(len(tars), ".tar shard is", ".tar shards are"),
                plural(len(beside), "folder or archive beside it", "folders and archives beside them"), shown(beside),
            )  # fmt: skip
        return tars
    if re.search(r"\.(tar\.\w+|tgz)$", path.lower()):
        raise ValueError(f"{field}={printable(path)}: a compressed shard has no random access; give plain .tar files")
    if not path.lower().endswith(".tar"):
        return []
    tars = []
    for name in expand_braces(path, field):
        tars += sorted(glob.glob(name)) if any(c in name for c in "*?[") and not os.path.exists(name) else [name]
    missing = [tar for tar in tars if not os.path.isfile(tar)]
    if missing or not tars:
        raise ValueError(f"{field}={printable(path)}: no such shard ({shown(missing) or 'nothing matches'})")
    return tars


def _may_hold_images(folder: str, entry: str) -> bool:
    return entry.lower().endswith(ARCHIVES) or os.path.isdir(os.path.join(folder, entry))


def expand_braces(pattern: str, field: str = "data.path") -> list[str]:
    """``a-{00..02}-{x,y}.tar`` as the shell expands it; the zeros of the first bound are kept.

    Raises:
        ValueError: it means more than a million names.
    """
    parts = _BRACES.split(pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        span = _RANGE.fullmatch(part) if i % 2 else None
        if span:
            low, high = int(span[1]), int(span[2])
            if high - low >= _MAX_BRACES:
                raise ValueError(f"{field}={printable(pattern)}: means more than {_MAX_BRACES} shards")
            choices.append([f"{number:0{len(span[1])}d}" for number in range(low, high + 1)])
        else:
            choices.append(part.split(",") if i % 2 else [part])
    if np.prod([len(choice) for choice in choices], dtype=float) > _MAX_BRACES:
        raise ValueError(f"{field}={printable(pattern)}: means more than {_MAX_BRACES} shards")
    return ["".join(names) for names in itertools.product(*choices)]


def open_shards(
    root: str, tars: list[str], field: str = "data.path", component: str | None = None, pixels: str = "uint8"
) -> ShardIndex:
    """The images of `tars`, from the index beside each where there is one that fits, else by reading its headers.

    Args:
        component: the extension (all behind the first dot) of the member of a sample that is the image, or
            several in order of preference ("jpg;png"); None: the only member that is named like one; "*": every
            member that is named like one is a sample of its own.
        pixels: which names are those of images (``names.py``).

    Raises:
        ValueError: a file is not a tar archive; no shard holds an image; a sample holds several and no component
            says which.
    """
    samples: list[list[list[Member]]] = []
    scanned = []
    for tar in tars:
        known = read_index(tar)
        if known is None or not _lists_all(known, tar):
            scanned.append(tar)
            known = scan_tar(tar, field, pixels)
        samples.append(known)
    if scanned:
        _LOG.warning(
            "%s=%s: %d of %s without an index that fits, headers were read; run `fastmim data index %s`",
            field, printable(root), len(scanned), plural(len(tars), "shard"), printable(root),
        )  # fmt: skip
    members = _chosen(samples, f"{field}={printable(root)}", component, pixels)
    if not any(members):
        raise ValueError(f"{field}={printable(root)}: no images in {plural(len(tars), 'shard')}{_instead(samples)}")
    return ShardIndex(root, tars, members)


def _lists_all(samples: list[list[Member]], tar: str) -> bool:
    """Whether an index has the first members of its shard: some writers list one image of a sample and no more."""
    listed = {member.offset for sample in samples for member in sample}
    try:
        with tarfile.open(tar, "r:") as archive:
            first = [member for member in itertools.islice(archive, _COMPARED) if _holds_bytes(member)]
    except (tarfile.TarError, OverflowError, ValueError, OSError):  # what is wrong is said when it is read
        return True
    return all(member.offset_data in listed for member in first)


def _holds_bytes(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.issparse()


def _components(sample: list[Member], component: str | None, pixels: str) -> list[Member]:
    if component in (None, EACH):
        return [member for member in sample if is_image(member.name, pixels)]
    for wanted in component.lower().split(";"):
        found = [member for member in sample if extension_of(member.name).lower() == wanted.strip().lstrip(".")]
        if found:
            return found
    return []


def _chosen(
    samples: list[list[list[Member]]], where: str, component: str | None, pixels: str
) -> list[list[Member]]:
    """The image of every sample that has one."""
    left_out = 0
    chosen: list[list[Member]] = []
    for shard in samples:
        chosen.append([])
        for sample in shard:
            found = _components(sample, component, pixels)
            if len(found) > 1 and component != EACH:
                choices = sorted({extension_of(member.name) for member in found}, key=len)
                raise ValueError(
                    f"{where}: a sample holds {len(found)} images ({shown([member.name for member in found])}); say"
                    f" which is the one, for example data.component={choices[0]}, or data.component={EACH} to take each"
                )
            left_out += not found
            chosen[-1] += found
    if left_out and any(chosen):
        what = "an image" if component in (None, EACH) else f"a component {component}"
        _LOG.warning("%s: left out %s without %s%s", where, plural(left_out, "sample"), what, _instead(samples))
    return chosen


def _instead(samples: list[list[list[Member]]]) -> str:
    kinds = Counter(extension_of(member.name) or "none" for shard in samples for one in shard for member in one)
    listed = ", ".join(f"{printable(kind)}: {count}" for kind, count in kinds.most_common(6))
    return f" (extensions there: {listed})" if listed else ""


def scan_tar(tar: str, field: str = "data.path", pixels: str = "uint8") -> list[list[Member]]:
    """The regular members, by sample; links and sparse files that are named like images are counted in a warning.

    A shard cut off in the middle gives what is before the cut, with a warning.

    Raises:
        ValueError: not an uncompressed tar archive.
    """
    found: dict[str, list[Member]] = {}
    links: list[str] = []
    try:
        with tarfile.open(tar, "r:") as archive:
            for member in _members(archive, tar):
                if _holds_bytes(member):
                    one = Member(member.name, member.offset_data, member.size)
                    found.setdefault(sample_key(member.name), []).append(one)
                elif is_image(member.name, pixels) and not member.isdir():
                    links.append(member.name)
    except tarfile.TarError as err:
        raise ValueError(f"{field}={printable(tar)}: not an uncompressed tar archive ({err})") from None
    except OSError as err:
        raise ValueError(f"{field}={printable(tar)}: cannot be read ({err.strerror or err})") from None
    if links:
        _LOG.warning(
            "%s: left out %s without bytes of its own (a link, a sparse file): %s; pack the files"
            " themselves (tar --dereference --hard-dereference)",
            printable(tar), plural(len(links), "member"), shown(links),
        )  # fmt: skip
    return list(found.values())


def _members(archive: tarfile.TarFile, tar: str) -> Iterator[tarfile.TarInfo]:
    while True:
        try:
            member = archive.next()
        except (tarfile.TarError, OverflowError, ValueError, OSError) as err:
            _LOG.warning("%s: damaged behind byte %d (%s); what is before is used", printable(tar), archive.offset, err)
            return
        if member is None:
            return
        yield member


def index_shards(path: str) -> dict[str, int]:
    """Write the index of every shard that `path` means; returns {shard: images}.

    Raises:
        ValueError: no shards there, or one is not an uncompressed tar archive.
    """
    tars = find_tars(path, "DIR")
    if not tars:
        raise ValueError(f"DIR={printable(path)}: no .tar shards; give a folder of them or a pattern")
    counts = {}
    for tar in tars:
        samples = scan_tar(tar, "DIR")
        write_index(tar, samples)
        counts[tar] = sum(any(is_image(member.name, "float32") for member in sample) for sample in samples)
    return counts
