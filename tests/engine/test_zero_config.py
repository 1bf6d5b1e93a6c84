"""What a user can get wrong around ZeRO is one line, before anything is loaded; and how a model is built in pieces."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from torch import nn

from fastmim.config import load_config
from fastmim.engine.distributed import World
from fastmim.engine.optim import build_optimizer
from fastmim.engine.zero import nvme
from fastmim.engine.zero.build import _Recorder, _Replay, _storage
from fastmim.objectives import create_objective


@pytest.mark.parametrize(
    "override, message",
    [
        ("efficiency.offload_optimizer=cpu", r"efficiency.offload_optimizer=cpu: needs efficiency.zero_stage"),
        ("efficiency.precision=fp16", r"efficiency.precision=fp16: needs efficiency.zero_stage 1, 2 or 3, not null"),
        ("efficiency.deepspeed={wall_clock_breakdown: true}", r"efficiency.deepspeed=.*needs efficiency.zero_stage"),
        ("efficiency.zero_stage=4", r"efficiency.zero_stage=4: expected one of 0, 1, 2, 3"),
        ("efficiency.recompute=half", r"efficiency.recompute=half: expected one of none, fc1"),
        ("efficiency.recompute_offload=true", r"efficiency.recompute_offload=true: .* use full"),
        ("efficiency={zero_stage: 2, deepspeed: {zero_optimization: 3}}", r"zero_optimization=3: expected a section"),
        ("efficiency.recompute_every=2", r"efficiency.recompute_every=2: not with recompute=none; use recompute=full"),
        ("efficiency.nvme_path=/drive", r"efficiency.nvme_path=/drive: nothing is offloaded to it; .* nvme_path=null"),
        ("efficiency.fused_optimizer=apexx", r"efficiency.fused_optimizer=apexx: expected auto, true, false, apex"),
    ],
)
def test_config_refuses(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_fp16_at_stage_0():
    """Stage 0 runs without DeepSpeed's loss scaling: small gradients would become zero unseen."""
    with pytest.raises(ValueError, match="efficiency.precision=fp16: needs efficiency.zero_stage 1, 2 or 3, not 0"):
        load_config(None, ["efficiency.zero_stage=0", "efficiency.precision=fp16"])
    for stage in (1, 2, 3):
        load_config(None, [f"efficiency.zero_stage={stage}", "efficiency.precision=fp16"])


@pytest.mark.parametrize(
    "stage, keys, message",
    [
        (0, "offload_optimizer=cpu", "offload_optimizer=cpu: needs efficiency.zero_stage 1, 2 or 3"),
        ("null", "offload_param=cpu", "offload_param=cpu: needs efficiency.zero_stage=3"),
        (2, "offload_param=cpu", "offload_param=cpu: needs efficiency.zero_stage=3"),
        (2, "offload_param=nvme nvme_path=/drive", "offload_param=nvme: needs efficiency.zero_stage=3"),
        (2, "offload_optimizer=nvme nvme_path=/drive", "offload_optimizer=nvme: needs efficiency.zero_stage=3; or use"),
        (3, "offload_optimizer=nvme", "nvme_path=null: offload to nvme needs a folder"),
        (3, "offload_optimizer=cpu offload_param=nvme", "nvme_path=null: offload to nvme needs a folder"),
        (3, "offload_optimizer=cpu offload_param=cpu nvme_path=/drive", "nvme_path=/drive: nothing is offloaded to it"),
    ],
)
def test_offload_that_does_not_fit(stage, keys, message):
    with pytest.raises(ValueError, match=f"efficiency.{message}"):
        load_config(None, [f"efficiency.{key}" for key in (f"zero_stage={stage}", *keys.split())])


