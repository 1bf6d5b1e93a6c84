"""What the command lines of all benchmarks share: help with defaults, where results go, and errors of one line.

Nothing but the standard library is imported: a missing package is then one of those lines.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
"""The committed results, which only ``--record`` writes."""
SCRATCH = ROOT / "runs" / "benchmarks"
"""Where results go without ``--out``; git ignores it."""
INSTALL = {"skimage": "scikit-image", "sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
"""Module → its package on PyPI, where the two have different names."""


TAKES = {
    "run.py kernels": "an hour; minutes for one --model or --shape",
    "run.py rivals": "10 minutes",
    "run.py step": "30 minutes, with clones 45",
    "run.py data": "3 minutes",
    "run.py profile": "15 minutes",
    "run.py memory": "20 minutes",
    "run.py pretrain": "25 minutes; nothing without clones",
    "run.py target": "1 minute",
    "run.py import": "2 minutes",
    "run.py counts": "5 minutes",
    "run.py report": "some seconds",
    "run.py all": "4 hours; with --quick 20 minutes",
    "accelerate_table.py": "5 minutes",
    "bench_busy.py": "6 minutes",
    "bench_checkout.py": "10 minutes",
    "bench_host.py": "2 minutes",
    "bench_visible.py": "5 minutes",
    "big_model.py": "10 minutes",
    "check_plan.py": "10 minutes",
    "ibot_count.py": "2 minutes",
    "kernel_report.py": "20 minutes; some for one --module",
    "moco_count.py": "1 minute",
    "op_count.py": "5 minutes",
    "study.py": "an hour",
    "sweep.py": "3 hours",
    "transfer.py": "an hour",
    "gpu_proof.py": "2 minutes with --dry; on a GPU at most --budget",
    "readme_table.py": "some seconds",
}
"""How long a command takes with its defaults on two cores without a GPU; estimates, but for ``target``."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Puts its default behind the help of every option that does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help or "", action.default
        if "default" in text or not action.option_strings or action.required or default is argparse.SUPPRESS:
            return text
        return f"{text} (default: {_shown(default)})".replace("%", "%%")


def _shown(default: Any) -> str:
    if isinstance(default, Path):
        return str(default.relative_to(ROOT)) if default.is_relative_to(ROOT) else str(default)
    if isinstance(default, list | tuple):
        return " ".join(map(str, default)) or "none"
    return {"None": "none", "False": "off"}.get(str(default), str(default))


class Parser(argparse.ArgumentParser):
    """Options of one benchmark; a wrong one is one line and exit status 2.

    Args:
        name: What is typed: "run.py step", or the script's file name.
        doc: The module's docstring.
    """

    def __init__(self, name: str, doc: str | None) -> None:
        takes = f"Takes about {TAKES[name]} (estimated for 2 cores without a GPU)."
        super().__init__(prog=name, description=doc, epilog=takes, formatter_class=Help)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)} (--help shows the options)\n")

    def add_results(self, file: str, what: str = "CSV that rows are appended to") -> None:
        """``--out`` and ``--record``, which both set ``args.out``; ``file`` is the name in either folder."""
        where = self.add_mutually_exclusive_group()
        where.add_argument("--out", type=result_path, default=SCRATCH / file, metavar="PATH", help=what)
        where.add_argument("--record", dest="out", action="store_const", const=RESULTS / file,
                           help=f"write the committed results/{file} instead (default: off)")  # fmt: skip


def check_shown(path: Path) -> None:
    """Of ``--show``, which measures nothing.

    Raises:
        ValueError: ``path`` is not there.
    """
    if not path.exists():
        raise ValueError(f"--show: there is no {path}; --show --record shows the committed one")


def result_path(text: str) -> Path:
    """A file that can be written, found out before anything is measured.

    Raises:
        ArgumentTypeError: it is a folder, or stands in something that is none.
    """
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a folder; give a file in it")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text}: nothing can be written in {there}")
    return path


def result_folder(text: str) -> Path:
    """A folder that can be written into or made.

    Raises:
        ArgumentTypeError: it is a file, or stands in something where nothing can be written.
    """
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a file; give a folder")
    result_path(str(path / "report.html"))
    return path


def positive(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    """A whole number of at least 0.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 0")
    return int(text)


def checked(check: Callable[[str], Any]) -> Callable[[str], str]:
    """A type of option: the text itself, where ``check`` raises no ValueError, whose words are the error otherwise."""

    def text_of(text: str) -> str:
        try:
            check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return text_of


def write_whole(path: Path, text: str) -> None:
    """Write a text file by renaming a finished one to its name; its folder is made.

    Raises:
        RuntimeError: It cannot be written, for example onto a full disk; the file is then as it was.
    """
    there = path.exists() and not path.is_file()  # a device, such as /dev/stdout
    temporary = path if there else path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8", newline="")
        if not there:
            temporary.replace(path)
    except OSError as error:
        if not there:
            temporary.unlink(missing_ok=True)
        raise RuntimeError(f"{path} cannot be written: {error.strerror}; the file is as it was") from None


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of these columns by :func:`write_whole`; what a row lacks is empty.

    Raises:
        ValueError: A row has another column.
        RuntimeError: As :func:`write_whole`.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def one_line(message: object) -> str:
    """A message without line breaks, and no longer than some lines of a terminal."""
    return " ".join(str(message).split())[:600]


def exit_with(name: str, main: Callable[[], int]) -> NoReturn:
    """End the process with what ``main`` returns; 2 for a wrong request, 1 for a failed run, each with one line."""
    try:
        status = main()
        sys.stdout.flush()  # onto a full disk, say: Python's own last flush would end in a traceback
        sys.exit(status)
    except ImportError as error:
        module = (getattr(error, "name", None) or "").partition(".")[0]
        help_ = f"; pip install {INSTALL.get(module, module)}" if isinstance(error, ModuleNotFoundError) else ""
        _end(name, f"{error}{help_}", 2)
    except ValueError as error:
        _end(name, error, 2)
    except (RuntimeError, OSError) as error:
        _end(name, error, 1)
    except KeyboardInterrupt:
        _end(name, "interrupted", 130)


def _end(name: str, message: object, status: int) -> NoReturn:
    print(f"{name}: {one_line(message)}", file=sys.stderr)
    if status == 1 and sys.stdout is sys.__stdout__:
        with contextlib.suppress(OSError):
            sys.stdout.close()
    sys.exit(status)


def absent(packages: Sequence[str]) -> list[str]:
    """Those of some top-level modules that are not installed."""
    from importlib.util import find_spec

    return [name for name in packages if find_spec(name) is None]
