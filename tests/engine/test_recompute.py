"""Recomputation changes what is kept for the backward pass, never a bit of the loss or of a gradient."""

from __future__ import annotations

import gc

import pytest
import torch

from fastmim.engine.recompute import POLICIES, apply_recompute
from fastmim.objectives import create_objective

# Stochastic depth in every block but the first, a shift, and SwinV2's extra norm: what a repetition could get wrong.
ENCODERS = {
    "swinv2": dict(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, extra_norm_period=2),
    "swin": dict(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4),
    "swinv2 visible": dict(embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=3),
    "vit": dict(embed_dim=16, depth=3, num_heads=2, init_values=0.1, shared_rel_pos_bias=True),
}


def build(name, policy="none", **options):
    torch.manual_seed(3)
    family, *visible = name.split()
    encoder = dict(name=family, img_size=32, patch_size=4, drop_path_rate=0.5, **ENCODERS[name])
    how = dict(visible_only=True, decoder_dim=16, decoder_num_heads=2) if visible else {}
    objective = create_objective("simmim", encoder=encoder, unit=8, **how)
    return objective, apply_recompute(objective, policy, **options)


def loss_and_gradients(objective, precision):
    torch.manual_seed(5)
    images, mask = torch.randn(4, 3, 32, 32), objective.random_mask(torch.arange(4))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = objective(images, mask)["loss"]
    loss.backward()
    # The next draw shows that the repetition has left the generator as it was.
    return [loss.detach(), torch.rand(2), *(p.grad for p in objective.parameters() if p.grad is not None)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ENCODERS)
def test_same_bits_under_every_policy(name, precision):
    expected = loss_and_gradients(build(name)[0], precision)
    cases = [(policy, {}) for policy in POLICIES] + [("full", {"every": 2}), ("full", {"offload": True})]
    for policy, options in cases:
        objective, _ = build(name, policy, **options)
        found = loss_and_gradients(objective, precision)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (policy, options)


def live_tensors():
    """Every tensor the collector knows. `type`, not `isinstance`: that asks weak proxies, which may be dead."""
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]


def kept_bytes(policy):
    """Bytes of tensors that a forward pass leaves behind for the backward pass, besides the model's own."""
    objective, _ = build("swinv2", policy)
    images, mask = torch.randn(8, 3, 32, 32), objective.random_mask(torch.arange(8))
    before = {id(o) for o in live_tensors()}
    storages = {}
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        loss = objective(images, mask)["loss"]
    gc.collect()
    for tensor in [*seen, *(o for o in live_tensors() if id(o) not in before)]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    own = {t.untyped_storage().data_ptr() for t in (*objective.parameters(), *objective.buffers())}
    assert loss.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_each_policy_keeps_less_than_the_one_before():
    kept = {policy: kept_bytes(policy) for policy in ("none", "fc1", "fc1_qkv", "full")}
    assert list(kept.values()) == sorted(kept.values(), reverse=True) and len(set(kept.values())) == 4
    # Of the blocks only their inputs are left: at these sizes less than half of everything.
    assert kept["full"] < 0.5 * kept["none"], kept
    assert kept["full"] < kept_bytes("gemm") < kept["none"]


def test_counts_blocks():
    assert build("vit", "full", every=2)[1] == 2  # blocks 0 and 2 of three
    assert build("swin", "full")[1] == 4
    assert build("swin", "none")[1] == 0


def test_no_recomputation_without_gradients():
    objective, _ = build("swinv2", "full")
    calls = []
    objective.encoder.layers[0].blocks[0].attn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        objective(torch.randn(2, 3, 32, 32), objective.random_mask(torch.arange(2)))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "options, message",
    [(dict(policy="half"), "efficiency.recompute='half'"), (dict(policy="gemm", offload=True), "use full")],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        apply_recompute(torch.nn.Linear(2, 2), **options)
