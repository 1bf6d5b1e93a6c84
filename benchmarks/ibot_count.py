"""What iBOT's loss, heads and teacher cost beside the published code's, counted on fake tensors: no GPU, no time.

ViT-S/16, 2 + 10 crops, 8192 codes, CUDA's bf16 autocast policy; forward and backward. Ours has as many rows of patches
as the masks can hide; of these the loss reads those that are hidden, on average. Centres are summed up in every
micro-batch and moved once an update, and the monitors of a collapse are no part of the loss: both are shown apart.
Without a clone (``--reference DIR``) its side shows what was counted once in the same way.

    python benchmarks/ibot_count.py [--reference DIR] [--batch 64]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from benchmarks import command  # noqa: E402
from benchmarks.ibot_reference import NAME, ReferenceIBOT  # noqa: E402
from benchmarks.recipe_case import RecipeCase  # noqa: E402
from benchmarks.reference import find_clones  # noqa: E402
from fastmim.engine.cuda_autocast import cuda_autocast  # noqa: E402
from fastmim.engine.dry_step import built  # noqa: E402
from fastmim.engine.local import LocalEngine  # noqa: E402
from fastmim.plan.counter import DispatchCounter  # noqa: E402
from fastmim.plan.saved import SavedTensors  # noqa: E402
from fastmim_kernels.common.dispatch import as_on_a_gpu  # noqa: E402

# Part: (MB an image, launches) of the published code, counted once; None: not counted.
PUBLISHED = {"loss": (335, 324), "student heads": (177, None)}
# Limits for ours: (MB an image, launches), and bytes a parameter of the teacher's update.
TARGETS = {"loss": (8.0, 12), "student heads": (25.0, None)}
TEACHER_BYTES = 12.0
LOW = torch.bfloat16


@dataclass(frozen=True)
class Part:
    """Totals of a part of a step, an image's share of its traffic and of what is kept for backward."""

    megabytes: float
    launches: int
    saved: float


def count(
    run: Callable[[], Any], batch: int, known: Sequence[Tensor], shares: dict[str, float], backward: bool
) -> Part:
    """``run()`` and, with ``backward``, gradients of what it returns; ``known`` tensors are not counted as saved."""
    counter, saved = DispatchCounter(shares), SavedTensors(known)
    with counter:
        with saved, cuda_autocast():
            out = [t for t in tree_leaves(run()) if isinstance(t, Tensor) and t.requires_grad]
        if backward:
            grads = [torch.empty_like(t) for t in out]
            counter.phase = "backward"
            torch.autograd.backward(out, grads)
    launches, moved, _ = counter.totals()
    return Part(moved / batch / 1e6, launches, saved.bytes / batch / 1e6)


def ours(batch: int, case: str = "ibot_vit_small", whole: bool = False) -> dict[str, Part]:
    """Parts of our step, and with ``whole`` its forward and backward."""
    config = RecipeCase(case, "bf16", batch)
    with FakeTensorMode(), as_on_a_gpu():
        objective: Any = built(config.build)
        state = [*objective.parameters(), *objective.buffers()]
        images, mask = objective.example(batch)
        rows, weights = objective._hidden(mask, 2 * batch)
        width, codes, local = objective.encoder.num_features, len(objective.head.last_layer.weight_g), len(images[1])

        def fake(*shape: int, grad: bool = True) -> Tensor:
            return torch.empty(*shape, dtype=LOW, requires_grad=grad)

        tokens = [fake(2 * batch, width), fake(local * batch, width)]
        patches = fake(2 * batch, *objective.token_grid, width)
        student = fake((2 + local) * batch, codes), fake(len(rows), codes)
        teacher = fake(2 * batch, codes, grad=False), fake(1 + len(rows), codes, grad=False)

        def loss() -> Tensor:
            # As forward adds them up, without the monitors.
            with mock.patch.multiple("fastmim.objectives.dino", mean_target_entropy=_none, view_agreement=_none):
                cls, _ = objective.class_loss(student[0], teacher[0])
            objective.centre.add(teacher[0])
            return cls + objective.patch_loss(student[1], teacher[1], weights)

        shares = objective.shares()
        engine = LocalEngine(objective, torch.optim.AdamW(objective.groups(0.04, "parity"), foreach=True))
        known = [*state, *student, *teacher, *tokens, patches, rows, weights]
        parts = {
            "loss": count(loss, batch, known, shares, True),
            "student heads": count(lambda: objective.predict(tokens, patches, rows), batch, known, shares, True),
            "monitors": count(lambda: objective.class_loss(student[0], teacher[0])[1], batch, known, shares, False),
            "centres, an update": count(objective.after_step, batch, known, shares, False),
            "teacher, an update": count(engine._move_averages, batch, known, shares, False),
        }
        if whole:
            known += [*images, mask]
            parts["forward and backward"] = count(lambda: objective(images, mask)["loss"], batch, known, shares, True)
        return parts


