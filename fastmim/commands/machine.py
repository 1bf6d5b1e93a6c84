"""``fastmim plan``, ``profile`` and ``doctor``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .configs import takes_config
from .console import own_rank, shown_on_a_terminal, write
from .own import is_number, refuse_folder, show_own, takes_images

_GPU = "h100-80g"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add these commands to the command line."""
    plan = commands.add_parser("plan", parents=[common], help="memory and modelled speed on a machine, before launch")
    takes_images(plan, "N|DIR", "size of the data set (default: data.path, ImageNet-1k); or a folder: print what "
                 "pretrain --images DIR would choose here (with --gpu: on a machine with that), and train nothing")
    plan.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs in all (default 1)")
    custom = "name=mine,memory=48,tflops=180,bandwidth=900,link=50,network=25 (GiB, TFLOP/s, GB/s)"
    plan.add_argument("--gpu", help=f"a known GPU (default h100-80g), or {custom}; network: between machines")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--picture", metavar="FILE", help="draw the memory of every stage and policy")
    plan.set_defaults(command=show_plan)

    profile = commands.add_parser("profile", parents=[common], help="profile real steps: time by op, memory, power")
    takes_config(profile)
    profile.add_argument("--steps", type=int, default=3, metavar="N", help="profiled steps (default 3)")
    profile.add_argument("--out", metavar="DIR", help="where the trace goes (default: profile in output.dir)")
    profile.set_defaults(command=profile_steps)

    doctor = commands.add_parser("doctor", parents=[common], help="check the installation and every op on this machine")
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(command=examine)


def show_plan(options: argparse.Namespace) -> int:
    """Print what fits on a machine, and how fast it is."""
    refuse_folder(options, "fastmim plan")
    if options.images is not None and not is_number(options.images):
        return show_own(options)
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.config import load_config
        from fastmim.engine.progress import counted, said_if_slow
        from fastmim.plan.command import make_plan
        from fastmim.plan.hardware import find_gpu
        from fastmim.plan.report import as_json, as_text, check_picture, save_picture
        from fastmim.plan.terminal import show

    cfg = load_config(options.config, options.overrides)
    if options.picture:
        check_picture(options.picture)
    count = None if options.images is None else int(options.images)
    slow = "tracing the model; of a large one that takes minutes, and is kept for the next plan"
    main, live = own_rank() == 0, sys.stderr.isatty()
    with (
        counted("tracing the model", enabled=main and live, stderr=True) as told,
        said_if_slow(slow, enabled=main and not live, seconds=30),
    ):
        plan = make_plan(cfg, gpu=find_gpu(options.gpu or _GPU), gpus=options.gpus, images=count, told=told)
    if options.picture:
        save_picture(plan, options.picture)
    if sys.stdout.isatty() and not options.json and own_rank() == 0:
        show(plan)
    else:
        write(as_json(plan) if options.json else as_text(plan))
    return 0


def profile_steps(options: argparse.Namespace) -> int:
    """Profile a few real steps."""
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.config import load_config
        from fastmim.profiling.command import profile_run

    cfg = load_config(options.config, options.overrides)
    write(profile_run(cfg, steps=options.steps, out=Path(options.out) if options.out else None))
    return 0


def examine(options: argparse.Namespace) -> int:
    """Check the installation."""
    with shown_on_a_terminal("loading libraries …"):
        from fastmim.doctor import doctor

    report, status = doctor(as_json=options.json)
    write(report)
    return status
