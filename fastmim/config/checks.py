"""Checks between fields. Each raises an error whose one line names the field, its value and the fix."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastmim.config.messages import nearest, problem, show

if TYPE_CHECKING:
    from fastmim.config.sections import EfficiencySection, OptimSection, TrainSection


def resolve(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Explicit keys over the named size over the constructor's defaults; ``name`` becomes the family.

    Raises:
        PydanticCustomError: an unknown name, or a key that the family does not have.
    """
    # Imported here: torch is loaded only when a config is.
    from fastmim.models import FAMILIES, SIZES, SwinTransformer, VisionTransformer

    name = encoder["name"]
    if name not in FAMILIES and name not in SIZES:
        known = [*FAMILIES, *SIZES]
        raise problem(f"model.name={show(name)}: unknown encoder{nearest(name, known)} (use one of {', '.join(known)})")
    size = SIZES.get(name, {"name": name})
    family = size["name"]
    encoder_class = VisionTransformer if family == "vit" else SwinTransformer
    defaults = {key: p.default for key, p in inspect.signature(encoder_class).parameters.items()}
    for key in encoder:
        if key != "name" and key not in defaults:
            raise problem(f"model.{key}={show(encoder[key])}: {name} has no such key; set model.{key}=null")
    return {**defaults, **size, **encoder, "name": family}


def architecture(encoder: Mapping[str, Any]) -> None:
    """The patch divides the image, the heads divide the channels, one number of heads per stage."""
    full = resolve(encoder)
    patch_divides(full["img_size"], full["patch_size"])
    heads, channels = full["num_heads"], full["embed_dim"]
    if full["name"] == "vit":
        if not isinstance(heads, int):
            raise problem(f"model.num_heads={show(heads)}: vit takes one number")
        _heads_divide(heads, heads, channels, "")
        return
    depths = full["depths"]
    if isinstance(heads, int) or len(heads) != len(depths):
        raise problem(f"model.num_heads={show(heads)}: must list one number per stage, as depths={show(depths)} does")
    for stage, count in enumerate(heads):
        _heads_divide(count, heads, channels * 2**stage, f" of stage {stage}")


