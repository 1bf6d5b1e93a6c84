"""Everyone's SimMIM training step behind one small adapter: ours, timm's, Microsoft's, lightly's, mmpretrain's; and
the published steps of iBOT and MAE.

A provider is built for a :class:`Case`, gets the case's weights, and is called as ``forward``, ``backward``,
``update``. ``NAME-compiled`` is the same step with ``torch.compile``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import ibot_reference, mae_reference
from benchmarks.baseline import timm_objective
from benchmarks.reference import KINDS, build_reference, case_config, find_clones
from benchmarks.third_party import lightly_objective, mmpretrain_objective
from benchmarks.train_step import CLIP, LR, WEIGHT_DECAY, Provider, awake, engine_step, plain_step
from fastmim.config import Config
from fastmim.engine.build import make_engine, recomputed_objective
from fastmim.engine.distributed import World
from fastmim.engine.recompute import POLICIES
from fastmim.interop import load_reference
from fastmim.models import expand_size

DTYPES = ("fp32", "bf16")
COMPILED = "-compiled"
MASKED = 0.6
MASKED_TOKENS = 22 / 36
"""Of the encoder's output, whose tokens are the mask's units."""
# Hidden patches are not read. Tokens without a masked pixel are not projected: their rows of the tiles are skipped.
SHARES = {"mask_tokens": 1 - MASKED, "linear_masked_l1": MASKED_TOKENS}

# Ours under each setting of the config's `efficiency` section that changes the step; the first is what a run takes.
PRESETS: dict[str, dict[str, Any]] = {
    "fastmim": {},
    "fastmim-torch": {"kernels": "torch"},
    "fastmim-reference": {"kernels": "reference"},
    "fastmim-plain-adamw": {"fused_optimizer": False},
    **{f"fastmim-recompute-{policy}": {"recompute": policy} for policy in POLICIES[1:]},
}


# Objectives other than SimMIM that have a published step: its provider, its module and how that is stepped.
PUBLISHED: dict[str, tuple[str, Any, Callable[..., Provider]]] = {
    "ibot": (ibot_reference.NAME, ibot_reference.ReferenceIBOT, ibot_reference.reference_step),
    "mae": (mae_reference.NAME, mae_reference.ReferenceMAE, mae_reference.reference_step),
}
ELSEWHERE = ("timm", "lightly", "mmpretrain")
PLAIN_VIT = {"abs_pos_embed": True, "shared_rel_pos_bias": False, "init_values": None}


class Unavailable(Exception):
    """A provider that cannot be built here; says why, and what would help."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One step to be measured.

    Args:
        name: A size of ``fastmim.models.sizes``, ``+47`` behind it for the normalised target of 47 pixels;
            ``vit_…_plain`` is a ViT with absolute positions and without LayerScale.
        dtype: "fp32", or "bf16" (autocast).
        batch: Images a step and rank.
        img_size: Pixels; None takes the size's own.
        device: "cpu" or "cuda".
    """

    name: str
    dtype: str = "fp32"
    batch: int = 4
    img_size: int | None = None
    device: str = "cpu"
    overrides: tuple[tuple[str, Any], ...] = ()

    def encoder(self) -> dict[str, Any]:
        """Keyword arguments of ``create_encoder``; no stochastic depth, whose noise would hide a wrong loss."""
        name = self.name.partition("+")[0]
        size = {} if self.img_size is None else {"img_size": self.img_size}
        plain = PLAIN_VIT if name.endswith("_plain") else {}
        known = {"name": name.removesuffix("_plain"), "drop_path_rate": 0.0}
        return expand_size(known | plain | size | dict(self.overrides))

    @property
    def norm_target(self) -> int:
        return int(self.name.partition("+")[2] or 0)

    def config(self, **efficiency: Any) -> Config:
        """Of a run that takes this case's step; ``efficiency`` are keys of that section."""
        return Config.model_validate({
            "model": self.encoder(),
            "objective": {"norm_target": self.norm_target},
            "optim": {"lr": LR, "weight_decay": WEIGHT_DECAY, "clip_grad": CLIP},
            "train": {"micro_batch_size": self.batch},
            "efficiency": {"precision": self.dtype, **efficiency},
        })  # fmt: skip

    def build(self, **efficiency: Any) -> Any:
        """Our objective for this case, as :meth:`config` says."""
        return recomputed_objective(self.config(**efficiency))

    def weights(self) -> nn.Module:
        """An objective that holds the first weights of every provider."""
        torch.manual_seed(0)
        return awake(self.build())

    def shares(self) -> dict[str, float]:
        """See :meth:`fastmim.objectives.Objective.shares`; of the plain encoders' masks."""
        return SHARES

    def inputs(self, source: Any) -> tuple[Tensor, Tensor]:
        """The images and masks that every provider sees."""
        images = torch.randn(self.batch, source.in_chans, *source.img_size, generator=torch.Generator().manual_seed(1))
        return images.to(self.device), source.random_mask(torch.arange(self.batch)).to(self.device)


