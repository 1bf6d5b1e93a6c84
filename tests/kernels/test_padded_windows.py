"""Maps that the window does not divide, padded before they are shifted: attention by its definition is the truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchvision.models.swin_transformer import shifted_window_attention

import fastmim_kernels as fk
from tests.kernels.test_accelerate import NAMES, accelerated, create, images, results
from tests.kernels.window_definition import as_defined, attend, reach

# Maps in tokens: one and all but one too many; odd in both edges; wider than the window in one edge only; smaller.
MAPS: dict[str, tuple[tuple[int, int], int]] = {
    "9x11, windows of 4": ((9, 11), 4), "15x10, windows of 7": ((15, 10), 7), "5x9, windows of 8": ((5, 9), 8),
    "3x5, windows of 8": ((3, 5), 8),
}  # fmt: skip




def build(name: str, grid: tuple[int, int], window: int, **options: Any) -> torch.nn.Module:
    size = (4 * grid[0], 4 * grid[1])
    return create(name, **dict(img_size=size, window_size=window, depths=(2,)) | options).double()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-10 * value.abs().max().item(), msg=key)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (0, 1)])
def test_the_definition_is_torchvisions(shift: tuple[int, int]) -> None:
    """Its padding too: zeros before the projection, which are keys."""
    block = build(NAMES[0], (11, 9), 4).layers[0].blocks[1]
    block.shift_size = shift
    x, attn = torch.randn(2, 11, 9, 16).double(), block.attn
    theirs = shifted_window_attention(
        x, attn.qkv.weight, attn.proj.weight, attn._get_rel_pos_bias(), [4, 4], attn.num_heads, list(shift),
        qkv_bias=attn.qkv.bias, proj_bias=attn.proj.bias, training=False)
    torch.testing.assert_close(attend(block, x), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grid, window", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_the_definition(name: str, grid: tuple[int, int], window: int) -> None:
    model = build(name, grid, window)
    x = images(*model.patch_embed.img_size, batch=1).double()
    expected = results(as_defined(model), x)
    same(results(accelerated(model, policy="default"), x), expected)
    ours = accelerated(model, policy="default")
    for block in ours.layers[0].blocks:  # timm's own forward of windows
        block.attn.proj.register_forward_hook(lambda *_: None)
    same(results(ours, x), expected)


@pytest.mark.parametrize("name", NAMES)
def test_other_sizes_than_built_for(name: str) -> None:
    model = build(name, (16, 16), 4, dynamic_img_size=True, depths=(2, 2))
    ours = accelerated(model, policy="default")
    for size in ((36, 44), (12, 20)):
        same(results(ours, images(*size).double()), results(as_defined(model), images(*size).double()))


@pytest.mark.parametrize("name", NAMES)
def test_a_token_reaches_its_windows_only(name: str) -> None:
    """Each token of a map in turn is changed; timm's order lets the first ones reach the last.

    A sharp softmax may hide a few of those that it reaches.
    """
    torch.manual_seed(1)
    model = build(name, (11, 7), 4)
    near = reach((11, 7), (4, 4), (2, 2))
    x = images(44, 28, batch=1).double()
    others = x + torch.kron(torch.eye(77).double().view(77, 1, 11, 7), torch.randn(3, 4, 4).double())
    for policy, right in (("default", True), ("parity", False)):
        ours = accelerated(model, policy=policy)
        with torch.no_grad():
            changed = (ours.forward_features(others) - ours.forward_features(x)).abs().amax(-1).view(77, 77) > 1e-12
        assert (changed.T & near).sum() > 0.9 * near.sum()
        assert bool((changed.T & ~near).any()) is not right


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_changes(name: str) -> None:
    """The same bits where the window divides the map, and in blocks that do not shift."""
    for options in (dict(img_size=(32, 64), window_size=4), dict(img_size=(44, 36), window_size=4, depths=(1, 1))):
        model = create(name, **options)
        x = images(*model.patch_embed.img_size)
        found, expected = (results(accelerated(model, policy=policy), x) for policy in ("default", "parity"))
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_policy_is_set_anew_and_checked() -> None:
    model = build(NAMES[0], (9, 11), 4)
    x = images(36, 44).double()
    ours = accelerated(model, policy="default")
    fk.accelerate(ours)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="policy='timm': must be 'parity' or 'default'"):
        fk.accelerate(model, policy="timm")


def test_a_block_alone() -> None:
    block = build(NAMES[1], (9, 11), 4).layers[0].blocks[1]
    x, expected = torch.randn(2, 9, 11, 16).double(), as_defined(block)
    fk.accelerate(block, policy="default")
    torch.testing.assert_close(block(x), expected(x), rtol=1e-9, atol=1e-9)
