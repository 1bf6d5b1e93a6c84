"""One small training step, in a process of its own for compute-sanitizer to watch.

    python -m benchmarks.proof.small_step cuda|cpu
"""

from __future__ import annotations

import sys

import torch

from benchmarks.proof import model

DEVICE_SIZE = {"img_size": 96, "embed_dim": 64, "depths": (2, 2), "num_heads": (2, 4), "window_size": 12}
"""Two stages of SwinV2's windows and head width, on maps that need a shift."""


def main(device: str) -> int:
    """0 where the losses of both precisions are finite."""
    if device == "cpu":  # the shapes are too small for threads
        torch.set_num_threads(1)
    for size in ("swinv2_base", "swin_base"):
        kwargs = model.encoder(size, tiny=device == "cpu")
        if device == "cuda":
            kwargs |= DEVICE_SIZE | ({"window_size": 6} if size == "swin_base" else {})
        objective = model.ours(kwargs, model.kernels_of(device), device)
        for dtype in ("fp32", "bf16"):
            step = model.trained("fastmim", objective, dtype)
            loss = step.forward(*model.batch(objective, 2, device))
            step.backward(loss)
            step.update()
            print(f"{size} {dtype}: loss {loss.item():.4f}", flush=True)
            if not torch.isfinite(loss):
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