@pytest.mark.parametrize(
    "stage, keys",
    [
        (1, "offload_optimizer=cpu"),
        (3, "offload_optimizer=cpu offload_param=cpu"),
        (3, "offload_optimizer=nvme nvme_path=/drive"),
        (3, "offload_param=nvme nvme_path=/drive"),
    ],
)
def test_offload_that_fits_needs_neither_deepspeed_nor_the_drive(stage, keys, monkeypatch):
    """A config is read on other machines than the one that trains: its folders are looked for there."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    load_config(None, [f"efficiency.{key}" for key in (f"zero_stage={stage}", *keys.split())])


def test_stage_3_with_compile():
    with pytest.raises(ValueError, match="efficiency.compile=true: not with zero_stage=3"):
        load_config(None, ["efficiency.zero_stage=3", "efficiency.compile=true"])


def test_nested_deepspeed_keys_from_the_command_line():
    overrides = ["efficiency.zero_stage=2", "efficiency.deepspeed.zero_optimization.reduce_bucket_size=5e6"]
    cfg = load_config(None, [*overrides, "efficiency.deepspeed.prescale_gradients=true"])
    assert cfg.efficiency.deepspeed == {"zero_optimization": {"reduce_bucket_size": 5e6}, "prescale_gradients": True}


def deepspeed_config(**changes):
    pytest.importorskip("deepspeed")
    from fastmim.engine.zero import config

    config.import_deepspeed(torch.device("cpu"))
    settings = dict(stage=3, micro_batch_size=4, grad_accum_steps=2, world_size=8, clip_grad=5.0, precision="bf16")
    return config.deepspeed_config(**settings | changes)


def test_the_configuration():
    extra = {"zero_optimization": {"overlap_comm": False}, "aio": {"queue_depth": 16}}
    config = deepspeed_config(offload_optimizer="cpu", extra=extra)
    assert config["train_batch_size"] == 64
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "overlap_comm": False}
    assert config["bf16"] == {"enabled": True} and config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"
    assert deepspeed_config(precision="fp16")["fp16"] == {"enabled": True}
    assert "bf16" not in deepspeed_config(stage=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(extra={"zero_optimisation": {}}), "zero_optimisation: .*did you mean zero_optimization"),
        (dict(extra={"zero_optimization": {"overlap_com": True}}), "overlap_com: .*did you mean overlap_comm"),
        (dict(extra={"aio": {"queue_dept": 1}}), "aio.queue_dept: .*did you mean queue_depth"),
        (dict(extra={"loss_scale": 1}), "loss_scale: DeepSpeed has no such key"),
        (dict(extra={"gradient_clipping": 1}), "decided by optim.clip_grad"),
        (dict(extra={"zero_optimization": {"stage": 1}}), "decided by efficiency.zero_stage"),
        (dict(extra={"flops_profiler": {"profile_stp": 5}}), "flops_profiler.profile_stp: .*did you mean profile_step"),
        (dict(extra={"tensorboard": {"output_pth": "x"}}), "tensorboard.output_pth: .*did you mean output_path"),
        (dict(extra={"csv_monitor": {"job_nam": "x"}}), "csv_monitor.job_nam: .*did you mean job_name"),
        (dict(extra={"wandb": {"projct": "x"}}), "wandb.projct: .*did you mean project"),
        (dict(extra={"comet": {"onlin": True}}), "comet.onlin: .*did you mean online"),
        (dict(extra={"comms_logger": {"verbos": True}}), "comms_logger.verbos: .*did you mean verbose"),
        (dict(extra={"compile": {"deep_compile": True}}), "compile.deep_compile: .*did you mean deepcompile"),
        (dict(extra={"timers": {"throughput": {"enable": True}}}), "timers.throughput.enable: .*did you mean enabled"),
        (dict(extra={"zero_optimization": {"leaf_module": {"class": "x"}}}), "leaf_module.class: .*mean classes"),
        (dict(extra={"zero_optimization": {1: 2}}), "zero_optimization.1: DeepSpeed has no such key"),
        (dict(extra={"use_node_local_storage": True}), "use_node_local_storage: DeepSpeed has no such key"),
        (dict(extra={"fp16": {"enabled": False}}), "fp16.enabled: decided by efficiency.precision"),
        (dict(extra={"elasticity": {"enabled": True}}), "elasticity: decided by train.global_batch_size"),
        (dict(extra={"zero_optimization": {"cpu_offload": True}}), "decided by efficiency.offload_optimizer"),
        (dict(extra={"zero_optimization": 3}), "deepspeed.zero_optimization=3: expected a section of keys and values"),
        (dict(extra={"aio": None}), "deepspeed.aio=null: expected a section"),
        (dict(extra={"timers": {"throughput": True}}), "deepspeed.timers.throughput=true: expected a section"),
        (dict(extra={"zero_optimization": {"offload_param": "cpu"}}), 'offload_param="cpu": expected a section'),
        (dict(offload_param="nvme", nvme_path="/no/such/drive"), "efficiency.nvme_path=/no/such/drive: no such folder"),
    ],
)
def test_deepspeed_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        deepspeed_config(**changes)
    assert "\n" not in str(error.value)


def test_keys_of_every_section_are_taken():
    """As DeepSpeed's configuration reference writes them."""
    extra = {
        "flops_profiler": {"enabled": True, "profile_step": 3, "module_depth": -1, "top_modules": 1, "detailed": True,
                           "output_file": None},
        "tensorboard": {"enabled": True, "output_path": "a", "job_name": "b"},
        "wandb": {"enabled": False, "group": "a", "team": "b", "project": "c"},
        "csv_monitor": {"enabled": True, "output_path": "a", "job_name": "b"},
        "comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False, "prof_ops": []},
        "timers": {"throughput": {"enabled": True, "synchronized": False}},
        "fp16": {"loss_scale_window": 500, "initial_scale_power": 12, "hysteresis": 2, "min_loss_scale": 1},
        "activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4},
        "zero_optimization": {"stage3_prefetch_bucket_size": 1000, "offload_param": {"pin_memory": True}},
        "communication_data_type": "bf16", "steps_per_print": 10, "wall_clock_breakdown": True, "dump_state": True,
    }  # fmt: skip
    config = deepspeed_config(extra=extra)
    assert config["flops_profiler"] == extra["flops_profiler"] and config["steps_per_print"] == 10


