"""A training step counted on fake tensors: launches, traffic, FLOPs and saved bytes, and the rows made of them."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from benchmarks import command  # noqa: E402
from benchmarks.baseline import TimmSimMIM  # noqa: E402
from benchmarks.providers import SHARES  # noqa: E402
from fastmim import create_objective  # noqa: E402
from fastmim.engine.cuda_autocast import cuda_autocast  # noqa: E402
from fastmim.models.sizes import SIZES  # noqa: E402
from fastmim.plan.counter import DispatchCounter  # noqa: E402
from fastmim.plan.hardware import MEASURED as GPUS  # noqa: E402
from fastmim.plan.launch import Launch, bound  # noqa: E402
from fastmim.plan.saved import SavedTensors  # noqa: E402
from fastmim_kernels.common import dispatch  # noqa: E402


@dataclasses.dataclass
class Count:
    """A counted step: totals are of the whole batch."""

    counter: DispatchCounter
    saved: SavedTensors
    batch: int
    casts: list[Launch] = dataclasses.field(default_factory=list)
    """Of the weights, once in an optimiser step; not in the totals."""

    @property
    def launches(self) -> int:
        return self.counter.totals()[0]

    @property
    def megabytes(self) -> float:
        """Traffic, MB an image."""
        return self.counter.totals()[1] / self.batch / 1e6

    @property
    def saved_megabytes(self) -> float:
        return self.saved.bytes / self.batch / 1e6

    def microseconds(self, gpu: int = 0) -> float:
        """Modelled, an image, by the pure roof: bytes and FLOPs at 100 % of both."""
        return self.counter.seconds(GPUS[gpu]) / self.batch * 1e6

    def bound(self, gpu: int = 0) -> dict[str, float]:
        """Modelled microseconds an image at public efficiency, by the roof of the three that binds."""
        return {roof: s / self.batch * 1e6 for roof, s in self.counter.bound(GPUS[gpu]).items()}

    def honest(self, gpu: int = 0) -> float:
        """The sum of :meth:`bound`."""
        return sum(self.bound(gpu).values())


def count_step(
    build: Callable[[], nn.Module],
    *,
    batch: int = 128,
    img_size: int = 192,
    sites: bool = False,
    casts_once: bool = False,
    shares: Mapping[str, float] = SHARES,
    watch: Callable[[str, Tensor], None] | None = None,
) -> Count:
    """Forward and backward of ``module(images, mask)["loss"]`` under CUDA's bf16 autocast policy.

    ``casts_once``: of the second micro-batch of a step, for a module that casts its weights in the first; what
    that costs is returned apart.
    """
    fake = FakeTensorMode()
    # Values do not exist, and torch's truncated normal looks at some.
    with fake, mock.patch.object(nn.init, "trunc_normal_", lambda tensor, **kwargs: tensor):
        module = build().train()
    counter = DispatchCounter(shares, watch=watch, sites=sites)
    casts: list[Launch] = []
    known = [*module.parameters(), *module.buffers()]
    # The Triton implementations accept what is on the CPU: nothing is executed.
    with fake, dispatch.as_on_a_gpu():
        images = torch.empty(batch, 3, img_size, img_size)
        grid = img_size // (getattr(module, "patch_size", None) or module.encoder.patch_size)
        mask = torch.empty(batch, grid, grid, dtype=torch.bool)
        saved = SavedTensors([*known, images, mask])
        if casts_once:
            module.set_micro_batch(0, 2)
            with cuda_autocast(), torch.no_grad(), counter:
                module(images, mask)
            casts = [x for x in counter.launches if x.op.startswith("low_copies")]
            counter.launches.clear()
            module.set_micro_batch(1, 2)
        with counter:
            with saved, cuda_autocast():
                loss = module(images, mask)["loss"]
            counter.phase = "backward"
            loss.backward()
    return Count(counter, saved, batch, casts)


def ours(name: str, impl: str = "auto", **encoder: Any) -> Callable[[], nn.Module]:
    """Builds our SimMIM for a size of ``fastmim.models.sizes``."""
    return lambda: create_objective("simmim", encoder={"name": name, **encoder}, impl=impl)


def _no_drop_path(rate: float, depths: Sequence[int], **kwargs: Any) -> list[list[float]]:
    return [[0.0] * depth for depth in depths]


def baseline(name: str, **encoder: Any) -> Callable[[], nn.Module]:
    """Builds the eager SimMIM on timm's encoder of the same architecture."""

    def build() -> nn.Module:
        size = {**SIZES[name], **encoder}
        family, period = size.pop("name"), size.pop("extra_norm_period", 0)
        source = swin_transformer_v2 if family == "swinv2" else swin_transformer
        kind = source.SwinTransformerV2 if family == "swinv2" else source.SwinTransformer
        # timm reads these numbers out of a tensor, and a fake one has none.
        with mock.patch.object(source, "calculate_drop_path_rates", _no_drop_path):
            net = kind(num_classes=0, **size)
        for module in net.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        for layer in net.layers:
            for i in range(period - 1, len(layer.blocks), period) if period else ():
                block = layer.blocks[i]
                layer.blocks[i] = nn.Sequential(block, nn.LayerNorm(block.dim))
        simmim = TimmSimMIM(net)
        simmim.patch_size = simmim.patch
        return simmim

    return build


