"""A few hundred real JPEG tiles for the demo, cut from photographs that installed packages ship.

Never touches the network: the files are read from the package folders of scikit-image and scikit-learn, and
neither package is imported.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastmim.files import naming, write_text
from fastmim.wording import install_packages

_MARKER = "demo.json"
_PACKAGES = ("scikit-image", "scikit-learn")
_JPEG_QUALITY = 90
_MAX_TILES_PER_AXIS = 6  # keeps one large photograph from crowding out the others

#: (package, file below it, integer factor by which it is reduced). One of each stereo pair, no drawings.
_PHOTOS = (
    ("skimage", "data/astronaut.png", 1),
    ("skimage", "data/brick.png", 1),
    ("skimage", "data/camera.png", 1),
    ("skimage", "data/chelsea.png", 1),
    ("skimage", "data/coffee.png", 1),
    ("skimage", "data/coins.png", 1),
    ("skimage", "data/grass.png", 1),
    ("skimage", "data/gravel.png", 1),
    ("skimage", "data/hubble_deep_field.jpg", 2),
    ("skimage", "data/ihc.png", 1),
    ("skimage", "data/moon.png", 1),
    ("skimage", "data/motorcycle_left.png", 1),
    ("skimage", "data/retina.jpg", 2),
    ("skimage", "data/rocket.jpg", 1),
    ("sklearn", "datasets/images/china.jpg", 1),
    ("sklearn", "datasets/images/flower.jpg", 1),
)
_MIN_PHOTOS = 8


class DemoCounts(NamedTuple):
    """Tiles written to each folder."""

    train: int
    val: int


class _Tile(NamedTuple):
    split: str
    name: str
    box: tuple[int, int, int, int]  # left, upper, right, lower in the (reduced) photograph


def make_demo(directory: str | os.PathLike[str], *, size: int = 160, val_fraction: float = 0.2) -> DemoCounts:
    """Write `directory`/train and `directory`/val: square JPEG tiles of `size` pixels.

    Tiles overlap inside a split, but no pixel of a photograph is in both: the right end of every photograph,
    at least `val_fraction` of its width and one tile wide, is held out (a photograph narrower than two tiles
    is all for training). Deterministic; a finished folder is left as it is.

    Returns:
        The number of tiles in train and val.

    Raises:
        ValueError: the packages are not installed (with the install command), an argument is out of range,
            or the folder holds other images.
    """
    if not 32 <= size <= 256:
        raise ValueError(f"size={size}: demo tiles are 32 to 256 px wide")
    if not 0 <= val_fraction <= 0.5:
        raise ValueError(f"val_fraction={val_fraction}: must lie in [0, 0.5]")
    directory = os.fspath(directory)
    settings = {"size": size, "val_fraction": val_fraction}
    done = _finished(directory, settings)
    if done is not None:
        return done
    photos = _find_photos()
    tiles = {path: list(_tiles(path, reduce, size, val_fraction)) for path, reduce in photos}
    every = [tile for group in tiles.values() for tile in group]
    _refuse_foreign_files(directory, {os.path.join(tile.split, tile.name) for tile in every})
    for path, reduce in photos:
        _write_tiles(directory, path, reduce, tiles[path])
    counts = DemoCounts(*(sum(tile.split == split for tile in every) for split in DemoCounts._fields))
    # Written last and in one move: its presence says that the folder is complete.
    marker = os.path.join(directory, _MARKER)
    write_text(Path(marker), json.dumps({**settings, **counts._asdict()}))
    return counts


def _find_photos() -> list[tuple[str, int]]:
    roots: dict[str, str] = {}
    for package in {package for package, _, _ in _PHOTOS}:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            how = install_packages(*_PACKAGES)
            raise ValueError(f"the demo's photographs come with scikit-image and scikit-learn: {how}")
        roots[package] = next(iter(spec.submodule_search_locations))
    paths = [(os.path.join(roots[package], *name.split("/")), reduce) for package, name, reduce in _PHOTOS]
    present = [(path, reduce) for path, reduce in paths if os.path.isfile(path)]
    if len(present) < _MIN_PHOTOS:
        how = install_packages("-U", *_PACKAGES)
        raise ValueError(f"the installed packages hold {len(present)} of {len(paths)} demo photographs: {how}")
    return present


def _open_photo(path: str, reduce: int) -> Image.Image:
    with Image.open(path) as image:
        return image.reduce(reduce) if reduce > 1 else image.copy()


def _tiles(path: str, reduce: int, size: int, val_fraction: float) -> Iterator[_Tile]:
    with Image.open(path) as image:  # reads the header only
        width, height = -(-image.width // reduce), -(-image.height // reduce)
    held_out = max(size, round(val_fraction * width)) if val_fraction and width >= 2 * size else 0
    stem = os.path.splitext(os.path.basename(path))[0]
    for split, low, high in (("train", 0, width - held_out), ("val", width - held_out, width)):
        for top in _starts(0, height, size):
            for left in _starts(low, high, size):
                yield _Tile(split, f"{stem}_{size}_{left:04d}_{top:04d}.jpg", (left, top, left + size, top + size))


def _starts(low: int, high: int, size: int) -> list[int]:
    """Evenly spaced starts of tiles in [low, high), about 3/8 of a tile apart, the first and last flush."""
    room = high - low - size
    if room < 0:
        return []
    count = min(_MAX_TILES_PER_AXIS, 1 + round(room / (0.375 * size)))
    return [low + (room * i) // max(count - 1, 1) for i in range(count)]


def _write_tiles(directory: str, path: str, reduce: int, tiles: list[_Tile]) -> None:
    photo = _open_photo(path, reduce)
    for tile in tiles:
        target = os.path.join(directory, tile.split, tile.name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        # Through memory: Pillow writes a JPEG to a file itself, and is content where a full disk takes a part of it.
        encoded = io.BytesIO()
        photo.crop(tile.box).save(encoded, "JPEG", quality=_JPEG_QUALITY)
        with naming(target):
            Path(target).write_bytes(encoded.getvalue())


def _finished(directory: str, settings: dict[str, float]) -> DemoCounts | None:
    try:
        with open(os.path.join(directory, _MARKER), encoding="utf-8") as file:
            found = json.load(file)
        counts = DemoCounts(found.pop("train"), found.pop("val"))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError):
        raise ValueError(f"{directory}/{_MARKER} is not from `fastmim data demo`; choose another folder") from None
    if found != settings:
        raise ValueError(f"{directory} holds a demo made with {found}, not {settings}; choose another folder")
    complete = all(len(_list(os.path.join(directory, split))) == count for split, count in counts._asdict().items())
    return counts if complete else None


def _refuse_foreign_files(directory: str, ours: set[str]) -> None:
    for split in DemoCounts._fields:
        for name in _list(os.path.join(directory, split)):
            if os.path.join(split, name) not in ours:
                raise ValueError(f"{directory} already holds {split}/{name}; choose another folder for the demo")


def _list(folder: str) -> list[str]:
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []
