"""Trains one config after the other in one process per rank: ``python zero_worker.py RUNS.json``.

RUNS.json holds a list of lists of overrides. One process group serves them all: starting a group, torch and
DeepSpeed costs more than these runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from fastmim.config import load_config
from fastmim.engine import train as training
from fastmim.engine.distributed import distributed, exit_process


def main() -> None:
    torch.set_num_threads(1)
    make_engine, engines = training.make_engine, []

    def remember(*args, **kwargs):
        engines.append(make_engine(*args, **kwargs))
        return engines[-1]

    training.make_engine = remember
    with distributed(always=True) as world:
        for overrides in json.loads(Path(sys.argv[1]).read_text()):
            cfg = load_config(None, overrides)
            training.train(cfg)
            engine = engines.pop()
            if hasattr(engine, "held_bytes"):
                held = engine.held_bytes()
                (Path(cfg.output.dir) / f"held-{world.rank}.json").write_text(json.dumps(held))
    exit_process(0)


if __name__ == "__main__":
    main()
