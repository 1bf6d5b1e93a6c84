"""The ``fastmim`` command.

What a user can put right is one line on standard error and exit status 2; a run that failed by itself (a
non-finite loss, data workers that cannot go on) or by its surroundings (a file that cannot be written, memory) exits
with 1, in one line too. A run that was asked to stop, and saved, exits with 128 and the signal's number, as in shells
(SIGINT 130, SIGTERM 143, SIGUSR1 138, SIGUSR2 140, SIGHUP 129); one that a second signal has aborted with 130.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from fastmim._version import __version__
from fastmim.engine.launcher import rank_or_none
from fastmim.errors import is_our_fault, lacks_memory, one_line
from fastmim.files import naming
from fastmim.threads import settle_threads

USER_ERROR, RUN_FAILED = 2, 1

_DESCRIPTION = "Masked image modelling pretraining for Swin, SwinV2 and ViT encoders."
_EXAMPLES = """\
examples:
  fastmim data demo demo/data
  fastmim data pack /path/to/images /path/to/shards --short-side 256
  fastmim pretrain configs/demo.yaml train.steps=50 output.dir=runs/short
  fastmim pretrain configs/simmim/swinv2_base.yaml data.path=/path/to/images
  fastmim config show configs/simmim/swinv2_base.yaml optim.lr=2e-4
  fastmim plan configs/simmim/swinv2_giant.yaml --gpus 8 --gpu h100-80g
  fastmim doctor
  torchrun --nproc_per_node 8 -m fastmim pretrain CONFIG data.path=/path/to/images
  deepspeed --num_gpus 8 --module fastmim pretrain CONFIG data.path=/path/to/images
  fastmim convert runs/short encoder.safetensors
"""
_OVERRIDES = "section.key=value, the value in YAML; may be repeated and wins over the file"


def entry() -> NoReturn:
    """The console script: run :func:`main` and leave with its status."""
    settle_threads()
    try:
        status = main()
    finally:
        _let_go_of_stdout()
    if rank_or_none() is not None:
        from fastmim.engine.distributed import exit_process

        exit_process(status)
    sys.exit(status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status.
    """
    arguments = _take_local_rank(list(sys.argv[1:] if argv is None else argv))
    options, unknown = _parser().parse_known_args(arguments)
    _log_to_stderr()
    try:
        unknown = _late_overrides(options, unknown)
        if unknown:
            raise ValueError(_unknown_option(unknown[0]))
        return int(options.command(options))
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        return 0  # the reader of a pipe such as `| head` has left
    except (ValueError, ModuleNotFoundError) as error:
        if options.traceback or is_our_fault(error):
            raise
        _say_error(error)
        return USER_ERROR
    except (FloatingPointError, OSError, MemoryError, RuntimeError) as error:
        if options.traceback or not _speaks_for_itself(error):
            raise
        _say_error(error)
        return USER_ERROR if _is_wrong_place(error) else RUN_FAILED


def _pretrain(options: argparse.Namespace) -> int:
    if rank_or_none() is None:
        return _pretrain_here(options)
    from fastmim.engine.distributed import distributed

    # Met first: a mistake that one rank alone makes is then known to all, and nobody waits for it.
    with distributed():
        return _pretrain_here(options)


def _pretrain_here(options: argparse.Namespace) -> int:
    from fastmim.config import load_config

    cfg = load_config(options.config, options.overrides)
    if cfg.data.path is None and cfg.data.file_list is None and cfg.data.loader != "synthetic":
        raise ValueError("data.path=null: give a folder of images, for example data.path=/path/to/images")
    with _shown_on_a_terminal("loading libraries …"):
        from fastmim.engine.train import train

    result = train(cfg, ends_process=True)
    return 128 + result.stopped_by if result.interrupted else 0


