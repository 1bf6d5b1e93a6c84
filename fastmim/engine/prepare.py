"""Before the first step on a GPU: its kernels are compiled, all at once, and tested."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from fastmim.engine import distributed
from fastmim.engine.distributed import World
from fastmim.engine.dry_step import DTYPES, dry_step
from fastmim.engine.progress import counted
from fastmim_kernels.common.dispatch import no_triton

log = logging.getLogger("fastmim")


def prepare_kernels(
    build: Callable[[], Any], *, impl: str, batch: int, precision: str, low_weights: bool, world: World
) -> None:
    """Compile what a step needs, and let ``impl="auto"`` test its kernels, where they are Triton's.

    The first rank of each machine compiles, and the others wait: they find the kernels in Triton's cache on disk. A
    kernel that does not compile is named in a warning; the self-test then replaces it by torch.

    Args:
        build: Makes the objective, on the CPU.
        impl: Of the ops.
        batch: Images of a micro-batch.
        precision: "fp32", "bf16" or "fp16".
        low_weights: The weights themselves are in it, as DeepSpeed keeps them.
        world: This rank.
    """
    if impl not in ("auto", "triton") or world.device.type != "cuda" or no_triton(world.device):
        return
    from fastmim_kernels.check import self_test

    try:
        if world.local_rank == 0:
            compile_step(build, batch, precision, low_weights, tested=impl == "auto", shown=world.is_main)
    finally:
        # Also when it was interrupted: the others must not wait for ever.
        distributed.barrier()
    if impl == "auto":
        self_test.run([DTYPES[precision]], world.device)


def compile_step(
    build: Callable[[], Any], batch: int, precision: str, low_weights: bool, *, tested: bool, shown: bool
) -> None:
    """The kernels of a step and, with ``tested``, of the self-test: found on fake tensors, compiled in threads.

    Nothing is raised: what was not found or not compiled is compiled when it is launched.
    """
    from fastmim_kernels.check import self_test
    from fastmim_kernels.check.compile_ahead import compile_ahead
    from fastmim_kernels.check.launches import launches_of

    began = time.monotonic()
    try:
        with torch.random.fork_rng(devices=()):
            launches = launches_of(lambda: dry_step(build, batch, precision=precision, low_weights=low_weights))
            launches += launches_of(lambda: self_test.request([DTYPES[precision]])) if tested else []
    except Exception as error:  # an objective from outside may do what fake tensors cannot
        log.warning("kernels are compiled one by one, as they are needed: the step cannot be traced (%s: %s)",
                    type(error).__name__, " ".join(str(error).split())[:300])
        return
    with counted("compiling kernels", enabled=shown) as progress:
        failed = compile_ahead(launches, progress)
    for line in failed:
        log.warning("Triton kernel %s", line)
    log.info("kernels compiled in %.0f s", time.monotonic() - began)
