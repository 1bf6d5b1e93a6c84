"""The drop-in modules by themselves: timm's class of the same name, on the same parameters, in float64 is the truth."""

from __future__ import annotations

from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.models import swin_transformer as v1
from timm.models import swin_transformer_v2 as v2
from timm.models import vision_transformer as vit
from torch import Tensor, nn

import fastmim_kernels as fk
from fastmim_kernels import nn as drop_in
from tests.kernels.oracle import FLOOR, relative_error


def randomise(module: nn.Module, seed: int = 0) -> None:
    """No parameter zero or one: SwinV2 starts its norms at zero, which would hide every branch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.3)
            parameter.copy_(noise + (1 if "norm" in name and name.endswith("weight") else 0))


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output and the gradients of the input and of every parameter, for one cotangent."""
    x = x.detach().requires_grad_()
    out = module(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, [x, *parameters], cotangent)
    return {"output": out.detach(), **dict(zip(("input", *names), grads, strict=True))}


def check_against_timm(ours: nn.Module, theirs: nn.Module, x: Tensor, factor: float = 2.0) -> None:
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    got, plain = results(ours, x), results(theirs, x)
    truth = results(theirs.double(), x.double())
    for name, value in truth.items():
        error, limit = relative_error(got[name], value), factor * relative_error(plain[name], value) + FLOOR
        assert error <= limit, f"{name}: error {error:.3g} > {limit:.3g}"


BLOCKS: list[tuple[Any, Any, dict[str, Any]]] = [
    # Divisible; a window that is wider than the map (timm shrinks it); rectangular with two pads, shifted.
    *((ours, theirs, dict(dim=16, num_heads=2, **geometry))
      for ours, theirs in ((drop_in.SwinTransformerBlock, v1.SwinTransformerBlock),
                           (drop_in.SwinTransformerV2Block, v2.SwinTransformerV2Block))
      for geometry in (dict(input_resolution=(8, 12), window_size=4, shift_size=2),
                       dict(input_resolution=(5, 6), window_size=7, shift_size=3),
                       dict(input_resolution=(7, 10), window_size=(4, 3), shift_size=(2, 1)),
                       # Shifted in a single dimension: the map is one window high.
                       dict(input_resolution=(4, 10), window_size=4, shift_size=2),
                       dict(input_resolution=(5, 6), window_size=7, shift_size=3, always_partition=True))),
    (drop_in.SwinTransformerBlock, v1.SwinTransformerBlock,
     dict(dim=16, num_heads=2, head_dim=4, input_resolution=(4, 4), window_size=4, qkv_bias=False)),
    (drop_in.SwinTransformerV2Block, v2.SwinTransformerV2Block,
     dict(dim=16, num_heads=2, input_resolution=(4, 4), window_size=2, qkv_bias=False, pretrained_window_size=6)),
]


@pytest.mark.parametrize("ours, theirs, options", BLOCKS)
def test_swin_blocks(ours: type[nn.Module], theirs: type[nn.Module], options: dict[str, Any]) -> None:
    x = torch.randn(3, *options["input_resolution"], 16, generator=torch.Generator().manual_seed(1))
    # A gradient of two values (the logit scales) may cancel: plain torch's own error then is one of luck.
    check_against_timm(ours(**options), theirs(**options), x, factor=4.0)


@pytest.mark.parametrize("theirs, ours", [(v1.PatchMerging, drop_in.PatchMerging),
                                          (v2.PatchMerging, drop_in.PatchMergingV2)])
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_patch_merging(theirs: type[nn.Module], ours: type[nn.Module], size: tuple[int, int]) -> None:
    check_against_timm(ours(8, 12), theirs(8, 12), torch.randn(2, *size, 8))


@pytest.mark.parametrize("bias", [True, False, (True, False)])
def test_mlp(bias: Any) -> None:
    check_against_timm(drop_in.Mlp(12, 20, 8, bias=bias), timm.layers.Mlp(12, 20, 8, bias=bias), torch.randn(2, 7, 12))


@pytest.mark.parametrize("options", [{}, dict(init_values=0.1, qk_norm=True)])
def test_vit_block(options: dict[str, Any]) -> None:
    check_against_timm(drop_in.VitBlock(16, 2, qkv_bias=True, **options), vit.Block(16, 2, qkv_bias=True, **options),
                       torch.randn(2, 7, 16))


@pytest.mark.parametrize("order", ["pre", "post"])
def test_residual_norm(order: str) -> None:
    norm = fk.nn.ResidualNorm(16, order=order, eps=1e-3)
    randomise(norm)
    x, branch = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    stream, second = norm(x, branch)

    def normalise(t: Tensor) -> Tensor:
        return F.layer_norm(t, (16,), norm.weight, norm.bias, 1e-3)

    added = x + branch if order == "pre" else x + normalise(branch)
    torch.testing.assert_close(stream, added)
    torch.testing.assert_close(second, normalise(added) if order == "pre" else added)


@pytest.mark.parametrize("theirs, ours", [(v1.WindowAttention, drop_in.WindowAttention),
                                          (v2.WindowAttention, drop_in.WindowAttentionV2)])
def test_attention_takes_maps_and_windows(theirs: Any, ours: Any) -> None:
    """A map of one window is that window; with timm's (windows, N, C) and mask it is timm's."""
    options = dict(dim=16, num_heads=2, window_size=(3, 5))
    plain, module = theirs(**options), ours(**options)
    randomise(plain)
    module.load_state_dict(plain.state_dict())
    x, mask = torch.randn(4, 3, 5, 16), torch.zeros(2, 15, 15).index_fill_(1, torch.tensor([3]), -100.0)
    torch.testing.assert_close(module(x).flatten(1, 2), plain(x.flatten(1, 2)))
    assert torch.equal(module(x.flatten(1, 2), mask), plain(x.flatten(1, 2), mask))


def test_attention_on_a_map_refuses_dropout() -> None:
    module = drop_in.WindowAttention(16, 2, window_size=4, attn_drop=0.1)
    with pytest.raises(ValueError, match="dropout of 0.1"):
        module(torch.randn(1, 4, 4, 16))
    assert module.eval()(torch.randn(1, 4, 4, 16)).shape == (1, 4, 4, 16)


def test_impl_is_checked() -> None:
    with pytest.raises(ValueError, match="impl='fast'"):
        drop_in.Mlp(8, impl="fast")
