"""Which step the benchmarks measure: their shared options, the cases these ask for, and the columns that say so."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import command, harness, providers
from benchmarks.providers import Case
from benchmarks.recipe_case import CASES as RECIPES
from benchmarks.recipe_case import make_case
from benchmarks.reference import commit_of, find_clones

CASES = ("swinv2_base+47", "swinv2_base", "swin_base", "vit_base")
PROVIDERS = (
    "fastmim", "fastmim-compiled", "timm", "timm-compiled", "microsoft-simmim", "microsoft-swin", "lightly",
    "mmpretrain", "bytedance-ibot", "facebookresearch-mae",
)  # fmt: skip


def add_shared(parser: command.Parser) -> None:
    """Options that say which step is measured."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case, provider, clone = map(command.checked, (_check_case, providers.check_name, find_clones))
    parser.add_argument("--cases", nargs="+", type=case, default=list(CASES), metavar="CASE",
                        help="sizes; +47 = normalised target of 47 pixels; " + ", ".join(RECIPES))  # fmt: skip
    parser.add_argument("--dtypes", nargs="+", default=list(providers.DTYPES), choices=providers.DTYPES,
                        help="precisions")  # fmt: skip
    parser.add_argument("--batch", type=command.positive, nargs="+", default=[4 if device == "cpu" else 128],
                        help="images a rank")  # fmt: skip
    parser.add_argument("--img-size", type=command.positive, nargs="+", default=[None], metavar="PIXELS",
                        help="edge of an image (default: the size's own)")  # fmt: skip
    parser.add_argument("--providers", nargs="+", type=provider, default=list(PROVIDERS), metavar="PROVIDER",
                        help="each also with -compiled")  # fmt: skip
    parser.add_argument("--reference", metavar="DIR", type=clone,
                        help="clone(s) of microsoft/SimMIM, Swin-Transformer, bytedance/ibot, MAE")  # fmt: skip
    parser.add_argument("--threads", type=command.positive,
                        help="CPU threads of torch, shared by --ranks (default: its own)")  # fmt: skip
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"), help="where the step runs")
    parser.add_results("measurements.csv")


def _check_case(name: str) -> None:
    make_case(name).encoder()


def cases(args: argparse.Namespace) -> list[Case]:
    """Every combination that the options ask for."""
    return [
        make_case(name, dtype, batch, size, args.device)
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
