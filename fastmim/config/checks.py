"""Checks between fields. Each raises an error whose one line names the field, its value and the fix.

A rule of one component is asked of that component; here are the rules between sections, and of the config's own keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_core import PydanticCustomError

from fastmim.config.messages import problem, said_by, show
from fastmim.config.objective import ObjectiveSection
from fastmim.wording import plural


def architecture(encoder: Mapping[str, Any]) -> None:
    """The encoder has each of the keys, and takes their values together."""
    # Imported here: torch is loaded only when a config is.
    from fastmim.models import check_encoder, encoder_settings

    name = encoder["name"]
    try:
        known = encoder_settings({"name": name})
        for key in encoder:
            if key not in known:
                raise problem(f"model.{key}={show(encoder[key])}: {name} has no such key; set model.{key}=null")
        check_encoder(encoder)
    except PydanticCustomError:
        raise
    except ValueError as error:
        raise said_by("model", encoder, error) from None


def objective(section: ObjectiveSection, encoder: Mapping[str, Any], data: Any, tree: Any) -> None:
    """The objective takes its keys together with the encoder and the images; `tree` has them as they were written."""
    from fastmim.objectives import find_objective

    arguments = section.arguments()
    written = tree.get("objective") if isinstance(tree, Mapping) else None
    try:
        found = find_objective(section.name)
        found.check_family(encoder)
        found.check(encoder=encoder, **arguments)
        found.check_pixels(pixels=data.pixels, has_gaps=data.no_data is not None, **arguments)
    except ValueError as error:
        given = {**arguments, **written} if isinstance(written, Mapping) else arguments
        raise said_by("objective", given, error) from None


def default_statistics(tree: Any) -> Any:
    """ImageNet's channel statistics are for RGB: other images get 0.5 unless the config says more."""
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        return tree
    data = tree.get("data") or {}
    if tree["model"].get("in_chans", 3) == 3 or not isinstance(data, dict) or data.get("pixels") == "float32":
        return tree
    return {**tree, "data": {"mean": [0.5], "std": [0.5], **data}}


def statistics(in_chans: int, data: Any) -> None:
    """One value per channel, or one for all, in the unit that the objective takes."""
    from fastmim.objectives.arguments import check_statistics

    given: dict[str, Sequence[float]] = {"mean": data.mean, "std": data.std}
    for name, values in given.items():
        if len(values) not in (1, in_chans):
            example = {"mean": 0.45, "std": 0.22}[name]
            raise problem(
                f"data.{name}={show(values)}: {plural(len(values), 'value')} for model.in_chans={in_chans}; give "
                f"{in_chans} or one for all, for example data.{name}=[{example}]; `fastmim data stats` measures them"
            )
        try:
            check_statistics(name, values, data.pixels)
        except ValueError as error:
            raise said_by("data", given, error) from None


def bands(given: Sequence[int] | None, in_chans: int) -> None:
    """Pictures show channels that there are."""
    from fastmim.objectives.pictures import check_bands

    try:
        check_bands(given, in_chans)
    except ValueError as error:
        raise said_by("output", {"bands": given}, error) from None


def reading(data: Any) -> None:
    """What says how a file is read goes together; for samples as they are stored no mean is known beforehand."""
    from fastmim.data.reading import check_reading, checked, reading_of

    try:
        check_reading(**checked(reading_of(data)))
    except ValueError as error:
        raise problem(str(error)) from None
    for key in ("mean", "std"):
        if data.pixels == "float32" and key not in data.model_fields_set:
            raise problem(
                f"data.{key}: not given, and data.pixels=float32 needs that of its samples; `fastmim data stats CONFIG "
                "--write FILE` measures it"
            )


def weights(path: str | Sequence[str] | None, given: Sequence[float] | None) -> None:
    """One weight for each of several folders."""
    count = len(path) if isinstance(path, tuple) else 1
    if given is not None and (count < 2 or len(given) != count):
        raise problem(
            f"data.weights={show(given)}: {len(given)} for {count} data.path; give data.path=[a, b, ...] "
            "and one weight for each, or null"
        )


def held_out(path: str | Sequence[str] | None, fraction: float | None) -> None:
    """Held-out images come from one place."""
    if path is not None and fraction is not None:
        given = f"data.val_path={show(path)} is given too"
        raise problem(f"data.val_fraction={fraction:g}: {given}; keep one and set the other to null")


def labels(data: Any, objective: ObjectiveSection) -> None:
    """A table of classes has images, and is there where nothing else says which several classes an image has."""
    from fastmim.objectives import find_objective

    learns, several = find_objective(objective.name).takes_labels, objective.arguments().get("multi_label")
    if data.labels is not None and data.labelled_path is None and not learns:
        raise problem(
            f"data.labels={data.labels}: names the classes of data.labelled_path, which is null; give that too"
        )
    if data.val_labels is not None and (data.val_path is None or not learns):
        fix = "give that too" if learns else "leave it out, or fine-tune with objective.name=classify"
        raise problem(f"data.val_labels={data.val_labels}: names the classes of data.val_path in fine-tuning; {fix}")
    for table, folder in (("labels", data.path), ("val_labels", data.val_path)) if learns and several else ():
        if folder is not None and getattr(data, table) is None:
            raise problem(f"data.{table}=null: objective.multi_label=true needs a CSV of file,class;class")


