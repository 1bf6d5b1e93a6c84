"""A Swin backwards, against timm's blocks and patch splitting written out."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn

from fastmim.models.inverse_swin import InverseSwin
from fastmim.models.sizes import SIZES

SIZE = dict(embed_dim=6, depths=(2, 1, 2), num_heads=(1, 2, 4), window_size=(4, 4))


def build(grid):
    torch.manual_seed(0)
    model = InverseSwin(5, grid, **SIZE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.double()


def direct(model, tokens):
    """Stage by stage with timm's blocks, whose map is padded by none of these grids."""
    x = tokens @ model.embed.weight.T + model.embed.bias
    for s, layer in enumerate(model.layers):
        if s:
            split = model.splits[s - 1]
            b, h, w, c = x.shape
            # Channel j of place (r, q) comes from output 4·j + 2·r + q.
            x = (x @ split.expansion.weight.T).view(b, h, w, c // 2, 2, 2).permute(0, 1, 4, 2, 5, 3)
            norm = split.norm
            x = nn.functional.layer_norm(x.reshape(b, 2 * h, 2 * w, c // 2), (c // 2,), norm.weight, norm.bias)
        for i, block in enumerate(layer.blocks):
            size = (x.shape[1], x.shape[2])
            window = tuple(min(4, edge) for edge in size)
            shift = 2 if i % 2 and window != size else 0
            twin = SwinTransformerBlock(x.shape[3], size, block.attn.num_heads, window_size=window, shift_size=shift)
            twin.double().load_state_dict(block.state_dict(), strict=True)
            for name, parameter in twin.named_parameters():
                parameter.data = block.get_parameter(name).data
            x = torch.func.functional_call(twin, dict(block.named_parameters()), (x,))
    return nn.functional.layer_norm(x, (x.shape[3],), model.norm.weight, model.norm.bias)


@pytest.mark.parametrize("grid", [(2, 2), (1, 2)])
def test_values_and_gradients_are_those_of_a_direct_one(grid):
    model = build(grid)
    tokens = torch.randn(2, *grid, 5, dtype=torch.float64, requires_grad=True)
    wanted = [tokens, *model.parameters()]
    found, expected = model(tokens), direct(model, tokens)
    assert found.shape == (2, 4 * grid[0], 4 * grid[1], 6)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((out * weight).sum(), wanted) for out in (found, expected))
    for gradient, truth in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, truth, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["swin_tiny", "swin_base"])
def test_sizes_are_those_of_the_swin(name):
    """timm's, whose blocks it has and whose merging multiplies by as many weights; counted, not made."""
    with torch.device("meta"):
        size = {key: SIZES[name][key] for key in ("embed_dim", "depths", "num_heads")}
        head = InverseSwin(1024, (6, 6), window_size=(6, 6), **size)
        twin = timm.create_model(f"{name}_patch4_window7_224", img_size=192, window_size=6, num_classes=0)
    dim = size["embed_dim"]
    merging = 2 * 4 * (dim + 2 * dim + 4 * dim)  # its norms, before the product
    splitting = 2 * (4 * dim + 2 * dim + dim)  # behind it
    ends = dim * (48 + 1 + 2) + 2 * 8 * dim  # patches with their norm, and the last norm
    new_ends = 8 * dim * (1024 + 1) + 2 * dim
    count = sum(p.numel() for p in twin.parameters()) - merging - ends + splitting + new_ends
    assert sum(p.numel() for p in head.parameters()) == count
