"""Run files of golden values, of whatever objective and size, through the public interface.

    python tests/run_golden.py FILE…

Weights, inputs, masks, schedules and optimiser are what a file's metadata say. One line a file: the worst relative
error of each kind of result; exit status 1 where one passes its limit, or a file is of a kind that fastmim cannot run.
"""

from __future__ import annotations

import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import fastmim_kernels as fk
from fastmim import create_objective, load_config
from fastmim.config import Config
from fastmim.engine.build import make_engine, make_schedule, make_weight_decay
from fastmim.engine.distributed import World
from fastmim.engine.local import LocalEngine
from fastmim.engine.loop import train_step
from fastmim.engine.optim import build_optimizer, param_groups
from fastmim.interop import load_reference
from fastmim.objectives.block_masks import beit_mask, ibot_mask
from fastmim.objectives.schedule import Schedule
from fastmim.objectives.self_distillation import Centre, hidden_weights, warm_temperature

Errors = dict[str, tuple[float, float]]
"""Of each kind of result the worst relative error and its limit."""


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(metadata, tensors) of a file; a table in JSON has no tensors."""
    if path.suffix == ".json":
        return json.loads(path.read_text()), {}
    with safe_open(path, "pt") as file:
        meta = {key: json.loads(value) for key, value in file.metadata().items()}
        return meta, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict


def run(path: Path, impl: str = "auto") -> Errors:
    """The errors of one file.

    Raises:
        ValueError: Nothing here runs files of its kind.
    """
    meta, tensors = read(path)
    for knows, check in CHECKS:
        if knows(meta):
            return check(meta, tensors, impl)
    raise ValueError(f"a file of {meta.get('source', meta.get('case', 'an unknown kind'))}: not built yet")


def relative(found: Any, wanted: Any) -> float:
    """Largest difference over the largest wanted number."""
    found, wanted = (np.asarray(torch.as_tensor(v), dtype=np.float64) for v in (found, wanted))
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-12))


def encoder_of(meta: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """The encoder's arguments; ``own`` are those that an objective's files do not state."""
    names = ("img_size", "patch_size", "embed_dim", "num_heads", "depths", "depth", "window_size", "mlp_ratio",
             "qkv_bias", "init_values")  # fmt: skip
    return {"name": meta["arch"], **{name: meta[name] for name in names if name in meta}, **own}


def weights(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("param."): tensor for name, tensor in tensors.items() if name.startswith("param.")}


# SimMIM


def build_simmim(meta: Mapping[str, Any], impl: str) -> Any:
    encoder = encoder_of(meta)
    if meta["arch"] == "vit":
        encoder |= dict(shared_rel_pos_bias=meta["use_shared_rel_pos_bias"], abs_pos_embed=meta["use_abs_pos_emb"])
    return create_objective("simmim", encoder=encoder, norm_target=meta.get("norm_target", 0), impl=impl)


def simmim(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    objective = build_simmim(meta, impl)
    load_reference(objective, weights(tensors))
    shape = (meta["steps"], meta["batch"], 3, meta["img_size"], meta["img_size"])
    images = torch.from_numpy(np.random.default_rng(meta["seed"]).standard_normal(shape).astype(np.float32))
    masks = tensors["masks"]
    recon = objective.reconstruct(images[0], masks[0])[:1]
    optimiser = build_optimizer("adamw", param_groups(objective, 0.05, policy="parity"), lr=1e-3)
    engine = LocalEngine(objective, optimiser, clip_grad=5.0)
    losses, norms = steps(engine, zip(images, masks, strict=True))
    # An L1 gradient jumps where a residual changes sign. Microsoft's own code leaves these norms by 2e-6 to 1.2e-2 from
    # step 2 on, depending on the CPU's vector width and thread count, so a tight bound holds for the first steps only.
    return {
        "reconstruction": (relative(recon, tensors["recon0"]), 1e-4),
        "losses": (relative([row["loss"] for row in losses], tensors["losses"]), 1e-4),
        "first norms": (relative(norms[:2], tensors["grad_norms"][:2]), 1e-4),
        "norms": (relative(norms, tensors["grad_norms"]), 2e-2),
    }


def steps(engine: LocalEngine, batches: Any, before: Callable[[int], None] = lambda step: None) -> Any:
    """(scalars, gradient norms) of one update a batch."""
    scalars, norms = [], []
    for step, (images, mask) in enumerate(batches):
        before(step)
        engine.train_on(images, mask)
        row = engine.read()
        norms.append(row.pop("grad_norm"))
        scalars.append(row)
    return scalars, norms


# iBOT and DINO


class Batches:
    """The crops and masks of an iBOT file, as a loader and an objective would give them."""

    def __init__(self, meta: Mapping[str, Any], masks: torch.Tensor, objective: Any) -> None:
        rng = np.random.default_rng(meta["seed"])
        count, batch, size, small = meta["steps"], meta["batch"], meta["img_size"], meta["local_size"]
        globals_ = rng.standard_normal((count, meta["n_global"], batch, 3, size, size))
        offset = rng.standard_normal((count, 1, batch, 3, 1, 1))
        local = rng.standard_normal((count, meta["n_local"], batch, 3, small, small))
        views = [torch.from_numpy((0.7 * crops + offset).astype(np.float32)) for crops in (globals_, local)]
        self.images, self.step = list(zip(*views, strict=True)), 0
        objective.random_mask = lambda ids, seed, epoch: masks[self.step]

    def __iter__(self) -> Any:
        for step, images in enumerate(self.images):
            self.step = step
            yield 0, _Batch(images)


class _Batch:
    sample_ids = None

    def __init__(self, images: Any) -> None:
        self.images = images


def ibot_config(meta: Mapping[str, Any], dino: bool) -> Config:
    """The config of the file's run; sizes of the model are left to the encoder's arguments."""
    keys = ("out_dim", "hidden_dim", "bottleneck_dim", "norm_last_layer", "local_size", "student_temp", "teacher_temp",
            "warmup_teacher_temp", "warmup_teacher_temp_epochs", "momentum_teacher", "freeze_last_layer")  # fmt: skip
    task = {key: meta[key] for key in keys} | dict(
        name="dino" if dino else "ibot",
        local_crops=meta["n_local"],
        augment=False,
        centre_momentum=meta["center_momentum"],
    )
    if not dino:
        task |= dict(
            teacher_patch_temp=meta["teacher_patch_temp"],
            warmup_teacher_patch_temp=meta["warmup_teacher_patch_temp"],
            mask_start_epoch=meta["pred_start_epoch"],
            class_weight=meta["lambda1"],
            patch_weight=meta["lambda2"],
        )
    optim = dict(
        lr=meta["base_lr"], lr_batch=None, warmup_lr=0.0, min_lr=meta["min_lr"], clip_grad=meta["clip_grad"],
        warmup_epochs=meta["warmup_epochs"], warmup_inclusive=True, clip_each=True, schedule_lag=False,
        weight_decay=meta["weight_decay"], weight_decay_end=meta["weight_decay_end"], policy="parity",
    )  # fmt: skip
    model = encoder_of(meta) | dict(policy="default") if meta["arch"] != "vit" else encoder_of(meta)
    plain_vit = dict(key_bias=True, abs_pos_embed=True, init="timm")
    own = plain_vit if meta["arch"] == "vit" else dict(norm_eps=meta["ln_eps"])
    train = dict(epochs=meta["epochs"], micro_batch_size=meta["batch"])
    return load_config(None, _overrides(model=model | own, objective=task, optim=optim, train=train))


def _overrides(**sections: Mapping[str, Any]) -> list[str]:
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in sections.items() for key, value in keys.items()]


def ibot(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    errors = {}
    for dino, prefix in ((False, ""), (True, "dino.")):
        if f"{prefix}losses" in tensors:
            found = ibot_run(meta, tensors, impl, dino)
            errors |= {f"{prefix}{name}": value for name, value in found.items()}
    return errors


def ibot_run(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str, dino: bool) -> Errors:
    cfg, per_epoch, prefix = ibot_config(meta, dino), meta["iters_per_epoch"], "dino." if dino else ""
    task = {key: value for key, value in cfg.objective.arguments().items()}
    objective = create_objective(cfg.objective.name, encoder=cfg.model.encoder_kwargs(), impl=impl, **task)
    load_reference(objective, weights(tensors))
    world = World(0, 1, 0, torch.device("cpu"))
    engine = make_engine(cfg, objective, world)
    schedule = make_schedule(cfg, per_epoch, meta["batch"])
    decay = make_weight_decay(cfg, schedule.total_steps)
    masks = torch.zeros_like(tensors["masks"]) if dino else tensors["masks"]
    batches, rows, norms = iter(Batches(meta, masks, objective)), [], []
    lengths = dict(total=schedule.total_steps, steps_per_epoch=per_epoch)
    for step in range(meta["steps"]):
        train_step(engine, batches, lr=schedule(step), weight_decay=decay(step), seed=0, **lengths)
        row = engine.read()
        rows.append([row["cls"], row.get("patch", 0.0), row["loss"]])
        norms.append(row["grad_norm"])
    errors = {
        "losses": (relative(rows, tensors[f"{prefix}losses"]), 1e-5),
        "norms": (relative(norms, tensors[f"{prefix}grad_norms"]), 1e-4),
        "centre": (relative(objective.centre.value, tensors[f"{prefix}center"]), 1e-4),
    }
    if not dino:
        errors["patch centre"] = (relative(objective.patch_centre.value, tensors["center2"]), 1e-4)
    for who, inside in (("student", ""), ("teacher", "teacher.")):
        errors[f"{who}'s end"] = (ends(objective, tensors, f"{prefix}{who}_end.", inside), 1e-4)
    return errors


def ends(objective: Any, tensors: Mapping[str, torch.Tensor], kind: str, inside: str) -> float:
    """Worst error of [L2 norm, dot with a seeded vector] of the final weights."""
    from fastmim.interop.self_distilled import own_name

    own, worst = dict(objective.named_parameters()), 0.0
    for key in [key for key in tensors if key.startswith(kind)]:
        name = key.removeprefix(kind)
        if inside + own_name(name) not in own:  # DINO's encoder has no token for hidden patches
            continue
        weight = own[inside + own_name(name)].detach().double().numpy().ravel().copy()
        if name.endswith("qkv.bias"):  # the keys' gradient is zero but for noise
            weight[len(weight) // 3 : 2 * len(weight) // 3] = 0
        direction = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(weight.size)
        worst = max(worst, relative([np.linalg.norm(weight), weight @ direction], tensors[key]))
    return worst


def ibot_loss(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Loss, its gradients and the centres, of logits that are given."""
    rng, batch, edge = np.random.default_rng(meta["seed"]), meta["batch"], math.isqrt(meta["num_patches"])
    temps = {name: float(value) for name, value in re.findall(r"(\w+) (\d[\d.]*)", meta["temps"])}
    warm_up, momentum = int(temps["warmup_epochs"]), temps["momentum"]
    centre, patch_centre = Centre((1, meta["out_dim"]), momentum), Centre((1, 1, meta["patch_out_dim"]), momentum)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    rows = []
    for epoch in range(meta["steps"]):
        sizes = (2 * batch, meta["out_dim"]), (2 * batch, edge**2, meta["patch_out_dim"])
        student, student_patch, teacher, teacher_patch = (draw(*shape) for shape in sizes * 2)
        local = draw(meta["local_crops"] * batch, meta["out_dim"])
        mask = torch.from_numpy(np.concatenate([rng.random((batch, edge, edge)) < 0.3 for _ in range(2)])).flatten(1)
        student.requires_grad_()
        student_patch.requires_grad_()
        heat = [
            warm_temperature(epoch, start=temps[f"warmup_{name}"], end=temps[name], warm_up=warm_up,
                             delay=delay) for name, delay in (("teacher_temp", 0),
                                                              ("teacher_patch_temp", meta["mim_start_epoch"]))
        ]  # fmt: skip
        crops = torch.cat((student, local)).unflatten(0, (-1, batch)), teacher.unflatten(0, (2, batch))
        how = [dict(student_temp=temps["student_temp"], teacher_temp=value, impl=impl) for value in heat]
        cls = fk.distillation(*crops, centre.value, pairs="views", **how[0])
        weight = hidden_weights(mask)
        patch = fk.distillation(student_patch, teacher_patch, patch_centre.value, weight=weight, **how[1])
        loss = meta["lambda1"] * cls + meta["lambda2"] * patch
        loss.backward()
        rows.append(
            [cls.item(), patch.item(), loss.item(), student.grad.norm().item(), student_patch.grad.norm().item()]
        )
        centre.add(teacher)
        patch_centre.add(teacher_patch)
        centre.move()
        patch_centre.move()
    return {
        "losses and gradients": (relative(rows, tensors["rows"]), 1e-5),
        "centre": (relative(centre.value, tensors["center"]), 1e-5),
        "patch centre": (relative(patch_centre.value, tensors["center2"]), 1e-5),
    }


