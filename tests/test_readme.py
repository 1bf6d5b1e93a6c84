"""The README's commands: the command line takes each of them, with configs that are there and can be used."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fastmim import cli
from fastmim.commands.finetune import finetune_config
from fastmim.commands.own import sort_words
from fastmim.config import config_of, load_config, read_tree

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(text):
    """The words behind ``fastmim`` of every line of a shell's blocks that has it, without comments."""
    blocks = [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if not language]
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    names = (".venv/bin/fastmim", "fastmim")
    return [words[i + 1 :] for words in lines for i, word in enumerate(words) if word in names]


def taken(words):
    """The options that the command line makes of them."""
    parser = cli._parser()
    options, unknown = parser.parse_known_args(words)
    sort_words(options, parser)
    assert cli._late_overrides(options, unknown) == []
    return options


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_the_command_line_takes_it(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = taken(words)
    if getattr(options, "config", None) not in (None, "CONFIG"):
        config_of(read_tree(options.config, options.overrides))


def test_what_a_newcomers_commands_write_the_next_ones_read(monkeypatch):
    monkeypatch.chdir(ROOT)
    section = README.partition("\n## From images to a classifier\n")[2].partition("\n## ")[0]
    digits, pretrain, probe, finetune, report = map(taken, commands(section))
    run = load_config(pretrain.config, pretrain.overrides)
    data = run.data
    assert (data.path, data.val_path, str(data.labelled_path)) == (
        f"{digits.folder}/train", f"{digits.folder}/val", digits.folder
    )  # fmt: skip
    assert (probe.source, probe.labelled, finetune.encoder) == (run.output.dir, digits.folder, run.output.dir)
    finetune.encoder = None
    tuned = finetune_config(finetune)
    assert (tuned.data.path, tuned.data.val_path) == (data.path, data.val_path)
    assert report.runs == [run.output.dir, tuned.output.dir]
