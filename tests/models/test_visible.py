"""A Swin of visible tokens only: the plain encoder where nothing is hidden, else one that ignores what is."""

from __future__ import annotations

import math

import pytest
import torch

from fastmim.models import create_encoder, visible
from fastmim.models import window_attention as attention
from fastmim_kernels import reference

# Image, windows and what else could go wrong: shifts that are no multiple of a column, of an odd number of tokens.
CASES = {
    "square": dict(img_size=96, window_size=6),
    "odd shift": dict(img_size=96, window_size=3),
    "windows do not divide": dict(img_size=96, window_size=5),
    "rectangles": dict(img_size=(64, 160), window_size=(4, 8)),
    "rectangles, parity": dict(img_size=(64, 160), window_size=(3, 7), policy="parity"),
    "window larger than the map": dict(img_size=64, window_size=32),
    "no qkv bias": dict(img_size=64, window_size=3, qkv_bias=False),
    "three stages, extra norms": dict(
        img_size=48, window_size=4, depths=(1, 2, 4), num_heads=(1, 2, 4), extra_norm_period=2
    ),
}


def build(family, case):
    """In float64, with parameters that all matter."""
    settings = dict(name=family, patch_size=4, in_chans=2, embed_dim=8, depths=(2, 3, 1, 2), num_heads=(1, 2, 4, 8))
    encoder = create_encoder({**settings, **CASES[case]}).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in encoder.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.3, generator)
    images = torch.randn(2, 2, *encoder.img_size, generator=generator, dtype=torch.float64)
    return encoder, images, visible.VisibleColumns(encoder)


def with_gradients(tokens, encoder):
    """The tokens, and the gradient of each parameter but the mask token, of a sum that weighs every value."""
    weights = torch.linspace(-1, 1, tokens.numel(), dtype=tokens.dtype).view_as(tokens).cos()
    parameters = {name: p for name, p in encoder.named_parameters() if name != "mask_token"}
    gradients = torch.autograd.grad((tokens * weights).sum(), list(parameters.values()))
    return {"tokens": tokens, **dict(zip(parameters, gradients, strict=True))}


@pytest.fixture
def seen_only(monkeypatch):
    """Lets plain attention leave out keys: (encoder, hidden columns (B, h·w)) → None."""

    def leave_out(encoder, hidden):
        grid = encoder.img_size[0] // encoder.stride, encoder.img_size[1] // encoder.stride

        def attend(self, qkv, step):
            (rows, columns), padded = encoder_map(encoder, self), qkv.shape[1:3]
            cells = hidden.view(-1, *grid)
            cells = cells.repeat_interleave(rows // grid[0], 1).repeat_interleave(columns // grid[1], 2)
            pad = padded[0] - rows, padded[1] - columns
            out = attention.pad_shifted(cells[..., None].double(), pad, self.padded_after_shift)
            bias = step.bias[None] + HIDE * windows(out, self)[:, None, None, :]
            return by_windows(qkv, bias, self)

        monkeypatch.setattr(attention.WindowAttention, "attend", attend)

    return leave_out


HIDE = -1e300


def encoder_map(encoder, attn):
    """(rows, columns) of the map that an attention of the encoder has."""
    stage = next(s for s, layer in enumerate(encoder.layers) if any(block.attn is attn for block in layer.blocks))
    scale = encoder.patch_size * 2**stage
    return encoder.img_size[0] // scale, encoder.img_size[1] // scale


def windows(x, attn):
    rolled = torch.roll(x, (-attn.shift_size[0], -attn.shift_size[1]), (1, 2))
    return reference.partition(rolled, attn.window_size)[..., 0]


def by_windows(qkv, bias, attn):
    """Window attention with a bias of each window's own, (B·windows, heads or 1, N or 1, N)."""
    cut = reference.partition(torch.roll(qkv, (-attn.shift_size[0], -attn.shift_size[1]), (1, 2)), attn.window_size)
    q, k, v = cut.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if attn.logit_scale is None:
        logits = q @ k.mT * q.shape[-1] ** -0.5
    else:
        unit = torch.nn.functional.normalize
        scale = attn.logit_scale.clamp(max=math.log(100)).exp()
        logits = unit(q, dim=-1) @ unit(k, dim=-1).mT * scale
    if any(attn.shift_size):
        groups = reference.shift_groups(*qkv.shape[1:3], attn.shift_size, qkv.device)[None, ..., None]
        groups = reference.partition(groups, attn.window_size)[..., 0]
        apart = (groups[:, :, None] != groups[:, None]).double().repeat(len(qkv), 1, 1)
        logits = logits - 100 * apart[:, None]
    found = ((logits + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
    return torch.roll(reference.unpartition(found, attn.window_size, *qkv.shape[1:3]), attn.shift_size, (1, 2))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_with_nothing_hidden_it_is_the_plain_encoder(family, case):
    encoder, images, columns = build(family, case)
    keep = torch.arange(columns.count).expand(2, -1)
    expected = with_gradients(encoder(images).flatten(1, 2), encoder)
    found = with_gradients(encoder(images, visible=columns(keep)), encoder)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_visible_tokens_are_those_of_a_plain_encoder_without_hidden_keys(family, case, seen_only):
    """Nothing but attention and merging looks at other tokens, and merging stays within a column."""
    encoder, images, columns = build(family, case)
    order = torch.rand(2, columns.count, generator=torch.Generator().manual_seed(2)).argsort(1)
    keep = order[:, : max(columns.count * 2 // 5, 1)].sort(1).values
    found = with_gradients(encoder(images, visible=columns(keep)), encoder)
    hidden = torch.ones(2, columns.count, dtype=torch.bool).scatter_(1, keep, False)
    seen_only(encoder, hidden)
    tokens = encoder(images).flatten(1, 2)
    expected = with_gradients(tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1])), encoder)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_order_and_company_do_not_matter():
    """Columns in any order, and an image alone as in a batch."""
    encoder, images, columns = build("swinv2", "rectangles")
    keep = torch.tensor([[7, 0, 3, 4], [9, 8, 1, 2]])
    found = encoder(images, visible=columns(keep))
    again = encoder(images[1:], visible=columns(keep[1:].flip(1)))
    torch.testing.assert_close(again.flip(1), found[1:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["swin", "swinv2"])
def test_hidden_pixels_are_not_read(family):
    encoder, images, columns = build(family, "rectangles")
    keep = torch.tensor([[0, 3, 4, 7], [1, 2, 8, 9]])
    expected = encoder(images, visible=columns(keep))
    shown = torch.zeros(2, columns.count, dtype=torch.bool).scatter_(1, keep, True).view(2, 1, 2, 5)
    seen = shown.repeat_interleave(32, 2).repeat_interleave(32, 3)
    assert torch.equal(encoder(images.masked_fill(~seen, torch.nan), visible=columns(keep)), expected)