@pytest.fixture
def own_group(monkeypatch):
    """Takes back the process group and the environment that a run under ZeRO leaves for the next one."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_a_batch_that_does_not_fit(settings, tmp_path, own_group):
    from fastmim.engine.train import train

    changes = dict(train__global_batch_size=12, train__grad_accum_steps=2, efficiency__zero_stage=2)
    with pytest.raises(ValueError, match=r"train.grad_accum_steps=2: global_batch_size=12 needs 3"):
        train(settings(tmp_path, **changes))


def test_fp16_on_a_cpu(settings, tmp_path, own_group):
    pytest.importorskip("deepspeed")
    from fastmim.engine.train import train

    with pytest.raises(ValueError, match="efficiency.precision=fp16: not on a CPU"):
        train(settings(tmp_path, efficiency__zero_stage=1, efficiency__precision="fp16"))


def test_without_deepspeed(settings, tmp_path, monkeypatch, own_group):
    from fastmim.engine.train import train

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"DeepSpeed is not installed; .*pip install -e \"\S+\[zero\]\""):
        train(settings(tmp_path, efficiency__zero_stage=1))


def test_the_apex_of_pypi_is_not_nvidias(monkeypatch):
    """PyPI's apex has no optimizers; NVIDIA's FusedAdam is used where it is there."""
    params = [{"params": [nn.Parameter(torch.ones(2))]}]
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(ValueError, match="efficiency.fused_optimizer=apex: NVIDIA's apex is not installed"):
        build_optimizer("adamw", params, 1e-3, fused="apex")
    optimizers = types.ModuleType("apex.optimizers")
    optimizers.FusedAdam = lambda groups, **options: options
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    options = build_optimizer("adamw", params, 1e-3, betas=(0.8, 0.9), fused="apex")
    assert options == {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-8, "adam_w_mode": True}
    with pytest.raises(ValueError, match="fused_optimizer=apex: NVIDIA's apex is not installed"):
        build_optimizer("lamb", params, 1e-3, fused="apex")
    optimizers.FusedLAMB = lambda groups, **options: options
    options = build_optimizer("lamb", params, 1e-3, betas=(0.8, 0.9), fused="apex")
    assert options == {"lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-8, "max_grad_norm": math.inf}


def test_swapped_gradients_are_found():
    """Two tensors with each other's update, as DeepSpeed's offload to NVMe was seen to give."""
    right = [torch.full((4,), float(i)) for i in range(4)]
    nvme.compare_updates([t.clone() for t in right], right, "key")
    with pytest.raises(ValueError, match="key: .* 2 of 4 test tensors get a wrong update .* use cpu"):
        nvme.compare_updates([right[0], right[2], right[1], right[3]], right, "key")


@pytest.mark.parametrize(
    "devices, asked",
    [
        (dict(offload_optimizer="nvme"), "efficiency.offload_optimizer=nvme"),
        (dict(offload_param="nvme"), "efficiency.offload_param=nvme"),
        (dict(offload_optimizer="cpu", offload_param="nvme"), "efficiency.offload_param=nvme"),
        (
            dict(offload_optimizer="nvme", offload_param="nvme"),
            "efficiency.offload_optimizer=nvme and efficiency.offload_param=nvme",
        ),
    ],
)
@pytest.mark.parametrize("fault", ["wrong", "refused", None])
def test_the_key_that_asked_for_nvme_is_named(devices, asked, fault, monkeypatch):
    """DeepSpeed's update on the drive differs, fails, or is right; the one in memory is done without any offload."""
    config = {"zero_optimization": {"stage": 3} | {name: {"device": device} for name, device in devices.items()}}

    def updated(config, make_optimizer, world):
        in_memory = config["zero_optimization"] == {"stage": 3}
        if fault == "refused" and not in_memory:
            raise RuntimeError("no\nlibaio")
        return [torch.full((2,), 2.0 if fault == "wrong" and not in_memory else 1.0)]

    monkeypatch.setattr(nvme, "_updated", updated)
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    if fault is None:
        nvme.check_nvme(config, lambda params: None, world=world)
        return
    with pytest.raises(ValueError) as error:
        nvme.check_nvme(config, lambda params: None, world=world)
    message = {"wrong": "with this DeepSpeed 1 of 1", "refused": "DeepSpeed cannot do it here (no libaio); use cpu"}
    assert str(error.value).startswith(f"{asked}: {message[fault]}")


