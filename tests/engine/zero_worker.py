"""Trains one config after the other in one process per rank: ``python zero_worker.py RUNS.json [STEP]``.

With STEP the last rank kills itself in the middle of that step. RUNS.json holds a list of lists of overrides.
One process group serves them all: starting a group, torch and DeepSpeed costs more than these runs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

from fastmim.config import load_config
from fastmim.engine import build as building
from fastmim.engine.distributed import distributed, exit_process
from fastmim.engine.train import train


def weighed(make_engine, path, *args, **kwargs):
    """The engine, which writes down what it holds before its last update of each run."""
    engine = make_engine(*args, **kwargs)
    step = engine.step

    def weigh_and_step():
        if engine.at_boundary:
            path.write_text(json.dumps(engine.held_bytes()))
        step()

    if hasattr(engine, "held_bytes"):
        engine.step = weigh_and_step
    if len(sys.argv) > 2:
        die_in_step(engine, int(sys.argv[2]))
    return engine


def die_in_step(engine, step):
    backward = engine.backward

    def backward_or_die(loss):
        if engine.steps + 1 == step and engine.world.rank == engine.world.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(loss)

    engine.backward = backward_or_die


def main() -> None:
    torch.set_num_threads(1)
    make_engine = building.make_engine
    with distributed(always=True) as world:
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            cfg = load_config(None, overrides)
            building.make_engine = partial(weighed, make_engine, Path(cfg.output.dir) / f"held-{world.rank}.json")
            train(cfg)
    exit_process(0)


if __name__ == "__main__":
    main()
