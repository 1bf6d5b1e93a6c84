"""Run files of golden values, of whatever objective and size, through the public interface.

    python tests/run_golden.py FILE…

Weights, inputs, masks, schedules and optimiser are what a file's metadata say. One line a file: the worst relative
error of each kind of result; exit status 1 where one passes its limit, or a file is of a kind that fastmim cannot run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.golden_kinds import downstream, moco, self_distilled, simmim, tables
from tests.golden_kinds.common import Errors, read


def run(path: Path, impl: str = "auto") -> Errors:
    """The errors of one file.

    Raises:
        ValueError: Nothing here runs files of its kind.
    """
    meta, tensors = read(path)
    for knows, check in CHECKS:
        if knows(meta):
            return check(meta, tensors, impl)
    raise ValueError(f"a file of {meta.get('source', meta.get('case', 'an unknown kind'))}: not built yet")


CHECKS: list[tuple[Callable[[Mapping[str, Any]], bool], Callable[..., Errors]]] = [
    (lambda meta: "mask_patch_size" in meta and "encoder_stride" in meta, simmim.simmim),
    (lambda meta: "bytedance/ibot" in meta.get("source", "") and "arch" in meta, self_distilled.ibot),
    (lambda meta: "bytedance/ibot" in meta.get("source", "") and "temps" in meta, self_distilled.ibot_loss),
    (lambda meta: "facebookresearch/moco-v3" in meta.get("source", "") and "momentum" in meta, moco.moco),
    (lambda meta: meta.get("case") == "block_masks", tables.block_masks),
    (lambda meta: meta.get("case") == "downstream", downstream.downstream),
    (lambda meta: any("by_layer" in row for row in meta.values() if isinstance(row, dict)), downstream.layer_decay),
    (lambda meta: "ibot" in meta and "iters_per_epoch" in meta, tables.schedules),
]


def main(paths: list[str]) -> int:
    if not paths:
        print((__doc__ or "").split("\n\n")[1].strip())
        return 2
    status = 0
    for path in paths:
        try:
            errors = run(Path(path))
            passed = [name for name, (error, limit) in errors.items() if not error <= limit]
            line = ", ".join(f"{name} {error:.1e}" for name, (error, _) in errors.items())
            line += f": ABOVE ITS LIMIT: {', '.join(passed)}" if passed else ": ok"
        except (OSError, ValueError) as error:
            passed, line = [str(error)], f"not run: {error}"
        status |= bool(passed)
        print(f"{path}: {line}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
