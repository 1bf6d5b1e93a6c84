"""The DeepSpeed configuration of a run, and the check of what a user passes through to it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_DATA_TYPES = {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}

# What the engine itself derives from other keys of this project: given twice, one of them would be ignored.
_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "bf16": "efficiency.precision",
    "bfloat16": "efficiency.precision",
    "torch_autocast": "efficiency.precision",
    "zero_optimization.stage": "efficiency.zero_stage",
    "zero_optimization.offload_optimizer.device": "efficiency.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "efficiency.nvme_path",
    "zero_optimization.offload_param.device": "efficiency.offload_param",
    "zero_optimization.offload_param.nvme_path": "efficiency.nvme_path",
}


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, on this device, without its compiled CPU communication, and on torch's process group.

    Raises:
        ValueError: it is not installed.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ValueError("efficiency.zero_stage: DeepSpeed is not installed; pip install 'fastmim[zero]'") from None
    import logging

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # A faster all-reduce within one CPU machine, which needs a compiler at start-up; gloo gives the same sums.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed


def deepspeed_config(
    *,
    stage: int,
    micro_batch_size: int,
    grad_accum_steps: int,
    world_size: int,
    clip_grad: float | None,
    precision: str,
    offload_optimizer: str = "none",
    offload_param: str = "none",
    nvme_path: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the configuration; ``extra`` (nested dicts) is merged in and must hold only known keys.

    That stage, precision and offload fit together is for the caller to see to: the config's checks do.

    Raises:
        ValueError: a folder that does not exist, an unknown key.
    """
    if nvme_path is not None and not Path(nvme_path).is_dir():
        raise ValueError(f"efficiency.nvme_path={nvme_path}: no such folder; create it or give another")
    zero: dict[str, Any] = {"stage": stage}
    for name, device in (("offload_optimizer", offload_optimizer), ("offload_param", offload_param)):
        if device != "none":
            zero[name] = {"device": device} | ({"nvme_path": str(nvme_path)} if device == "nvme" else {})
    config: dict[str, Any] = {
        "train_batch_size": micro_batch_size * grad_accum_steps * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": grad_accum_steps,
        "gradient_clipping": clip_grad or 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        # The optimisers that the engine builds are right on flat pieces; DeepSpeed knows only some by name.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
    }
    if stage and precision in ("bf16", "fp16"):
        # Stage 0 keeps fp32 weights under autocast: there is nothing to shard, and DeepSpeed's own bf16
        # optimiser of stage 0 was measured to drift.
        config[precision] = {"enabled": True}
        if precision == "bf16":
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    if extra:
        check_extra(extra)
        config = _merged(config, extra)
    return config


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in extra.items():
        mine = result.get(key)
        result[key] = _merged(mine, value) if isinstance(mine, dict) and isinstance(value, Mapping) else value
    return result


def check_extra(extra: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse keys that DeepSpeed does not know (it ignores many typos), or that another key decides.

    Raises:
        ValueError: naming the key, the closest known one, or the key to use instead.
    """
    for key, value in extra.items():
        path = f"{prefix}{key}"
        if path in _OWNED:
            raise ValueError(f"efficiency.deepspeed.{path}: decided by {_OWNED[path]}; set that")
        known = _known(prefix.rstrip("."))
        if known is not None and key not in known:
            close = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"did you mean {close[0]}?" if close else "see DeepSpeed's configuration reference"
            raise ValueError(f"efficiency.deepspeed.{path}: DeepSpeed has no such key; {hint}")
        if isinstance(value, Mapping):
            check_extra(value, f"{path}.")


def _known(section: str) -> set[str] | None:
    """Keys of a section of DeepSpeed's configuration; None where it takes any."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.activation_checkpointing import config as activation
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor import constants as aio
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    models: dict[str, Any] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "fp16": DeepSpeedFP16Config,
    }
    if section in models:
        fields = models[section].model_fields
        return set(fields) | {field.alias for field in fields.values() if field.alias}
    if section == "activation_checkpointing":
        return _strings(activation, "ACT_CHKPT_")
    if section == "aio":
        return _strings(aio, "AIO_")
    if section == "data_types":
        return _DATA_TYPES
    if section:
        return None
    sections = {
        "zero_optimization", "activation_checkpointing", "aio", "fp16", "data_types", "flops_profiler", "tensorboard",
        "wandb", "csv_monitor", "comet", "comms_logger", "compile", "timers", "checkpoint", "elasticity",
    }  # fmt: skip
    # Every JSON key that DeepSpeed reads at the top has a lower-case string constant with a default beside it.
    names = vars(constants)
    found = {value for name, value in names.items() if isinstance(value, str) and f"{name}_DEFAULT" in names}
    inner = set(DeepSpeedFP16Config.model_fields) | _DATA_TYPES | {"enabled", "tag_validation", "load_universal"}
    return (found - inner) | sections


def _strings(module: Any, prefix: str) -> set[str]:
    values = {value for name, value in vars(module).items() if name.startswith(prefix) and isinstance(value, str)}
    return {value for value in values if value.isidentifier()}
