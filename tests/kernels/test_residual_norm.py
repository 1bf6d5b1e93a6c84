from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import reference, residual_norm
from fastmim_kernels.residual_norm import on_torch
from fastmim_kernels.residual_norm.op import OP, traffic
from tests.kernels.oracle import check, watched

# (order, what else is given)
VARIANTS = [("pre", ""), ("pre", "scale"), ("pre", "gamma+branch_bias"), ("pre", "scale+gamma+branch_bias"),
            ("pre", "branch_bias"), ("post", ""), ("post", "scale"), ("post", "scale+branch_bias")]
# 3x5x7 rows fill no tile, 40 channels pad to 64.
SHAPE = (3, 5, 7, 40)
F32, BF16 = torch.float32, torch.bfloat16
# (residual stream, branch): all float32, the parity setting under autocast, all bf16.
STREAMS = [(F32, F32), (F32, BF16), (BF16, BF16)]


def inputs_for(shape: tuple[int, ...], given: str) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    c = shape[-1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    inputs = {"residual": normal(*shape), "branch": normal(*shape) + 0.5, "weight": normal(c), "bias": normal(c)}
    inputs |= {name: normal(c) for name in ("gamma", "branch_bias") if name in given}
    # One sample in three is dropped.
    scale = torch.tensor([0.0, 1.25, 1.25] * shape[0])[: shape[0]]
    return inputs | ({"drop_scale": scale} if "scale" in given else {})


def dtypes_for(inputs: dict[str, Any], stream: torch.dtype, branch: torch.dtype) -> dict[str, torch.dtype]:
    dtypes = {n: F32 for n in inputs if n != "drop_scale"}
    return dtypes | {"residual": stream, "branch": branch}


def with_impl(impl: str, order: str, out_dtype: torch.dtype | None) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(**kwargs: Any) -> tuple[Tensor, Tensor]:
        # The oracle's float64 inputs keep float64 results.
        out = torch.float64 if kwargs["residual"].dtype == torch.float64 else out_dtype
        return residual_norm(**kwargs, order=order, impl=impl, out_dtype=out)
    return run


def plain(order: str, out_dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """What a user writes: each operation in the dtype of its inputs, the LayerNorm in float32."""
    def run(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, drop_scale: Tensor | None = None,
            gamma: Tensor | None = None, branch_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        def norm(x: Tensor) -> Tensor:
            return torch.nn.functional.layer_norm(x.float(), weight.shape, weight, bias)
        dtype = branch.dtype
        branch = branch if branch_bias is None else branch + branch_bias.to(dtype)
        if order == "post":
            branch = norm(branch).to(dtype)
        branch = branch if gamma is None else branch * gamma.to(dtype)
        if drop_scale is not None:
            branch = branch * drop_scale.to(dtype).view(-1, *[1] * (branch.ndim - 1))
        added = residual + branch
        return added, added.to(out_dtype) if order == "post" else norm(added).to(out_dtype)
    return run


@pytest.mark.parametrize("stream, branch", STREAMS)
@pytest.mark.parametrize("order, given", VARIANTS)
def test_against_float64(order: str, given: str, stream: torch.dtype, branch: torch.dtype) -> None:
    inputs = inputs_for(SHAPE, given)
    dtypes = dtypes_for(inputs, stream, branch)
    check(with_impl("torch", order, branch), with_impl("reference", order, branch), inputs, dtypes,
          wrt=list(dtypes), plain=plain(order, branch))


@pytest.mark.parametrize("stream, branch", STREAMS[:2])
@pytest.mark.parametrize("order, given", VARIANTS)
def test_the_whole_op_against_float64(order: str, given: str, stream: torch.dtype, branch: torch.dtype) -> None:
    """Where nobody watches a CPU adds and normalises with torch's autograd; compilers see this."""
    inputs = inputs_for(SHAPE, given)
    dtypes = dtypes_for(inputs, stream, branch)
    check(watched(with_impl("torch", order, branch)), with_impl("reference", order, branch), inputs, dtypes,
          wrt=list(dtypes), plain=plain(order, branch))


@pytest.mark.parametrize("given, kept_wide", [("", 0), ("scale+branch_bias", 0), ("", 1 << 20)])
def test_many_low_values_have_their_gradient_in_chunks(given: str, kept_wide: int, monkeypatch: pytest.MonkeyPatch
                                                       ) -> None:
    """Of 105 rows 7, which fill the last chunk, or 8, which do not; kept as they are where they are even more."""
    monkeypatch.setattr(on_torch, "IN_ONE", 0)
    monkeypatch.setattr(on_torch, "KEPT_WIDE", kept_wide)
    inputs = inputs_for(SHAPE, given)
    dtypes = dtypes_for(inputs, F32, BF16)
    for rows in (7, 8):
        monkeypatch.setattr(on_torch, "CHUNK", rows * 40 + 39)
        check(with_impl("torch", "post", BF16), with_impl("reference", "post", BF16), inputs, dtypes,
              wrt=list(dtypes), plain=plain("post", BF16))
    args = {n: inputs[n].to(d).requires_grad_() for n, d in dtypes.items()}
    kept = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal kept
        kept += t.nbytes if t.ndim > 2 else 0
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        residual_norm(**args, order="post", impl="torch")
    assert kept == (4 if kept_wide else 2) * inputs["branch"].numel()


def without(name: str, order: str, impl: str, out_dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor]]:
    """``residual_norm`` without ``name``; one result where both would be the same memory."""
    def run(**kwargs: Any) -> tuple[Tensor, Tensor]:
        wide = next(iter(kwargs.values())).dtype
        out = wide if wide == torch.float64 else out_dtype
        return residual_norm(**kwargs, **{name: None}, order=order, impl=impl, out_dtype=out,
                             stream_dtype=None if name == "branch" else wide)
    return run


def check_without(name: str, impl: str, dtype: torch.dtype) -> None:
    """A stream that starts: LN(branch), or one that only is normalised: (r, LN(r))."""
    order = "post" if name == "residual" else "pre"
    inputs = {k: v for k, v in inputs_for(SHAPE, "").items() if k != name}
    dtypes = dict.fromkeys(inputs, F32) | {"branch" if name == "residual" else "residual": dtype}

    def plain_norm(weight: Tensor, bias: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = kwargs.values()
        y = torch.nn.functional.layer_norm(x.float(), weight.shape, weight, bias).to(BF16)
        return (y.to(x.dtype), y) if name == "residual" else (x, y)
    check(without(name, order, impl, BF16), without(name, order, "reference", BF16), inputs, dtypes,
          wrt=list(inputs), plain=plain_norm)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("name", ["residual", "branch"])
def test_without_a_residual_or_a_branch(name: str, dtype: torch.dtype) -> None:
    check_without(name, "torch", dtype)


def check_merge(given: str, impl: str, stream: torch.dtype) -> None:
    """The stream comes as patch_merge gathers it, for one reader."""
    # Two images of 3 x 5 merged tokens: more than a tile, no power of two.
    inputs = inputs_for((2, 6, 10, 40), given)
    dtypes = dtypes_for(inputs, stream, BF16)

    def merged(name: str) -> Callable[..., Tensor]:
        def run(**kwargs: Any) -> Tensor:
            out = torch.float64 if kwargs["residual"].dtype == torch.float64 else BF16
            return residual_norm(**kwargs, order="post", impl=name, merge=True, out_dtype=out)[0]
        return run

    def plain_merge(**kwargs: Tensor) -> Tensor:
        return reference.patch_merge(plain("post", BF16)(**kwargs)[1])
    check(merged(impl), merged("reference"), inputs, dtypes, wrt=list(dtypes), plain=plain_merge)


@pytest.mark.parametrize("stream", [F32, BF16])
@pytest.mark.parametrize("given", ["", "scale+branch_bias"])
def test_merge(given: str, stream: torch.dtype) -> None:
    check_merge(given, "torch", stream)


def test_two_readers_of_one_stream() -> None:
    """Both results are one memory; the backward pass gets their gradients apart, with no addition of its own."""
    inputs = {k: v.bfloat16().requires_grad_() for k, v in inputs_for(SHAPE, "").items()}
    added, out = residual_norm(**inputs, order="post")
    assert added.data_ptr() == out.data_ptr() and added.grad_fn is out.grad_fn
    assert type(added.grad_fn).__name__.startswith("fastmim::residual_norm")


@pytest.mark.parametrize("rows", [1, 1023, 1024])
def test_both_ways_to_sum_rows(rows: int) -> None:
    """The bias gradient is a product with ones from 1,024 rows on."""
    inputs = inputs_for((1, rows, 24), "branch_bias")
    dtypes = dtypes_for(inputs, F32, F32)
    check(with_impl("torch", "pre", F32), with_impl("reference", "pre", F32), inputs, dtypes, wrt=list(dtypes))


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_one_result_alone(order: str, impl: str, used: int) -> None:
    """The gradient of a result that nobody reads is not made up, and not needed."""
    inputs = {k: v.float().requires_grad_() for k, v in inputs_for((2, 3, 16), "").items()}

    def grads(name: str) -> tuple[Tensor, ...]:
        out = residual_norm(**inputs, order=order, impl=name, out_dtype=BF16)[used]
        return torch.autograd.grad(out.float().square().sum(), list(inputs.values()), materialize_grads=True)

    for ours, theirs in zip(grads(impl), grads("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dtypes_of_the_results() -> None:
    norm = {"weight": torch.ones(8), "bias": torch.zeros(8)}
    for stream, branch in STREAMS:
        args = {"residual": torch.zeros(2, 8, dtype=stream), "branch": torch.ones(2, 8, dtype=branch)}
        for order in ("pre", "post"):
            added, out = residual_norm(**args, **norm, order=order)
            assert (added.dtype, out.dtype) == (stream, branch)
            with torch.autocast("cpu", BF16):
                added, out = residual_norm(**args, **norm, order=order)
            assert (added.dtype, out.dtype) == (stream, BF16)
            shared = added.data_ptr() == out.data_ptr()
            assert shared == (order == "post" and stream == BF16)


def test_saves_one_map_and_two_statistics() -> None:
    """What backward needs: the branch ("post") or the new stream ("pre"), mean and rstd of each row."""
    for order in ("pre", "post"):
        inputs = {k: v.float().requires_grad_() for k, v in inputs_for((4, 32, 64), "").items()}
        sizes: dict[int, int] = {}

        def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            residual_norm(**inputs, order=order, impl="torch")
        assert sum(sizes.values()) <= 128 * 64 + 2 * 128 + 2 * 64


@pytest.mark.parametrize("order, given", VARIANTS)
def test_opcheck(order: str, given: str) -> None:
    for out_dtype in (F32, BF16):
        args = op_args(inputs_for((2, 3, 16), given), order, out_dtype, "torch")
        torch.library.opcheck(OP.forward.op, args, test_utils=("test_schema", "test_autograd_registration",
                                                     "test_faketensor", "test_aot_dispatch_static"))


def op_args(inputs: dict[str, Any], order: str, out_dtype: torch.dtype, impl: str) -> tuple[Any, ...]:
    names = ("residual", "branch", "weight", "bias", "branch_bias", "drop_scale", "gamma")
    tensors = [inputs[n].float().requires_grad_(n != "drop_scale") if n in inputs else None for n in names]
    return *tensors, order, 1e-5, F32, out_dtype, False, impl


def test_compiles_without_graph_break() -> None:
    inputs = {k: v.float() for k, v in inputs_for((2, 3, 16), "scale").items()}
    torch._dynamo.reset()
    compiled = torch.compile(residual_norm, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(**inputs, order="pre"), residual_norm(**inputs, order="pre"), strict=True):
        assert torch.equal(ours, theirs)


def test_counts_no_matrix_product() -> None:
    inputs = {k: v.float().requires_grad_() for k, v in inputs_for((2, 3, 16), "").items()}
    with FlopCounterMode(display=False) as counter:
        sum(t.sum() for t in residual_norm(**inputs, order="pre")).backward()
    assert counter.get_total_flops() == 0


def test_traffic_counts_each_map_once() -> None:
    n, rows, c = 640, 10, 64
    assert traffic(rows, c, "pre") == ((4 * n + 512, 4 * n + 80, 0), (6 * n + 80 + 256, 2 * n + 512, 0))
    # A bf16 stream after SwinV2's norm: one result, and its gradient passes through untouched.
    assert traffic(rows, c, "post") == ((4 * n + 512, 2 * n + 80, 0), (4 * n + 80 + 256, 2 * n + 512, 0))
    forward, backward = traffic(rows, c, "post", itemsize=4, drop_scale=True, branch_bias=True)
    assert forward == (6 * n + 768 + 40, 6 * n + 80, 0)
    assert backward == (8 * n + 80 + 40 + 512, 6 * n + 768, 0)


@pytest.mark.parametrize("change, word", [
    ({"order": "mid"}, "order='mid'"), ({"order": "post", "gamma": torch.ones(4)}, "gamma must be None"),
    ({"branch": torch.zeros(2, 4, 4)}, "branch"), ({"weight": torch.ones(5)}, "weight must be"),
    ({"branch_bias": torch.ones(5)}, "branch_bias must be"), ({"drop_scale": torch.ones(3)}, "drop_scale must be")])
def test_wrong_arguments_are_named(change: dict, word: str) -> None:
    args = {"residual": torch.zeros(2, 3, 4), "branch": torch.zeros(2, 3, 4), "weight": torch.ones(4),
            "bias": torch.zeros(4), "order": "pre"}
    with pytest.raises(ValueError, match=word):
        residual_norm(**(args | change))
