"""SimMIM written plainly on timm's encoders: the step that every speed-up in this folder is measured against."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
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
        pixels = mask.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2).unsqueeze(1)
        pixels = pixels.type_as(images)
        target = average_pool_target(images, self.norm_target) if self.norm_target else images
        loss = F.l1_loss(target, prediction, reduction="none")
        return {"loss": (loss * pixels).sum() / (pixels.sum() + 1e-5) / images.shape[1]}


def average_pool_target(images: Tensor, window: int) -> Tensor:
    """Local normalisation as published: three sliding average pools of the whole window."""
    pad = window // 2
    mean = F.avg_pool2d(images, window, stride=1, padding=pad, count_include_pad=False)
    square = F.avg_pool2d(images**2, window, stride=1, padding=pad, count_include_pad=False)
    count = F.avg_pool2d(torch.ones_like(images), window, stride=1, padding=pad) * window**2
    variance = ((square - mean**2) * (count / (count - 1))).clamp(min=0)
    return (images - mean) / (variance + 1e-6).sqrt()


# name: (timm model, its extra arguments, our encoder)
MODELS = {
    "swinv2_base": ("swinv2_base_window12_192", {}, {"name": "swinv2_base"}),
    "swinv2_large": ("swinv2_large_window12_192", {}, {"name": "swinv2_large"}),
    "swin_base": ("swin_base_patch4_window7_224", {"img_size": 192, "window_size": 6}, {"name": "swin_base"}),
}


def timm_simmim(name: str, norm_target: int = 0) -> TimmSimMIM:
    """A :class:`TimmSimMIM` for a key of :data:`MODELS`, without weights from anywhere."""
    model, kwargs, _ = MODELS[name]
    encoder = timm.create_model(model, pretrained=False, num_classes=0, drop_path_rate=0.0, **kwargs)
    for key, parameter in encoder.named_parameters():
        # SwinV2 starts its residual branches at zero: their gradients would be zero and prove nothing.
        if key.endswith(("norm1.weight", "norm2.weight")):
            nn.init.constant_(parameter, 0.5)
    return TimmSimMIM(encoder, norm_target)


def copy_weights(source: TimmSimMIM, target: nn.Module) -> None:
    """Give one of our SimMIM objectives the weights of ``source``."""
    # timm keeps an unused bias for keys and position tables that are not parameters.
    own = {k for k, _ in target.encoder.named_parameters()}
    state = {k: v for k, v in source.encoder.state_dict().items() if k in own}
    state["mask_token"] = source.mask_token.detach().reshape(1, 1, -1)
    missing = own - set(state)
    if missing:
        raise ValueError(f"copy_weights: the timm encoder lacks {sorted(missing)}")
    target.encoder.load_state_dict(state, strict=False)
    with torch.no_grad():
        target.head.weight.copy_(source.decoder[0].weight.flatten(1))
        target.head.bias.copy_(source.decoder[0].bias)
