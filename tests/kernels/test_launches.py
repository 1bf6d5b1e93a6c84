"""What the encoders launch, found without a GPU: the self-test reaches all of it, and few kernels are compiled."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import create_function_from_signature  # noqa: E402

from fastmim.engine.dry_step import dry_step  # noqa: E402
from fastmim.objectives import create_objective  # noqa: E402
from fastmim_kernels.check import self_test  # noqa: E402
from fastmim_kernels.check.compile_ahead import specialisation  # noqa: E402
from fastmim_kernels.check.examples import SHIPPED, SMALL, Case  # noqa: E402
from fastmim_kernels.check.launches import Launch, launches_of  # noqa: E402

BATCH = 128
SHALLOW: dict[str, Any] = {"depths": (2, 2, 6, 2)}
"""As many blocks as the extra norms of H and G need; what a block launches does not depend on the depth."""
ENCODERS: dict[str, dict[str, Any]] = {
    "swin_base": {"name": "swin_base", **SHALLOW},
    **{name: {"name": name, "drop_path_rate": drop, **SHALLOW} for name, drop in
       (("swinv2_base", 0.0), ("swinv2_large", 0.1), ("swinv2_huge", 0.1), ("swinv2_giant", 0.0))},
    **{f"vit_base at {size} px": {"name": "vit_base", "depth": 3, "drop_path_rate": drop, "img_size": size}
       for size, drop in ((192, 0.0), (224, 0.1), (256, 0.0))}}

_SIZES = {"N", "K", "C", "D", "SPLITS", "SHARE"}
"""Constexprs that are sizes of tensors, or follow from the number of rows."""
_FLAGS = {"POST", "MERGE", "SUMS", "MLP", "ADD", "PRECISION"}
"""Constexprs that belong to which tensors there are, not to the tiles."""


def step_of(name: str, precision: str = "bf16") -> list[Launch]:
    encoder = ENCODERS[name]
    norm = 47 if "swinv2" in name else 0
    return launches_of(lambda: dry_step(lambda: create_objective("simmim", encoder=encoder, norm_target=norm), BATCH,
                                        precision=precision))


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def facts(launch: Launch) -> set[tuple[Hashable, ...]]:
    """What decides the code that a launch runs: which tensors there are; tiles, and how often each loop turns.

    Sizes themselves do not: only whether tiles divide them, and whether there is more than one of each part. The two
    are apart but for attention, whose few kernels are compared whole.
    """
    names, given = launch.kernel.arg_names, dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    kernel = f"{launch.kernel.fn.__module__.removeprefix('fastmim_kernels.')}.{launch.kernel.fn.__name__}"
    s = {**launch.settings, **{n: v for n, v in given.items() if isinstance(v, int)}}
    tensors = tuple((n, None if given[n] is None else str(given[n].dtype)) for n in names if n.startswith("p_"))
    flags = tuple((n, str(v)) for n, v in sorted(launch.settings.items()) if n in _FLAGS)
    tiles = tuple((n, str(v)) for n, v in sorted(launch.settings.items()) if n not in _SIZES | _FLAGS)
    trips = RULES[kernel](s, launch.grid) if kernel in RULES else ()
    if kernel.startswith("window_attention"):
        return {(kernel, tensors, flags, tiles, trips)}
    return {(kernel, "tensors", tensors, flags), (kernel, "tiles", tiles, trips)}


def _product(s: dict[str, Any], grid: tuple[int, ...]) -> tuple[Hashable, ...]:
    rows = ceil(s["rows"], s["BM"])
    return s["N"] % s["BN"] == 0, s["K"] > s["BK"] * s["num_stages"], rows > s["GROUP"]


def _gelu_gradient(s: dict[str, Any], grid: tuple[int, ...]) -> tuple[Hashable, ...]:
    return *_product(s, grid), ceil(s["rows"], s["BM"]) > s["SHARE"]


def _weight_gradient(s: dict[str, Any], grid: tuple[int, ...]) -> tuple[Hashable, ...]:
    return (s["N"] % s["BN"] == 0, s["K"] % s["BK"] == 0, s["SPLITS"] > 1, s["SHARE"] < s["SPLITS"], s["K"] > s["BK"])


def _rows(s: dict[str, Any], grid: tuple[int, ...]) -> tuple[Hashable, ...]:
    """Persistent: whole rows or padded ones, several trips, several groups of partial sums."""
    return s["C"] % s["BLOCK_C"] == 0, ceil(s["rows"], s["BLOCK_R"]) > grid[0], grid[0] > 16


def _mask(s: dict[str, Any], grid: tuple[int, ...]) -> tuple[Hashable, ...]:
    return s["C"] == s["BLOCK_C"], grid[1] > 1, grid[0] * grid[1] > 16


def _windows(s: dict[str, Any], grid: tuple[int, ...]) -> tuple[Hashable, ...]:
    return (s["windows"] > s["groups"],)


def _merge(s: dict[str, Any], grid: tuple[int, ...]) -> tuple[Hashable, ...]:
    return s["C"] % s["BLOCK_C"] == 0, ceil(s["rows"], s["BLOCK_R"]) > grid[0], grid[0] > 16


RULES: dict[str, Callable[[dict[str, Any], tuple[int, ...]], tuple[Hashable, ...]]] = {
    "mlp.on_triton.linear_gelu_kernel": _product,
    "mlp.on_triton.gelu_gradient_kernel": _gelu_gradient,
    "linear.product_add.product_add_kernel": _product,
    "linear.weight_gradient.weight_gradient_kernel": _weight_gradient,
    "residual_norm.on_triton.residual_norm_forward": _rows,
    "residual_norm.on_triton.residual_norm_backward": _rows,
    "patch_merge.on_triton.patch_merge_forward": _merge,
    "patch_merge.on_triton.patch_merge_backward": _merge,
    "mask_tokens.on_triton.mask_tokens_forward": _mask,
    "mask_tokens.on_triton.mask_tokens_backward": _mask,
    "unshuffle.on_triton.unshuffle_forward": _mask,
    "unshuffle.on_triton.unshuffle_backward": _mask,
    "masked_loss.linear_kernels.statistics_kernel": lambda s, grid: (s["K"] > s["BLOCK"],),
    "window_attention.triton_forward.forward_kernel": _windows,
    "window_attention.triton_backward.backward_kernel": _windows,
    "window_attention.triton_backward.backward_large_kernel": _windows,
    "window_attention.triton_rows_backward.rows_backward_kernel": _windows,
    "window_attention.triton_backward.reduce_kernel": lambda s, grid: (s["groups"] > s["GROUPS"],),
    "masked_loss.linear_kernels.head_loss_kernel": lambda s, grid: (s["first"] > 0, s["row_blocks"] > 32),
    "masked_loss.linear_kernels.order_kernel": lambda s, grid: (s["tokens"] > s["SCAN"], grid[0] > 1),
}


@pytest.mark.parametrize("kernel", RULES)
def test_a_rule_is_of_a_kernel(kernel: str) -> None:
    """One that was renamed would be compared without its rule, and nobody would see it."""
    module, _, name = kernel.rpartition(".")
    assert hasattr(importlib.import_module(f"fastmim_kernels.{module}"), name)


@pytest.fixture(scope="module")
def self_tested() -> set[tuple[Hashable, ...]]:
    return set().union(*map(facts, launches_of(self_test.request)))


@pytest.mark.parametrize("precision, name", [("bf16", name) for name in ENCODERS]
                         + [("fp32", name) for name in ("swin_base", "swinv2_base", "vit_base at 224 px")])
def test_the_self_test_reaches_what_an_encoder_launches(precision: str, name: str,
                                                        self_tested: set[tuple[Hashable, ...]]) -> None:
    requested = set().union(*map(facts, step_of(name, precision)))
    assert len(requested) > 25
    assert not requested - self_tested


def test_the_small_examples_alone_reach_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither split products nor several groups of partial sums, so that the comparison above sees something."""
    monkeypatch.setattr(self_test, "CASES", SMALL)
    small = launches_of(lambda: self_test.request([torch.bfloat16]))
    products = [launch.settings["SPLITS"] for launch in small if "SPLITS" in launch.settings]
    assert products and max(products) == 1


