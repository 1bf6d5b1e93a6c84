"""MAE's published step as a provider: a clone of its shape takes our step, and another loss is seen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import measure, providers, reference
from benchmarks.recipe_case import RecipeCase

# Names and calls are the published model's, the rest as He et al. 2022 define it: patches, noise, decoder, loss.
MODEL = """
import numpy as np
import torch
from timm.models.vision_transformer import Block, PatchEmbed
from torch import nn
from util.positions import ZERO

class MaskedAutoencoderViT(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, decoder_embed_dim, decoder_depth,
                 decoder_num_heads, mlp_ratio, norm_layer, norm_pix_loss):
        super().__init__()
        self.norm_pix_loss, self.p = norm_pix_loss, patch_size
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        length = np.float(self.patch_embed.num_patches)
        def stack(dim, count, heads):
            return nn.ModuleList(Block(dim, heads, mlp_ratio, qkv_bias=True, qk_scale=None, norm_layer=norm_layer)
                                 for _ in range(count))
        self.cls_token, self.mask_token = (nn.Parameter(torch.zeros(1, 1, d)) for d in (embed_dim, decoder_embed_dim))
        self.pos_embed, self.decoder_pos_embed = (
            nn.Parameter(torch.full((1, int(length) + 1, d), ZERO), requires_grad=False)
            for d in (embed_dim, decoder_embed_dim))
        self.blocks, self.norm = stack(embed_dim, depth, num_heads), norm_layer(embed_dim)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = stack(decoder_embed_dim, decoder_depth, decoder_num_heads)
        self.decoder_norm = norm_layer(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

    def forward(self, images, mask_ratio):
        b, c, p = len(images), images.shape[1], self.p
        patches = self.patch_embed(images) + self.pos_embed[:, 1:]
        length, kept = patches.shape[1], int(patches.shape[1] * (1 - mask_ratio))
        order = torch.rand(b, length).argsort(1)
        keep, hidden = order[:, :kept], order[:, kept:]
        own = torch.arange(b)[:, None]
        x = torch.cat((self.cls_token.expand(b, -1, -1) + self.pos_embed[:, :1], patches[own, keep]), 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))
        every = self.mask_token.to(x.dtype).repeat(b, length, 1)
        every[own, keep] = x[:, 1:]
        x = torch.cat((x[:, :1], every), 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        guess = self.decoder_pred(self.decoder_norm(x))[:, 1:][own, hidden]
        rows, columns = images.shape[2] // p, images.shape[3] // p
        target = images.reshape(b, c, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).reshape(b, length, -1)[own, hidden]
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return FACTOR * ((guess - target) ** 2).mean(), None, None
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    root = tmp_path / "mae"
    (root / "util").mkdir(parents=True)
    (root / "main_pretrain.py").touch()
    (root / "util" / "positions.py").write_text("ZERO = 0.0\n", encoding="utf-8")
    (root / "models_mae.py").write_text(MODEL.replace("FACTOR", "1"), encoding="utf-8")
    return root


def first_losses(case: RecipeCase, clone: Path) -> dict[str, tuple[float, float]]:
    providers._clones.cache_clear()
    source = case.weights()
    with torch.no_grad():
        source.encoder.cls_token.add_(0.1)
    images, mask = case.inputs(source)
    names = ("fastmim", "facebookresearch-mae")
    steps = [providers.build(name, case, source, reference=str(clone)) for name in names]
    return {step.name: measure.first_losses(step, images, mask) for step in steps}


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_maes_step_is_ours_update_included(norm_pix_loss: bool, clone: Path) -> None:
    keys = (("objective.norm_pix_loss", norm_pix_loss), ("model.depth", 2), ("optim.lr", 1e-2))
    case = RecipeCase("mae_demo", "fp32", 3, 48, overrides=keys)
    assert reference.find_clones(clone) == {"facebookresearch-mae": clone}
    losses = first_losses(case, clone)
    assert measure.refusals(losses, "facebookresearch-mae", (1e-5, 1e-4)) == {}
    first, later = losses["fastmim"]
    assert abs(later / first - 1) > 1e-2  # an update that was left out would be seen
    if norm_pix_loss:
        model = clone / "models_mae.py"
        model.write_text(MODEL.replace("FACTOR", "1.001"), encoding="utf-8")
        assert "fastmim" in measure.refusals(first_losses(case, clone), "facebookresearch-mae", (1e-5, 1e-4))


def test_what_does_not_train_mae_says_so(clone: Path) -> None:
    case = RecipeCase("mae_demo")
    for name in ("timm", "bytedance-ibot"):
        with pytest.raises(providers.Unavailable, match=f"{name}: it does not train mae"):
            providers.build(name, case, case.weights(), reference=str(clone))
    with pytest.raises(providers.Unavailable, match="give a clone of it with --reference DIR"):
        providers.build("facebookresearch-mae", case, case.weights())
