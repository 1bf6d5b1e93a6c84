"""SimMIM as lightly (ViT) and mmpretrain (Swin) build it, where they are installed, with our weights in it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class LightlySimMIM(nn.Module):
    """lightly's masked ViT with the linear decoder and L1 loss of its SimMIM example, on a mask that is given."""

    def __init__(self, backbone: nn.Module, patch: int, masked: int) -> None:
        super().__init__()
        self.backbone, self.patch_size, self.masked = backbone, patch, masked
        self.decoder = nn.Linear(backbone.vit.embed_dim, patch**2 * 3)
        self.criterion = nn.L1Loss()

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of (B, 3, H, W) float images under a (B, H/p, W/p) mask with ``masked`` patches in each image."""
        from lightly.models import utils

        # Position 0 is the class token.
        index = 1 + mask.flatten(1).long().argsort(dim=1, descending=True, stable=True)[:, : self.masked]
        tokens = self.backbone.encode(images=images, idx_mask=index)
        prediction = self.decoder(utils.get_at_index(tokens, index))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), index - 1)
        return {"loss": self.criterion(prediction, target)}


def lightly_objective(encoder: Mapping[str, Any], norm_target: int, source: Any) -> nn.Module:
    """lightly's SimMIM for our encoder's keyword arguments.

    Raises:
        ImportError: lightly is not installed.
        ValueError: it has no such encoder.
    """
    if encoder["name"] != "vit" or not encoder.get("abs_pos_embed") or norm_target:
        raise ValueError("its SimMIM is a ViT with absolute positions on raw pixels (case vit_base_plain)")
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    kept = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    vit = VisionTransformer(num_classes=0, **{k: v for k, v in encoder.items() if k in kept})
    patches = source.encoder.grid[0] * source.encoder.grid[1]
    masked = int(source.random_mask(torch.arange(1)).sum())
    assert masked < patches
    net = LightlySimMIM(MaskedVisionTransformerTIMM(vit=vit), vit.patch_embed.patch_size[0], masked)
    own = dict(source.encoder.named_parameters())
    with torch.no_grad():
        for key, parameter in vit.named_parameters():
            parameter.copy_(_joined_bias(own, key) if key.endswith("qkv.bias") else own[key])
        net.backbone.mask_token.copy_(own["mask_token"])
        # Rows are (channel, row, column) of a patch here and (row, column, channel) there.
        shape = (3, net.patch_size**2)
        net.decoder.weight.copy_(source.head.weight.unflatten(0, shape).transpose(0, 1).flatten(0, 1))
        net.decoder.bias.copy_(source.head.bias.view(shape).T.flatten())
    return net


def _joined_bias(own: Mapping[str, Tensor], key: str) -> Tensor:
    # The bias of the keys shifts every logit of a query alike: softmax does not see it.
    query, value = (own[key.replace("qkv.bias", name)] for name in ("q_bias", "v_bias"))
    return torch.cat((query, torch.zeros_like(query), value))


class MmpretrainSimMIM(nn.Module):
    """Backbone, neck and head of mmpretrain's SimMIM, called as its ``loss`` calls them."""

    def __init__(self, backbone: nn.Module, neck: nn.Module, head: nn.Module, patch: int) -> None:
        super().__init__()
        self.backbone, self.neck, self.head, self.patch_size = backbone, neck, head, patch

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of (B, 3, H, W) float images under a (B, H/p, W/p) mask."""
        return {"loss": self.head.loss(self.neck(self.backbone(images, mask)[0]), images, mask.long())}


def mmpretrain_objective(encoder: Mapping[str, Any], norm_target: int, source: Any) -> nn.Module:
    """mmpretrain's SimMIM for our encoder's keyword arguments.

    Raises:
        ImportError: mmpretrain or mmcv is not installed.
        ValueError: it has no such encoder.
    """
    if encoder["name"] != "swin" or norm_target:
        raise ValueError("its SimMIM is a Swin (v1) on raw pixels")
    from mmpretrain.models import PixelReconstructionLoss, SimMIMHead, SimMIMLinearDecoder  # noqa: F401, registers
    from mmpretrain.models.selfsup.simmim import SimMIMSwinTransformer

    arch = dict(embed_dims=encoder["embed_dim"], depths=encoder["depths"], num_heads=encoder["num_heads"])
    backbone = SimMIMSwinTransformer(
        arch=arch,
        img_size=encoder["img_size"],
        drop_path_rate=0.0,
        stage_cfgs=dict(block_cfgs=dict(window_size=encoder["window_size"])),
    )
    neck = SimMIMLinearDecoder(source.encoder.num_features, source.stride)
    head = SimMIMHead(source.patch_size, dict(type="PixelReconstructionLoss", criterion="L1", channel=3))
    net = MmpretrainSimMIM(backbone, neck, head, source.patch_size)
    own = dict(source.encoder.named_parameters())
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            parameter.copy_(_merged(own[_own_name(key)]) if ".downsample." in key else own[_own_name(key)])
        neck.decoder[0].weight.copy_(source.head.weight[:, :, None, None])
        neck.decoder[0].bias.copy_(source.head.bias)
    return net


def _own_name(key: str) -> str:
    """mmpretrain's parameter name → timm's."""
    key = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
    key = re.sub(r"^norm\d+\.", "norm.", key)
    for theirs, ours in (("stages.", "layers."), ("projection", "proj"), ("w_msa.", ""), ("ffn.layers.0.0", "mlp.fc1"),
                         ("ffn.layers.1", "mlp.fc2")):  # fmt: skip
        key = key.replace(theirs, ours)
    return key


def _merged(weight: Tensor) -> Tensor:
    """Patch merging's last axis: (column, row, channel) here, (channel, row, column) there."""
    return weight.unflatten(-1, (2, 2, -1)).movedim(-1, -3).transpose(-1, -2).flatten(-3)
