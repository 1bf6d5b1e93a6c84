"""Which step the benchmarks measure: their shared options, the cases these ask for, and the columns that say so."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, providers
from benchmarks.providers import Case
from benchmarks.reference import commit_of, find_clones

CASES = ("swinv2_base+47", "swinv2_base", "swin_base", "vit_base")
PROVIDERS = (
    "fastmim", "fastmim-compiled", "timm", "timm-compiled", "microsoft-simmim", "microsoft-swin", "lightly",
    "mmpretrain",
)  # fmt: skip
RESULTS = harness.RESULTS / "measurements.csv"


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Options that say which step is measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="sizes; +47 = normalised target of 47 pixels")
    parser.add_argument("--dtypes", nargs="+", default=list(providers.DTYPES), choices=providers.DTYPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[4 if device == "cpu" else 128], help="images a rank")
    parser.add_argument("--img-size", type=int, nargs="+", default=[None], help="pixels; default: the size's own")
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), help="each also with -compiled")
    parser.add_argument("--reference", metavar="DIR", help="clone(s) of microsoft/SimMIM, Swin-Transformer")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (shared by --ranks); default: its own")
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=RESULTS)


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination that the options ask for."""
    return [
        Case(name, dtype, batch, size, args.device)
        for name in args.cases
        for size in args.img_size
        for batch in args.batch
        for dtype in args.dtypes
    ]


def describe(case: Case, ranks: int, args: argparse.Namespace) -> dict[str, Any]:
    """Columns that say what was measured, on what."""
    out = {"case": case.name, "dtype": case.dtype, "batch": case.batch, "img_size": case.encoder()["img_size"],
           "ranks": ranks, "device": case.device, **harness.environment()}  # fmt: skip
    if case.device == "cuda":
        out["machine"] = torch.cuda.get_device_name()
    if args.reference:
        clones = find_clones(args.reference)
        out["reference"] = " ".join(f"{name}@{commit_of(path)}" for name, path in clones.items())
    return out