def _none(*_: Any) -> None:
    """Stands in for a monitor."""


def theirs(batch: int, clone: Path, case: str = "ibot_vit_small") -> dict[str, Part]:
    """The same parts of the published code; its centres move inside the loss."""
    own = RecipeCase(case, "bf16", batch)
    module: Any = ReferenceIBOT(clone, own.config(), own.build()).train()
    encoder = module.student.backbone
    small: dict[str, Any] = own.config().objective.arguments()
    # Its weights stay real, and are seen as fake ones by every op.
    with FakeTensorMode(allow_non_fake_inputs=True):

        def tokens(count: int, edge: int) -> Tensor:
            length = (edge // encoder.patch_embed.patch_size) ** 2 + 1
            return torch.empty(count * batch, length, encoder.embed_dim, dtype=LOW, requires_grad=True)

        wide, narrow = tokens(2, encoder.patch_embed.img_size), tokens(module.local_crops, small["local_size"])
        head, codes = module.student.head, small["out_dim"]
        student, teacher = (torch.empty(*wide.shape[:2], codes, dtype=LOW, requires_grad=own) for own in (True, False))
        local = torch.empty(len(narrow), codes, dtype=LOW, requires_grad=True)
        masks = [torch.empty(batch, 14, 14, dtype=torch.bool) for _ in range(2)]

        def loss() -> Tensor:
            both = ((logits[:, 0], logits[:, 1:]) for logits in (student, teacher))
            total: Tensor = module.loss(*both, local, masks, 0)["loss"]
            return total

        known = [*module.parameters(), *module.buffers(), wide, narrow, student, teacher, local, *masks]
        heads = count(lambda: (head(wide), head(narrow)[0]), batch, known, {}, True)
        return {"loss": count(loss, batch, known, {}, True), "student heads": heads}


def show(mine: dict[str, Part], other: dict[str, Part], parameters: int, batch: int) -> int:
    """A line for each part; returns how many limits are missed."""
    missed = 0
    for name, part in mine.items():
        counted = (other[name].megabytes, other[name].launches) if name in other else PUBLISHED.get(name)
        most, launches = TARGETS.get(name, (float("inf"), None))
        met = part.megabytes <= most and part.launches <= (launches or part.launches)
        missed += not met
        limit = f"at most {most:g} MB" + (f", {launches} launches" if launches else "")
        print(
            f"{name:22}{f'{counted[0]:.0f} MB in {counted[1]}' if counted else '':>18}{part.megabytes:9.2f} MB an image"
            f" in {part.launches:5} launches, {part.saved:6.2f} MB saved"
            f"{f'  {limit} ' + ('met' if met else 'MISSED') if name in TARGETS else ''}"
        )
    each = mine["teacher, an update"].megabytes * 1e6 * batch / parameters
    print(f"the teacher's update moves {each:.1f} bytes a parameter (at most {TEACHER_BYTES:g})")
    return missed + (each > TEACHER_BYTES * 1.01)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command.Parser("ibot_count.py", __doc__)
    parser.add_argument("--batch", type=command.positive, default=64, help="images")
    parser.add_argument("--reference", metavar="DIR", type=command.checked(find_clones), help=f"clone of {NAME}")
    args = parser.parse_args(argv)
    clones = find_clones(args.reference) if args.reference else {}
    other = theirs(args.batch, clones[NAME]) if NAME in clones else {}
    own = RecipeCase("ibot_vit_small").build()
    parameters = sum(p.numel() for pair in own.ema() for p in pair[0].parameters())
    return int(show(ours(args.batch, whole=True), other, parameters, args.batch) > 0)


if __name__ == "__main__":
    command.exit_with("ibot_count.py", main)
