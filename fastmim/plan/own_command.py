"""``--images DIR``: a config for one's own images that says of every key why it is what it is."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmim.config import Config, config_of, merge_trees, read_tree
from fastmim.config.load import Tree
from fastmim.config.messages import show
from fastmim.data.reading import opening_of, reading_of
from fastmim.data.source import check_path, open_index
from fastmim.engine.build import build_objective
from fastmim.engine.precision import precision_of
from fastmim.engine.settings import flat
from fastmim.wording import plural

from .command import footprint_of
from .hardware import GIB, Gpu
from .memory import memory
from .own import choose, model_keys
from .own_facts import gather
from .own_terms import LADDER, SIDES, Cost, Facts
from .own_text import as_yaml

_RATES = ("optim.lr_batch", "optim.warmup_lr", "optim.min_lr")
_MEASURED_BATCH = 8


class Own(NamedTuple):
    """A chosen config.

    Attributes:
        tree: sections of keys and values, all that was given and chosen; every other key has its default.
        text: the same as YAML with reasons; a line about an earlier run where its config is taken.
        is_new: whether it was chosen now.
    """

    tree: Tree
    text: str
    is_new: bool

    @property
    def cfg(self) -> Config:
        """The checked config."""
        return config_of(self.tree)


def own_config(
    images: str,
    config: str | None = None,
    overrides: Sequence[str] = (),
    *,
    gpu: Gpu | None = None,
    ranks: int = 1,
    local_ranks: int = 1,
) -> Own:
    """What ``fastmim pretrain [CONFIG] --images DIR [key=value …]`` trains.

    What the file and the overrides say stands; :func:`.own.choose` chooses the rest. Where ``output.dir`` has
    checkpoints of the same images, the config of that run is taken, so that it goes on; else, with
    ``train.branch_from``, that of the run to branch from.

    Args:
        images: a folder of images or of shards, a shard or a pattern of them: ``data.path``.
        gpu: choose for a machine with this one; None: for this machine.
        ranks, local_ranks: processes of the run, and those of them on this machine.

    Raises:
        ValueError: there is no image, nothing fits, ``output.dir`` is another run's, or a key is wrong.
    """
    check_path(os.path.expanduser(images), "--images")  # before warnings about what they would replace
    given = _given(images, config, overrides)
    out = given.get("output", {}).get("dir") or f"runs/{name_of(images)}"
    said = flat(given) | (dict.fromkeys(_RATES) if _says_lr(config) else {})
    given = merge_trees(given, {"output": {"dir": out}})
    earlier = _earlier(Path(os.path.expanduser(out)), images, given) or _branched(given)
    if earlier is not None:
        return earlier
    supposed = _supposed(given, said)
    asked = _asked(supposed, said)
    index = open_index(asked.data.path, field="--images", **opening_of(asked.data))
    bands = None
    if asked.data.pixels == "float32":
        bands = reading_of(asked.data) | {"in_chans": asked.model.in_chans}
    facts = gather(index, gpu=gpu, ranks=ranks, local_ranks=local_ranks, bands=bands)
    here = gpu is None and not facts.gpu and ranks == 1
    chosen = choose(facts, said, _costs(supposed, facts, gpu), _measure(supposed) if here else None)
    tree = merge_trees(given, _nested({one.key: one.value for one in chosen}))
    reasons = {one.key: one.reason for one in chosen} | {"data.path": "as given"}
    if "output.dir" not in said:
        reasons["output.dir"] = "named after the images"
    return Own(tree, as_yaml(tree, reasons, _heading(images, facts)), True)


def _supposed(given: Tree, said: Mapping[str, Any]) -> Tree:
    """What is given, with a micro-batch that goes with its global batch until one is chosen; the default's need not."""
    batch, accumulated = said.get("train.global_batch_size"), said.get("train.grad_accum_steps") or 1
    if "train.micro_batch_size" in said or not (isinstance(batch, int) and isinstance(accumulated, int)):
        return given
    return merge_trees(given, {"train": {"micro_batch_size": max(1, batch // max(1, accumulated))}})


def _asked(given: Tree, said: Mapping[str, Any]) -> Config:
    """The config of what is given, so that a mistake is said before anything is looked at.

    With a mask and patches that go with the size that is given: those of the defaults need not.
    """
    try:
        return config_of(given)
    except ValueError as error:
        try:
            keys = model_keys(said.get("model.name") or LADDER[0][0], SIDES[0], said)
        except (TypeError, AttributeError, ArithmeticError):  # what is given is of a wrong type
            raise error from None
        return config_of(merge_trees(given, _nested(keys)))


def name_of(images: str) -> str:
    """A name for a folder of runs: that of the folder of images, or of the one that holds the shards."""
    path = Path(os.path.abspath(os.path.expanduser(images)))
    path = path.parent if path.name.lower().endswith(".tar") else path
    return re.sub(r"[^\w.-]+", "-", path.name).strip("-.") or "images"


def _given(images: str, config: str | None, overrides: Sequence[str]) -> Tree:
    """What the user says, with the images; ``data.path`` of a file gives way to ``--images``."""
    written = read_tree(None, [word for word in overrides if word.startswith("data.")])
    for key in ("path", "file_list"):
        if written.get("data", {}).get(key) is not None:
            value = show(written["data"][key])
            raise ValueError(f"--images {images}: data.{key}={value} is given too; keep one of them")
    tree = merge_trees(read_tree(config, overrides), {"data": {"path": images}})
    if tree["data"].get("file_list") is not None:
        raise ValueError(f"--images {images}: {config} has data.file_list; give data.file_list=null too")
    return tree


def _says_lr(config: str | None) -> bool:
    """Whether a file gives a learning rate: its unit, and what goes with it, are then the file's too."""
    return "lr" in ((read_tree(config).get("optim") or {}) if config is not None else {})


def _earlier(folder: Path, images: str, given: Tree) -> Own | None:
    """The config of a run of these images in this folder that has checkpoints, under what is given now."""
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    tree = read_tree(path)
    known = (tree.get("data") or {}).get("path")
    if not isinstance(known, str) or os.path.realpath(known) != os.path.realpath(os.path.expanduser(images)):
        raise ValueError(
            f"output.dir={folder}: holds a run on {show(known)}, not on {images}; give another, for example "
            f"output.dir={folder}-2"
        )
    resume = (given.get("train") or {}).get("resume", "auto")
    if resume == "none" or not any((folder / "checkpoints").glob("step-*")):
        return None
    text = f"going on with {path}, as it was chosen before; train.resume=none or another output.dir chooses anew"
    return Own(merge_trees(tree, given), text, False)


def _branched(given: Tree) -> Own | None:
    """The config of the run that ``train.branch_from`` names, under what is given now: encoder and masks are its."""
    start = (given.get("train") or {}).get("branch_from")
    if start is None:
        return None
    path = Path(os.path.expanduser(start)).absolute()  # a run, or one of its checkpoints
    config = next((one / "config.yaml" for one in (path, *path.parents[:2]) if (one / "config.yaml").is_file()), None)
    if config is None:
        return None
    return Own(merge_trees(read_tree(config), given), f"a branch of {start}: what its run had chosen stands", False)


def _costs(given: Tree, facts: Facts, gpu: Gpu | None) -> Any:
    """For :func:`.own.choose`: what the planner says of keys of the model."""
    has_bf16 = gpu.bf16 if gpu is not None else not facts.gpu or torch.cuda.is_bf16_supported(including_emulation=False)

    def cost(keys: Mapping[str, Any]) -> Cost:
        cfg = config_of(merge_trees(given, _nested(_of_the_model(keys))))
        asked = cfg.efficiency.precision
        precision = precision_of(asked, name=facts.gpu, bf16=has_bf16) if facts.gpu else "fp32"
        efficiency = cfg.efficiency.model_copy(update={"precision": precision})
        every = f"/{efficiency.recompute_every}" if efficiency.recompute_every > 1 else ""
        footprint = footprint_of(cfg.model_copy(update={"efficiency": efficiency}), f"{efficiency.recompute}{every}")

        def need(micro_batch: int) -> float:
            return memory(footprint, stage=0, gpus=facts.ranks, micro_batch=micro_batch, grad_accum_steps=2).total

        return Cost(footprint.parameters, need, footprint.flops(_MEASURED_BATCH) / _MEASURED_BATCH)

    return cost


def _measure(given: Tree) -> Any:
    """For :func:`.own.choose`: images a second of forward and backward on this CPU, the better of two after a first."""

    def measure(keys: Mapping[str, Any], micro_batch: int) -> float:
        cfg = config_of(merge_trees(given, _nested(_of_the_model(keys))))
        batch = min(micro_batch, _MEASURED_BATCH)
        with torch.random.fork_rng(devices=()):
            objective = build_objective(cfg).train()
            images, mask = objective.example(batch)
            took = [_seconds(objective, images, mask) for _ in range(3)]
        return batch / min(took[1:])

    return measure


def _seconds(objective: Any, images: Any, mask: torch.Tensor) -> float:
    began = time.perf_counter()
    objective(images, mask)["loss"].backward()
    return time.perf_counter() - began


def _of_the_model(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key.startswith(("model.", "objective."))}


def _nested(flat: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for name, value in flat.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    return tree


def _heading(images: str, facts: Facts) -> str:
    beside = f", {facts.gpu} with {facts.gpu_memory / GIB:.3g} GiB free" if facts.gpu else ""
    machine = f"{plural(facts.cores, 'core')}, {facts.memory / GIB:.3g} GiB free{beside}"
    ranks = f" for each of {facts.ranks} processes" if facts.ranks > 1 else ""
    found = f"{images}: {plural(facts.images, 'image')}; {machine}{ranks}."
    return f"{found} Chosen for these, and why; this text as CONFIG repeats the run."
