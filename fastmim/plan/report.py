"""A plan as a table, as JSON and as a picture. GB are 10^9 bytes; every time in it is modelled."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmim.files import naming
from fastmim.wording import install_extra, plural
from fastmim_kernels.common.roofs import HONEST, LAUNCH

from .hardware import GIB, Gpu
from .memory import COMPONENTS
from .recommend import HEADROOM, Option
from .roofline import BAND, HOST_LAUNCH, LINK

log = logging.getLogger("fastmim")

TEXT_COLUMNS = {0, 1}
"""Columns of the table that are not numbers: stage and recompute."""
_FEW_DAYS = 0.01
"""GPU-days from which a run is not given in minutes: with two places they would be a nought."""
_COLORS = ("#4e79a7", "#59a14f", "#76b7b2", "#f28e2b", "#edc948", "#b07aa1")


@dataclass(frozen=True)
class Plan:
    """What a model needs on a machine."""

    title: str
    parameters: int
    gpu: Gpu
    gpus: int
    configured: Option
    options: list[Option]
    recommended: Option | None
    smallest: tuple[Gpu, Option] | None
    images: int
    images_from: str
    precision: str = "bf16"
    still: int = 0
    """Of the parameters those without gradients, as a teacher's."""
    notes: tuple[str, ...] = ()

    def gpu_days(self, option: Option) -> tuple[float, float]:
        """Of the whole run: as modelled, and at the lower end of the band."""
        days = self.images / option.images_per_sec * option.setting.gpus / 86400
        return days, days / BAND


def sentence(option: Option, gpu: Gpu) -> str:
    """Whether an option fits, and why: its components beside the limit."""
    parts = [f"{_label(name)} {getattr(option.memory, name) / 1e9:.1f}" for name in COMPONENTS]
    verdict = "fits" if option.fits else "does not fit"
    host = f"; {option.memory.host / 1e9:.1f} GB of host RAM a GPU" if option.memory.host else ""
    drive = f"; {option.memory.drive / 1e9:.1f} GB on nvme a GPU" if option.memory.drive else ""
    return (
        f"{how(option)}: {verdict}: {' + '.join(parts)} = {option.memory.total / 1e9:.1f} GB "
        f"{'<=' if option.fits else '>'} {option.limit / 1e9:.1f} GB ({gpu.name}: {gpu.memory:g} GiB less "
        f"{HEADROOM:.0%} headroom){host}{drive}"
    )


def how(option: Option) -> str:
    """A setting in words."""
    s = option.setting
    offload = f", offload {s.offload}" if s.offload != "none" else ""
    return (
        f"ZeRO stage {s.stage}, recompute {s.policy}, micro-batch {s.micro_batch} x {s.grad_accum_steps} x "
        f"{plural(s.gpus, 'GPU')}{offload}"
    )


def speed(plan: Plan, option: Option) -> str:
    """Modelled speed and cost."""
    return (
        f"modelled {option.time.total:.3g} s a step (pure roof {option.time.pure:.3g} s; forward and backward bound by "
        f"{binding(option)}; communication {option.time.exposed / option.time.total:.0%}), "
        f"{BAND * option.images_per_sec:,.0f} to {option.images_per_sec:,.0f} images/s, "
        f"MFU {_shares(BAND * option.mfu, option.mfu)}, {cost(*plan.gpu_days(option))} "
        f"for {plural(plan.images, 'image')} ({plan.images_from})"
    )


def cost(low: float, high: float) -> str:
    """From and to so many GPU-days; of a short run minutes, which are more than a nought."""
    if low >= _FEW_DAYS:
        return f"{low:,.2f} to {high:,.2f} GPU-days"
    low, high = 1440 * low, 1440 * high
    if high < 0.1:
        return "under 0.1 GPU-minutes"
    return f"{f'{low:.1f}' if low >= 0.1 else 'under 0.1'} to {high:.1f} GPU-minutes"


def share(part: float) -> str:
    """In whole per cent; not 0% of what is something."""
    return f"{part:.0%}" if part >= 0.01 or part == 0 else "<1%"


