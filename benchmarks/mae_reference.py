"""MAE's step beside that of a clone of facebookresearch/mae: losses, time on this CPU, and counts on fake tensors.

    python benchmarks/mae_reference.py --reference DIR [--model vit_base] [--batch 8] [--rounds 9]
                                       [--dtypes fp32 bf16] [--decoder 512 8 16] [--counts-only] [--out CSV]

Both have the same weights and get the same images and masks; their losses are compared before anything is measured, and
a difference beyond rounding ends the command. The steps (forward, backward, AdamW) take turns: a ratio is of two steps
next to each other, in CPU seconds, which a busy machine disturbs least. Counts (launches, traffic, saved bytes) are of
bf16 autocast on fake CUDA tensors, ViT at 224 px: no GPU is needed, and none is measured. The clone is read, not
edited: its attention is unfused in the counts, as in the timm that it pins, and what current timm has in the times.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import timm.models.vision_transformer as timm_vit
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, step_count  # noqa: E402
from benchmarks.bench_counts import on_fake_weights  # noqa: E402
from benchmarks.train_step import Provider, plain_step  # noqa: E402
from fastmim import create_objective  # noqa: E402
from fastmim.engine.local import LocalEngine  # noqa: E402
from fastmim.engine.optim import build_optimizer, param_groups  # noqa: E402
from fastmim.interop.mae import save_mae  # noqa: E402
from fastmim.models import expand_size  # noqa: E402

LR, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.05
LIMITS = {"fp32": 1e-5, "bf16": 1e-2}
"""Of the relative difference of the first losses."""
COLUMNS = ("model", "batch", "dtype", "decoder", "loss_difference", "ours_cpu_seconds", "reference_cpu_seconds",
           "ratio", "ratio_low", "ratio_high", "launches", "reference_launches", "mb_per_image",
           "reference_mb_per_image", "saved_mb_per_image", "reference_saved_mb_per_image", "threads", "torch",
           "commit")  # fmt: skip


def encoder_of(model: str, **changes: Any) -> dict[str, Any]:
    """MAE's ViT of a size."""
    plain = dict(shared_rel_pos_bias=False, init_values=None, key_bias=True, abs_pos_embed="sincos", init="mae")
    return expand_size({"name": model, **plain, **changes})


def ours(encoder: dict[str, Any], decoder: Sequence[int]) -> Any:
    width, depth, heads = decoder
    sizes = dict(decoder_embed_dim=width, decoder_depth=depth, decoder_num_heads=heads)
    return create_objective("mae", encoder=encoder, norm_pix_loss=True, **sizes)


class Reference(nn.Module):
    """The clone's model behind our call: it draws the noise that leaves the patches of ``mask`` hidden."""

    def __init__(self, clone: Path, source: Any) -> None:
        super().__init__()
        settings, decoder = source.encoder.settings, source.decoder_blocks
        with _importable(clone):
            module = importlib.import_module("models_mae")
            self.model = module.MaskedAutoencoderViT(
                img_size=settings["img_size"],
                patch_size=settings["patch_size"],
                in_chans=settings["in_chans"],
                embed_dim=settings["embed_dim"],
                depth=settings["depth"],
                num_heads=settings["num_heads"],
                decoder_embed_dim=source.decoder_embed.out_features,
                decoder_depth=len(decoder),
                decoder_num_heads=decoder[0].attn.num_heads,
                mlp_ratio=settings["mlp_ratio"],
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                norm_pix_loss=source.norm_pix_loss,
            )
        self.model.load_state_dict(save_mae(source)["model"])
        self.patch_size, self.mask_ratio = settings["patch_size"], source.mask_ratio

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        with mock.patch.object(torch, "rand", lambda *_, **__: mask.flatten(1).float()):
            return {"loss": self.model(images, self.mask_ratio)[0]}


@contextlib.contextmanager
def _importable(clone: Path) -> Iterator[None]:
    """The clone's modules, with what NumPy and timm have dropped since."""
    known, real = set(sys.modules), timm_vit.Block

    def block(*args: Any, qk_scale: None = None, **kwargs: Any) -> nn.Module:
        return real(*args, **kwargs)

    dropped = mock.patch.object(timm_vit, "Block", block), mock.patch.object(np, "float", float, create=True)
    sys.path.insert(0, str(clone))
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no files in the clone
    try:
        with dropped[0], dropped[1]:
            yield
    finally:
        sys.path.remove(str(clone))
        sys.dont_write_bytecode = bytecode
        for name in [n for n in sys.modules if n not in known and n.partition(".")[0] in ("models_mae", "util")]:
            del sys.modules[name]


def check_losses(source: Any, reference: nn.Module, dtype: str, inputs: tuple[Tensor, Tensor]) -> float:
    """The relative difference of both losses.

    Raises:
        ValueError: It is beyond rounding.
    """
    losses = []
    for module in (source, reference):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            losses.append(float(module(*inputs)["loss"]))
    difference = abs(losses[0] / losses[1] - 1)
    if not difference <= LIMITS[dtype]:
        raise ValueError(f"{dtype}: our loss is {losses[0]:.8f}, the clone's {losses[1]:.8f}; nothing was measured")
    return difference


