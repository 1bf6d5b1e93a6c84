"""The parts of the proof, in the order in which they run: first whether it is right, then how fast it is."""

from __future__ import annotations

from benchmarks.proof.part import Part

PARTS = (
    Part("compiled", "The kernels of the next two parts, compiled at once", 85, "benchmarks.proof.compiled:compiled"),
    Part("self_test", "Doctor, and the self-test at production shapes", 25, "benchmarks.proof.ops:self_test"),
    Part("ops", "Every op against float64 in three precisions", 35, "benchmarks.proof.ops:ops"),
    Part("determinism", "The same step twice, bit for bit", 15, "benchmarks.proof.repeat:determinism"),
    Part("sanitizer", "compute-sanitizer on one step", 45, "benchmarks.proof.sanitizer:sanitizer"),
    Part("no_sync", "No host synchronisation between logged steps", 15, "benchmarks.proof.repeat:no_sync"),
    Part("losses", "50 steps: Triton, torch and timm's model", 35, "benchmarks.proof.losses:losses"),
    Part("graph", "CUDA graph of a whole step, bit for bit", 15, "benchmarks.proof.graph:graph"),
    Part("kernels", "Kernels beside measured copy and matmul rates", 45, "benchmarks.proof.kernels:kernels"),
    Part("step_swinv2", "SwinV2-B's step beside timm's", 25, "benchmarks.proof.whole_step:swinv2_base"),
    Part("step_swin", "Swin-B's step beside timm's", 20, "benchmarks.proof.whole_step:swin_base"),
    Part("rivals", "Window attention beside other people's", 40, "benchmarks.proof.beside:beside", reference=True),
    Part("compiled_swin", "Swin-B's step beside timm's compiled", 60, "benchmarks.proof.whole_step:swin_base_compiled"),
    Part("compiled_swinv2", "SwinV2-B's step beside timm's compiled", 70,
         "benchmarks.proof.whole_step:swinv2_base_compiled"),
)  # fmt: skip
"""The seconds are estimates of what no GPU has run yet; together they are the budget. What takes longer ends with it,
and what does not fit is left for the next run of the command."""