def probe(every: int, data: Any) -> None:
    """There is something to look at: images with labels, or held-out ones for RankMe alone."""
    if every and (data.labelled_path, data.val_path, data.val_fraction) == (None, None, None):
        raise problem(
            f"train.probe_every={every}: nothing to probe; give data.labelled_path, or data.val_fraction=0.1 for RankMe"
            " alone, which needs no labels"
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


def batch(total: int | None, micro: int) -> None:
    """The global batch is made of whole micro-batches."""
    if total is not None and total % micro:
        low, high = total // micro * micro, -(-total // micro) * micro
        options = " or ".join(map(str, [low, high] if low else [high]))
        raise problem(f"train.global_batch_size={total}: not a multiple of micro_batch_size {micro}; use {options}")


def zero(stage: int | None, precision: str, compiled: bool, deepspeed: Mapping[str, Any]) -> None:
    """What DeepSpeed does or needs is asked for only together with it."""
    if deepspeed and stage is None:
        raise problem("efficiency.deepspeed={...}: needs efficiency.zero_stage, for example 2")
    # The planner reads this section too; the others are DeepSpeed's alone, and checked where it is imported.
    section = deepspeed.get("zero_optimization", {})
    if not isinstance(section, Mapping):
        where = "efficiency.deepspeed.zero_optimization"
        raise problem(f"{where}={show(section)}: expected a section of keys and values")
    # Stage 0 keeps fp32 weights under autocast, without the optimiser of DeepSpeed that scales the loss.
    if precision == "fp16" and not stage:
        raise problem(
            f"efficiency.precision=fp16: needs efficiency.zero_stage 1, 2 or 3, not {show(stage)}: "
            "only they scale the loss"
        )
    if stage is not None and compiled:
        raise problem(
            f"efficiency.compile=true: not with zero_stage={stage}; DeepSpeed gathers weights in "
            "hooks that torch.compile cannot see through; use compile=false, or zero_stage=null"
        )


def offload(stage: int | None, optimizer: str, param: str, nvme_path: str | None) -> None:
    """A ZeRO stage that can offload what is asked for, and a folder for what goes to a drive."""
    if optimizer == "nvme" and stage != 3:
        raise problem("efficiency.offload_optimizer=nvme: needs efficiency.zero_stage=3; or use cpu")
    if optimizer != "none" and not stage:
        raise problem(f"efficiency.offload_optimizer={optimizer}: needs efficiency.zero_stage 1, 2 or 3")
    if param != "none" and stage != 3:
        raise problem(f"efficiency.offload_param={param}: needs efficiency.zero_stage=3")
    if "nvme" in (optimizer, param) and nvme_path is None:
        raise problem("efficiency.nvme_path=null: offload to nvme needs a folder on a local NVMe drive")
    if nvme_path is not None and "nvme" not in (optimizer, param):
        raise problem(
            f"efficiency.nvme_path={show(nvme_path)}: nothing is offloaded to it; set "
            "efficiency.offload_optimizer or offload_param to nvme, or nvme_path=null"
        )


def recompute(policy: str, every: int, offloaded: bool) -> None:
    """What is said about recomputation applies to some."""
    if offloaded and policy != "full":
        raise problem(f"efficiency.recompute_offload=true: not with recompute={policy}; use full")
    if every != 1 and policy == "none":
        raise problem(
            f"efficiency.recompute_every={every}: not with recompute=none; "
            "use recompute=full or another policy, or recompute_every=1"
        )


def lamb(optimizer: str, stage: int | None) -> None:
    """LAMB scales each tensor's update by the norms of the whole tensor, of which a rank of ZeRO has a part."""
    if optimizer == "lamb" and stage:
        raise problem(f"optim.name=lamb: not with efficiency.zero_stage={stage}; use adamw, or stage 0")


def schedule(name: str, optim: Mapping[str, Any]) -> None:
    """Each key is given in one unit only, and the schedule takes them together."""
    from fastmim.objectives.schedule import check_decay

    for first, second in (
        ("warmup_steps", "warmup_epochs"),
        ("milestone_steps", "milestones"),
        ("decay_steps", "decay_epochs"),
    ):
        if optim[first] and optim[second]:
            raise problem(
                f"optim.{first}={show(optim[first])}: optim.{second}={show(optim[second])} "
                "is given too; keep one and set the other to null"
            )
    unit = "milestone_steps" if optim["milestone_steps"] else "milestones"
    try:
        check_decay(name, optim[unit], optim["decay_steps"] or optim["decay_epochs"], unit)
    except ValueError as error:
        raise problem(str(error)) from None
