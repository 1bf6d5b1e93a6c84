"""An exception as the one line that a user sees."""

from __future__ import annotations

import errno
import re

from fastmim.wording import install_packages

_PACKAGES = {"fastmim_kernels": "fastmim", "yaml": "pyyaml", "PIL": "pillow"}
_PACKAGES |= {name: name for name in ("numpy", "pydantic", "rich", "safetensors", "timm", "torch", "torchvision")}
"""What brings a module that everything needs. (What only some things need says so where it is used.)"""
_LIMITS = {errno.EFBIG: "; see ulimit -f", errno.EMFILE: "; see ulimit -n", errno.EDQUOT: "; see quota"}


def is_our_fault(error: Exception) -> bool:
    """Whether a traceback is more use than one line."""
    return isinstance(error, ModuleNotFoundError) and error.name not in _PACKAGES


def one_line(error: Exception) -> str:
    """What happened, where, and where that is known what to do."""
    if isinstance(error, ModuleNotFoundError) and error.name == "fastmim_kernels":
        return "fastmim_kernels is not on the path; pip install -e . or, in a checkout, PYTHONPATH=.:kernels"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; {install_packages(_PACKAGES[str(error.name)])}"
    if isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror or " ".join(map(str, error.args)) or type(error).__name__
        return _printable(f"{error.filename}: {reason[:1].lower()}{reason[1:]}{_LIMITS.get(error.errno or 0, '')}")
    if lacks_memory(error):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", str(error))
        amount = asked and (f"{int(asked[1]) / 1e9:.3g} GB" if asked[2] == "bytes" else f"{asked[1]} {asked[2]}")
        what = f"{amount} more were asked for" if amount else "the system has no more"
        return f"not enough memory: {what}; a smaller model or train.micro_batch_size needs less (see fastmim plan)"
    return _printable(" ".join(str(error).split())) or type(error).__name__


def lacks_memory(error: Exception) -> bool:
    """Python's own error, or torch's, which are RuntimeErrors."""
    names = ("CUDA out of memory", "DefaultCPUAllocator", "bad_alloc")
    return isinstance(error, MemoryError) or any(name in str(error) for name in names)


def _printable(text: str) -> str:
    """For every terminal: what is not printable as its escape, and no kilobytes of what was given."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 400 else f"{shown[:220]} … {shown[-150:]}"
