"""The trace against real tensors: what the CPU's allocator and autograd's hooks say is kept, policy by policy."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastmim.engine.cuda_autocast import cuda_autocast
from fastmim.engine.recompute import apply_recompute
from fastmim.objectives import create_objective, simmim
from fastmim.plan.counter import DispatchCounter, SavedTensors
from fastmim.plan.trace import Footprint, trace

# Deep enough that most of what is kept lies in blocks; a window that shifts, an extra norm, and a ViT with LayerScale.
MODELS: dict[str, dict[str, Any]] = {
    "swin": dict(name="swin", img_size=64, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4),
    "swinv2": dict(name="swinv2", img_size=64, embed_dim=48, depths=(2, 4), num_heads=(3, 6), window_size=8,
                   extra_norm_period=2, drop_path_rate=0.2),
    "vit": dict(name="vit", img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, init_values=0.1,
                shared_rel_pos_bias=True, drop_path_rate=0.1),
}  # fmt: skip
CASES = [(model, policy) for model in MODELS for policy in ("none", "fc1_qkv", "full")]
MODELS["swin, visible tokens"] = MODELS["swin"]
OPTIONS: dict[str, dict[str, Any]] = {
    "swin, visible tokens": dict(visible_only=True, decoder_dim=64, decoder_num_heads=2)
}
CASES += [("swinv2", "fc1"), ("vit", "gemm"), ("swin, visible tokens", "none"), ("swin, visible tokens", "full")]
BATCH = 6


def builder(model: str, policy: str = "none", norm_target: int = 0) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        own = OPTIONS.get(model, {})
        objective = create_objective("simmim", encoder=MODELS[model], norm_target=norm_target, impl="torch", **own)
        apply_recompute(objective, policy)
        return objective

    return build


@cache
def kept(model: str, policy: str) -> float:
    """By the planner, from traces of other batch sizes; what ops hold inside is not kept, and takes long to trace."""
    with mock.patch.object(DispatchCounter, "_open", lambda *args: 0):
        return Footprint(*trace(builder(model, policy), (2, 4), on_gpu=False)).kept(BATCH)


def inputs(objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(BATCH, 3, *objective.img_size), objective.random_mask(torch.arange(BATCH))


def allocated_by(run: Callable[[], object]) -> tuple[object, int]:
    """What ``run()`` returns, and the bytes that torch's CPU allocator has given out and not got back since."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    events = found.profiler.kineto_results.events()
    return result, sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.fixture(autouse=True)
def every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner counts a GPU's step; a CPU leaves out rows of the last block."""
    monkeypatch.setattr(simmim, "masked_tokens", lambda *args: None)


@pytest.mark.parametrize("model, policy", CASES)
def test_kept_bytes_are_what_the_allocator_says(model: str, policy: str) -> None:
    objective = builder(model, policy)().train()
    images, mask = inputs(objective)

    def forward() -> torch.Tensor:
        with cuda_autocast():  # left before the count, as in training: inside, autocast keeps casts of weights
            return objective(images, mask)["loss"]

    forward().backward()  # whatever is cached at first use is there
    objective.zero_grad(set_to_none=True)
    loss, measured = allocated_by(forward)
    assert measured == pytest.approx(kept(model, policy), rel=0.05) and loss is not None


@pytest.mark.parametrize("model", MODELS)
def test_kept_bytes_are_what_autograd_saves(model: str) -> None:
    objective = builder(model)().train()
    images, mask = inputs(objective)
    saved = SavedTensors([*objective.parameters(), *objective.buffers(), images, mask])
    with saved, cuda_autocast():
        objective(images, mask)
    assert saved.bytes == pytest.approx(kept(model, "none"), rel=0.05)