def _shares(low: float, high: float) -> str:
    return "under 1%" if high < 0.01 else f"{share(low)} to {share(high)}"


def binding(option: Option) -> str:
    """Shares of forward and backward by the roof that binds, largest first."""
    found = sorted(option.time.bound.items(), key=lambda item: -item[1])
    names = {"issue": "issue slots", "launches": "gaps between launches", "host": "the host"}
    shares = [(names.get(roof, roof), seconds / option.time.compute) for roof, seconds in found if seconds]
    return ", ".join(f"{roof} {share:.0%}" for roof, share in shares)


def conclusions(plan: Plan) -> list[str]:
    """The lines under the table."""
    trained, still = plan.parameters - plan.still, plan.still
    lines = [
        f"{trained / 1e6:,.1f} M parameters; states at stage 0: 16 bytes each, "
        + (f"4 of each of the {still / 1e6:,.1f} M that have no gradient, " if still else "")
        + f"{(16 * trained + 4 * still) / 1e9:.1f} GB; GB are 10^9 bytes",
        f"{plan.gpu.name}: {plan.gpu.memory:g} GiB, {plan.gpu.flops / 1e12:g} TFLOP/s in {plan.precision}, "
        f"{plan.gpu.bandwidth / 1e9:,g} GB/s, link {plan.gpu.link / 1e9:g} GB/s, "
        f"network {plan.gpu.network / 1e9:g} GB/s ({plan.gpu.source})",
        f"times: {HONEST.memory:.0%} of the bandwidth, {HONEST.cublas:.0%} of the FLOP/s in library products and "
        f"{HONEST.triton:.0%} in Triton's, issue slots{'' if plan.gpu.slots else ' left out: no figure of this GPU'}, "
        f"{LAUNCH * 1e6:g} µs of the GPU and {HOST_LAUNCH * 1e6:g} of the host a launch, {LINK:.0%} of links; the "
        f"lower end of a range is {BAND:.0%} of that",
        *plan.notes,
        f"as configured: {sentence(plan.configured, plan.gpu)}",
    ]
    if plan.configured.fits:
        lines.append(f"    {speed(plan, plan.configured)}")
    if plan.recommended is not None:
        lines.append(f"recommended: {sentence(plan.recommended, plan.gpu)}")
        lines.append(f"    {speed(plan, plan.recommended)}")
    if plan.smallest is not None:
        gpu, option = plan.smallest
        lines.append(f"smallest known machine for it: {option.setting.gpus} x {gpu.name}: {sentence(option, gpu)}")
    elif plan.recommended is None:
        lines.append("does not fit on any known machine")
    return lines


def as_text(plan: Plan) -> str:
    """A table of stages and policies, and the conclusions."""
    rows = table_rows(plan)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        sized = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(w) if i in TEXT_COLUMNS else cell.rjust(w) for i, (cell, w) in sized]
        return "  ".join(cells).rstrip()

    table = [line(rows[0]), "-" * len(line(rows[0])), *map(line, rows[1:])]
    return "\n".join([*heading(plan), "", *table, "", *conclusions(plan)]) + "\n"


def heading(plan: Plan) -> list[str]:
    """The lines over the table."""
    title = f"{plan.title} on {plan.gpus} x {plan.gpu.name}, global batch {plan.configured.setting.images}"
    return [title, "GB a GPU at the fullest point of a step; images/s and MFU are modelled, not measured"]


def table_rows(plan: Plan) -> list[list[str]]:
    """The cells of the table: names of the columns, then a row an option."""
    header = ["stage", "recompute", "micro", *(_label(name) for name in COMPONENTS), "total", "fits", "images/s", "MFU"]
    return [header, *(_row(plan, option) for option in plan.options)]


def _row(plan: Plan, option: Option) -> list[str]:
    sizes = [f"{getattr(option.memory, name) / 1e9:.1f}" for name in COMPONENTS]
    mark = "*" if option is plan.recommended else ""
    return [
        f"{option.setting.stage}{mark}",
        option.setting.policy,
        str(option.setting.micro_batch),
        *sizes,
        f"{option.memory.total / 1e9:.1f}",
        "yes" if option.fits else "no",
        f"{option.images_per_sec:,.0f}",
        share(option.mfu),
    ]


