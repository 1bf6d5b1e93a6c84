"""``fastmim tokenizer``: train one, and look at what one does to images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .configs import takes_config
from .console import write


def add(commands: Any, common: argparse.ArgumentParser, train: Callable[[argparse.Namespace], int]) -> None:
    """Add ``tokenizer`` and its commands to the command line; ``train`` is ``fastmim pretrain``."""
    group = commands.add_parser("tokenizer", help="train a tokenizer for BEiT, show what one does to images")
    inner = group.add_subparsers(metavar="COMMAND", required=True)
    trained = inner.add_parser("train", parents=[common], help="fastmim pretrain, of a config with objective.name=dvae")
    takes_config(trained)
    trained.set_defaults(command=train, images=None, parser=trained, only="dvae", takes_images=False)
    codes = inner.add_parser("codes", parents=[common], help="count the codes of images, compare what they give back")
    codes.add_argument(
        "tokenizer", metavar="TOKENIZER", help="encoder.safetensors of such a run, its folder, or DALL-E's"
    )
    codes.add_argument("folder", metavar="DIR", help="folder of images, nested or flat, or tar shards")
    codes.add_argument("--picture", metavar="FILE", help="draw some images, what comes back, and the codes")
    codes.set_defaults(command=show_codes)


def show_codes(options: argparse.Namespace) -> int:
    """Tokenise a folder of images."""
    from fastmim.evaluate.codes import report_on_folder

    report = report_on_folder(options.tokenizer, options.folder, picture=options.picture)
    write(f"{options.folder}: {report}\n")
    return 0
