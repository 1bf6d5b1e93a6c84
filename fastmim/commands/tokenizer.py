"""``fastmim tokenizer``: train one, and look at what one does to images."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .configs import takes_config
from .console import write


def add(commands: Any, common: argparse.ArgumentParser, train: Callable[[argparse.Namespace], int]) -> None:
    """Add ``tokenizer`` and its commands to the command line; ``train`` is ``fastmim pretrain``."""
    group = commands.add_parser("tokenizer", help="train a tokenizer for BEiT, show what one does to images")
    inner = group.add_subparsers(metavar="COMMAND", required=True)
    trained = inner.add_parser("train", parents=[common], help="fastmim pretrain, of a config with objective.name=dvae")
    takes_config(trained)
    trained.set_defaults(command=train, images=None, parser=trained, only="dvae")
    codes = inner.add_parser("codes", parents=[common], help="count the codes of images, compare what they give back")
    codes.add_argument(
        "tokenizer", metavar="TOKENIZER", help="encoder.safetensors of such a run, its folder, or DALL-E's"
    )
    codes.add_argument("folder", metavar="DIR", help="folder of images, nested or flat, or tar shards")
    codes.add_argument("--picture", metavar="FILE", help="draw some images, what comes back, and the codes")
    codes.set_defaults(command=show_codes)


def show_codes(options: argparse.Namespace) -> int:
    """Tokenise a folder of images."""
    from contextlib import closing

    from fastmim.data import build_loader
    from fastmim.evaluate.codes import code_report
    from fastmim.evaluate.reconstruct import draw_grid
    from fastmim.files import replacing
    from fastmim.objectives.tokenizer import read_tokenizer

    tokenizer = read_tokenizer(options.tokenizer)
    size, channels = tokenizer.model.img_size, tokenizer.in_chans
    how: dict[str, Any] = dict(img_size=size, in_chans=channels, micro_batch_size=8, train=False, num_workers=0)
    with closing(build_loader(path=options.folder, verify="none", field="DIR", **how)) as loader:
        report, picture = code_report(tokenizer, loader.epoch(0), shown=8 if options.picture else 0)
    if picture is not None:
        with replacing(Path(options.picture)) as partial:
            draw_grid(picture).save(partial, format="PNG")
    write(f"{options.folder}: {report}\n")
    return 0