def count_target(function: Callable[[Tensor, int], Tensor], batch: int, img_size: int = 192) -> Count:
    """The normalised target by itself."""
    counter, saved = DispatchCounter(), SavedTensors([])
    with FakeTensorMode(), dispatch.as_on_a_gpu():
        images = torch.empty(batch, 3, img_size, img_size)
        with counter, cuda_autocast():
            function(images, 47)
    return Count(counter, saved, batch)


def detail(count: Count, top: int = 40) -> str:
    """The costliest ops of a step, by phase and op and source line."""
    groups: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    for x in count.counter.launches:
        group = groups[x.phase, x.op, x.site]
        for i, value in enumerate((1, x.bytes, x.seconds(GPUS[0]), x.bound(GPUS[0])[1])):
            group[i] += value
    lines = [f"{'':9}{'launches':>8} {'MB/img':>8} {'us/img':>8} {'honest':>8}  op, place"]
    for (phase, op, site), (n, moved, seconds, honest) in sorted(groups.items(), key=lambda item: -item[1][3])[:top]:
        lines.append(
            f"{phase:9}{n:8.0f} {moved / count.batch / 1e6:8.2f} {seconds / count.batch * 1e6:8.2f} "
            f"{honest / count.batch * 1e6:8.2f}  {op}  {site}"
        )
    lines.append(f"saved for backward, MB/img, by first shape and place ({count.saved_megabytes:.1f} in all)")
    for site, size in sorted(count.saved.by_site().items(), key=lambda item: -item[1])[: top // 2]:
        lines.append(f"{size / count.batch / 1e6:25.2f}  {site}")
    return "\n".join(lines)


def row(model: str, side: str, count: Count) -> dict[str, Any]:
    """One line of the CSV."""
    forward, backward = (count.counter.totals(phase) for phase in ("forward", "backward"))
    return {
        **versions(),
        "model": model,
        "side": side,
        "batch": count.batch,
        "launches_forward": forward[0],
        "launches_backward": backward[0],
        "mb_forward": round(forward[1] / count.batch / 1e6, 2),
        "mb_backward": round(backward[1] / count.batch / 1e6, 2),
        "gflop": round((forward[2] + backward[2]) / count.batch / 1e9, 2),
        "saved_mb": round(count.saved_megabytes, 2),
        "casts_once_mb": round(sum(x.bytes for x in count.casts) / count.batch / 1e6, 2),
        **{f"modelled_us_{gpu.name.lower()}": round(count.microseconds(i), 1) for i, gpu in enumerate(GPUS)},
        **{f"honest_us_{gpu.name.lower()}": round(count.honest(i), 1) for i, gpu in enumerate(GPUS)},
        **{f"h100_us_bound_by_{roof.lower()}": round(us, 1) for roof, us in count.bound().items()},
    }


def roof_rows(model: str, count: Count) -> list[dict[str, Any]]:
    """Every kernel of a step under its three roofs on an H100: microseconds an image, costliest first.

    ``bytes``, ``flops`` and ``issue`` are pure; ``pure`` is the sum over launches of the larger of the first two,
    ``honest`` that of the largest of all three at public efficiency, and ``binds`` the roof that gives most of it.
    """
    groups: dict[tuple[str, str], list[Launch]] = defaultdict(list)
    for launch in count.counter.launches:
        groups[launch.phase, launch.op].append(launch)
    rows = []
    for (phase, op), launches in groups.items():
        roofs = [x.roofs(GPUS[0]) for x in launches]
        found = bound(launches, GPUS[0])
        times = {name.lower(): sum(r[name] for r in roofs) for name in found}
        times |= {"pure": sum(x.seconds(GPUS[0]) for x in launches), "honest": sum(found.values())}
        rows.append({
            "model": model, "phase": phase, "op": op, "launches": len(launches),
            "mb": round(sum(x.bytes for x in launches) / count.batch / 1e6, 3),
            "gflop": round(sum(x.flops for x in launches) / count.batch / 1e9, 3),
            "warp_instructions": round(sum(x.issued for x in launches) / count.batch),
            **{f"{name}_us": round(s / count.batch * 1e6, 3) for name, s in times.items()},
            "binds": max(found, key=lambda roof: found[roof]),
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["honest_us"])


@functools.cache
def versions() -> dict[str, str]:
    """Date, commit and the versions that the counts depend on."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short", "HEAD") or "none"
    dirty = "+changes" if git("status", "--porcelain") else ""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit + dirty,
        "torch": torch.__version__.split("+")[0],
        "triton": importlib.metadata.version("triton"),
        "timm": timm.__version__,
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    command.write_csv(path, list(rows[0]), rows)
