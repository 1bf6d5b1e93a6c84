"""``fastmim data stats``: mean and standard deviation of every band of a config's images, and the config with them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from fastmim.files import naming, write_text
from fastmim.wording import plural

from .configs import UNNORMALISED
from .console import bar, write

_DIGITS = 7  # of float32


def data_stats(options: argparse.Namespace) -> int:
    """Measure, print, and put into a config where that is asked for."""
    from fastmim.config import load_config
    from fastmim.data.held_out import split
    from fastmim.data.reading import opening_of, reading_of
    from fastmim.data.source import open_index
    from fastmim.data.statistics import measure

    cfg = load_config(options.config, [*options.overrides, *UNNORMALISED])
    data = cfg.data
    how = {key: value for key, value in reading_of(data, "max_bad_fraction").items() if key not in ("mean", "std")}
    index = open_index(data.path, data.file_list, **opening_of(data))
    if data.val_fraction is not None:
        index = split(index, data.val_fraction, held_out=False)
    with bar() as progress:
        found = measure(index, in_chans=cfg.model.in_chans, progress=progress, **how)
    values = {key: [float(f"{one:.{_DIGITS}g}") for one in getattr(found, key)] for key in ("mean", "std")}
    lines = [f"left out {path}: {reason}" for path, reason in sorted(found.bad.items())]
    lines += [f"data.{key}={value}" for key, value in values.items()]
    if data.no_data is not None:
        lines.append("samples that are data: " + ", ".join(f"{share:.1%}" for share in found.data))
    lines.append(f"{index.root}: {plural(found.images, 'image')}, {plural(len(found.bad), 'bad file')}")
    if options.write is not None:
        with naming(options.write):
            _put(Path(options.write), options.config, options.overrides, values)
        lines.append(f"{options.write}: data.mean and data.std written")
    write("\n".join(lines) + "\n")
    return 0


def _put(target: Path, config: str, overrides: list[str], values: dict[str, list[float]]) -> None:
    """Into the file as it is; a new one builds on CONFIG and has the overrides too."""
    from fastmim.config import read_tree
    from fastmim.config.edit import with_values
    from fastmim.config.yaml_text import dump

    try:
        if target.exists():
            text = target.read_text(encoding="utf-8")
        else:
            text = dump({"base": os.path.relpath(config, target.parent), **read_tree(None, overrides)})
        write_text(target, with_values(text, "data", values))
    except ValueError as error:
        raise ValueError(f"--write {target}: {error}") from None