# Tables


def schedules(table: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Those of iBOT; of the objectives that are not built yet there is nothing to compare."""
    length, per_epoch = table["epochs"] * table["iters_per_epoch"], table["iters_per_epoch"]
    found = {}
    for name, values in table["ibot"].items():
        numbers = [float(word) for word in name.replace(",", "").split() if word.replace(".", "").isdigit()]
        if name == "lr":
            rate = Schedule(name="cosine", base_lr=table["base_lr"], min_lr=table["min_lr"], total_steps=length,
                            warmup_steps=table["warmup_epochs"] * per_epoch, warmup_inclusive=True)  # fmt: skip
            own = [rate(step) for step in range(length)]
        elif "temp" in name:
            start, end, warm_up, *delay = numbers
            how = dict(start=start, end=end, warm_up=int(warm_up), delay=int(delay[0]) if delay else 0)
            own = [warm_temperature(epoch, **how) for epoch in range(table["epochs"])]
        else:
            curve = Schedule(name="cosine", base_lr=numbers[0], min_lr=numbers[1], total_steps=length)
            own = [curve(step) for step in range(length)]
        found[f"ibot {name.split()[0]}"] = (relative(own, values), 1e-9)
    return found


def block_masks(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    """Statistics in standard errors of the difference: share of unmasked ones, mean count, probability of each cell."""
    ids, errors = torch.arange(4000), {}
    for name, stats in meta["stats"].items():
        mask = masks_of(name, stats["grid"], ids).double()
        count, theirs = mask.sum((1, 2)), stats["masks"] * (1 - stats["share_unmasked"])
        some, shown = mask[count > 0], count[count > 0]
        both = (1 / len(some) + 1 / theirs) ** 0.5
        half = (0.25 / len(ids) + 0.25 / stats["masks"]) ** 0.5
        share = ((count == 0).double().mean() - stats["share_unmasked"]) / half
        mean = (shown.mean() - stats["count_mean_masked"]) / max(stats["count_std_masked"] * both, 1e-12)
        probability = tensors[f"probability.{name}"].double()
        cells = (some.mean(0) - probability) / ((probability * (1 - probability)).sqrt() * both).clamp(min=1e-12)
        errors[name] = (float(torch.stack([share.abs(), mean.abs()]).max()), 4.0)
        errors[f"{name} cells"] = (float(cells.abs().max()), 5.0)
    return errors


def masks_of(name: str, grid: list[int], ids: torch.Tensor) -> torch.Tensor:
    """Own masks of a case, whose name says its algorithm and numbers."""
    size = (grid[0], grid[1])
    if beit := re.fullmatch(r"beit_\d+x\d+_(\d+)_min(\d+)", name):
        return beit_mask(ids, grid=size, count=int(beit[1]), smallest=int(beit[2]))
    if fixed := re.search(r"_ratio([\d.]+)_fixed", name):
        return ibot_mask(ids, grid=size, ratios=((float(fixed[1]),) * 2,))
    if spread := re.search(r"_rand_ratio_0_or_([\d.]+)pm([\d.]+)", name):
        middle, half = float(spread[1]), float(spread[2])
        ratios = ((0.0, 0.0), (middle - half, middle + half))
        return ibot_mask(ids, grid=size, ratios=ratios, shape="random")
    return ibot_mask(ids, grid=size)


CHECKS: list[tuple[Callable[[Mapping[str, Any]], bool], Callable[..., Errors]]] = [
    (lambda meta: "mask_patch_size" in meta and "encoder_stride" in meta, simmim),
    (lambda meta: "bytedance/ibot" in meta.get("source", "") and "arch" in meta, ibot),
    (lambda meta: "bytedance/ibot" in meta.get("source", "") and "temps" in meta, ibot_loss),
    (lambda meta: meta.get("case") == "block_masks", block_masks),
    (lambda meta: "ibot" in meta and "iters_per_epoch" in meta, schedules),
]


def main(paths: list[str]) -> int:
    if not paths:
        print((__doc__ or "").split("\n\n")[1].strip())
        return 2
    status = 0
    for path in paths:
        try:
            errors = run(Path(path))
            passed = [name for name, (error, limit) in errors.items() if not error <= limit]
            line = ", ".join(f"{name} {error:.1e}" for name, (error, _) in errors.items())
            line += f": ABOVE ITS LIMIT: {', '.join(passed)}" if passed else ": ok"
        except (OSError, ValueError) as error:
            passed, line = [str(error)], f"not run: {error}"
        status |= bool(passed)
        print(f"{path}: {line}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
