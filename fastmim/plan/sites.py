"""Where in the source an op was called, and its tensors in a few letters."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

_COUNTING = tuple(str(Path(__file__).with_name(name)) for name in ("counter.py", "saved.py", "sites.py"))
_SKIPPED = ("/torch/", *_COUNTING, "cuda_autocast.py", "kernels/common/", "contextlib.py", "functools.py")


def short(tensor: Tensor) -> str:
    """Dtype and shape, such as ``bfloat16[64,36,1024]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}".replace(" ", "")


def caller() -> str:
    """``file.py:line function`` of the innermost frame outside torch and what counts."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in _SKIPPED):
            return f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
