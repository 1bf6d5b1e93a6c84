"""Whole MoCo v3 runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastmim import create_objective, load_config
from fastmim.config import Config
from fastmim.engine.build import make_engine, make_schedule
from fastmim.engine.distributed import World
from fastmim.engine.loop import train_step
from fastmim.interop import load_reference
from fastmim.interop.moco import own_name

from .common import Errors, encoder_of, ends, overrides, relative, weights


def moco_config(meta: Mapping[str, Any], params: Mapping[str, torch.Tensor]) -> Config:
    """The config of the file's run; the number of layers of its heads is that of their matrices."""
    layers = {
        name: sum(key.startswith(f"{prefix}.") and value.ndim == 2 for key, value in params.items())
        for name, prefix in (("projector_layers", "base_encoder.head"), ("predictor_layers", "predictor"))
    }
    task = layers | dict(
        name="moco", hidden_dim=meta["mlp_dim"], out_dim=meta["dim"], temperature=meta["temperature"],
        momentum=meta["momentum"], freeze_patch_embed=any("patch_embed" in name for name in meta["frozen"]),
        augment=False,
    )  # fmt: skip
    optim = dict(
        lr=meta["base_lr"], lr_batch=None, warmup_lr=0.0, min_lr=0.0, clip_grad=None, weight_decay=meta["weight_decay"],
        warmup_epochs=meta["warmup_epochs"], schedule_lag=False, policy="parity",
    )  # fmt: skip
    channels = params["base_encoder.patch_embed.proj.weight"].shape[1]
    model = encoder_of(meta, in_chans=channels, key_bias=True, abs_pos_embed="sincos_moco", init="moco")
    train = dict(epochs=meta["epochs"], micro_batch_size=meta["batch"])
    return load_config(None, overrides(model=model, objective=task, optim=optim, train=train))


def batches(meta: Mapping[str, Any], channels: int) -> Iterator[tuple[int, Any]]:
    """Both crops of every step, as a loader gives them."""
    rng, edge = np.random.default_rng(meta["seed"]), meta["img_size"]
    rows, columns = (edge, edge) if isinstance(edge, int) else edge
    crops = rng.standard_normal((meta["steps"], 2, meta["batch"], channels, rows, columns))
    offset = rng.standard_normal((meta["steps"], 1, meta["batch"], channels, 1, 1))
    for images in torch.from_numpy((0.7 * crops + offset).astype(np.float32)):
        yield 0, SimpleNamespace(images=(images,), sample_ids=torch.arange(meta["batch"]))


def moco(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], impl: str) -> Errors:
    params = weights(tensors)
    cfg, per_epoch = moco_config(meta, params), meta["iters_per_epoch"]
    objective = create_objective("moco", encoder=cfg.model.encoder_kwargs(), impl=impl, **cfg.objective.arguments())
    errors = {"positions": (relative(objective.encoder.pos_embed, params["base_encoder.pos_embed"]), 1e-6)}
    load_reference(objective, params)
    engine = make_engine(cfg, objective, World(0, 1, 0, torch.device("cpu")))
    schedule = make_schedule(cfg, per_epoch, meta["batch"])
    inputs = list(batches(meta, cfg.model.in_chans))
    errors |= first_outputs(objective, inputs[0][1].images, tensors)
    run = Run(objective, engine)
    for step in range(meta["steps"]):
        rate = schedule(step)
        run.before(step, rate)
        train_step(engine, iter(inputs[step:]), lr=rate, seed=0, total=schedule.total_steps, steps_per_epoch=per_epoch)
        run.rows.append(engine.read())
    return errors | run.errors(tensors)


def first_outputs(objective: Any, images: Any, tensors: Mapping[str, torch.Tensor]) -> Errors:
    """Of the first crops; on a copy, for they move statistics."""
    model = deepcopy(objective).train()
    with torch.no_grad():
        crops = model.crops(images)
        features = model.encoder.forward_tokens(crops)[0].unflatten(0, (2, -1))
        queries, keys = model.predictor(model.head(features))[0], model.keys(crops)[0]
    return {name: (relative(found, tensors[name]), 5e-5) for name, found in (("q1", queries), ("k1", keys))}


class Run:
    """What is to be compared, collected along the way."""

    def __init__(self, objective: Any, engine: Any) -> None:
        self.objective = objective
        self.rows: list[dict[str, float]] = []
        self.rates: list[float] = []
        self.momentum: list[float] = []
        self.first: dict[str, torch.Tensor] = {}
        engine.optimizer.register_step_pre_hook(lambda *_: self._keep_gradients())

    def before(self, step: int, rate: float) -> None:
        """A step: its momentum encoder has moved already, and moves once more, for the next one, at its end."""
        self.rates.append(rate)
        if step:
            self.momentum.append(self.objective.ema_momentum())
        named = self.objective.named_parameters()
        self.average = {name: param.detach().clone() for name, param in named if name.startswith("momentum_encoder.")}

    def _keep_gradients(self) -> None:
        if not self.first:
            named = self.objective.named_parameters()
            self.first = {name: param.grad.clone() for name, param in named if param.grad is not None}

    def errors(self, tensors: Mapping[str, torch.Tensor]) -> Errors:
        found = {
            "losses": (relative([row["loss"] for row in self.rows], tensors["losses"]), 5e-5),
            "norms": (relative([row["grad_norm"] for row in self.rows], tensors["grad_norms"]), 1e-4),
            "lr": (relative(self.rates, tensors["lr"]), 1e-6),
        }
        if self.momentum:
            found["momentum"] = (relative(self.momentum, tensors["momentum"][1:]), 1e-6)
        own, buffers = dict(self.objective.named_parameters()), dict(self.objective.named_buffers())
        for what, values, kind in (
            ("first gradients", self.first, "grad0."),
            ("end", own, "end."),
            ("momentum encoder's end", self.average, "momentum_end."),
            ("statistics' end", buffers, "buffer_end."),
        ):
            named = [own_name(key.removeprefix(kind)) for key in tensors if key.startswith(kind)]
            assert named and not set(named) - values.keys(), (what, set(named) - values.keys())
            found[what] = (ends(values, tensors, kind, own_name), 1e-4)
        return found
