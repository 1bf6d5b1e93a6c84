"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

POLICIES = ("parity", "default")

# What `no_weight_decay()` of the published Swin, SwinV2 and ViT pretraining models names. Their keyword lists
# (tables, cpb_mlp, logit_scale) are prefixed with "encoder." before they are searched for inside a
# parameter's name, where the tables and scales sit deeper: they match nothing, so those tensors decay.
_PARITY_SWIN = frozenset({"mask_token", "absolute_pos_embed", "pos_embed"})
_PARITY_VIT = frozenset({"cls_token", "pos_embed"})

_DEFAULT_TOKENS = frozenset({"mask_token", "cls_token", "pos_embed", "absolute_pos_embed"})
_DEFAULT_PARTS = frozenset({"relative_position_bias_table", "cpb_mlp", "logit_scale"})


def split_parameters(obj: nn.Module, weight_decay: float, policy: str = "parity") -> list[dict[str, Any]]:
    """Split the trainable parameters of an objective into a group that decays and one that does not.

    Every parameter that requires a gradient is in exactly one group. Empty groups are left out.

    Args:
        obj: the objective (encoder and head), or any module.
        weight_decay: decoupled weight decay of the decaying group.
        policy: ``"parity"`` reproduces microsoft/SimMIM and microsoft/Swin-Transformer: 1-d tensors,
            ``.bias`` and absolute positions do not decay, nor do Swin's mask token and ViT's class token;
            relative position tables, ``cpb_mlp`` weights, ``logit_scale`` and ViT's mask token do.
            ``"default"`` spares all of them.

    Returns:
        Optimiser groups with ``name`` (``decay`` | ``no_decay``), ``params``, ``param_names``,
        ``weight_decay``.

    Raises:
        ValueError: unknown policy or negative weight decay.
    """
    if policy not in POLICIES:
        raise ValueError(f"optim.policy={policy!r}: unknown; use one of {', '.join(POLICIES)}")
    if weight_decay < 0:
        raise ValueError(f"optim.weight_decay={weight_decay}: negative; use 0 to switch weight decay off")
    named = _trainable(obj)
    # Of the published encoders only the ViT has a class token; its list does not hold the mask token.
    is_vit = any(_last(name) == "cls_token" for name, _ in named)
    spares = _spared if policy == "default" else lambda name, param: _spared_by_parity(name, param, is_vit)
    return _grouped(named, weight_decay, spares)


def split_by_rank(obj: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As DINO and iBOT split: every tensor of two or more dimensions decays, unless it is called a bias.

    Arguments and groups are those of :func:`split_parameters`.
    """
    return _grouped(_trainable(obj), weight_decay, lambda name, param: _ndim(param) <= 1 or _last(name) == "bias")


def split_for_tuning(obj: nn.Module, weight_decay: float, spare_tables: bool) -> list[dict[str, Any]]:
    """As the published fine-tunings split: vectors, biases, class token and positions do not decay.

    Args:
        spare_tables: Nor do tables of position biases, SwinV2's ``cpb_mlp`` and ``logit_scale``.

    Other arguments and groups are those of :func:`split_parameters`.
    """

    def spares(name: str, param: Tensor) -> bool:
        parts = name.split(".")
        listed = parts[-1] in ("bias", "cls_token", "pos_embed")
        return _ndim(param) <= 1 or listed or (spare_tables and not _DEFAULT_PARTS.isdisjoint(parts))

    return _grouped(_trainable(obj), weight_decay, spares)

def all_decay(obj: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """As MoCo v3: every trainable tensor decays, norms and biases too.

    Arguments and groups are those of :func:`split_parameters`.
    """
    return _grouped(_trainable(obj), weight_decay, lambda name, param: False)


def split_freezable(groups: list[dict[str, Any]], freezable: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Groups of which each is frozen as a whole or never: ZeRO flattens a group, and cannot leave a part of it out.

    Args:
        groups: of :func:`split_parameters`.
        freezable: see :meth:`~fastmim.objectives.Objective.freezable`.

    Returns:
        The groups without these parameters, and behind each one, ``name:freezable``, of those that were in it.
    """
    chosen = {id(param) for param in freezable}
    if not chosen:
        return groups
    result: list[dict[str, Any]] = []
    for group in groups:
        named = list(zip(group["params"], group["param_names"], strict=True))
        for suffix, inside in (("", False), (":freezable", True)):
            part = [(param, name) for param, name in named if (id(param) in chosen) == inside]
            if part:
                params, names = (list(column) for column in zip(*part, strict=True))
                result.append({**group, "name": group["name"] + suffix, "params": params, "param_names": names})
    return result


def _trainable(obj: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, param) for name, param in obj.named_parameters() if param.requires_grad]


def _grouped(
    named: list[tuple[str, Tensor]], weight_decay: float, spares: Callable[[str, Tensor], bool]
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [
        {"name": "decay", "params": [], "param_names": [], "weight_decay": float(weight_decay)},
        {"name": "no_decay", "params": [], "param_names": [], "weight_decay": 0.0},
    ]
    for name, param in named:
        group = groups[spares(name, param)]
        group["params"].append(param)
        group["param_names"].append(name)
    return [group for group in groups if group["params"]]


def _ndim(param: Tensor) -> int:
    """Dimensions of a parameter; ZeRO-3 leaves none of them in the tensor itself."""
    return len(getattr(param, "ds_shape", param.shape))


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _spared_by_parity(name: str, param: Tensor, is_vit: bool) -> bool:
    listed = _PARITY_VIT if is_vit else _PARITY_SWIN
    # Exactly one level below the objective: the reference's list holds "encoder.mask_token", never a deeper
    # name.
    is_listed = name.count(".") <= 1 and _last(name) in listed
    return _ndim(param) == 1 or name.endswith(".bias") or is_listed


def _spared(name: str, param: Tensor) -> bool:
    parts = name.split(".")
    return (
        _ndim(param) <= 1 or parts[-1] == "bias" or parts[-1] in _DEFAULT_TOKENS or not _DEFAULT_PARTS.isdisjoint(parts)
    )
