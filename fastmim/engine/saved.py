"""The objective that a checkpoint holds, built and filled from the checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastmim.engine.checkpoint.shards import Shards
from fastmim.engine.checkpoint.whole import open_whole
from fastmim.engine.settings import image_arguments, section_of
from fastmim.interop.strict import LoadReport, copy_strictly
from fastmim.objectives import Objective, create_objective


def load_objective(source: str | Path) -> tuple[Objective, dict[str, Any]]:
    """Encoder and heads of a checkpoint, whatever the number of ranks and the ZeRO stage that wrote it.

    Args:
        source: a ``step-…`` folder, a ``checkpoints`` folder or a run's output folder (its last checkpoint).

    Returns:
        The objective in evaluation mode on the CPU, and the settings of its run as ``section.key``.

    Raises:
        ValueError: no checkpoint there, a damaged one, or as :func:`objective_of`.
    """
    source = Path(source)
    if source.is_file():
        raise ValueError(f"{source}: a file of weights says nothing of heads; give the run's output folder")
    folder, run = open_whole(source, "reconstruct {path}")
    objective = objective_of(run, folder)
    try:
        shards = Shards(folder)
        tensors = {name: shards.tensor(name).float() for name in shards.shapes}
        copy_strictly(objective, tensors, LoadReport(names={name: name for name in tensors}))
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder}: {' '.join(str(error).split())}") from None
    return objective.eval(), run


def objective_of(run: dict[str, Any], folder: Path) -> Objective:
    """The objective that the settings of a run, found in ``folder``, say, with new weights.

    Raises:
        ValueError: settings that do not fit, or an objective outside of fastmim, whose module a file must not choose.
    """
    name = run.get("objective.name", "simmim")
    if ":" in name:
        raise ValueError(f"{folder}: objective.name={name}: a module of your own is not imported on a file's word")
    given = {key: value for key, value in section_of(run, "objective").items() if key != "name"}
    encoder = {key: value for key, value in section_of(run, "model").items() if value is not None}
    objective: Objective = create_objective(name, encoder=encoder, **image_arguments(section_of(run, "data")), **given)
    return objective
