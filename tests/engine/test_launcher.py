"""What the variables of launchers mean; the truth is what each launcher documents."""

from __future__ import annotations

import pytest

from fastmim.engine.launcher import find_place, first_node, meeting_point, rank_or_none

BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[03-05,9],x"}
SLURM = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, (0, 1, None)),
        ({"LOCAL_RANK": "0"}, (0, 1, 0)),
        ({"RANK": "0"}, (0, 1, None)),
        ({"RANK": "", "WORLD_SIZE": ""}, (0, 1, None)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (3, 8, 1)),
        (SLURM, (3, 8, 1)),
        # a step of fewer tasks than the job
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "4"}, (3, 4, 1)),
        # one task a node starts torchrun: torchrun's count
        ({**SLURM, "RANK": "9", "WORLD_SIZE": "64", "LOCAL_RANK": "5"}, (9, 64, 5)),
        # a batch script that exports the size only
        ({**SLURM, "WORLD_SIZE": "8"}, (3, 8, 1)),
        ({**SLURM, "RANK": "3", "WORLD_SIZE": "8"}, (3, 8, 1)),
        # salloc's shell, and a job of one task
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, (0, 1, None)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1, None)),
        # a batch script beside srun is task 0 of 8 by its variables, and alone; in it, torchrun and mpirun count
        (BATCH, (0, 1, None)),
        ({**BATCH, "SLURM_STEP_ID": "0"}, (0, 8, 0)),
        ({**BATCH, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, (0, 2, 0)),
        ({**BATCH, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, (1, 2, None)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, (1, 2, 1)),
        # mpirun inside a job: its daemons are Slurm's tasks
        ({**SLURM, "OMPI_COMM_WORLD_RANK": "7", "OMPI_COMM_WORLD_SIZE": "16"}, (7, 16, None)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, (1, 2, 1)),
        ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_LOCAL_RANK": "0"}, (1, 2, 0)),
        ({"FLUX_TASK_RANK": "1", "FLUX_JOB_SIZE": "2", "FLUX_TASK_LOCAL_ID": "1"}, (1, 2, 1)),
    ],
)
def test_the_place_of_a_process(env, place):
    assert find_place(env)[:3] == place
    assert rank_or_none(env) == (place[0] if place[1] > 1 else None)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "1"}, "RANK=1 but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 but RANK is not set"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 but RANK and WORLD_SIZE are not set"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, r"RANK=2: outside 0..1 given by WORLD_SIZE=2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one': not a whole number"),
        ({"RANK": "1\x00\n" * 999, "WORLD_SIZE": "2"}, "RANK=.*: not a whole number"),
        ({**SLURM, "WORLD_SIZE": "16"}, "WORLD_SIZE=16 but RANK is not set"),
        ({**SLURM, "RANK": "5"}, "RANK=5 but WORLD_SIZE is not set"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID=1 but SLURM_STEP_NUM_TASKS is not set"),
        ({"SLURM_PROCID": "8", "SLURM_NTASKS": "8"}, "SLURM_PROCID=8: outside 0..7 given by SLURM_NTASKS=8"),
        ({"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1 but OMPI_COMM_WORLD_SIZE is not set"),
        ({"PMI_RANK": "1", "PMI_SIZE": "x"}, "PMI_SIZE='x'"),
    ],
)
def test_half_of_a_launcher_is_refused(env, message):
    with pytest.raises(ValueError, match=message) as error:
        find_place(env)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert rank_or_none(env) is None


def test_where_the_ranks_meet():
    slurm = {**SLURM, "SLURM_JOB_ID": "17"}
    first, other = (meeting_point(find_place(env), env) for env in (slurm, slurm | {"SLURM_PROCID": "4"}))
    assert first == other and first["MASTER_ADDR"] == "gpu03" and 1024 < int(first["MASTER_PORT"]) < 32768
    assert meeting_point(find_place(slurm), slurm | {"SLURM_JOB_ID": "18"}) != first
    named = slurm | {"MASTER_ADDR": "head", "MASTER_PORT": "29611"}
    assert meeting_point(find_place(named), named) == {"MASTER_ADDR": "head", "MASTER_PORT": "29611"}
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    with pytest.raises(ValueError, match="MASTER_ADDR is not set: Open MPI does not say"):
        meeting_point(find_place(mpi), mpi)
    assert meeting_point(find_place(mpi), mpi | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(ValueError, match="MASTER_PORT='70000'"):
        meeting_point(find_place(mpi), mpi | {"MASTER_ADDR": "head", "MASTER_PORT": "70000"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("n[1-4]", "n1"), ("n[007,9]", "n007"), ("n[1-2]-ib,c", "n1-ib"), ("", ""),
     ("r[1-2]n[04-07],x", "r1n04"), ("t[0,2-3][1-4]", "t01"), ("n[3", "n")],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first
