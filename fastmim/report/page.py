"""The page: what the runs have left, in one file of HTML."""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Sequence
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import Any

from PIL import Image

from fastmim._version import __version__
from fastmim.evaluate.reconstruct import DESCRIPTION
from fastmim.files import write_text
from fastmim.report.charts import COLOURS, charts_of, draw
from fastmim.report.masks import masks_of
from fastmim.report.runs import MODEL, OBJECTIVE, RunFiles, differing, read_runs
from fastmim.wording import as_yaml, plural

_WIDEST, _QUALITY, _EARLIER, _MOST_BAD, _LONGEST = 1200, 82, 3, 500, 400


def write_report(folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Path:
    """Write the page of some runs, finished or not.

    Pictures are in it as WebP, curves as SVG: it needs no other file and no network. Whatever a run's files hold is
    shown as text, never run.

    Args:
        folders: output folders of runs, the first the one that others are compared with.
        out: the .html file; it appears complete or not at all.

    Raises:
        ValueError: a folder is no run's, or a name that is not of HTML.
    """
    out = Path(out)
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out}: must end in .html")
    runs = read_runs(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, render(runs))
    return out


def render(runs: Sequence[RunFiles]) -> str:
    """The HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    drawn = [(chart, draw(chart, runs)) for chart in charts_of(runs)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    title = runs[0].name if len(runs) == 1 else plural(len(runs), "run")
    return template.render(
        title=title,
        version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M"),
        lead=lead(runs),
        runs=[_shown(run, colour) for run, colour in zip(runs, cycle(COLOURS), strict=False)],
        numbers=numbers(runs),
        charts=[(chart, Markup(svg)) for chart, svg in drawn if svg is not None],
        masks=[(run.name, list(map(Markup, one.svgs)), one.said) for run in runs if (one := masks_of(run))],
        mixed=len({run.settings[OBJECTIVE] for run in runs}) > 1,
        pictures=[found for run in runs if (found := _pictures(run))],
        classes=[_classes(run) for run in runs if run.classes],
        differing={key: [as_yaml(value) for value in values] for key, values in differing(runs).items()},
    )


def lead(runs: Sequence[RunFiles]) -> str:
    """One sentence: what was trained and where it is."""
    if len(runs) == 1:
        run = runs[0]
        of = f" of {run.total:,}" if run.total and run.total != run.step else ""
        ends = [f"{name} {value}" for name, [value] in numbers(runs) if name in _ENDS and value != _NOTHING]
        steps = f"{run.step:,}{of} steps" if of else plural(run.step, "step")
        what = f"{run.settings[MODEL]} by {run.settings[OBJECTIVE]}, {steps}"
        return f"{what}: {', '.join(ends)}." if ends else f"{what}."
    said = []
    for name, value_of in _BEST:
        values = [(value, run.name) for run in runs if (value := value_of(run)) is not None]
        if values:
            value, who = max(values)
            said.append(f"{name} {_number(value)} ({who})")
    return f"{plural(len(runs), 'run')} side by side. Best: {', '.join(said)}." if said else ""


_BEST: tuple[tuple[str, Callable[[RunFiles], float | None]], ...] = (
    ("top-1 at the end", lambda run: run.last("val_top1")), ("k-NN at the end", lambda run: run.last("knn_top1")),
    ("images a second", RunFiles.speed),
)  # fmt: skip
"""Of several runs, with the figures of the table."""
_ENDS = ("training loss", "held-out loss", "k-NN top-1, %", "held-out top-1, %")
_NOTHING = "–"


def numbers(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Rows of the table: a name, and a value a run; those that no run has are left out."""
    rows: list[tuple[str, list[str]]] = [
        ("encoder", [as_yaml(run.settings[MODEL]) for run in runs]),
        ("objective", [as_yaml(run.settings[OBJECTIVE]) for run in runs]),
        ("steps", [f"{run.step:,}" + (f" of {run.total:,}" if run.total else "") for run in runs]),
        ("epochs", [_number(run.last("epoch")) for run in runs]),
        ("training loss", [_number(run.last("loss")) for run in runs]),
        ("held-out loss", [_number(run.last("val_loss")) for run in runs]),
        ("k-NN top-1, %", [_number(run.last("knn_top1")) for run in runs]),
        ("RankMe", [_number(run.last("rankme")) for run in runs]),
        ("held-out top-1, %", [_number(run.last("val_top1")) for run in runs]),
        ("best top-1, %", [_number(max((v for _, v in run.series("val_top1")), default=None)) for run in runs]),
        ("calibration error, %", [_number(run.last("val_ece")) for run in runs]),
        ("images a second", [_number(run.speed()) for run in runs]),
        ("time in steps", [_duration(run.seconds()) for run in runs]),
        ("peak memory, GiB", [_number(run.last("peak_memory_gib")) for run in runs]),
        ("files left out", [f"{len(run.bad_files):,}" for run in runs]),
        ("folder", [str(run.folder) for run in runs]),
    ]
    return [(name, values) for name, values in rows if set(values) != {_NOTHING}]


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _shown(run: RunFiles, colour: str) -> dict[str, Any]:
    bad = dict(sorted(run.bad_files.items())[:_MOST_BAD])
    settings = {key: as_yaml(value) for key, value in run.settings.items()}
    return {"name": run.name, "colour": colour, "bad_files": bad, "bad_count": len(run.bad_files), "settings": settings}


def _pictures(run: RunFiles) -> dict[str, Any] | None:
    """The last one, and a few before it."""
    found = run.pictures
    if not found:
        return None
    before = found[:-1]
    spread = [before[i * len(before) // _EARLIER] for i in range(_EARLIER)] if len(before) > _EARLIER else before
    shown = [embedded(path, alt=f"what {run.name} predicts at step {step}", step=step) for step, path in spread]
    step, path = found[-1]
    last = embedded(path, alt=f"what {run.name} predicts at step {step}", step=step)
    return None if last is None else {**last, "run": run.name, "earlier": [one for one in shown if one is not None]}


def embedded(path: Path, **more: Any) -> dict[str, Any] | None:
    """A picture as data of the page, at most :data:`_WIDEST` pixels wide, and what its file says that it shows.

    None where it cannot be read as one.
    """
    try:
        with Image.open(path) as opened:
            image, description = opened.convert("RGB"), str(opened.info.get(DESCRIPTION, ""))[:_LONGEST]
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    if image.width > _WIDEST:
        image = image.resize((_WIDEST, max(1, round(image.height * _WIDEST / image.width))), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "WEBP", quality=_QUALITY)
    data = "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
    return {"data": data, "width": image.width, "height": image.height, "description": description, **more}


def _classes(run: RunFiles) -> dict[str, Any]:
    heads = list(run.classes[0])
    rows = [[_cell(row.get(head)) for head in heads] for row in run.classes]
    return {"run": run.name, "heads": heads, "rows": rows, "confusion": embedded(run.folder / "confusion.png")}


def _cell(value: Any) -> str:
    return _number(value) if isinstance(value, float) else as_yaml(value)
