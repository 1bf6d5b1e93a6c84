"""Whether DeepSpeed's offload to NVMe does here what it does in memory: one update of a throwaway module.

DeepSpeed 0.19.8 was seen to give tensors of 1 MiB and more the gradients of other tensors on its CPU
accelerator. Losses look plausible then; only a comparison shows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmim.engine.distributed import World
from fastmim.engine.zero.config import import_deepspeed

# Four matrices above the size from which DeepSpeed swaps (1 MiB), of different shapes, and one below it.
_SHAPES = ((512, 768), (768, 640), (640, 1024), (1024, 512), (16, 16))
_OFFLOADS = ("offload_optimizer", "offload_param")


class _Probe(nn.Module):
    """Every parameter gets a gradient of its own: its number plus a ramp."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for shape in _SHAPES)

    def forward(self, x: Tensor) -> Tensor:
        total = x.sum() * 0
        for number, weight in enumerate(self.weights, start=1):
            ramp = torch.linspace(0, 1, weight.numel(), device=x.device, dtype=weight.dtype).view_as(weight)
            total = total + (weight * (number + ramp)).sum()
        return total


def check_nvme(config: dict[str, Any], make_optimizer: Callable[[list[nn.Parameter]], Any], *, world: World) -> None:
    """Compare one update under ``config`` with the same update kept in memory; every rank calls it.

    Args:
        config: DeepSpeed's, at stage 3 with something offloaded to nvme.
        make_optimizer: builds the run's optimiser over parameters.
        world: this process.

    Raises:
        ValueError: DeepSpeed cannot offload here, or its update differs.
    """
    in_memory = copy.deepcopy(config)
    for name in _OFFLOADS:
        in_memory["zero_optimization"].pop(name, None)
    expected = _updated(in_memory, make_optimizer, world)
    try:
        found = _updated(config, make_optimizer, world)
    except (RuntimeError, AssertionError, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{_asked(config)}: DeepSpeed cannot do it here ({text}); use cpu") from None
    compare_updates(found, expected, _asked(config))


def _asked(config: dict[str, Any]) -> str:
    """The keys of our own config that ask for nvme, as they are set."""
    zero = config["zero_optimization"]
    names = [name for name in _OFFLOADS if zero.get(name, {}).get("device") == "nvme"]
    return " and ".join(f"efficiency.{name}=nvme" for name in names)


def compare_updates(found: Sequence[Tensor], expected: Sequence[Tensor], asked: str) -> None:
    """Refuse offload whose updated weights are not those of the update in memory; ``asked`` is what turns it on.

    Raises:
        ValueError: naming how many tensors differ.
    """
    pairs = zip(found, expected, strict=True)
    wrong = [i for i, (a, b) in enumerate(pairs) if not torch.allclose(a, b, rtol=1e-4, atol=1e-6)]
    if wrong:
        raise ValueError(
            f"{asked}: with this DeepSpeed {len(wrong)} of {len(expected)} test tensors get "
            "a wrong update when they are swapped to the drive, and training would go wrong unseen; use cpu"
        )


def _updated(config: dict[str, Any], make_optimizer: Callable[[list[nn.Parameter]], Any], world: World) -> list[Tensor]:
    deepspeed = import_deepspeed(world.device)
    config = {**config, "gradient_accumulation_steps": 1}
    config["train_batch_size"] = config["train_micro_batch_size_per_gpu"] * world.size
    probe = _Probe().to(world.device)
    engine, *_ = deepspeed.initialize(
        model=probe, optimizer=make_optimizer(list(probe.parameters())), config=config, dist_init_required=False
    )
    engine.backward(engine(torch.ones(1, device=world.device)))
    engine.step()
    params = list(probe.parameters())
    with deepspeed.zero.GatheredParameters(params):
        weights = [param.detach().float().cpu().clone() for param in params]
    engine.destroy()
    return weights
