"""Power, utilisation and memory of a GPU as NVIDIA's driver reports them."""

from __future__ import annotations

from typing import Any

import torch

from fastmim.wording import install_extra


class Nvml:
    """Samples of one GPU; where there is nothing to sample, ``reason`` says why in one sentence.

    Args:
        device: The device that the process computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self.reason = ""
        self._handle: Any = None
        try:
            import pynvml
        except ImportError:
            how = install_extra("profile")
            self.reason = f"NVML: pynvml is not installed, so no power or utilisation; {how}"
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            self.reason = f"NVML: no NVIDIA driver answers here ({error}), so no power or utilisation"
            return
        if device.type != "cuda":
            self.reason = "NVML: the run is on the CPU, so no power or utilisation"
            return
        self._nvml = pynvml
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    def sample(self) -> dict[str, float]:
        """``power_w``, ``utilization`` (percent of time with a kernel running), ``device_bytes``; {} without NVML."""
        if self._handle is None:
            return {}
        nvml, handle = self._nvml, self._handle
        return {
            "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "utilization": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "device_bytes": float(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        }