def patch_divides(img_size: int | Sequence[int], patch_size: int) -> None:
    """Both edges are multiples of the patch."""
    edges = [img_size] if isinstance(img_size, int) else list(img_size)
    fitting = [[e // patch_size * patch_size, -(-e // patch_size) * patch_size] for e in edges]
    if all(low == high for low, high in fitting):
        return
    shapes = [[low or high, high] for low, high in fitting]
    choices = [s[0] if len(edges) == 1 else s for s in ([a[0] for a in shapes], [a[1] for a in shapes])]
    options = " or ".join(dict.fromkeys(map(show, choices)))
    raise problem(f"model.img_size={show(img_size)}: not divisible by patch_size {patch_size}; use {options}")


def mask_unit(encoder: Mapping[str, Any], unit: int) -> None:
    """A mask unit covers whole patches."""
    patch = resolve(encoder)["patch_size"]
    if unit % patch:
        choices = dict.fromkeys((max(unit // patch, 1) * patch, -(-unit // patch) * patch))
        options = " or ".join(map(str, choices))
        raise problem(f"objective.unit={unit}: not a multiple of patch_size {patch}; use {options}")


def some_visible(encoder: Mapping[str, Any], unit: int, mask_ratio: float) -> None:
    """The mask leaves at least one unit of every image visible."""
    from fastmim.objectives.masking import masked_units

    size = resolve(encoder)["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    try:
        masked_units(mask_ratio, -(-height // unit) * -(-width // unit))
    except ValueError as error:
        raise problem(f"objective.{error}") from None


def norm_target(window: int) -> None:
    """Off, or an odd window with at least two pixels (one pixel has no variance)."""
    if window and (window % 2 == 0 or window < 3):
        low, high = max(window - 1, 3), max(window + 1, 3)
        options = dict.fromkeys((low, high))
        raise problem(
            f"objective.norm_target={window}: must be 0 (off) or an odd window of at least 3 pixels; "
            f"use {' or '.join(map(str, options))}"
        )


def default_statistics(tree: Any) -> Any:
    """ImageNet's channel statistics are for RGB: other images get 0.5 unless the config says more."""
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        return tree
    data = tree.get("data") or {}
    if tree["model"].get("in_chans", 3) == 3 or not isinstance(data, dict):
        return tree
    return {**tree, "data": {"mean": [0.5], "std": [0.5], **data}}


def channels(in_chans: int, **statistics: Sequence[float]) -> None:
    """One value per channel, or one for all."""
    for name, values in statistics.items():
        if len(values) not in (1, in_chans):
            example = {"mean": 0.45, "std": 0.22}[name]
            raise problem(
                f"data.{name}={show(values)}: {len(values)} values for model.in_chans={in_chans}; "
                f"give {in_chans} or one for all, for example data.{name}=[{example}]"
            )


def either(section: Any, first: str, second: str, default: Any = None) -> Any:
    """Let a given `first` replace the default of `second`; where neither is given as null, use `default`."""
    if not isinstance(section, dict):
        return section
    if section.get(first) is not None and second not in section:
        return {**section, second: None}
    if default is not None and section.get(first) is None and section.get(second, default) is None:
        return {**section, second: default}
    return section


def length(steps: int | None, epochs: int | None) -> None:
    """Exactly one of the two."""
    if steps is not None and epochs is not None:
        raise problem(f"train.steps={steps}: train.epochs={epochs} is given too; keep one and set the other to null")
    if steps is None and epochs is None:
        raise problem("train.steps=null: give train.steps or train.epochs")


def batch(train: TrainSection) -> None:
    """The global batch is made of whole micro-batches."""
    total, micro = train.global_batch_size, train.micro_batch_size
    if total is not None and total % micro:
        low, high = total // micro * micro, -(-total // micro) * micro
        options = " or ".join(map(str, [low, high] if low else [high]))
        raise problem(f"train.global_batch_size={total}: not a multiple of micro_batch_size {micro}; use {options}")


def zero(efficiency: EfficiencySection) -> None:
    """What DeepSpeed does or needs is asked for only together with it."""
    if efficiency.deepspeed and efficiency.zero_stage is None:
        raise problem("efficiency.deepspeed={...}: needs efficiency.zero_stage, for example 2")
    # The planner reads this section too; the others are DeepSpeed's alone, and checked where it is imported.
    section = efficiency.deepspeed.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        where = "efficiency.deepspeed.zero_optimization"
        raise problem(f"{where}={show(section)}: expected a section of keys and values")
    # Stage 0 keeps fp32 weights under autocast, without the optimiser of DeepSpeed that scales the loss.
    if efficiency.precision == "fp16" and not efficiency.zero_stage:
        stage = show(efficiency.zero_stage)
        raise problem(
            f"efficiency.precision=fp16: needs efficiency.zero_stage 1, 2 or 3, not {stage}: only they scale the loss"
        )
    if efficiency.zero_stage is not None and efficiency.compile:
        raise problem(
            f"efficiency.compile=true: not with zero_stage={efficiency.zero_stage}; DeepSpeed gathers weights in "
            "hooks that torch.compile cannot see through; use compile=false, or zero_stage=null"
        )


def offload(efficiency: EfficiencySection) -> None:
    """A ZeRO stage that can offload what is asked for, and a folder for what goes to a drive."""
    stage, optimizer, param = efficiency.zero_stage, efficiency.offload_optimizer, efficiency.offload_param
    if optimizer == "nvme" and stage != 3:
        raise problem("efficiency.offload_optimizer=nvme: needs efficiency.zero_stage=3; or use cpu")
    if optimizer != "none" and not stage:
        raise problem(f"efficiency.offload_optimizer={optimizer}: needs efficiency.zero_stage 1, 2 or 3")
    if param != "none" and stage != 3:
        raise problem(f"efficiency.offload_param={param}: needs efficiency.zero_stage=3")
    if "nvme" in (optimizer, param) and efficiency.nvme_path is None:
        raise problem("efficiency.nvme_path=null: offload to nvme needs a folder on a local NVMe drive")
    if efficiency.nvme_path is not None and "nvme" not in (optimizer, param):
        raise problem(
            f"efficiency.nvme_path={show(efficiency.nvme_path)}: nothing is offloaded to it; set "
            "efficiency.offload_optimizer or offload_param to nvme, or nvme_path=null"
        )


def recompute(efficiency: EfficiencySection) -> None:
    """What is said about recomputation applies to some."""
    if efficiency.recompute_offload and efficiency.recompute != "full":
        raise problem(f"efficiency.recompute_offload=true: not with recompute={efficiency.recompute}; use full")
    if efficiency.recompute_every != 1 and efficiency.recompute == "none":
        raise problem(
            f"efficiency.recompute_every={efficiency.recompute_every}: not with recompute=none; "
            "use recompute=full or another policy, or recompute_every=1"
        )


def lamb(optim: OptimSection, efficiency: EfficiencySection) -> None:
    """LAMB scales each tensor's update by the norms of the whole tensor, of which a rank of ZeRO has a part."""
    if optim.name == "lamb" and efficiency.zero_stage:
        raise problem(f"optim.name=lamb: not with efficiency.zero_stage={efficiency.zero_stage}; use adamw, or stage 0")


def schedule(optim: OptimSection) -> None:
    """The schedule has the keys it needs, each in one unit only, and its rates are in order."""
    for first, second in (
        ("warmup_steps", "warmup_epochs"),
        ("milestone_steps", "milestones"),
        ("decay_steps", "decay_epochs"),
    ):
        if getattr(optim, first) and getattr(optim, second):
            raise problem(
                f"optim.{first}={show(getattr(optim, first))}: optim.{second}={show(getattr(optim, second))} "
                "is given too; keep one and set the other to null"
            )
    if optim.schedule == "multistep" and not (optim.milestones or optim.milestone_steps):
        raise problem("optim.milestones=[]: the multistep schedule needs at least one epoch, for example [700]")
    if optim.schedule == "step" and not (optim.decay_epochs or optim.decay_steps):
        raise problem("optim.decay_epochs=null: the step schedule needs the epochs between two decays, for example 30")
    for name in ("milestones", "milestone_steps"):
        values = getattr(optim, name)
        if list(values) != sorted(set(values)):
            raise problem(f"optim.{name}={show(values)}: must rise; use {show(sorted(set(values)))}")


def _heads_divide(count: int, heads: int | Sequence[int], channels: int, where: str) -> None:
    if count < 1 or channels % count:
        near = min((c for c in range(1, channels + 1) if channels % c == 0), key=lambda c: abs(c - count))
        what = f"{count} does not divide the {channels} channels{where}"
        raise problem(f"model.num_heads={show(heads)}: {what}; use {near}")
