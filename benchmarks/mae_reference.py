"""facebookresearch/mae's own step from a local clone, which is read and never edited.

Model, groups and update are those of its ``engine_pretrain.py`` and ``main_pretrain.py``, without loggers, the wrapper
of distributed training and the scaling of gradients, which bf16 does not need and a CPU does not have.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from benchmarks.reference import load_modules
from benchmarks.train_step import Provider
from fastmim.config import Config
from fastmim.interop.mae import save_mae

NAME = "facebookresearch-mae"


class ReferenceMAE(nn.Module):
    """The clone's model with the weights of one of our objectives, under the call that is timed.

    It draws the noise that leaves the patches of the mask hidden. Its attention is what current timm has.

    Args:
        clone: Its folder.
        config: Of our run.
        source: Our objective.
    """

    def __init__(self, clone: Path, config: Config, source: Any) -> None:
        super().__init__()
        own, sizes = config.objective.arguments(), source.encoder.settings
        same = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
        decoder = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss")
        # timm's block has dropped an argument, and NumPy a name that is asked for while positions are made.
        with mock.patch.object(timm_vit, "Block", _block), mock.patch.object(np, "float", float, create=True):
            (module,) = load_modules(clone, "models_mae")
            self.model = module.MaskedAutoencoderViT(
                **{key: sizes[key] for key in same},
                **{key: own[key] for key in decoder},
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
        self.model.load_state_dict(save_mae(source)["model"])
        self.patch_size, self.mask_ratio = sizes["patch_size"], own["mask_ratio"]

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with mock.patch.object(torch, "rand", lambda *_, **__: mask.flatten(1).float()):
            return {"loss": self.model(images, self.mask_ratio)[0]}


def _block(*args: Any, qk_scale: None = None, **kwargs: Any) -> nn.Module:
    """timm's block as it was called then."""
    return _BLOCK(*args, **kwargs)


_BLOCK = timm_vit.Block


def reference_step(module: ReferenceMAE, config: Config, *, device: str, dtype: str) -> Provider:
    """The step as its ``train_one_epoch`` takes it."""
    optim = config.optim
    groups = param_groups_weight_decay(module, optim.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas)
    trained = [p for p in module.parameters() if p.requires_grad]

    def forward(images: Tensor, mask: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss: Tensor = module(images, mask)["loss"]
        loss.item()  # it looks for bad values in every step
        return loss

    def update() -> None:
        torch.stack([p.grad.detach().norm() for p in trained if p.grad is not None]).norm()  # which it logs
        optimizer.step()
        optimizer.zero_grad()

    return Provider(NAME, module, forward, lambda loss: loss.backward(), update)
