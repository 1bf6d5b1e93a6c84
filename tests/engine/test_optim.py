"""Decay groups against lists read off the published models, and the optimiser that is built from them."""

from __future__ import annotations

import pytest
import torch

from fastmim.engine.optim import build_optimizer, param_groups
from fastmim.objectives import create_objective

SWIN = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (1, 2),
    "window_size": 4,
}
ENCODERS = {
    "swin": SWIN | {"name": "swin"},
    "swinv2": SWIN | {"name": "swinv2"},
    "vit": {"name": "vit", "img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2,
            "init_values": 0.1, "shared_rel_pos_bias": True, "abs_pos_embed": True},
}  # fmt: skip

# Tensors with two or more dimensions that are not weight matrices, and whether the references decay them.
SPECIAL = {
    "swin": {"encoder.mask_token": False, "relative_position_bias_table": True},
    "swinv2": {"encoder.mask_token": False, "cpb_mlp.0.weight": True, "cpb_mlp.2.weight": True,
               "logit_scale": True},
    "vit": {"encoder.mask_token": True, "encoder.cls_token": False, "encoder.pos_embed": False,
            "relative_position_bias_table": True},
}  # fmt: skip


def build(family):
    return create_objective("simmim", encoder=ENCODERS[family], unit=8)


def decays(groups):
    return {name: group["weight_decay"] > 0 for group in groups for name in group["param_names"]}


@pytest.mark.parametrize("policy", ["parity", "default"])
@pytest.mark.parametrize("family", ENCODERS)
def test_every_parameter_is_in_one_group(family, policy):
    objective = build(family)
    groups = param_groups(objective, 0.05, policy)
    assert sorted(group["name"] for group in groups) == ["decay", "no_decay"]
    members = [param for group in groups for param in group["params"]]
    assert len(members) == len(set(members))
    assert set(members) == set(objective.parameters())
    named = dict(objective.named_parameters())
    for group in groups:
        assert [named[name] for name in group["param_names"]] == group["params"]
        assert group["weight_decay"] == (0.05 if group["name"] == "decay" else 0.0)


@pytest.mark.parametrize("family", ENCODERS)
def test_parity_groups(family):
    decayed = decays(param_groups(build(family), 0.05, "parity"))
    shapes = {name: param.shape for name, param in build(family).named_parameters()}
    seen = set()
    for name, got in decayed.items():
        special = next((key for key in SPECIAL[family] if name.endswith(key)), None)
        seen.add(special)
        expected = (
            SPECIAL[family][special] if special else len(shapes[name]) > 1 and not name.endswith(".bias")
        )
        assert got == expected, name
    assert set(SPECIAL[family]) <= seen  # the models really have these tensors


@pytest.mark.parametrize("family", ENCODERS)
def test_default_groups_spare_tables_tokens_and_scales(family):
    decayed = decays(param_groups(build(family), 0.05, "default"))
    for name, got in decayed.items():
        assert not (got and name.endswith(tuple(SPECIAL[family]))), name
    assert any(decayed.values())
    assert decayed["head.weight"]


def test_frozen_parameters_are_left_out():
    objective = build("swin")
    objective.encoder.requires_grad_(False)
    groups = param_groups(objective, 0.05)
    assert {name for group in groups for name in group["param_names"]} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("arguments", "message"), [((-1.0, "parity"), "negative"), ((0.1, "parit"), "unknown")]
)
def test_wrong_group_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        param_groups(build("swin"), *arguments)


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="optim.name='sgd'"):
        build_optimizer("sgd", param_groups(build("swin"), 0.05), 1e-3)


def test_fused_demanded_where_there_is_none():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, device="meta"))]}]
    with pytest.raises(ValueError, match="efficiency.fused_optimizer"):
        build_optimizer("adamw", groups, 1e-3, fused=True)
    assert not build_optimizer("adamw", groups, 1e-3).param_groups[0]["fused"]


def test_one_update_is_decoupled_adamw():
    """First AdamW update in closed form: p(1 - lr wd) - lr g / (|g| + eps), since both moments cancel."""
    param = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer("adamw", [{"params": [param], "weight_decay": 0.05}], 0.1, eps=1e-8)
    param.grad = torch.tensor([[3.0, -0.5]])
    optimizer.step()
    expected = torch.tensor([[1 * 0.995 - 0.1, -2 * 0.995 + 0.1]])
    torch.testing.assert_close(param.data, expected)


def test_one_update_is_lamb():
    """First LAMB update (You et al. 2020, algorithm 2): u = g / (|g| + eps) + wd p, then p - lr |p| / |u| u."""
    param = torch.nn.Parameter(torch.tensor([[3.0, -4.0]]))
    optimizer = build_optimizer("lamb", [{"params": [param], "weight_decay": 0.05}], 0.1, eps=1e-8)
    param.grad = torch.tensor([[300.0, -0.5]])  # a large gradient: nothing clips
    optimizer.step()
    update = torch.tensor([[1 + 0.15, -1 - 0.2]])
    expected = torch.tensor([[3.0, -4.0]]) - 0.1 * 5 / update.norm() * update
    torch.testing.assert_close(param.data, expected)


@pytest.mark.parametrize("fused", [True, "cpu_adam"])
def test_kernels_that_lamb_does_not_have(fused):
    with pytest.raises(ValueError, match="efficiency.fused_optimizer=(true|cpu_adam): there is no such LAMB"):
        build_optimizer("lamb", param_groups(build("swin"), 0.05), 1e-3, fused=fused)
