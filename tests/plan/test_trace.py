"""The trace against real tensors: what the CPU's allocator and autograd's hooks say is kept, policy by policy."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastmim.engine.cuda_autocast import cuda_autocast
from fastmim.engine.recompute import apply_recompute
from fastmim.models import attend, create_encoder
from fastmim.objectives import create_objective, losses, simmim
from fastmim.plan.counter import DispatchCounter
from fastmim.plan.saved import SavedTensors
from fastmim.plan.trace import Footprint, trace

# Deep enough that most of what is kept lies in blocks; a window that shifts, an extra norm, and a ViT with LayerScale.
MODELS: dict[str, dict[str, Any]] = {
    "swin": dict(name="swin", img_size=64, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4),
    "swinv2": dict(name="swinv2", img_size=64, embed_dim=48, depths=(2, 4), num_heads=(3, 6), window_size=8,
                   extra_norm_period=2, drop_path_rate=0.2),
    "vit": dict(name="vit", img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, init_values=0.1,
                shared_rel_pos_bias=True, drop_path_rate=0.1),
    "mae": dict(name="vit", img_size=128, patch_size=8, embed_dim=96, depth=4, num_heads=3, key_bias=True,
                abs_pos_embed="sincos", init="mae"),
}  # fmt: skip
MODELS["moco"] = dict(MODELS["mae"], abs_pos_embed="sincos_moco", init="moco")
MODELS["swinv2, mae"] = dict(MODELS["swinv2"], extra_norm_period=0, drop_path_rate=0.0)
CASES = [(model, policy) for model in MODELS if model != "moco" for policy in ("none", "fc1_qkv", "full")]
MODELS["swin, visible tokens"] = MODELS["swin, bins in parts"] = MODELS["swin"]
OPTIONS: dict[str, dict[str, Any]] = {
    "swin, visible tokens": dict(visible_only=True, decoder_dim=64, decoder_num_heads=2),
    "swin, bins in parts": dict(target="bins", bins=256, head="mlp"),
    "moco": dict(hidden_dim=512, out_dim=64),
}
CASES += [("swinv2", "fc1"), ("vit", "gemm"), ("swin, visible tokens", "none"), ("swin, visible tokens", "full")]
CASES += [("moco", "none"), ("moco", "full"), ("swin, bins in parts", "none")]
DECODER = dict(decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=True)
BATCH = 6


def builder(model: str, policy: str = "none", norm_target: int = 0) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        name, own = ("mae", DECODER) if "mae" in model else ("simmim", dict(norm_target=norm_target))
        name, own = ("moco", {}) if model == "moco" else (name, own)
        own = own | OPTIONS.get(model, {})
        objective = create_objective(name, encoder=MODELS[model], **own, impl="torch")
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
    """The planner counts a GPU's step; a CPU leaves out rows of the last block, and attends by plain products."""
    monkeypatch.setattr(simmim, "masked_tokens", lambda *args: None)
    monkeypatch.setattr(attend, "MOST_TOKENS", 0)


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


def test_a_frozen_tokenizer_is_counted(tmp_path) -> None:
    """Its weights once, float32 under bf16 too, and the products of its encoder, of 2 FLOPs each."""
    settings = dict(name="dvae", img_size=32, patch_size=4, embed_dim=8, depth=0, codes=32, code_dim=4)
    model = create_encoder(settings)
    save_file(model.state_dict(), tmp_path / "tokenizer.safetensors", {"encoder": json.dumps(settings)})

    def build(tokenizer: str | None) -> Callable[[], nn.Module]:
        how = dict(codes=32, num_mask=20, min_block=4, impl="torch")
        return lambda: create_objective("beit", encoder=MODELS["vit"], tokenizer=tokenizer, **how)

    plain, held = (trace(build(path), (2, 4)) for path in (None, str(tmp_path / "tokenizer.safetensors")))
    assert held[0].frozen - plain[0].frozen == 4 * sum(p.numel() for p in model.parameters())
    assert plain[0].parameters == held[0].parameters
    flops = [sum(launch.flops for launch in found[0].launches) for found in (plain, held)]
    # Two 4 × 4 convolutions to 16² and 8² places, and the one to the codes.
    by_hand = 2 * (16**2 * 8 * 3 * 16 + 8**2 * 8 * 8 * 16 + 8**2 * 32 * 8)
    assert flops[1] - flops[0] == 2 * by_hand  # of two images


def test_statistics_of_batch_norm_are_on_every_rank() -> None:
    """Mean and variance of 2·512 + 64 features twice, of 512 + 64 once (the predictor), float32; a counter a norm."""
    objective = builder("moco")()
    others = sum(b.nbytes for name, b in objective.named_buffers() if "running_" not in name and "batches" not in name)
    norms = 2 * (2 * (2 * 512 + 64)) + 2 * (512 + 64)
    assert trace(builder("moco"), (2, 4))[0].frozen - others == 4 * norms + 8 * 8


HEADS: list[dict[str, Any]] = [
    dict(head="mlp"),
    dict(target="bins", target_stride=4),
    dict(target="bins", bins=256, target_stride=4),
    dict(target_stride=8),
]


@pytest.mark.parametrize("own", HEADS, ids=lambda own: " ".join(map(str, own.values())))
def test_what_a_head_and_its_target_multiply_is_counted(own: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Products forward and twice backward, of all tokens where the loss is on all pixels; again where in parts."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1 << 14)

    def flops(**own: Any) -> int:
        built = lambda: create_objective("simmim", encoder=MODELS["swin"], loss_on="all", impl="torch", **own)  # noqa: E731
        return sum(launch.flops for launch in trace(built, (2, 4))[0].launches)

    tokens, dim = 2 * 8 * 8, 64
    values = own.get("bins", 8 if own.get("target") else 1) * 3 * (8 // own.get("target_stride", 1)) ** 2
    times = 4 if tokens // 2 * values > 1 << 14 and own.get("target") else 3
    hidden = 6 * tokens * dim * dim if own.get("head") == "mlp" else 0
    linear = 6 * tokens * dim * 3 * 8**2
    assert flops(**own) - flops() == 2 * times * tokens * dim * values + hidden - linear
