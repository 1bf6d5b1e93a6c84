"""The golden values, computed with the published implementations, reproduced here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from fastmim.engine.optim import param_groups
from fastmim.interop import load_reference
from fastmim_kernels.reference import local_norm_target
from tests.golden_kinds.common import read, weights
from tests.golden_kinds.simmim import build_simmim
from tests.run_golden import run

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(GOLDEN.glob("simmim_*.safetensors"))


FILES = sorted(GOLDEN.iterdir())
IMPLS = [(path, impl) for path in FILES for impl in ("torch", "reference")
         if impl == "torch" or path.stem.startswith(("simmim_", "mae_"))]


@pytest.mark.parametrize(("path", "impl"), IMPLS, ids=lambda value: getattr(value, "stem", value))
def test_every_result_of_a_golden_file_is_reproduced(path, impl):
    for what, (error, limit) in run(path, impl).items():
        assert error <= limit, what


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_first_gradients_are_microsofts(path, impl):
    meta, tensors = read(path)
    objective = build_simmim(meta, impl)
    report = load_reference(objective, weights(tensors))
    assert set(report.names) == set(weights(tensors))
    shape = (meta["steps"], meta["batch"], 3, meta["img_size"], meta["img_size"])
    images = torch.from_numpy(np.random.default_rng(meta["seed"]).standard_normal(shape).astype(np.float32))
    objective(images[0], tensors["masks"][0])["loss"].backward()
    check_first_gradients(objective, report.names, tensors)


def timm_encoder(meta):
    common = dict(
        img_size=meta["img_size"],
        patch_size=meta["patch_size"],
        embed_dim=meta["embed_dim"],
        num_heads=meta["num_heads"],
        num_classes=0,
        drop_path_rate=0.0,
    )
    if meta["arch"] == "vit":
        return Beit(
            **common,
            depth=meta["depth"],
            init_values=meta["init_values"],
            qkv_bias=True,
            global_pool="",
            use_shared_rel_pos_bias=meta["use_shared_rel_pos_bias"],
            use_abs_pos_emb=meta["use_abs_pos_emb"],
        )
    cls = SwinTransformer if meta["arch"] == "swin" else SwinTransformerV2
    return cls(**common, depths=meta["depths"], window_size=meta["window_size"])


class TimmSimMIM(nn.Module):
    """SimMIM written plainly on timm's encoders, as a second implementation."""

    def __init__(self, meta):
        super().__init__()
        self.meta, self.encoder = meta, timm_encoder(meta)
        self.encoder.mask_token = nn.Parameter(torch.zeros(1, 1, meta["embed_dim"]))
        width = meta["embed_dim"] * (1 if meta["arch"] == "vit" else 8)
        self.head = nn.Linear(width, meta["encoder_stride"] ** 2 * 3)

    def tokens(self, images, mask):
        encoder = self.encoder
        x = encoder.patch_embed(images)
        m = mask.to(images.dtype).unsqueeze(-1)
        if self.meta["arch"] == "vit":
            x = x * (1 - m.flatten(1, 2)) + encoder.mask_token * m.flatten(1, 2)
            x = torch.cat((encoder.cls_token.expand(len(x), -1, -1), x), 1)
            for block in encoder.blocks:
                x = block(x, shared_rel_pos_bias=encoder.rel_pos_bias())
            return encoder.norm(x)[:, 1:].unflatten(1, mask.shape[1:])
        x = x * (1 - m) + encoder.mask_token[0] * m
        return encoder.norm(encoder.layers(x))

    def forward(self, images, mask):
        pixels = nn.functional.pixel_shuffle(
            self.head(self.tokens(images, mask)).permute(0, 3, 1, 2), self.meta["encoder_stride"]
        )
        m = mask.repeat_interleave(self.meta["patch_size"], 1).repeat_interleave(self.meta["patch_size"], 2)[:, None]
        if self.meta.get("norm_target"):
            images = local_norm_target(images, self.meta["norm_target"])
        return ((images - pixels).abs() * m).sum() / (m.sum() + 1e-5) / 3


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_training_run_equals_timm_in_float64(path):
    meta, tensors = read(path)
    ours, theirs = build_simmim(meta, "torch").double(), TimmSimMIM(meta).double()
    load_reference(ours, weights(tensors))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(0)
    optimisers = [torch.optim.AdamW(param_groups(m, 0.05, policy="parity"), lr=1e-3) for m in (ours, theirs)]
    for masks in tensors["masks"]:
        images = torch.randn(meta["batch"], 3, meta["img_size"], meta["img_size"], generator=generator).double()
        rows = []
        for model, optimiser in zip((ours, theirs), optimisers, strict=True):
            out = model(images, masks)
            loss = out["loss"] if isinstance(out, dict) else out
            optimiser.zero_grad()
            loss.backward()
            rows.append((loss.item(), torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0).item()))
            optimiser.step()
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)


def check_first_gradients(objective, names, tensors):
    """Norm and random projection of each parameter's gradient; the projection's seed is the stored order."""
    own = dict(objective.named_parameters())
    seeds = {name: i for i, name in enumerate(reference_order(names))}
    for name, own_name in names.items():
        norm, projection = tensors[f"grad0.{name}"].tolist()
        grad = own[own_name].grad.flatten().double().numpy()
        direction = np.random.default_rng(seeds[name]).standard_normal(grad.size)
        scale = max(norm, 1e-7)
        assert abs(np.linalg.norm(grad) - norm) <= 1e-3 * scale, name
        assert abs(grad @ direction - projection) <= 1e-3 * max(abs(projection), scale), name


# How Microsoft's modules register their parameters, which numbers the projections' seeds.
REGISTRATION = [
    "encoder",
    "decoder",
    "cls_token",
    "pos_embed",
    "mask_token",
    "patch_embed",
    "rel_pos_bias",
    "layers",
    "blocks",
    "downsample",
    "gamma_1",
    "gamma_2",
    "norm1",
    "attn",
    "norm2",
    "mlp",
    "logit_scale",
    "q_bias",
    "v_bias",
    "relative_position_bias_table",
    "cpb_mlp",
    "qkv",
    "reduction",
    "proj",
    "fc1",
    "fc2",
    "norm",
    "weight",
    "bias",
]


def reference_order(names):
    def key(name):
        return [(int(part) if part.isdigit() else REGISTRATION.index(part)) for part in name.split(".")]

    return sorted(names, key=key)