def steps_of(source: Any, reference: nn.Module, dtype: str) -> tuple[Provider, Provider]:
    """Ours as a run takes it, and the clone's as its engine writes it, without gradient scaling, which a CPU lacks."""
    optimiser = build_optimizer("adamw", param_groups(source, DECAY, policy="parity"), lr=LR, betas=BETAS)
    engine = LocalEngine(source, optimiser, precision=dtype)
    own = Provider("fastmim", source, lambda *inputs: engine(*inputs)["loss"], engine.backward, engine.step)
    theirs = plain_step("facebookresearch-mae", reference, reference, device="cpu", dtype=dtype, lr=LR, betas=BETAS)
    return own, theirs


def paired_seconds(steps: Sequence[Provider], inputs: tuple[Tensor, Tensor], rounds: int) -> list[tuple[float, ...]]:
    """CPU seconds of a step of each, in turns, the one that begins being another in every round."""
    found = []
    for number in range(-1, rounds):
        seconds = [0.0] * len(steps)
        order = list(enumerate(steps))
        for at, step in order if number % 2 else reversed(order):
            begin = time.process_time()
            step.backward(step.forward(*inputs))
            step.update()
            seconds[at] = time.process_time() - begin
        if number >= 0:  # the first warms up
            found.append(tuple(seconds))
    return found


def counts(clone: Path, model: str, decoder: Sequence[int], batch: int = 64) -> dict[str, Any]:
    """Launches, traffic and saved bytes of both steps."""
    encoder = encoder_of(model)
    reference = Reference(clone, ours(encoder, decoder))
    for part in reference.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    found: dict[str, Any] = {}
    builders: dict[str, Callable[[], Any]] = {
        "": lambda: ours(encoder, decoder), "reference_": partial(on_fake_weights, reference)
    }  # fmt: skip
    with mock.patch.object(step_count, "SHARES", {}):
        for side, build in builders.items():
            count = step_count.count_step(build, batch=batch, img_size=encoder["img_size"])
            found |= {
                f"{side}launches": count.launches,
                f"{side}mb_per_image": round(count.megabytes, 2),
                f"{side}saved_mb_per_image": round(count.saved_megabytes, 2),
            }
    return found


def times(clone: Path, args: Any, dtype: str) -> dict[str, Any]:
    """Losses and CPU seconds of both steps in one precision."""
    torch.manual_seed(0)
    source = ours(encoder_of(args.model, img_size=args.img_size), args.decoder).train()
    reference = Reference(clone, source).train()
    images = torch.randn(args.batch, 3, *source.img_size, generator=torch.Generator().manual_seed(1))
    inputs = images, source.random_mask(torch.arange(args.batch))
    difference = check_losses(source, reference, dtype, inputs)
    rows = paired_seconds(steps_of(source, reference, dtype), inputs, args.rounds)
    ratios = sorted(theirs / own for own, theirs in rows)
    low, _, _, high = statistics.quantiles(ratios, n=5)
    return {
        "batch": args.batch,
        "dtype": dtype,
        "loss_difference": f"{difference:.1e}",
        "ours_cpu_seconds": round(statistics.median(own for own, _ in rows), 3),
        "reference_cpu_seconds": round(statistics.median(theirs for _, theirs in rows), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_low": round(low, 3),
        "ratio_high": round(high, 3),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("mae_reference.py", __doc__)
    parser.add_argument("--reference", type=Path, required=True, help="clone of facebookresearch/mae")
    parser.add_argument("--model", default="vit_base", help="size of fastmim.models.sizes (default vit_base)")
    parser.add_argument("--img-size", type=command.positive, default=224, help="of the timed steps (default 224)")
    parser.add_argument("--decoder", type=command.positive, nargs=3, default=[512, 8, 16], help="width, blocks, heads")
    parser.add_argument("--batch", type=command.positive, default=8, help="images of a timed step (default 8)")
    parser.add_argument("--rounds", type=command.positive, default=9, help="pairs of steps, 2 at least (default 9)")
    parser.add_argument("--dtypes", nargs="*", choices=list(LIMITS), default=list(LIMITS), help="of the timed steps")
    parser.add_argument("--counts-only", action="store_true", help="no times")
    parser.add_results("mae_reference.csv")
    args = parser.parse_args(argv)
    if not (args.reference / "models_mae.py").is_file():
        parser.error(f"--reference {args.reference}: no models_mae.py in it; clone facebookresearch/mae")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: give 2 at least")
    counted = counts(args.reference, args.model, args.decoder)
    shared = {"model": args.model, "decoder": "x".join(map(str, args.decoder)), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "commit": step_count.versions()["commit"]}  # fmt: skip
    timed = [{}] if args.counts_only else [times(args.reference, args, dtype) for dtype in args.dtypes]
    rows = [shared | counted | found for found in timed]
    for row in rows:
        print(", ".join(f"{key} {row[key]}" for key in COLUMNS if key in row), flush=True)
    command.write_csv(args.out, COLUMNS, [dict.fromkeys(COLUMNS, "") | row for row in rows])
    return 0


if __name__ == "__main__":
    command.exit_with("mae_reference.py", main)