@contextmanager
def _shown_on_a_terminal(text: str) -> Iterator[None]:
    """A line that stands while something takes seconds, and leaves no trace."""
    shown = _rank() == 0 and sys.stderr is not None and sys.stderr.isatty()
    if shown:
        print(f"fastmim: {text}", end="\r", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\x1b[K", end="", file=sys.stderr, flush=True)


def _config_show(options: argparse.Namespace) -> int:
    from fastmim.config import dump_config, explain, load_config

    cfg = load_config(options.config, options.overrides)
    _print(explain(cfg) if options.explain else dump_config(cfg))
    return 0


def _config_keys(options: argparse.Namespace) -> int:
    from fastmim.config import explain, load_config

    _print(explain(load_config(None, options.overrides)))
    return 0


def _data_demo(options: argparse.Namespace) -> int:
    from fastmim.data import make_demo

    counts = make_demo(options.folder)
    _print(f"{options.folder}: {counts.train} photographs in train, {counts.val} in val\n")
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from fastmim.config import load_config
    from fastmim.data import check_images

    cfg = load_config(None, options.overrides)
    keys = {"follow_links", "component", "min_size", "value_range", "alpha"}
    usable, bad = check_images(options.folder, in_chans=cfg.model.in_chans, **cfg.data.model_dump(include=keys))
    lines = [f"{path}: {reason}" for path, reason in sorted(bad.items())]
    _print("\n".join([*lines, f"{options.folder}: {usable} usable images, {len(bad)} bad files"]) + "\n")
    return 1 if bad else 0


def _data_index(options: argparse.Namespace) -> int:
    from fastmim.data import index_shards

    with naming(options.shards):
        counts = index_shards(options.shards)
    _print(f"{options.shards}: {sum(counts.values())} images in {len(counts)} shards, an .idx beside each\n")
    return 0


def _data_pack(options: argparse.Namespace) -> int:
    from fastmim.data import pack_images

    with naming(options.target), _bar() as progress:
        report = pack_images(
            options.folder,
            options.target,
            shard_bytes=round(options.shard_mb * 1e6),
            short_side=options.short_side,
            quality=options.quality,
            progress=progress,
        )
    lines = [f"left out {path}: {reason}" for path, reason in sorted(report.bad.items())]
    written = f"{report.images} images in {len(report.shards)} shards, {report.total_bytes / 1e6:.1f} MB"
    _print("\n".join([*lines, f"{options.target}: {written}, every one read back; {len(report.bad)} bad files"]) + "\n")
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, a row a stage."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=_rank() != 0) as bar:
        rows: dict[str, TaskID] = {}

        def tell(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bar.add_task(stage, total=total)
            bar.update(rows[stage], completed=done)

        yield tell


def _doctor(options: argparse.Namespace) -> int:
    from fastmim.doctor import doctor

    report, status = doctor(as_json=options.json)
    _print(report)
    return status


def _plan(options: argparse.Namespace) -> int:
    from fastmim.config import load_config

    cfg = load_config(options.config, options.overrides)
    from fastmim.engine.progress import counted
    from fastmim.plan.command import make_plan
    from fastmim.plan.hardware import find_gpu
    from fastmim.plan.report import as_json, as_text, save_picture
    from fastmim.plan.terminal import show

    with counted("tracing the model", enabled=_rank() == 0 and sys.stderr.isatty(), stderr=True) as told:
        plan = make_plan(cfg, gpu=find_gpu(options.gpu), gpus=options.gpus, images=options.images, told=told)
    if options.picture:
        save_picture(plan, options.picture)
    if sys.stdout.isatty() and not options.json and _rank() == 0:
        show(plan)
    else:
        _print(as_json(plan) if options.json else as_text(plan))
    return 0


def _profile(options: argparse.Namespace) -> int:
    from pathlib import Path

    from fastmim.config import load_config

    cfg = load_config(options.config, options.overrides)
    from fastmim.profiling.command import profile_run

    _print(profile_run(cfg, steps=options.steps, out=Path(options.out) if options.out else None))
    return 0


def _convert(options: argparse.Namespace) -> int:
    from fastmim.engine.checkpoint import convert

    _print(f"{convert(options.checkpoint, options.out, whole=options.whole)}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--traceback", action="store_true", default=False, help="show where an error came from")
    parser = argparse.ArgumentParser(
        prog="fastmim",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastmim {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    pretrain = commands.add_parser("pretrain", parents=[common], help="pretrain an encoder")
    _takes_config(pretrain)
    pretrain.set_defaults(command=_pretrain)

    config = commands.add_parser("config", help="show a config, or every key there is")
    config_commands = config.add_subparsers(metavar="COMMAND", required=True)
    shown = config_commands.add_parser("show", parents=[common], help="print the resolved config as YAML")
    _takes_config(shown)
    shown.add_argument("--explain", action="store_true", help="with the type, default and meaning of every key")
    shown.set_defaults(command=_config_show)
    keys = config_commands.add_parser("keys", parents=[common], help="print every key, its type and default")
    keys.add_argument("overrides", metavar="key=value", nargs="*", help="objective.name=... shows another's keys")
    keys.set_defaults(command=_config_keys)

    data = commands.add_parser("data", help="make the demo's photographs, check a folder, pack and index shards")
    data_commands = data.add_subparsers(metavar="COMMAND", required=True)
    demo = data_commands.add_parser("demo", parents=[common], help="write a few hundred real photograph tiles")
    demo.add_argument("folder", metavar="DIR", help="gets the folders train and val")
    demo.set_defaults(command=_data_demo)
    check = data_commands.add_parser("check", parents=[common], help="decode every image, name the bad files")
    check.add_argument("folder", metavar="DIR", help="folder of images, nested or flat, or tar shards")
    check.add_argument("overrides", metavar="key=value", nargs="*", help="such as model.in_chans=1, data.value_range=…")
    check.set_defaults(command=_data_check)
    index = data_commands.add_parser("index", parents=[common], help="write the index beside every tar shard")
    index.add_argument("shards", metavar="SHARDS", help="folder of .tar files, one of them, or a-{000..127}.tar")
    index.set_defaults(command=_data_index)
    pack = data_commands.add_parser("pack", parents=[common], help="write a folder of images into tar shards")
    pack.add_argument("folder", metavar="DIR", help="folder of images, nested or flat")
    pack.add_argument("target", metavar="TARGET", help="new folder for the shards, their indices and names.txt")
    pack.add_argument("--short-side", type=int, metavar="PX", help="make larger images this small (default: copy)")
    pack.add_argument("--quality", type=int, default=90, metavar="Q", help="of those JPEGs, 1 to 100 (default 90)")
    pack.add_argument("--shard-mb", type=float, default=1000, metavar="MB", help="size of a shard (default 1000)")
    pack.set_defaults(command=_data_pack)

    plan = commands.add_parser("plan", parents=[common], help="memory and modelled speed on a machine, before launch")
    _takes_config(plan)
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all (default 1)")
    custom = "name=mine,memory=48,tflops=180,bandwidth=900,link=50,network=25 (GiB, TFLOP/s, GB/s)"
    plan.add_argument("--gpu", default="h100-80g", help=f"a known GPU, or {custom}; network: between machines")
    plan.add_argument("--images", type=int, metavar="N", help="size of the data set (default: data.path, ImageNet-1k)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--picture", metavar="FILE", help="draw the memory of every stage and policy")
    plan.set_defaults(command=_plan)

    profile = commands.add_parser("profile", parents=[common], help="profile real steps: time by op, memory, power")
    _takes_config(profile)
    profile.add_argument("--steps", type=int, default=3, metavar="N", help="profiled steps (default 3)")
    profile.add_argument("--out", metavar="DIR", help="where the trace goes (default: profile in output.dir)")
    profile.set_defaults(command=_profile)

    convert = commands.add_parser("convert", parents=[common], help="write the encoder of any checkpoint as one file")
    convert.add_argument("checkpoint", metavar="CHECKPOINT", help="a step-... folder, or a run's output folder")
    convert.add_argument("out", metavar="OUT", help="file to write, for example encoder.safetensors")
    convert.add_argument("--whole", action="store_true", help="the whole objective under its own names")
    convert.set_defaults(command=_convert)

    doctor = commands.add_parser("doctor", parents=[common], help="check the installation and every op on this machine")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(command=_doctor)
    return parser


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, for example configs/demo.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=_OVERRIDES)


def _take_local_rank(argv: list[str]) -> list[str]:
    """Drop the ``--local_rank=N`` that the deepspeed launcher adds; the environment says the same."""
    kept, rest = [], iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value if equals else next(rest, "0"))
        else:
            kept.append(argument)
    return kept


def _late_overrides(options: argparse.Namespace, unknown: list[str]) -> list[str]:
    """Take ``key=value`` that stands behind an option; argparse gives up on positionals there."""
    late = [word for word in unknown if "=" in word and not word.startswith("-")]
    if not hasattr(options, "overrides"):
        return unknown
    options.overrides = [*options.overrides, *late]
    return [word for word in unknown if word not in late]


def _unknown_option(option: str) -> str:
    if option.startswith("-") and "=" in option:
        return f"unknown option {option}; config keys take no dashes: {option.lstrip('-')}"
    return f"unknown option {option}; see fastmim --help"


def _rank() -> int:
    return rank_or_none() or 0


def _say_error(error: Exception) -> None:
    """On rank 0; on another rank with its number, unless rank 0 says the same."""
    module, rank = sys.modules.get("fastmim.engine.rank_errors"), _rank()
    if rank and module is not None and module.told_by_rank_0(error):
        return
    who = f"rank {rank}: " if rank else ""
    _to_stderr(f"{who}error: {one_line(error)}")


def _speaks_for_itself(error: Exception) -> bool:
    """Whether its one line is enough: of a RuntimeError, which is a bug, that is so for memory and other ranks only."""
    module = sys.modules.get("fastmim.engine.rank_errors")
    is_other_ranks = module is not None and isinstance(error, module.OtherRankError)
    return isinstance(error, (FloatingPointError, OSError)) or lacks_memory(error) or is_other_ranks


def _is_wrong_place(error: Exception) -> bool:
    """Whether a path was named that nobody may use; an error of a run that failed is a RuntimeError too."""
    wrong = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
    says_nothing = isinstance(error, OSError) and error.errno is None
    return (isinstance(error, wrong) or says_nothing) and not isinstance(error, RuntimeError)


def _say(text: str) -> None:
    """One line on standard error; the ranks other than 0 stay silent where all of them say the same."""
    if _rank() == 0:
        _to_stderr(text)


def _to_stderr(text: str, at: str = "") -> None:
    with suppress(OSError):  # nobody is left to hear it
        print(f"{at}fastmim: {text}", file=sys.stderr, flush=True)


def _print(text: str) -> None:
    if _rank() != 0:
        return
    if sys.stdout is None:
        raise OSError(errno.EBADF, "is closed", "standard output")
    with naming("standard output"):
        sys.stdout.write(text)
        sys.stdout.flush()


def _let_go_of_stdout() -> None:
    """What could not be written must not be tried again at exit: that would be a second error, and another status."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Stderr(logging.Handler):
    """Looks standard error up at every record: the live progress line puts its own stream there."""

    def emit(self, record: logging.LogRecord) -> None:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        _to_stderr(_folded(f"{level}{self.format(record)}"), at=f"{at} ")


def _folded(text: str) -> str:
    """A line of the log as a terminal shows it whole, broken between words; elsewhere it stays one line."""
    if "\n" in text or sys.stderr is None or not sys.stderr.isatty():
        return text
    width = max(shutil.get_terminal_size().columns - 18, 40)  # behind the time and the program's name
    return textwrap.fill(text, width, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)


def _log_to_stderr() -> None:
    log = logging.getLogger("fastmim")
    if not log.handlers:
        log.addHandler(_Stderr())
    log.setLevel(logging.INFO if _rank() == 0 else logging.ERROR)
    if _rank() and not sys.warnoptions:
        warnings.simplefilter("ignore")  # rank 0 meets the same ones


if __name__ == "__main__":
    wanted = "start `python -m fastmim`, or `deepspeed --module fastmim`"
    print(f"fastmim: error: fastmim/cli.py is not the command; {wanted}", file=sys.stderr)
    sys.exit(2)
