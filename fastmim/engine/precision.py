"""What ``efficiency.precision`` is on a device: bfloat16 needs a GPU that computes in it (Ampere and later)."""

from __future__ import annotations

import logging

import torch

log = logging.getLogger("fastmim")

_FAST = "efficiency.precision=fp16 with efficiency.zero_stage=1"


def precision_of(asked: str, *, name: str, bf16: bool) -> str:
    """"fp32", "bf16" or "fp16" on a GPU.

    Args:
        asked: ``efficiency.precision``.
        name: The GPU's, for the message.
        bf16: Whether the GPU computes in bfloat16; torch would emulate it, slower than float32.

    Raises:
        ValueError: bf16 is asked for and the GPU has none.
    """
    if asked == "bf16" and not bf16:
        raise ValueError(f"efficiency.precision=bf16: {name} has no bfloat16; use fp32, or {_FAST}")
    if asked == "auto":
        return "bf16" if bf16 else "fp32"
    return asked


def auto_is_fp32(name: str) -> str:
    """What is said where ``auto`` finds a GPU without bfloat16."""
    return f"efficiency.precision=auto: {name} has no bfloat16, so it is fp32 there; the fast option is {_FAST}"


def device_precision(asked: str, device: torch.device) -> str:
    """``efficiency.precision`` on a device of this machine; ``auto`` is fp32 on a CPU.

    Raises:
        ValueError: see :func:`precision_of`.
    """
    if device.type != "cuda":
        return "fp32" if asked == "auto" else asked
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return precision_of(asked, name=torch.cuda.get_device_name(device), bf16=bf16)


def warn_without_bf16(asked: str, device: torch.device) -> None:
    """One line where ``auto`` is not what it usually is on a GPU."""
    if asked == "auto" and device.type == "cuda" and device_precision(asked, device) == "fp32":
        log.warning(auto_is_fp32(torch.cuda.get_device_name(device)))