@pytest.mark.parametrize("case", SHIPPED, ids=lambda case: f"{case.op}: {case.variant}")
def test_an_example_is_bounded(case: Case) -> None:
    """Values of inputs, outputs and gradients, by which memory and time of the self-test are bounded."""
    with FakeTensorMode():
        given = case.build()
        outputs = self_test.run_case(case, given, {}, torch.device("cpu"), "torch")
        values = sum(t.numel() for t in [*given.values(), *outputs] if isinstance(t, Tensor))
    assert values <= self_test.MOST_VALUES


def test_compilations_of_a_step() -> None:
    """A SwinV2-B step compiles 61 kernels; Triton's own rule tells them apart as ours does."""
    launches = step_of("swinv2_base")
    binders: dict[Any, Callable[..., Any]] = {}

    def as_triton(launch: Launch) -> tuple[Hashable, ...]:
        kernel = launch.kernel
        if kernel not in binders:
            binders[kernel] = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, kinds, options = binders[kernel](*launch.args, **launch.settings, debug=False, instrumentation_mode="")
        return kernel, str(kinds), str(options)

    backend = make_backend(GPUTarget("cuda", 90, 32))
    both = {(specialisation(launch), as_triton(launch)) for launch in launches}
    assert len(both) == len({ours for ours, _ in both}) == len({theirs for _, theirs in both}) == 61


def test_sizes_of_a_batch_compile_nothing_new() -> None:
    """Other numbers of images change grids and the split of products, but no kernel of attention, norms or masks."""
    def kernels(batch: int) -> set[Hashable]:
        objective = partial(create_objective, "simmim", encoder=ENCODERS["swinv2_base"])
        found = launches_of(lambda: dry_step(objective, batch, precision="bf16"))
        return {specialisation(launch) for launch in found if "SPLITS" not in launch.settings}

    # The chunks of the head's slopes, of which the first is other code, depend on it too.
    assert kernels(128) == kernels(96)
