"""``fastmim probe``: k-NN, RankMe and a linear probe of an encoder on labelled images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastmim.wording import plural

from .configs import positive, takes_overrides
from .console import shown_on_a_terminal, write

_PROTOCOLS = ("dino", "ibot", "mae", "moco", "beit", "none")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``probe`` to the command line."""
    probe = commands.add_parser("probe", parents=[common], help="k-NN, RankMe and linear accuracy of an encoder")
    probe.add_argument("source", metavar="RUN|ENCODER", help="a run's output folder, a step-… folder, or the "
                       "encoder.safetensors that a run or `fastmim convert` has written")
    probe.add_argument("labelled", metavar="DIR", help="class folders, or shards with .cls members; or a folder with "
                       "train and val, each of these")
    takes_overrides(probe, "how the images are read: data.num_workers=8, data.value_range=…, data.alpha=…")
    probe.add_argument("--val", metavar="DIR", help="to try it on (default: DIR/val, else a fifth of each class)")
    probe.add_argument("--labels", metavar="CSV", help="lines file,class, instead of class folders")
    probe.add_argument("--protocol", choices=_PROTOCOLS, default="dino", help="whose linear probe (default dino)")
    probe.add_argument("--pool", choices=("cls", "mean"), help="what stands for an image (default: the class token of "
                       "a ViT with key_bias, else the mean)")
    probe.add_argument("--epochs", type=positive, metavar="N", help="of the linear probe (default: the protocol's)")
    probe.add_argument("--augment", type=positive, metavar="N", default=0, help="N passes over random crops and flips "
                       "for the linear probe; the protocols make one an epoch (default: centre crops, one pass)")
    probe.add_argument("--most", type=positive, metavar="N", help="use so many, evenly spread (default: all)")
    probe.add_argument("--batch", type=positive, metavar="B", default=64, help="images in a forward pass (default 64)")
    probe.add_argument("--seed", type=int, default=0, metavar="S", help="of the linear probe (default 0)")
    probe.add_argument("--untrained", action="store_true", help="the same of the encoder with new weights, to compare")
    probe.add_argument("--json", action="store_true", help="print the report as JSON")
    probe.set_defaults(command=run_probe)


def check_overrides(overrides: list[str], command: str) -> None:
    """Refuse overrides that do not say how images are read.

    Raises:
        ValueError: names one.
    """
    from fastmim.data.reading import FROZEN, KEYS, OPENING

    known_keys = {*KEYS, *OPENING, *FROZEN} - {"mean", "std", "pixels"}
    other = [word for word in overrides if word.partition("=")[0].removeprefix("data.") not in known_keys]
    if other:
        known = ", ".join(f"data.{key}" for key in sorted(known_keys))
        raise ValueError(f"{other[0]}: {command} takes {known}; what the encoder is, its file says")


def data_of(overrides: list[str], facts: dict[str, Any]) -> Any:
    """The data section of overrides, over what an encoder's file says of float images.

    Args:
        overrides: of :func:`check_overrides`.
        facts: of :func:`fastmim.engine.probe.encoder_facts`.
    """
    from fastmim.config import config_of, merge_trees, read_tree
    from fastmim.engine.settings import image_facts

    said, tree = image_facts(facts.get("statistics", {})), {}
    if said.get("pixels") == "float32":
        tree = {"model": {"in_chans": facts["encoder"].get("in_chans", 3)}, "data": said}
    return config_of(merge_trees(tree, read_tree(None, overrides))).data


def run_probe(options: argparse.Namespace) -> int:
    """Probe an encoder and print what was found."""
    check_overrides(options.overrides, "probe")
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.data.labelled import LabelledImages
        from fastmim.data.reading import FROZEN, opening_of, reading_of
        from fastmim.engine.distributed import distributed
        from fastmim.engine.probe import encoder_facts, encoder_file, probe_encoder

    with distributed() as world, encoder_file(Path(options.source)) as file:
        data = data_of(options.overrides, encoder_facts(file))
        images = LabelledImages(
            options.labelled,
            options.val,
            table=options.labels,
            most=options.most,
            **opening_of(data),
        )
        how: dict[str, Any] = dict(
            micro_batch_size=options.batch,
            reading=reading_of(data, *FROZEN),
            protocol=None if options.protocol == "none" else options.protocol,
            pool=options.pool,
            epochs=options.epochs,
            augment=options.augment,
            seed=options.seed,
            called=options.source,
        )
        report, encoder = probe_encoder(file, images, world, **how)
        new = probe_encoder(file, images, world, untrained=True, **how)[0] if options.untrained else None
    write(_as_json(report, new, encoder, options) if options.json else _as_text(report, new, encoder, options))
    return 0


def _as_text(report: Any, new: Any, encoder: dict[str, Any], options: argparse.Namespace) -> str:
    images = f"{plural(report.train_images, 'image')} to learn from, {report.test_images:,} to try it on"
    what = "class token" if report.pool == "cls" else "mean of the tokens"
    lines = [
        f"{options.source}: {encoder['name']}, {plural(report.width, 'channel')} ({what} behind the last block)",
        f"{options.labelled}: {plural(report.classes, 'class', 'classes')}, {images}",
        "",
        *_scores(report, options),
    ]
    if new is not None:
        lines += ["", "the same encoder untrained, with new weights:", *_scores(new, options)]
    return "\n".join(lines) + "\n"


def _scores(report: Any, options: argparse.Namespace) -> list[str]:
    lines = [f"k-NN, k = {k:<4} {first:5.1f} % top-1  {five:5.1f} % top-5" for k, (first, five) in report.knn.items()]
    lines.append(f"RankMe       {report.rankme:5.1f} of {report.width}")
    if report.linear:
        best = max(report.linear, key=lambda one: one.top1)
        lines.append(f"linear, {options.protocol:<5}{best.top1:5.1f} % top-1  {best.top5:5.1f} % top-5")
        crops = f"{plural(options.augment, 'pass', 'passes')} of random crops" if options.augment else "centre crops"
        many = f"; the best of {len(report.linear)} on the images tried" if len(report.linear) > 1 else ""
        lines.append(f"             rate {best.rate:g} per 256 images, features {best.features + 1}, {crops}{many}")
    return lines


def _as_json(report: Any, new: Any, encoder: dict[str, Any], options: argparse.Namespace) -> str:
    found = _found(report) | {
        "source": options.source,
        "labelled": options.labelled,
        "protocol": options.protocol,
        "encoder": encoder,
    }
    return json.dumps(found if new is None else found | {"untrained": _found(new)}, indent=2, default=list) + "\n"


def _found(report: Any) -> dict[str, Any]:
    knn = {str(k): {"top1": first, "top5": five} for k, (first, five) in report.knn.items()}
    return report._asdict() | {"knn": knn, "linear": [one._asdict() for one in report.linear]}