def check_name(name: str) -> None:
    """Is there such a provider?

    Raises:
        ValueError: no; names those that there are.
    """
    known = [*PRESETS, *ELSEWHERE, *KINDS]
    if name.removesuffix(COMPILED) not in known:
        raise ValueError(f"provider {name!r}: unknown; use one of {', '.join(known)}, each also with {COMPILED}")


def build(name: str, case: Case, source: nn.Module, *, reference: str | None = None, world: World | None = None) -> Any:
    """A provider for a case, on a copy of the weights of ``source``.

    Raises:
        Unavailable: it is not installed, not given, or has no such model.
    """
    plain = name.removesuffix(COMPILED)
    compiled = name.endswith(COMPILED)
    if plain in PRESETS:
        return _ours(name, case, source, PRESETS[plain] | {"compile": compiled}, world)
    module = foreign_module(plain, case, source, reference).to(case.device).train()
    for provider, kind, step in PUBLISHED.values():
        if plain == provider and isinstance(module, kind):
            if compiled or (world is not None and world.size > 1):
                raise Unavailable(f"{name}: only as it is, in one process")
            return step(module, case.config(), device=case.device, dtype=case.dtype)
    return _plain_step(name, module, case, compiled, world)


def _ours(name: str, case: Case, source: nn.Module, preset: dict[str, Any], world: World | None) -> Provider:
    objective = case.build(**preset)
    objective.load_state_dict(source.state_dict())
    objective.to(case.device).train()
    world = world or World(rank=0, size=1, local_rank=0, device=torch.device(case.device))
    engine = make_engine(case.config(**preset), objective, world)
    return engine_step(name, objective, engine)


def _plain_step(name: str, module: nn.Module, case: Case, compiled: bool, world: World | None) -> Provider:
    call: Any = torch.compile(module, dynamic=False) if compiled else module
    if world is not None and world.size > 1:
        call = nn.parallel.DistributedDataParallel(call, broadcast_buffers=False)
    return plain_step(name, module, call, device=case.device, dtype=case.dtype)


def foreign_module(name: str, case: Case, source: nn.Module, reference: str | None) -> nn.Module:
    """Somebody else's objective with the weights of ``source``.

    Raises:
        Unavailable: it is not installed, not given, or has no such model.
    """
    makers: dict[str, Callable[..., nn.Module]] = dict(
        zip(ELSEWHERE, (timm_objective, lightly_objective, mmpretrain_objective), strict=True)
    )
    task = case.config().objective.name
    if task != next((known for known, (own, _, _) in PUBLISHED.items() if own == name), "simmim"):
        raise Unavailable(f"{name}: it does not train {task}")
    if task in PUBLISHED:
        if name not in _clones(reference):
            raise Unavailable(f"{name}: give a clone of it with --reference DIR")
        if case.encoder()["name"] != "vit":
            raise Unavailable(f"{name}: measured for a ViT alone")
        found: nn.Module = PUBLISHED[task][1](_clones(reference)[name], case.config(), source)
        return found
    if name in KINDS:
        return _microsoft(name, case, source, reference)
    try:
        return makers[name](case.encoder(), case.norm_target, source)
    except (ImportError, ValueError) as error:
        raise Unavailable(f"{name}: {error}") from None


def _microsoft(name: str, case: Case, source: nn.Module, reference: str | None) -> nn.Module:
    clones = _clones(reference)
    encoder = case.encoder()
    if name not in clones:
        raise Unavailable(f"{name}: give a clone of it with --reference DIR")
    if encoder["name"] not in KINDS[name][1]:
        raise Unavailable(f"{name}: its SimMIM has no {encoder['name']}")
    try:
        model = build_reference(clones[name], case_config(clones[name], encoder, case.norm_target))
    except ValueError as error:
        raise Unavailable(f"{name}: {error}") from None
    # Reading a copy tells which of its tensors is which of ours, and that none is left over on either side.
    names = load_reference(copy.deepcopy(source), model.model.state_dict()).names
    ours, theirs = dict(source.named_parameters()), dict(model.model.named_parameters())
    with torch.no_grad():
        for key, own in names.items():
            theirs[key].copy_(ours[own].reshape(theirs[key].shape))
    return model


@functools.cache
def _clones(reference: str | None) -> dict[str, Path]:
    return find_clones(reference) if reference else {}
