"""``fastmim data check``: every image decoded, the bad ones named, and what the loader would do to the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from fastmim.data.decode import check_decode_options
from fastmim.data.reading import checked
from fastmim.data.source import VERIFY_AUTO_LIMIT, find_bad_files, open_index
from fastmim.data.survey import survey, warn


def check_images(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    *,
    file_list: str | os.PathLike[str] | None = None,
    follow_links: bool = False,
    component: str | None = None,
    in_chans: int = 3,
    loader: str = "auto",
    min_size: int = 8,
    num_workers: int | None = None,
    **reading: Any,
) -> tuple[int, dict[str, str]]:
    """Decode every image of a folder or list; returns (number of usable files, {path: reason} of the others).

    What is done to the values of the usable ones is logged, of more than 2000 evenly spread ones.

    Args:
        reading: further arguments of :func:`~fastmim.data.decode.decode_image`.

    Raises:
        ValueError: as `open_index`, or for a `reading` that there is not.
    """
    check_decode_options(in_chans, loader, **checked(reading))
    pixels = reading.get("pixels", "uint8")
    index = open_index(path, file_list, follow_links=follow_links, component=component, pixels=pixels)
    options: dict[str, Any] = dict(in_chans=in_chans, loader=loader, min_size=min_size, **reading)
    bad = find_bad_files(index, num_workers=num_workers, **options)
    warn(survey(index, bad, most=VERIFY_AUTO_LIMIT, num_workers=num_workers, **options))
    return len(index) - len(bad), {index.label(i): reason for i, reason in bad.items()}
