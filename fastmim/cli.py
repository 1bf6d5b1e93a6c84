"""The ``fastmim`` command.

What a user can put right is one line on standard error and exit status 2; a run that failed by itself (a
non-finite loss, data workers that cannot go on) or by its surroundings (a file that cannot be written, memory) exits
with 1, in one line too. A run that was asked to stop, and saved, exits with 128 and the signal's number, as in shells
(SIGINT 130, SIGTERM 143, SIGUSR1 138, SIGUSR2 140, SIGHUP 129); one that a second signal has aborted with 130.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastmim._version import __version__
from fastmim.commands import (
    configs,
    convert,
    features,
    finetune,
    images,
    machine,
    masks,
    own,
    probe,
    reconstruct,
    report,
    tokenizer,
)
from fastmim.commands.console import let_go_of_stdout, log_to_stderr, own_rank, say, shown_on_a_terminal, to_stderr
from fastmim.commands.own import own_images, refuse_folder, sort_words
from fastmim.engine.launcher import rank_or_none
from fastmim.errors import is_our_fault, lacks_memory, one_line
from fastmim.threads import settle_threads

USER_ERROR, RUN_FAILED = 2, 1

_DESCRIPTION = "Masked image modelling pretraining for Swin, SwinV2 and ViT encoders."
_EXAMPLES = """\
examples:
  fastmim data demo demo/data
  fastmim data pack /path/to/images /path/to/shards --short-side 256
  fastmim pretrain --images /path/to/images
  fastmim pretrain configs/demo.yaml train.steps=50 output.dir=runs/short
  fastmim pretrain configs/simmim/swinv2_base.yaml data.path=/path/to/images
  fastmim config show configs/simmim/swinv2_base.yaml optim.lr=2e-4
  fastmim plan configs/simmim/swinv2_giant.yaml --gpus 8 --gpu h100-80g
  fastmim doctor
  torchrun --nproc_per_node 8 -m fastmim pretrain CONFIG data.path=/path/to/images
  deepspeed --num_gpus 8 --module fastmim pretrain CONFIG data.path=/path/to/images
  fastmim convert runs/short encoder.safetensors
  fastmim finetune configs/finetune/small.yaml --encoder runs/short data.path=/path/to/class/folders
  fastmim probe runs/short /path/to/class/folders
  fastmim reconstruct runs/short photo.jpg --mask painted.png
  fastmim report runs/short runs/long --out page.html
  fastmim features runs/short /path/to/images --out features.safetensors
"""


def entry() -> NoReturn:
    """The console script: run :func:`main` and leave with its status."""
    settle_threads()
    try:
        status = main()
    finally:
        let_go_of_stdout()
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
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    sort_words(options, parser)
    log_to_stderr()
    try:
        unknown = _late_overrides(options, unknown)
        if unknown:
            raise ValueError(_unknown_option(unknown[0]))
        return int(options.command(options))
    except KeyboardInterrupt:
        say("interrupted")
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
    if options.takes_images:
        refuse_folder(options, "fastmim pretrain")
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.config import load_config

    if hasattr(options, "read"):
        cfg = options.read(options)
    else:
        cfg = load_config(options.config, options.overrides) if options.images is None else own_images(options)
    if options.only not in (None, cfg.objective.name):
        name = cfg.objective.name
        raise ValueError(f"objective.name={name}: this command trains {options.only}; use fastmim pretrain")
    if cfg.data.path is None and cfg.data.file_list is None and cfg.data.loader != "synthetic":
        raise ValueError("data.path=null: give a folder of images, for example data.path=/path/to/images")
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.engine.train import train

    result = train(cfg, ends_process=True)
    return 128 + result.stopped_by if result.interrupted else 0


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
    own.takes_images(pretrain, "DIR", "choose for the images in this folder, and for this machine, what CONFIG (if "
                     "given) and key=value do not say; print it as a config with reasons, and train")
    pretrain.set_defaults(command=_pretrain, only=None, takes_images=True)
    finetune.add(commands, common, _pretrain)
    for group in (configs, images, machine, convert, masks, probe, features, reconstruct, report):
        group.add(commands, common)
    tokenizer.add(commands, common, train=_pretrain)
    return parser


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


def _say_error(error: Exception) -> None:
    """On rank 0; on another rank with its number, unless rank 0 says the same."""
    module, rank = sys.modules.get("fastmim.engine.rank_errors"), own_rank()
    if rank and module is not None and module.told_by_rank_0(error):
        return
    who = f"rank {rank}: " if rank else ""
    to_stderr(f"{who}error: {one_line(error)}")


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


if __name__ == "__main__":
    wanted = "start `python -m fastmim`, or `deepspeed --module fastmim`"
    print(f"fastmim: error: fastmim/cli.py is not the command; {wanted}", file=sys.stderr)
    sys.exit(2)
