"""SimMIM written plainly on timm's encoders: the step that every speed-up in this folder is measured against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn


class TimmSimMIM(nn.Module):
    """Mask token after the patch embedding, timm's stages, 1×1 convolution and pixel shuffle, masked L1.

    Args:
        model: ``swinv2_base``-like or ``swin_base``-like name of a timm model, or a timm encoder.
        norm_target: Window of the normalised target, computed with three average pools; 0 = raw pixels.
        in_chans: Image channels.
    """

    def __init__(self, encoder: nn.Module, norm_target: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm_target = norm_target
        self.patch = encoder.patch_embed.patch_size[0]
        stride = self.patch * 2 ** (len(encoder.layers) - 1)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, encoder.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.decoder = nn.Sequential(nn.Conv2d(encoder.num_features, stride**2 * in_chans, 1), nn.PixelShuffle(stride))

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of (B, C, H, W) float images under a (B, H/p, W/p) mask."""
        x = self.encoder.patch_embed(images)
        w = mask.unsqueeze(-1).type_as(x)
        x = x * (1 - w) + self.mask_token * w
        for layer in self.encoder.layers:
            x = layer(x)
        prediction = self.decoder(self.encoder.norm(x).permute(0, 3, 1, 2))
        return {"loss": plain_loss(images, prediction, mask, self.patch, self.norm_target)}


def average_pool_target(images: Tensor, window: int) -> Tensor:
    """Local normalisation as published: three sliding average pools of the whole window."""
    pad = window // 2
    mean = F.avg_pool2d(images, window, stride=1, padding=pad, count_include_pad=False)
    square = F.avg_pool2d(images**2, window, stride=1, padding=pad, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(images), window, stride=1, padding=pad) * window**2
    variance = ((square - mean**2) * (count / (count - 1))).clamp(min=0)
    return (images - mean) / (variance + 1e-6).sqrt()


class TimmVitSimMIM(nn.Module):
    """The same on timm's ``Beit``, the ViT with relative position bias that SimMIM pretrains."""

    def __init__(self, encoder: nn.Module, norm_target: int = 0, in_chans: int = 3) -> None:
        super().__init__()
        self.encoder = encoder
        self.norm_target = norm_target
        self.patch = encoder.patch_embed.patch_size[0]
        self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))
        self.decoder = nn.Sequential(
            nn.Conv2d(encoder.embed_dim, self.patch**2 * in_chans, 1), nn.PixelShuffle(self.patch)
        )

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of (B, C, H, W) float images under a (B, H/p, W/p) mask."""
        x = self.encoder.patch_embed(images)
        w = mask.flatten(1).unsqueeze(-1).type_as(x)
        x = x * (1 - w) + self.mask_token * w
        x = torch.cat((self.encoder.cls_token.expand(x.shape[0], -1, -1), x), 1)
        if self.encoder.pos_embed is not None:
            x = x + self.encoder.pos_embed
        bias = None if self.encoder.rel_pos_bias is None else self.encoder.rel_pos_bias()
        for block in self.encoder.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        x = self.encoder.norm(x)[:, 1:].transpose(1, 2).unflatten(2, mask.shape[1:])
        return {"loss": plain_loss(images, self.decoder(x), mask, self.patch, self.norm_target)}


def plain_loss(images: Tensor, prediction: Tensor, mask: Tensor, patch: int, norm_target: int) -> Tensor:
    """Mean absolute error of the masked pixels, on images or their normalised target."""
    pixels = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2).unsqueeze(1).type_as(images)
    target = average_pool_target(images, norm_target) if norm_target else images
    loss = F.l1_loss(target, prediction, reduction="none")
    return (loss * pixels).sum() / (pixels.sum() + 1e-5) / images.shape[1]


def timm_objective(encoder: dict[str, Any], norm_target: int, source: nn.Module) -> nn.Module:
    """SimMIM on timm's encoder for our encoder's keyword arguments, with the weights of one of our objectives.

    Raises:
        ValueError: timm has no such encoder, or names a parameter that ours lacks.
    """
    kwargs = {k: v for k, v in encoder.items() if k != "name"}
    if kwargs.pop("extra_norm_period", 0):
        raise ValueError("its SwinV2 has no extra norms (SwinV2-H and -G)")
    if encoder["name"] == "vit":
        names = {"shared_rel_pos_bias": "use_shared_rel_pos_bias", "rel_pos_bias": "use_rel_pos_bias",
                 "abs_pos_embed": "use_abs_pos_emb"}  # fmt: skip
        kwargs = {"use_abs_pos_emb": False} | {names.get(k, k): v for k, v in kwargs.items()}
        vit = Beit(num_classes=0, global_pool="token", use_fc_norm=False, **kwargs)
        net: nn.Module = TimmVitSimMIM(vit, norm_target)
    else:
        kind = SwinTransformerV2 if encoder["name"] == "swinv2" else SwinTransformer
        net = TimmSimMIM(kind(num_classes=0, **kwargs), norm_target)
    own = {k for k, _ in net.encoder.named_parameters()}
    weights = dict(source.encoder.named_parameters())
    if own != set(weights) - {"mask_token"}:
        raise ValueError(f"other parameters than ours: {sorted(own ^ (set(weights) - {'mask_token'}))[:4]}")
    with torch.no_grad():
        for key, parameter in net.encoder.named_parameters():
            parameter.copy_(weights[key])
        net.mask_token.copy_(weights["mask_token"].reshape(net.mask_token.shape))
        net.decoder[0].weight.copy_(source.head.weight.reshape(net.decoder[0].weight.shape))
        net.decoder[0].bias.copy_(source.head.bias)
    return net
