"""The contract of ``LocalEngine`` on DeepSpeed: weights, gradients and optimiser states cut among the ranks."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from fastmim.engine.base import Engine
from fastmim.engine.checkpoint.shards import STEP, WEIGHT, Piece, Shards, write_shard
from fastmim.engine.distributed import World
from fastmim.engine.nonfinite import NonFiniteError
from fastmim.engine.zero import averages, fragments
from fastmim.engine.zero.averages import Averages
from fastmim.engine.zero.config import import_deepspeed
from fastmim.engine.zero.update import UpdateHooks
from fastmim.objectives import Objective


class ZeroEngine(Engine):
    """Forward, backward and update of an objective under ZeRO.

    Stage 0 keeps everything on every rank, 1 cuts the optimiser's states, 2 also the gradients, 3 also the
    weights. With ``precision="bf16"`` (stages 1–3) the weights are bf16, and the master weights, the moments and
    the reduction of gradients are fp32; ``"fp16"`` adds dynamic loss scaling.

    An update with a non-finite gradient is not applied. Under fp16 it lowers the loss scale and training goes
    on; otherwise :meth:`step` raises.

    Args:
        objective: module with ``forward(images, mask) -> {"loss": scalar, …}``; for stage 3 built by
            :func:`fastmim.engine.zero.build.build_partitioned`.
        optimizer: a torch optimiser over its parameters.
        config: from :func:`fastmim.engine.zero.config.deepspeed_config`.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``.
        world: this process among all.
        clip_each: norm that the gradient of every tensor is clipped to by itself; DeepSpeed must not clip then.

    Raises:
        ValueError: DeepSpeed is not installed, or refuses the configuration; or the objective has a teacher that the
            configuration puts out of reach.
    """

    sharded = True
    # It would upset DeepSpeed's bookkeeping of gradients.
    _free_backward = False

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        config: dict[str, Any],
        precision: str = "fp32",
        world: World,
        clip_each: float | None = None,
    ) -> None:
        if precision == "fp16" and world.device.type == "cpu":
            raise ValueError("efficiency.precision=fp16: not on a CPU; use bf16 or fp32")
        deepspeed = import_deepspeed(world.device)
        accum: int = config["gradient_accumulation_steps"]
        super().__init__(objective, optimizer, grad_accum_steps=accum, precision=precision, device=world.device)
        self.world = world
        self.stage: int = config["zero_optimization"]["stage"]
        if self._averages and self.stage:
            averages.refuse(config["zero_optimization"])
        groups = [[param for param in group["params"] if param.requires_grad] for group in optimizer.param_groups]
        if precision != "fp32":
            # Inside DeepSpeed's engine, which would switch off an autocast around it.
            objective.forward = _in_autocast(objective.forward, self.autocast)
        try:
            self._module, self.optimizer, _, _ = deepspeed.initialize(
                model=objective, optimizer=optimizer, config=config, dist_init_required=False
            )
        except (AssertionError, NotImplementedError) as error:
            raise ValueError(f"efficiency.zero_stage={self.stage}: DeepSpeed: {' '.join(str(error).split())}") from None
        self._teachers = self._make_teachers(groups) if self.stage else None
        self._hooks = self._make_hooks(groups, clip_each)

    def _make_hooks(self, groups: list[list[nn.Parameter]], clip_each: float | None) -> UpdateHooks | None:
        can_freeze = isinstance(self.objective, Objective) and any(True for _ in self.objective.freezable())
        if not (clip_each or can_freeze):
            return None
        whole, objective = self.stage == 0, cast(Objective, self.objective)
        return UpdateHooks(
            self._base,
            groups,
            self._fragments(rank=0, world_size=1) if whole else self._fragments(),
            [name for name, param in self.objective.named_parameters() if param.requires_grad],
            clip_each=clip_each,
            frozen=objective.frozen if can_freeze else tuple,
            whole=whole,
            device=self.device,
        )

    def _make_teachers(self, groups: list[list[nn.Parameter]]) -> Averages | None:
        """Of the students that are trained; the teacher of another one is that one's equal, and stays so."""
        names = {id(param): name for name, param in self.objective.named_parameters()}
        pairs = [(names[id(own)], own, student) for own, student in self._averages if student.requires_grad]
        if not pairs:
            return None
        keys: Any = [None] * len(groups) if self.stage == 3 else fragments.flat_groups(self.optimizer)
        flattened = list(zip(groups, keys, strict=True))
        return Averages(pairs, self._fragments(), flattened, stage=self.stage, world=self.world)

    def _move_averages(self) -> None:
        if self._teachers is None:
            super()._move_averages()
        else:
            self._teachers.move(cast(Objective, self.objective).ema_momentum())

    @property
    def collective(self) -> bool:
        """Whether even a forward pass needs all ranks, because each holds only a part of the weights."""
        return self.stage == 3 and self.world.size > 1

    @property
    def _base(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer if self.stage else self.optimizer

    def _backward(self, loss: Tensor) -> None:
        self._module.backward(loss)  # which divides by the number of micro-batches

    def _step(self, update: bool) -> bool:
        if update and self.stage == 0:
            self._grad_norm = get_total_norm([p.grad for p in self.objective.parameters() if p.grad is not None])
            if not bool(torch.isfinite(self._grad_norm)):
                self._base.zero_grad(set_to_none=True)
                raise NonFiniteError(self.steps)
        self._module.step()
        applied = update and (self.stage == 0 or self._was_applied())
        if applied and self._hooks is not None:
            self._hooks.check()
        return applied

    def _was_applied(self) -> bool:
        norm = self._module.get_global_grad_norm()
        self._grad_norm = torch.as_tensor(math.nan if norm is None else norm).detach()
        overflow = bool(self.optimizer.overflow)
        if overflow and self.precision != "fp16":
            raise NonFiniteError(self.steps)
        return not overflow

    def held_bytes(self) -> dict[str, int]:
        """Bytes of ``weights``, ``master`` weights, ``moments`` (and averages) and ``gradients`` on this rank."""
        held = fragments.held_bytes(
            self.objective, self.optimizer, stage=self.stage, rank=self.world.rank, world_size=self.world.size
        )
        if self._teachers is not None:
            held["moments"] += self._teachers.held_bytes()
        return held

    def state(self) -> dict[str, Any]:
        """See :meth:`Engine.state`."""
        scaled = self.precision == "fp16" and self.stage > 0
        return super().state() | ({"loss_scale": float(self.optimizer.loss_scale)} if scaled else {})

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` returned."""
        super().load_state(state)
        if self.precision == "fp16" and "loss_scale" in state:
            self.optimizer.loss_scaler.cur_scale = state["loss_scale"]

    def _fragments(self, rank: int | None = None, world_size: int | None = None) -> list[fragments.Fragment]:
        rank, world_size = self.world.rank if rank is None else rank, world_size or self.world.size
        return list(
            fragments.fragments(self.objective, self.optimizer, stage=self.stage, rank=rank, world_size=world_size)
        )

    def _whole(self) -> dict[str, Tensor]:
        """Persistent buffers, and untrained parameters that every rank has whole: rank 0 stores them."""
        cut = {name for name, param in self.objective.named_parameters() if param.requires_grad or self.stage == 3}
        cut |= self._teachers.names if self._teachers is not None else set()
        return {name: tensor for name, tensor in self.objective.state_dict().items() if name not in cut}

    def _untrained(self) -> dict[str, nn.Parameter]:
        """Parameters that stage 3 has cut, but for those of :class:`Averages`."""
        averages = self._teachers.names if self._teachers is not None else set()
        named = self.objective.named_parameters() if self.stage == 3 else ()
        return {name: param for name, param in named if not param.requires_grad and name not in averages}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {name: fragments.full_shape(param) for name, param in self.objective.named_parameters()}
        return {name: tuple(tensor.shape) for name, tensor in self._whole().items()} | shapes

    def save(self, folder: Path) -> None:
        """Write this rank's share of weights and moments; every rank calls it."""
        pieces: list[Piece] = []
        for one in self._fragments():
            pieces.append(Piece(one.name, WEIGHT, one.start, self._get(one, None)))
            for slot in fragments.moments(self._base, one):
                pieces.append(Piece(one.name, slot, one.start, self._get(one, slot)))
            count = fragments.step_count(self._base, one)
            pieces.append(Piece(one.name, STEP, one.start, torch.tensor([count])))
        if self._teachers is not None:
            pieces += [Piece(name, WEIGHT, start, values) for name, start, values in self._teachers.own()]
        for name, param in self._untrained().items():
            start, values = fragments.own_part(param, self.world.rank)
            pieces += [Piece(name, WEIGHT, start, values)] if len(values) else []
        if self.world.is_main:
            pieces += [Piece(name, WEIGHT, 0, value.reshape(-1)) for name, value in self._whole().items()]
        write_shard(folder, self.world.rank, pieces, self._shapes())

    def load(self, folder: Path) -> None:
        """Read a checkpoint that any engine, stage and number of ranks has written; every rank calls it.

        Raises:
            RuntimeError: a weight is missing, left over or has another shape.
        """
        shards = Shards(folder)
        shards.check(self._shapes())
        for one in self._fragments():
            stop = one.start + one.count
            self._put(one, None, shards.read(one.name, WEIGHT, one.start, stop))
            slots = [slot for slot in fragments.MOMENTS if slot in shards.slots(one.name)]
            if slots:
                count = shards.scalar(one.name, STEP)
                fragments.create_state(self._base, one.key, count)
            for slot in slots:
                self._put(one, slot, shards.read(one.name, slot, one.start, stop))
        with torch.no_grad():
            for name, tensor in self._whole().items():
                tensor.copy_(shards.tensor(name))
        fragments.publish(self.optimizer, stage=self.stage)
        self._load_untrained(shards)

    def _load_untrained(self, shards: Shards) -> None:
        parts = []
        for name, param in self._untrained().items():
            start, own = fragments.own_part(param, self.world.rank)
            parts += [(own, shards.read(name, WEIGHT, start, start + len(own)).to(own))] if len(own) else []
        fragments.set_own_parts(list(self._untrained().values()), parts)
        if self._teachers is not None:
            for name, start, values in self._teachers.own():
                values.copy_(shards.read(name, WEIGHT, start, start + len(values)))
            self._teachers.publish()

    def _get(self, one: fragments.Fragment, slot: str | None) -> Tensor:
        return one.of(one.key if slot is None else self._base.state[one.key][slot]).detach()

    def _put(self, one: fragments.Fragment, slot: str | None, values: Tensor) -> None:
        with torch.no_grad():
            self._get(one, slot).copy_(values)


def _in_autocast(forward: Any, autocast: Any) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with autocast():
            return forward(*args, **kwargs)

    return run
