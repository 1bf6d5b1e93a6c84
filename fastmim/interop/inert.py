"""PyTorch's files read without running anything in them, whatever objects lie beside the weights.

Training scripts store their settings with the weights: an ``argparse.Namespace``, a ``yacs`` node, NumPy numbers. The
reader with ``weights_only`` refuses the whole file for them. Then the file is read a second time by an unpickler that
knows the functions which rebuild tensors and nothing else: every other class or function becomes a :class:`StandIn`,
which takes all that it is given and does nothing.
"""

from __future__ import annotations

import pickle
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import _utils


class StandIn:
    """In place of an object of another program: nothing is imported for it, called or kept.

    Attributes:
        kind: The class or function that the file names, such as ``argparse.Namespace``.
    """

    kind = "an unknown object"

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def _ignore(self, *_: Any, **__: Any) -> StandIn:
        return self

    # What an unpickler does with an object: its state, and what a list, a set or a dictionary holds.
    __setstate__ = __setitem__ = __call__ = append = extend = add = _ignore


class _Known:
    """One of the functions below; the unpickler can call it and cannot set attributes on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, _: Any) -> None:
        pass


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor"): _utils._rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _utils._rebuild_parameter,
}


def _inert_pickle(met: set[str]) -> Any:
    """A module like ``pickle`` for :func:`torch.load`; the names of what it has replaced are added to ``met``."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            known = _KNOWN.get((module, name))
            if known is not None:
                return _Known(known)
            kind = f"{module}.{name}"
            met.add(kind)
            return type("StandIn", (StandIn,), {"kind": kind})

    inert = types.ModuleType("inert_pickle")
    inert.Unpickler = Unpickler  # type: ignore[attr-defined]
    inert.load = lambda file, **options: Unpickler(file, **options).load()  # type: ignore[attr-defined]
    return inert


def read_torch_file(path: Path) -> tuple[Any, list[str]]:
    """What ``torch.save`` has written to ``path``, on the CPU, and the kinds of objects that were replaced.

    Raises:
        Exception: half a dozen types for a broken file, as torch raises them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a protocol that it may not know
            return torch.load(path, map_location="cpu", weights_only=True), []
    except pickle.UnpicklingError:
        # The two kinds that torch reads in other ways than by unpickling.
        if tarfile.is_tarfile(path) or _is_torchscript(path):
            raise
    met: set[str] = set()
    # Without weights_only torch hands the file to the module given, here the one that knows the functions above.
    content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_inert_pickle(met))
    return content, sorted(met)


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return any(name.rpartition("/")[2] == "constants.pkl" for name in file.namelist())
