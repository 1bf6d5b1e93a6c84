"""``fastmim config``: a config as it will be used, what its keys mean, and how two of them differ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .console import say, write

UNNORMALISED = ("data.mean=[0]", "data.std=[1]")
"""For commands that read images and need no statistics of them, which ``data.pixels=float32`` asks for."""

OVERRIDES = "section.key=value, the value in YAML; may be repeated and wins over the file"


def takes_config(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """CONFIG and overrides of it."""
    parser.add_argument("config", metavar="CONFIG", nargs=nargs, help="YAML file, for example configs/demo.yaml")
    takes_overrides(parser, OVERRIDES)


def takes_overrides(parser: argparse.ArgumentParser, words: str, metavar: str = "key=value") -> None:
    """Any number of overrides, none included."""
    # Without a default argparse would name them among what is required.
    parser.add_argument("overrides", metavar=metavar, nargs="*", default=[], help=words)


def positive(text: str) -> int:
    """An option's whole number of at least 1.

    Raises:
        ArgumentTypeError: it is smaller.
    """
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``config`` and its commands to the command line."""
    config = commands.add_parser("config", help="show a config, compare two, or print the keys there are")
    config_commands = config.add_subparsers(metavar="COMMAND", required=True)
    shown = config_commands.add_parser("show", parents=[common], help="print the resolved config as YAML")
    takes_config(shown)
    shown.add_argument("--explain", action="store_true", help="with the type, default and meaning of every key")
    shown.set_defaults(command=config_show)
    keys = config_commands.add_parser("keys", parents=[common], help="print every key, its type and default")
    only = "SECTION or SECTION.KEY: these alone, as optim or optim.lr; objective.name=… shows another objective's keys"
    takes_overrides(keys, only, metavar="SECTION")
    keys.set_defaults(command=config_keys)
    about = "print the keys in which two configs differ, `key: A -> B`"
    diff = config_commands.add_parser("diff", parents=[common], help=about, description=f"{about}; like diff(1) the "
                                      "exit status is 0 where there are none, 1 where there are some, 2 for an error")
    what = "YAML file, or the output folder of a run (its config.yaml)"
    diff.add_argument("first", metavar="A", help=what)
    diff.add_argument("second", metavar="B", help=what)
    diff.set_defaults(command=config_diff)


def config_show(options: argparse.Namespace) -> int:
    """Print a config."""
    from fastmim.config import dump_config, explain, load_config

    cfg = load_config(options.config, options.overrides)
    write(explain(cfg) if options.explain else dump_config(cfg))
    return 0


def config_keys(options: argparse.Namespace) -> int:
    """Print the keys of all sections, or of those named."""
    from fastmim.config import explain, load_config

    named = [word for word in options.overrides if "=" not in word]
    cfg = load_config(None, [word for word in options.overrides if "=" in word])
    write(explain(cfg, named))
    return 0


def config_diff(options: argparse.Namespace) -> int:
    """Print the keys in which two configs differ; status 1 where there are any."""
    from fastmim.config import differences, load_config

    first, second = (load_config(_config_of(path)) for path in (options.first, options.second))
    lines = [f"{key}: {old} -> {new}\n" for key, (old, new) in differences(first, second).items()]
    write("".join(lines))
    if not lines:
        say(f"{options.first} and {options.second} are the same in every key")
    return 1 if lines else 0


def _config_of(path: str) -> Path:
    """The file; of a folder, the config that a run has left there.

    Raises:
        ValueError: there is none.
    """
    found = Path(path)
    if not found.is_dir():
        return found
    if not (found / "config.yaml").is_file():
        raise ValueError(f"{path}: no config.yaml in this folder; give a YAML file or the output folder of a run")
    return found / "config.yaml"
