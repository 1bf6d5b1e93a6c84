"""The DeepSpeed configuration of a run, and the check of what a user passes through to it."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch

from fastmim.wording import install_extra

_DATA_TYPES = {"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}

# What the engine itself derives from other keys of this project: given twice, one of them would be ignored.
_OWNED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "gradient_clipping": "optim.clip_grad",
    "optimizer": "optim.name",
    "scheduler": "optim.schedule",
    "managed_gradient_accumulation": "train.grad_accum_steps",
    "elasticity": "train.global_batch_size",
    "checkpoint": "train.save_every",
    "fp16.enabled": "efficiency.precision",
    "bf16": "efficiency.precision",
    "bfloat16": "efficiency.precision",
    "torch_autocast": "efficiency.precision",
    "zero_optimization.stage": "efficiency.zero_stage",
    "zero_optimization.cpu_offload": "efficiency.offload_optimizer",
    "zero_optimization.cpu_offload_param": "efficiency.offload_param",
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
        how = install_extra("zero")
        raise ValueError(f"efficiency.zero_stage: DeepSpeed is not installed; {how}") from None
    import logging
    import warnings

    # Of DeepSpeed's own calls, which torch 2.14 has given other names: nothing that a user could do anything about.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
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
        ValueError: a folder that does not exist, an unknown key, a section that is none.
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
        ValueError: naming the key, and the closest known one, the key to use instead, or what it should hold.
    """
    sections = _sections()
    known = sections[prefix.rstrip(".")]
    for key, value in extra.items():
        path = f"{prefix}{key}"
        if path in _OWNED:
            raise ValueError(f"efficiency.deepspeed.{path}: decided by {_OWNED[path]}; set that")
        if key not in known:
            close = difflib.get_close_matches(str(key), sorted(known), n=1)
            hint = f"did you mean {close[0]}?" if close else "see DeepSpeed's configuration reference"
            raise ValueError(f"efficiency.deepspeed.{path}: DeepSpeed has no such key; {hint}")
        if path in sections:
            if not isinstance(value, Mapping):
                shown = json.dumps(value, default=str)
                raise ValueError(f"efficiency.deepspeed.{path}={shown}: expected a section of keys and values")
            check_extra(value, f"{path}.")


@functools.cache
def _sections() -> dict[str, set[str]]:
    """The keys of every section of DeepSpeed's configuration by its path; the top's is empty."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime.activation_checkpointing import config as activation
    from deepspeed.runtime.precision_config import DeepSpeedFP16Config
    from deepspeed.runtime.swap_tensor import constants as aio
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    sections = {
        "activation_checkpointing": _strings(activation, "ACT_CHKPT_"),
        "aio": _strings(aio, "AIO_"),
        "data_types": _DATA_TYPES,
        "flops_profiler": _strings(profiling, "FLOPS_PROFILER_"),
        "timers": {"throughput"},
        **_of_model("timers.throughput", DeepSpeedThroughputTimerConfig),
        **_of_model("comms_logger", CommsLoggerConfig),
        **_of_model("compile", CompileConfig),
        **_of_model("fp16", DeepSpeedFP16Config),
        **_of_model("zero_optimization", DeepSpeedZeroConfig),
        # Its fields are sections of the top: tensorboard, wandb, csv_monitor, comet.
        **_of_model("", DeepSpeedMonitorConfig),
    }
    return {**sections, "": _top() | {path for path in sections if path and "." not in path}}


def _of_model(path: str, model: Any) -> dict[str, set[str]]:
    """The keys of a section that is a pydantic model, and of the models inside it."""
    found: dict[str, set[str]] = {path: set()}
    for name, field in model.model_fields.items():
        found[path] |= {name, field.alias or name}
        for kind in (field.annotation, *get_args(field.annotation)):
            if hasattr(kind, "model_fields"):
                found |= _of_model(f"{path}.{name}".lstrip("."), kind)
    return found


def _top() -> set[str]:
    """The keys at the top that are no sections, with those that another key decides."""
    from deepspeed.runtime import constants

    # Every JSON key that DeepSpeed reads has a string constant with a default beside it; those of sections too.
    names = vars(constants)
    inside = ("FP16_", "BFLOAT16_", "CHECKPOINT_", "TORCH_AUTOCAST_", "LEGACY_FUSION")
    found = {
        value
        for name, value in names.items()
        if isinstance(value, str) and f"{name}_DEFAULT" in names and not name.startswith(inside)
    }
    return found - _DATA_TYPES - {"load_universal", "use_node_local_storage"}


def _strings(module: Any, prefix: str) -> set[str]:
    values = {value for name, value in vars(module).items() if name.startswith(prefix) and isinstance(value, str)}
    return {value for value in values if value.isidentifier()}
