"""``fastmim convert``: an encoder from and for other programs."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from fastmim.wording import plural

from .configs import takes_overrides
from .console import shown_on_a_terminal, write

_KEYS = {"model": ("name", "img_size", "window_size", "pretrained_window_size", "num_heads", "norm_eps", "policy"),
         "data": ("mean", "std", "interpolation")}  # fmt: skip


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``convert`` to the command line."""
    formats = "fastmim, timm, huggingface, simmim, swin, mae, ibot, dino, moco, beit"
    convert = commands.add_parser("convert", parents=[common], help="write the encoder of any checkpoint for another "
                                  "program, or as ONNX", epilog=f"formats: {formats}; --to also onnx")
    convert.add_argument("source", metavar="SRC", help="a run's output folder, a step-… folder, a weight file, or a "
                         "folder of timm's or transformers' with config.json")
    convert.add_argument("out", metavar="DST", help="a .safetensors, .pth or .onnx file, or a folder with config.json")
    takes_overrides(convert, "what a file of another program does not say: model.img_size=…, "
                    "model.window_size=…, model.num_heads=…, data.mean=…")
    convert.add_argument("--from", dest="project", metavar="FORMAT", help="of SRC (default: as its names tell)")
    convert.add_argument("--to", dest="target", metavar="FORMAT", help="of DST (default: fastmim for a .safetensors "
                         "file, onnx for .onnx, timm for a folder)")
    convert.add_argument("--report", metavar="FILE", help="write a CSV of every tensor of SRC and what became of it")
    convert.add_argument("--whole", action="store_true", help="of a run the whole objective under its own names")
    convert.add_argument("--student", action="store_true", help="of iBOT and DINO the student instead of the teacher")
    convert.add_argument("--average", action="store_true", help="of a fine-tuning the weights' moving average")
    convert.set_defaults(command=run_convert)


def run_convert(options: argparse.Namespace) -> int:
    """Convert, and say what was done with which tensors."""
    from fastmim.config import read_tree

    tree = read_tree(None, options.overrides)
    other = [f"{section}.{key}" for section, keys in tree.items() for key in keys if key not in _KEYS.get(section, ())]
    if other:
        known = ", ".join(f"{section}.{key}" for section, keys in _KEYS.items() for key in keys)
        raise ValueError(f"{other[0]}: convert takes {known}")
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.engine.conversion import convert_any, write_report

    done = convert_any(
        options.source,
        options.out,
        project=options.project,
        target=options.target,
        given=tree.get("model"),
        statistics=tree.get("data"),
        whole=options.whole,
        student=options.student,
        average=options.average,
    )
    if options.report:
        write_report(done, options.report)
    write(_as_text(done))
    return 0


def _as_text(done: Any) -> str:
    foreign = done.foreign
    if foreign is None:
        return f"{done.out}\n"
    under = f", under {foreign.place}" if foreign.place else ""
    count = sum(tensor.numel() for tensor in foreign.tensors.values())
    used = [row for row in foreign.rows if row.becomes]
    form = "as ONNX" if done.target == "onnx" else f"for {done.target}"
    lines = [f"{done.out}: {foreign.settings['name']} with {plural(count, 'weight')}, {form}",
             f"  read as {foreign.project}'s{under}: {plural(len(used), 'tensor')} used"]  # fmt: skip
    reasons = Counter(row.reason for row in foreign.rows if not row.becomes)
    for reason, many in reasons.items():
        first = next(row.name for row in foreign.rows if row.reason == reason)
        lines.append(f"  left out {plural(many, 'tensor')} ({first}{', …' if many > 1 else ''}): {reason}")
    if foreign.not_read:
        lines.append(f"  not read: {', '.join(foreign.not_read[:8])}{', …' if len(foreign.not_read) > 8 else ''}")
    if done.difference is not None:
        lines.append(f"  ONNX Runtime's results differ by at most {done.difference:.1e}")
    return "\n".join([*lines, *(f"  {note}" for note in [*foreign.notes, *done.notes])]) + "\n"
