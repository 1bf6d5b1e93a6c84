"""Every op's Triton kernels in Triton's interpreter, in fp32 at the self-test's odd shapes; a process of its own.

``TRITON_INTERPRET=1`` must be set before triton is imported and holds for the whole process.
"""

from __future__ import annotations

import sys
import time

import torch

from fastmim_kernels.check.examples import SMALL
from fastmim_kernels.check.interpreter import make_one_element_an_index
from fastmim_kernels.check.self_test import errors

LEFT_OUT = {
    ("window_attention", "scaled dot"): "too slow in the interpreter",
    ("window_attention", "cosine, 144 tokens"): "too slow in the interpreter",
    ("low_copies", "bfloat16"): "the interpreter truncates",
}


def main() -> int:
    """0 where every case is within its limit."""
    make_one_element_an_index()
    wrong = 0
    cases = [case for case in SMALL if (case.op, case.variant) not in LEFT_OUT]
    for (op, variant), why in LEFT_OUT.items():
        print(f"left out: {op} {variant}: {why}")
    for case in cases:
        began = time.monotonic()
        error, limit = errors(case, torch.device("cpu"), torch.float32, "triton")[-2:]
        wrong += not error <= limit
        print(f"{case.op} {case.variant}: {error:.2g} <= {limit:.2g}, {time.monotonic() - began:.1f} s", flush=True)
    print(f"{len(cases) - wrong} of {len(cases)} cases within their limits")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
