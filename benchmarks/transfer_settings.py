"""The runs of ``transfer.py``: encoders and their first weights, objectives, and what they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastmim import load_config
from fastmim.config import Config
from fastmim.models import create_encoder
from fastmim.models.vit_init import xavier_linears

COMMON = [
    "model.in_chans=1", "data.hflip=0", "data.mean=[0.13]", "data.std=[0.31]", "data.num_workers=0", "data.verify=none",
    "train.micro_batch_size=64", "train.log_every=25", "train.log_seconds=0", "train.save_every=0", "output.loggers=[]",
    "output.pictures=4", "optim.lr_batch=null", "optim.warmup_lr=0", "optim.min_lr=1e-5", "optim.warmup_inclusive=true",
    "efficiency.threads=1",
]  # fmt: skip
"""Of ``study.py`` and ``sweep.py`` too."""
ENCODERS = {
    "vit": [
        "model.name=vit", "model.img_size=28", "model.patch_size=7", "model.embed_dim=48", "model.depth=3",
        "model.num_heads=3", "model.key_bias=true", "model.abs_pos_embed=sincos", "model.init=mae",
    ],
    "swin": [
        "model.name=swin", "model.img_size=32", "model.patch_size=4", "model.embed_dim=24", "model.depths=[1,2]",
        "model.num_heads=[2,4]", "model.window_size=4", "model.norm_eps=1e-6", "model.policy=default",
        "model.init_from={first}",
    ],
}  # fmt: skip
"""Either has 4 × 4 tokens at its end; ``{first}`` is the file of :func:`first_weights`."""
_MASKED = ["data.scale=[1.0,1.0]", "data.ratio=[1.0,1.0]", "train.micro_batch_size=32", "optim.lr=4e-3"]
"""Whole digits: what is hidden is task enough."""
_VIEWS = ["objective.augment=false", "objective.hidden_dim=128", "train.micro_batch_size=32", "optim.lr=3e-3"]
_SELF_DISTILLATION = [
    *_VIEWS, "objective.bottleneck_dim=32", "objective.out_dim=128", "objective.local_crops=0",
    "objective.global_scale=[0.4,1.0]", "objective.freeze_last_layer=0", "objective.momentum_teacher=0.97",
    "objective.teacher_temp=0.04", "objective.warmup_teacher_temp_epochs=0", "objective.centre_momentum=0.9",
    "objective.norm_last_layer=true", "optim.clip_each=true", "optim.clip_grad=3.0", "optim.weight_decay=0.01",
]  # fmt: skip
OBJECTIVES = {
    "simmim": ["objective.name=simmim", *_MASKED, "objective.unit={stride}", "objective.loss=l2",
               "objective.mask_ratio=0.4"],
    "visible": ["objective.name=simmim", *_MASKED, "objective.visible_only=true", "objective.unit={stride}",
                "objective.loss=l2", "objective.mask_ratio=0.5", "objective.decoder_dim=192",
                "objective.decoder_num_heads=6", "optim.lr=3e-3"],
    "mae": ["objective.name=mae", *_MASKED, "objective.mask_ratio=0.5", "objective.decoder_embed_dim=48",
            "objective.decoder_depth=1", "objective.decoder_num_heads=3", "optim.clip_grad=null"],
    "beit": ["objective.name=beit", *_MASKED, "objective.tokenizer={tokenizer}", "objective.num_mask=8",
             "objective.min_block=2", "objective.jitter=0", "optim.clip_grad=3.0", "optim.lr=3e-3"],
    "dino": ["objective.name=dino", *_SELF_DISTILLATION],
    "ibot": ["objective.name=ibot", *_SELF_DISTILLATION, "objective.teacher_patch_temp=0.04",
             "objective.patch_weight=0.1"],
    "moco": ["objective.name=moco", *_VIEWS, "train.micro_batch_size=64", "objective.out_dim=32",
             "objective.scale=[0.5,1.0]", "objective.momentum=0.97", "objective.freeze_patch_embed=false",
             "optim.clip_grad=null"],
}  # fmt: skip
"""Overrides of each: a new objective is a line here. ``{stride}`` is that of the encoder's tokens, ``{tokenizer}`` a
discrete autoencoder of the same images, whose training comes on top."""
ONLY = {"moco": ("vit",), "visible": ("swin",)}
"""The encoders of an objective that is not tried on all: MoCo v3 is published for ViT, ``visible_only`` is for Swin."""
POOLS = {"simmim": "mean", "mae": "mean", "beit": "mean"}
"""What stands for an image, where it is not the class token of a ViT: its loss reads patches alone."""
TOKENIZER = [
    "model.name=dvae", "model.img_size=16", "model.patch_size=4", "model.embed_dim=24", "model.depth=1",
    "model.codes=64", "model.code_dim=16", "objective.name=dvae", "objective.temperature_end=0.2",
    "objective.balance_weight=0.001", "data.scale=[1.0,1.0]", "data.ratio=[1.0,1.0]", "train.micro_batch_size=32",
    "optim.lr=3e-3", "optim.weight_decay=0", "optim.clip_grad=1.0",
]  # fmt: skip
"""4 × 4 codes an image, a code a token of either encoder."""
TOKENIZER_STEPS = 500
STRIDES = {"vit": 7, "swin": 8}


def config(objective: str, encoder: str, seed: int, images: Path, out: Path, steps: int) -> Config:
    """The run of a row."""
    places = {"stride": STRIDES[encoder], "tokenizer": tokenizer_of(encoder, out.parent),
              "first": out.parent / f"first-{encoder}-{seed}.safetensors"}  # fmt: skip
    own = [word.format(**places) for word in (*ENCODERS[encoder], *OBJECTIVES[objective])]
    given = [f"data.path={images}", f"train.steps={steps}", f"optim.warmup_steps={max(1, steps // 10)}",
             f"train.seed={seed}", f"output.dir={out}", "train.resume=none"]  # fmt: skip
    return load_config(None, [*COMMON, *own, *given])


def first_weights(cfg: Config) -> None:
    """Make the file that ``model.init_from`` names, if any: Xavier-uniform linear layers (Glorot & Bengio 2010).

    Swin's own have a deviation of 0.02 whatever the width, which is little for one so narrow: on fold 0, seed 0, 400
    steps of DINO gave a k-NN of 45.1 % from them and 57.0 % from these (untrained 50.9 and 51.8).
    """
    file: Any = cfg.model.init_from
    if file is None or Path(file).is_file():
        return
    torch.manual_seed(cfg.train.seed)
    encoder = create_encoder(cfg.model.encoder_kwargs())
    xavier_linears(encoder)
    save_file(encoder.state_dict(), file)


def tokenizer_of(encoder: str, folder: Path) -> Path:
    """The folder of the tokenizer that BEiT has for an encoder: a process for each encoder may share ``folder``."""
    return folder / f"tokenizer-{encoder}"


def takes(objective: str, encoder: str) -> bool:
    """Whether the study has this pair."""
    return encoder in ONLY.get(objective, ENCODERS)


def pool_of(objective: str, encoder: str) -> str:
    """What stands for an image; a Swin has no class token."""
    return POOLS.get(objective, "cls") if encoder == "vit" else "mean"
