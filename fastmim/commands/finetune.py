"""``fastmim finetune``: an encoder learns the classes of labelled images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .configs import takes_config

if TYPE_CHECKING:
    from fastmim.config import Config

OBJECTIVE = "classify"
# What a fine-tuning may have in another way than the encoder's file says.
_NOT_OF_THE_FILE = {"drop_path_rate", "residual_dtype", "init"}


def add(commands: Any, common: argparse.ArgumentParser, train: Any) -> None:
    """Add ``finetune`` to the command line; ``train`` runs it, by the config of its ``read``."""
    finetune = commands.add_parser("finetune", parents=[common], help="train an encoder on labelled images")
    takes_config(finetune)
    finetune.add_argument("--encoder", metavar="RUN|FILE", help="a pretraining's output folder, or the "
                          "encoder.safetensors of one: weights to start from; the model section is what it says")
    finetune.set_defaults(command=train, only=None, takes_images=False, read=finetune_config)


def finetune_config(options: argparse.Namespace) -> Config:
    """The config, with the model of ``--encoder`` where neither it nor an override says another.

    Raises:
        ValueError: there is no encoder, its file does not say what it is, or the config is no fine-tuning.
    """
    from fastmim.config import config_of, merge_trees, read_tree

    tree = read_tree(options.config, options.overrides)
    if options.encoder is not None:
        tree = merge_trees(_of_encoder(Path(options.encoder)), tree)
    cfg = config_of(tree)
    if cfg.objective.name != OBJECTIVE:
        name = cfg.objective.name
        raise ValueError(f"objective.name={name}: finetune learns classes; use {OBJECTIVE}, or `fastmim pretrain`")
    return cfg


def _of_encoder(source: Path) -> dict[str, Any]:
    """The tree of a config whose model is that of a run or a file.

    A ViT's table for all blocks becomes one for each, and fixed positions become learnt ones, as in SimMIM's and MAE's
    fine-tuning; a SwinV2's position biases stay those of the window that they were trained with.
    """
    from fastmim.engine.probe import ENCODER_FILE, encoder_facts
    from fastmim.engine.settings import image_facts

    file = source / ENCODER_FILE if source.is_dir() else source
    if not file.is_file():
        fix = f"`fastmim convert {source} {file}` makes it" if source.is_dir() else "give a run's folder"
        raise ValueError(f"--encoder {source}: no {file.name} there; {fix}")
    facts = encoder_facts(file)
    settings = {key: value for key, value in facts["encoder"].items() if key not in _NOT_OF_THE_FILE}
    if settings.pop("shared_rel_pos_bias", False):
        settings |= {"shared_rel_pos_bias": False, "rel_pos_bias": True}
    settings["abs_pos_embed"] = bool(settings["abs_pos_embed"]) if "abs_pos_embed" in settings else None
    if settings.get("name") == "swinv2" and not settings.get("pretrained_window_size"):
        settings["pretrained_window_size"] = settings["window_size"]
    said = image_facts(facts.get("statistics", {}))
    images = {key: value for key, value in said.items() if value is not None and key != "interpolation"}
    model = {key: value for key, value in settings.items() if value is not None}
    return {"model": model | {"init_from": str(file)}, "data": images}
