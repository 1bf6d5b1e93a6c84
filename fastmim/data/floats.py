"""Samples of any number of bands as normalised float32, in which NaN marks no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastmim.data.samples import Samples, UnusableError
from fastmim.wording import plural

Array = np.ndarray[Any, Any]


def all_bands(samples: Samples, in_chans: int) -> Array:
    """(in_chans, H, W) of the colours and the fourth samples of an image of another kind than ``arrays.py`` reads.

    Raises:
        UnusableError: it has other bands, or its reader gives a part of its bits.
    """
    if samples.is_cut:
        raise UnusableError("its reader gives 8 of its 16 bits; save it as TIFF")
    bands = samples.colour
    if samples.fourth is not None:
        bands = np.concatenate([bands, samples.fourth[None]])
    if len(bands) != in_chans:
        what = " (alpha is one)" if samples.is_alpha else ""
        raise UnusableError(f"has {plural(len(bands), 'band')}{what}, and model.in_chans={in_chans}")
    return bands


def to_floats(
    values: Array,
    *,
    no_data: float | str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Array:
    """(value - mean) / std in float32; NaN where there is no data.

    Args:
        values: (C, H, W), integers or floats.
        no_data: the value of samples that are no data, compared in the type of `values`; "nan"; None: all are data.
        mean, std: one for each band, or one for all; None: 0 and 1.

    Raises:
        UnusableError: a sample is not finite and not `no_data`; or none is data.
    """
    gaps = None if no_data is None else _equal(values, no_data)
    with np.errstate(over="ignore"):  # beyond float32 is found below
        floats = values.astype(np.float32, order="C")
    if values.dtype.kind == "f":
        odd = ~np.isfinite(floats)
        if gaps is not None:
            odd &= ~gaps
        if odd.any():
            fix = "; data.no_data=nan takes NaN for no data" if no_data is None and np.isnan(floats[odd]).all() else ""
            raise UnusableError(f"{plural(int(odd.sum()), 'sample')} NaN or infinite{fix}")
    if gaps is not None and gaps.all():
        raise UnusableError(f"every sample is no data (data.no_data={no_data})")
    if mean is not None:
        floats -= np.array(mean, np.float32).reshape(-1, 1, 1)
    if std is not None:
        floats /= np.array(std, np.float32).reshape(-1, 1, 1)
    if gaps is not None:
        floats[gaps] = np.nan
    return floats


def _equal(values: Array, no_data: float | str) -> Array:
    if no_data == "nan":
        return np.isnan(values)
    value = float(no_data)
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            return values == values.dtype.type(value)
    return values == int(value) if value.is_integer() else np.zeros(values.shape, bool)