@pytest.mark.parametrize(
    "encoder",
    [
        dict(name="swinv2", embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4, extra_norm_period=2),
        dict(name="swin", embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4),
        dict(name="vit", embed_dim=16, depth=2, num_heads=2, init_values=0.1, rel_pos_bias=True, abs_pos_embed=True),
        dict(name="vit", embed_dim=16, depth=2, num_heads=2, key_bias=True, abs_pos_embed=True, init="timm"),
    ],
    ids=["swinv2", "swin", "vit", "ibot"],
)
def test_replayed_construction_is_the_plain_one(encoder):
    """Every weight bit by bit, SwinV2's zeroed norms and a teacher's too, with a fraction of the model in memory."""
    teacher = "key_bias" in encoder

    def build():
        own = dict(out_dim=32, hidden_dim=24, bottleneck_dim=8) if teacher else dict(unit=8)
        name = "ibot" if teacher else "simmim"
        return create_objective(name, encoder=dict(img_size=32, patch_size=4, **encoder), impl="torch", **own)

    torch.manual_seed(3)
    plain, next_draw = build(), torch.rand(3)
    torch.manual_seed(3)
    with _Recorder() as recorder, torch.device("meta"):
        empty = build()
    found = {}
    replay = _Replay(recorder.operations, {_storage(p): name for name, p in empty.named_parameters()})
    replay.run(lambda name, tensor: found.__setitem__(name, tensor.clone()))
    assert found.keys() == dict(plain.named_parameters()).keys()
    for name, param in plain.named_parameters():
        assert torch.equal(found[name].view_as(param), param), name
    assert torch.equal(torch.rand(3), next_draw)
    # One tensor at a time, or a teacher's beside its student's; but a ViT of SimMIM divides its residual outputs, two
    # of a block's six matrices, at the very end.
    sizes = {name: 4 * p.numel() for name, p in plain.named_parameters()}
    late = sum(size for name, size in sizes.items() if name.endswith(("attn.proj.weight", "mlp.fc2.weight")))
    late = max(sizes.values()) if teacher else late if encoder["name"] == "vit" else 0
    assert replay.most_held <= max(sizes.values()) + 64 + late