def as_json(plan: Plan) -> str:
    """Everything of the table, bytes and seconds as numbers."""
    smallest = None
    if plan.smallest is not None:
        gpu, option = plan.smallest
        smallest = {"gpu": gpu.name, "gpus": option.setting.gpus, **_entry(plan, option)}
    tree = {
        "title": plan.title,
        "parameters": plan.parameters,
        "untrained": plan.still,
        "gpu": plan.gpu.__dict__ | {"memory_bytes": plan.gpu.memory * GIB},
        "gpus": plan.gpus,
        "precision": plan.precision,
        "headroom": HEADROOM,
        "images": plan.images,
        "images_from": plan.images_from,
        "notes": list(plan.notes),
        "configured": _entry(plan, plan.configured),
        "recommended": None if plan.recommended is None else _entry(plan, plan.recommended),
        "smallest_machine": smallest,
        "options": [_entry(plan, option) for option in plan.options],
        "times": "modelled by three roofs at the efficiency of public kernels, not measured",
        "efficiency": HONEST._asdict() | {"link": LINK, "least_share": BAND},
    }
    return json.dumps(tree, indent=1) + "\n"


def _entry(plan: Plan, option: Option) -> dict[str, Any]:
    s, m = option.setting, option.memory
    return {
        "zero_stage": s.stage,
        "recompute": s.policy,
        "micro_batch_size": s.micro_batch,
        "grad_accum_steps": s.grad_accum_steps,
        "offload": s.offload,
        "fits": option.fits,
        "limit_bytes": option.limit,
        "memory_bytes": {name: getattr(m, name) for name in (*COMPONENTS, "total", "host", "drive")},
        "modelled_step_seconds": option.time.total,
        "modelled_pure_roof_step_seconds": option.time.pure,
        "modelled_seconds_by_binding_roof": dict(option.time.bound),
        "modelled_images_per_sec": option.images_per_sec,
        "modelled_mfu": option.mfu,
        "modelled_gpu_days": plan.gpu_days(option)[0],
        "modelled_gpu_days_at_most": plan.gpu_days(option)[1],
    }


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse what :func:`save_picture` cannot write, before a plan is made for it.

    Raises:
        ValueError: matplotlib is not installed, the file's ending is none that it can draw, or there is no such folder.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise ValueError(f"--picture: matplotlib is not installed; {install_extra('plots')}") from None
    path = Path(path)
    if path.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        raise ValueError(f"--picture {path}: no picture ends like this; use .png, .svg or .pdf")
    if not path.parent.is_dir():
        raise ValueError(f"--picture {path}: there is no folder {path.parent}; make it first")


def save_picture(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Stacked bars of memory by stage and policy, the limit as a line.

    Raises:
        ValueError: As :func:`check_picture`.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = plan.options
    figure = Figure(figsize=(max(6.0, 0.55 * len(shown) + 2), 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    base = [0.0] * len(shown)
    for name, color in zip(COMPONENTS, _COLORS, strict=True):
        heights = [getattr(option.memory, name) / 1e9 for option in shown]
        axes.bar(range(len(shown)), heights, bottom=base, color=color, label=_label(name))
        base = [low + height for low, height in zip(base, heights, strict=True)]
    axes.axhline(shown[0].limit / 1e9, color="black", linestyle="--", label=f"{plan.gpu.name} less headroom")
    labels = [f"{o.setting.policy}\nstage {o.setting.stage}, {o.setting.micro_batch}" for o in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=60, ha="right", fontsize=7)
    axes.set_xlabel("recompute policy, ZeRO stage and micro-batch")
    axes.set_ylabel("GB a GPU")
    axes.set_title(f"{plan.title} on {plan.gpus} x {plan.gpu.name}")
    axes.legend(fontsize=8)
    path = Path(path)
    with naming(path):
        figure.savefig(path)
    return path


def _label(component: str) -> str:
    return "optimiser" if component == "optimizer" else component
