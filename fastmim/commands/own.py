"""``--images DIR`` of ``fastmim pretrain`` and ``fastmim plan``: a config chosen for one's own images."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import TYPE_CHECKING

from .configs import takes_config
from .console import say, write, write_if_possible

if TYPE_CHECKING:
    from fastmim.config import Config


def takes_images(parser: argparse.ArgumentParser, metavar: str, words: str) -> None:
    """CONFIG, which may be left out with ``--images``, overrides, and ``--images``."""
    takes_config(parser, nargs="?")
    parser.add_argument("--images", metavar=metavar, help=words)
    parser.set_defaults(parser=parser)


def sort_words(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Without CONFIG the first ``key=value`` stands in its place; with neither it nor a folder there is no command."""
    if not hasattr(options, "images"):
        return
    config = options.config
    if config is not None and "=" in config and not os.path.exists(config):
        options.overrides, options.config = [config, *options.overrides], None
    if options.config is None and (options.images is None or is_number(options.images)):
        options.parser.error("the following arguments are required: CONFIG, or --images DIR")


def is_number(images: str) -> bool:
    """Whether ``--images`` of ``plan`` is a size; a folder of such a name is written ``./60``."""
    return images.lstrip("-").isdigit()


def refuse_folder(options: argparse.Namespace, command: str) -> None:
    """Likely a first try: a folder of images, or of a run, in the place of CONFIG.

    Raises:
        ValueError: says what ``command`` takes of it.
    """
    if options.config is None or not os.path.isdir(options.config):
        return
    inside = os.path.join(options.config, "config.yaml")
    if os.path.isfile(inside):
        fix = f"for the config of its run: {command} {shlex.quote(inside)}"
        raise ValueError(f"{options.config}: is a directory; {fix}")
    what = "to train on its images" if command.endswith("pretrain") else "to plan for its images"
    raise ValueError(f"{options.config}: is a directory; {what}: {command} --images {shlex.quote(options.config)}")


def own_images(options: argparse.Namespace) -> Config:
    """The config that is chosen, after it was printed; on several ranks what rank 0 chooses."""
    from fastmim.engine.distributed import on_main, world_from_env
    from fastmim.plan.own_command import Own, own_config

    _say_what_takes_long(options)
    ranks = world_from_env().size
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))

    def chosen() -> Own:
        return own_config(options.images, options.config, options.overrides, ranks=ranks, local_ranks=local)

    own: Own = on_main(chosen)
    if own.is_new:
        write_if_possible(own.text)
    else:
        say(own.text)
    return own.cfg


def show_own(options: argparse.Namespace) -> int:
    """Print what ``pretrain --images`` would choose.

    Raises:
        ValueError: an option of a plan of a config; names the way to it.
    """
    from fastmim.plan.hardware import find_gpu
    from fastmim.plan.own_command import own_config

    for option in ("json", "picture"):
        if getattr(options, option):
            raise ValueError(f"--{option}: not with a folder for --images; save what is printed without it, as "
                             f"mine.yaml, and give `fastmim plan mine.yaml --{option}`")  # fmt: skip
    gpu = None if options.gpu is None else find_gpu(options.gpu)
    _say_what_takes_long(options)
    own = own_config(options.images, options.config, options.overrides, gpu=gpu, ranks=options.gpus,
                     local_ranks=options.gpus)  # fmt: skip
    write(own.text if own.is_new else f"# {own.text}\n")
    return 0


def _say_what_takes_long(options: argparse.Namespace) -> None:
    say(f"--images {options.images}: looking at the images and the machine …")
