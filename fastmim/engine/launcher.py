"""Which process this is among all, from the variables of whatever started it. Nothing here needs torch."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """``rank`` of ``size`` processes, ``local_rank`` on its machine (None: not told), and who said so."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    launcher: str = ""


class _Names(NamedTuple):
    launcher: str
    rank: str
    sizes: tuple[str, ...]
    local_ranks: tuple[str, ...]


_ENV = "RANK and WORLD_SIZE"
# mpirun inside a Slurm job inherits the variables of the step that started its daemons: MPI comes first.
_SCHEDULERS = (
    _Names("Open MPI", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",)),
    _Names("MVAPICH2", "MV2_COMM_WORLD_RANK", ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",)),
    _Names("MPI", "PMI_RANK", ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID",
                                                "SLURM_LOCALID")),
    _Names("jsrun", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_LOCAL_RANK",)),
    _Names("Flux", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), ("FLUX_TASK_LOCAL_ID",)),
    _Names("Slurm", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"), ("SLURM_LOCALID",)),
)  # fmt: skip
# srun sets these in every task. A batch script has the job's variables and none of a step: it calls itself task 0 of
# all, and nobody has started the others.
_OF_A_STEP = ("SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
_FIX = "unset it, or start with torchrun, deepspeed, srun or mpirun"


def find_place(env: Mapping[str, str] | None = None) -> Place:
    """This process among all: from ``RANK`` and ``WORLD_SIZE`` (torchrun, deepspeed), else from MPI or Slurm.

    Args:
        env: default ``os.environ``.

    Raises:
        ValueError: the variables contradict each other, or only half of them are there.
    """
    env = os.environ if env is None else env
    given = _scheduled(env)
    size, rank = _number(env, "WORLD_SIZE"), _number(env, "RANK")
    local = _number(env, "LOCAL_RANK")
    if size is None and rank is None:
        place = given
    elif size is not None and (rank is not None or size == 1):
        place = Place(rank or 0, size, None, _ENV)
    elif size is not None:
        if given.size != size:
            raise ValueError(f"WORLD_SIZE={size} but RANK is not set; {_FIX}")
        place = given
    elif rank and (rank, True) != (given.rank, given.size > 1):
        raise ValueError(f"RANK={rank} but WORLD_SIZE is not set; {_FIX}")
    else:
        place = given
    if not 0 <= place.rank < place.size:
        name, count = ("RANK", "WORLD_SIZE") if place.launcher == _ENV else _names(place.launcher, env)
        raise ValueError(f"{name}={place.rank}: outside 0..{place.size - 1} given by {count}={place.size}; {_FIX}")
    if place.size == 1 and local and place.launcher != _ENV:
        raise ValueError(f"LOCAL_RANK={local} but RANK and WORLD_SIZE are not set; {_FIX}")
    if local is None:
        local = given.local_rank if (given.rank, given.size) == (place.rank, place.size) else None
    if local is not None and local < 0:
        raise ValueError(f"LOCAL_RANK={local}: below 0; {_FIX}")
    return place._replace(local_rank=local)


def rank_or_none(env: Mapping[str, str] | None = None) -> int | None:
    """The rank among several, or None for a process that is alone or whose variables cannot be understood."""
    try:
        place = find_place(env)
    except ValueError:
        return None
    return place.rank if place.size > 1 else None


def meeting_point(place: Place, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """``MASTER_ADDR`` and ``MASTER_PORT`` where all ranks of a job meet: those that are set, else from the job.

    Raises:
        ValueError: nobody says where rank 0 runs.
    """
    env = os.environ if env is None else env
    port = env.get("MASTER_PORT") or ""
    if port and not (port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"MASTER_PORT={port[:40]!r}: not a port; give a number from 1 to 65535")
    address = env.get("MASTER_ADDR") or _address(place, env)
    if not address:
        raise ValueError(f"MASTER_ADDR is not set: {place.launcher} does not say where rank 0 runs; set it to its host")
    return {"MASTER_ADDR": address, "MASTER_PORT": port or str(_port(place, env))}


def _scheduled(env: Mapping[str, str]) -> Place:
    for names in _SCHEDULERS:
        rank = _number(env, names.rank)
        if rank is None or (names.launcher == "Slurm" and rank == 0 and not any(map(env.get, _OF_A_STEP))):
            continue
        size = next((value for name in names.sizes if (value := _number(env, name)) is not None), None)
        if size is None:
            if rank == 0:
                continue
            raise ValueError(f"{names.rank}={rank} but {names.sizes[0]} is not set; {_FIX}")
        local = next((value for name in names.local_ranks if (value := _number(env, name)) is not None), None)
        if size > 1:
            return Place(rank, size, local, names.launcher)
    return Place()


def _names(launcher: str, env: Mapping[str, str]) -> tuple[str, str]:
    names = next(names for names in _SCHEDULERS if names.launcher == launcher)
    return names.rank, next(name for name in names.sizes if env.get(name))


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = (env.get(name) or "").strip()
    if not text:
        return None
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise ValueError(f"{name}={text[:40]!r}: not a whole number; {_FIX}")
    return int(text)


def _address(place: Place, env: Mapping[str, str]) -> str:
    if place.launcher == "Slurm" or (place.launcher == "MPI" and env.get("SLURM_PROCID")):
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
        return first_node(nodes)
    on_one = any(env.get(name) == str(place.size) for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS",
                 "MV2_COMM_WORLD_LOCAL_SIZE", "PMI_LOCAL_SIZE", "LOCAL_WORLD_SIZE"))  # fmt: skip
    return "127.0.0.1" if on_one else ""


def first_node(nodes: str) -> str:
    """The first host of a Slurm node list: ``node[03-05,9],other`` is ``node03``, ``r[1-2]n[4-7]`` is ``r1n4``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([0-9]*)[^\]]*\]", r"\1", first[0]) if first else ""


def _port(place: Place, env: Mapping[str, str]) -> int:
    """A port that the ranks of one job share and two jobs on a machine do not."""
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "PMI_JOBID", "FLUX_JOB_ID")
    job = [env[name] for name in names if env.get(name)]
    return 29500 if not job else 20000 + zlib.crc32("/".join(job).encode()) % 10000
