from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmim_kernels import linear_masked_l1, masked_l1
from fastmim_kernels.masked_loss import linear_on_torch, on_torch
from fastmim_kernels.masked_loss.linear_op import OP as LINEAR_OP
from fastmim_kernels.masked_loss.linear_op import linear_traffic
from fastmim_kernels.masked_loss.op import OP, traffic
from tests.kernels.oracle import check, relative_error

# (B, C, H, W), token grid, mask grid, stride, and why.
GEOMETRIES = [
    ((2, 3, 16, 24), (2, 3), (2, 3), 8),  # one mask cell a token
    ((2, 3, 16, 24), (2, 3), (8, 12), 8),  # cells of 2 px within tokens
    ((2, 1, 12, 12), (4, 4), (2, 3), 3),  # one cell over several tokens, odd stride
    ((1, 2, 12, 20), (2, 3), (4, 5), 8),  # tokens reach beyond the image
    ((1, 1, 12, 12), (3, 3), (2, 2), 4),  # cells of 6 px cross the edges of 4 px tokens
    ((1, 5, 5, 5), (1, 1), (5, 5), 5),  # every pixel has its own mask value
    ((2, 3, 2, 3), (2, 3), (2, 1), 1),  # a token is one pixel: SimMIM's lowest resolution
]


def inputs_for(geometry: tuple[Any, ...], linear: bool, seed: int = 3) -> dict[str, Any]:
    (b, c, height, width), grid, mask_grid, stride = geometry
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    mask = torch.rand((b, *mask_grid), generator=generator) < 0.5
    mask[0, 0, 0] = True
    inputs = {"target": normal(b, c, height, width).float(), "mask": mask, "stride": stride}
    channels = c * stride**2
    if linear:
        return inputs | {"tokens": normal(b, *grid, 11), "weight": normal(channels, 11), "bias": normal(channels)}
    return inputs | {"prediction": normal(b, *grid, channels)}


def with_impl(op: Any, impl: str, **fixed: Any):  # type: ignore[no-untyped-def]
    def run(**kwargs: Any) -> torch.Tensor:
        wide = kwargs.get("prediction", kwargs.get("tokens")).dtype == torch.float64
        if wide and kwargs["target"].dtype != torch.uint8:
            kwargs["target"] = kwargs["target"].double()
        return op(**kwargs, **fixed, impl=impl)
    return run


def check_both(op: Any, impl: str, inputs: dict[str, Any], dtype: torch.dtype, **fixed: Any) -> None:
    names = [n for n in ("prediction", "tokens", "weight", "bias") if n in inputs]
    check(with_impl(op, impl, **fixed), with_impl(op, "reference", **fixed), inputs, dict.fromkeys(names, dtype),
          wrt=names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", [masked_l1, linear_masked_l1])
def test_against_float64(op: Any, geometry: tuple[Any, ...], loss: str, dtype: torch.dtype) -> None:
    check_both(op, "torch", inputs_for(geometry, op is linear_masked_l1), dtype, loss=loss)


@pytest.mark.parametrize("loss", ["l1", "smooth_l1"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tokens_picked_out_of_many(geometry: tuple[Any, ...], loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What large maps take where few tokens count; small ones are worked on whole."""
    monkeypatch.setattr(on_torch, "VALUES", 0)
    check_both(masked_l1, "torch", inputs_for(geometry, linear=False), torch.float32, loss=loss)


@pytest.mark.parametrize("op", [masked_l1, linear_masked_l1])
def test_uint8_target_is_the_normalised_image(op: Any) -> None:
    inputs = inputs_for(GEOMETRIES[1], op is linear_masked_l1)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    pixels = torch.randint(0, 256, inputs["target"].shape, generator=torch.Generator().manual_seed(0)).byte()
    image = (pixels.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    names = {n: inputs[n] for n in ("prediction", "tokens", "weight", "bias") if n in inputs}
    expected = op(**inputs | {"target": image}, impl="reference")
    inputs |= {n: v.float() for n, v in names.items()}
    for impl in ("torch", "reference"):
        found = op(**inputs | {"target": pixels}, mean=mean.view(3, 1, 1), std=std.view(3, 1, 1), impl=impl)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("masked, values", [(3, 0), (13, 0), (3, on_torch.VALUES)])
def test_what_is_not_masked_is_not_read(masked: int, values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few of many tokens are picked out, else all are worked on: in any case without a trace of the others."""
    monkeypatch.setattr(on_torch, "VALUES", values)
    inputs = inputs_for(((2, 3, 32, 32), (4, 4), (4, 4), 8), linear=False)
    mask = inputs["mask"] = (torch.arange(16) < masked).view(1, 4, 4).repeat(2, 1, 1)
    clean = inputs["prediction"].float()
    spoilt = clean.masked_fill(~mask[..., None], float("nan")).requires_grad_()
    loss, truth = masked_l1(**inputs | {"prediction": spoilt}), masked_l1(**inputs | {"prediction": clean})
    grad, = torch.autograd.grad(loss, spoilt)
    assert torch.equal(loss, truth) and grad[~mask].eq(0).all() and grad[mask].ne(0).all()


def test_a_kept_gradient_is_handed_out_by_the_graph_alone() -> None:
    """A loss that is minimised by itself returns what it has kept, any other one a multiple."""
    inputs = inputs_for(GEOMETRIES[0], linear=True)
    args = [inputs[k].float().requires_grad_() for k in ("tokens", "weight", "bias")]
    loss = linear_masked_l1(*args, inputs["target"], inputs["mask"], stride=inputs["stride"], impl="torch")
    once = torch.autograd.grad(loss, args, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, args, retain_graph=True)
    torch.testing.assert_close([3 * g for g in once], [*thrice])
    kept = torch.randn(4, 5)
    found = LINEAR_OP.backward.op(torch.ones(()), torch.ones(()), torch.ones(2), kept, torch.ones(4), torch.float32,
                                  torch.float32, "torch")
    assert torch.equal(found[1], kept) and found[1].data_ptr() != kept.data_ptr()


MAE = {"loss": "l2", "target_eps": 1e-6, "count_eps": 0.0}
COVERED = [geometry for geometry in GEOMETRIES if geometry[0][2] == geometry[1][0] * geometry[3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("geometry", COVERED)
def test_patch_statistics_against_float64(geometry: tuple[Any, ...], dtype: torch.dtype) -> None:
    check_both(linear_masked_l1, "torch", inputs_for(geometry, True), dtype, **MAE)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_loss_of_mae_is_its_formula(impl: str) -> None:
    """Mean over hidden patches of the mean squared error, against numbers by their own statistics; uint8 images."""
    (b, c, h, w), grid, _, p = GEOMETRIES[0]
    inputs = inputs_for(GEOMETRIES[0], linear=True)
    image = torch.randint(0, 256, (b, c, h, w), generator=torch.Generator().manual_seed(1)).byte()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    patches = ((image / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)).double().unflatten(3, (grid[1], p))
    patches = patches.unflatten(2, (grid[0], p)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    wanted = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    each = (F.linear(inputs["tokens"], inputs["weight"], inputs["bias"]) - wanted).square().mean(-1)
    expected = (each * inputs["mask"]).sum() / inputs["mask"].sum()
    args = inputs | {k: inputs[k].float() for k in ("tokens", "weight", "bias")}
    found = linear_masked_l1(**args | {"target": image}, mean=mean, std=std, **MAE, impl=impl)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_equals_the_formula_pixel_by_pixel() -> None:
    """Against loops written from the definition, not against the oracle."""
    inputs = inputs_for(GEOMETRIES[3], linear=False)
    prediction, target, mask = inputs["prediction"], inputs["target"].double(), inputs["mask"]
    (_, c, height, width), s = target.shape, 8
    total, count = 0.0, 0
    for y in range(height):
        for x in range(width):
            if mask[0, y // 3, x // 4]:
                count += 1
                for k in range(c):
                    value = prediction[0, y // s, x // s, k * s * s + (y % s) * s + x % s]
                    total += abs(value - target[0, k, y, x]).item()
    found = masked_l1(prediction, target, mask, stride=s, impl="torch")
    assert found.item() == pytest.approx(total / (count + 1e-5) / c, rel=1e-12)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_nothing_masked_is_zero(impl: str) -> None:
    inputs = inputs_for(GEOMETRIES[0], linear=True)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    args = {k: v.float().requires_grad_() if k in ("tokens", "weight", "bias") else v for k, v in inputs.items()}
    loss = linear_masked_l1(**args, impl=impl)
    grads = torch.autograd.grad(loss, [args["tokens"], args["weight"], args["bias"]])
    assert loss.item() == 0 and all(g.eq(0).all() for g in grads)


class LargestTensor(TorchDispatchMode):
    """Most elements of a floating tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return out


def test_the_prediction_never_exists_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """600 tokens of 64 values: the largest tensor is a chunk of 256 of them."""
    inputs = inputs_for(((6, 1, 80, 80), (10, 10), (10, 10), 8), linear=True)
    inputs |= {k: inputs[k].float().requires_grad_() for k in ("tokens", "weight", "bias")}
    inputs["mask"] = torch.ones_like(inputs["mask"])
    target = inputs["target"].numel()
    with LargestTensor() as mode:
        LINEAR_OP.forward.op(inputs["tokens"].detach(), inputs["weight"].detach(), inputs["bias"].detach(),
                             inputs["target"], inputs["mask"], None, None, 8, "l1", 0.0, 1e-5, torch.float32, True,
                             "torch")
    assert mode.largest <= target  # the target itself, laid out as tokens
    sizes: list[int] = []
    product = linear_on_torch.product
    monkeypatch.setattr(linear_on_torch, "product", lambda x, *rest: sizes.append(x.shape[0]) or product(x, *rest))
    linear_masked_l1(**inputs, impl="torch")
    assert sizes == [256, 256, 88]


def test_only_masked_tokens_are_projected() -> None:
    inputs = inputs_for(GEOMETRIES[0], linear=True)
    inputs["mask"] = torch.tensor([[[1, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]]]).bool()
    tokens = inputs["tokens"].float()
    tokens[~inputs["mask"]] = float("nan")
    inputs |= {"tokens": tokens.requires_grad_(), "weight": inputs["weight"].float(), "bias": inputs["bias"].float()}
    loss = linear_masked_l1(**inputs, impl="torch")
    (grad,) = torch.autograd.grad(loss, inputs["tokens"])
    assert torch.isfinite(loss) and grad[~inputs["mask"]].eq(0).all() and grad[inputs["mask"]].ne(0).any(-1).all()


@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
def test_autocast_runs_the_product_in_bfloat16_and_the_loss_in_float32(loss: str) -> None:
    inputs = inputs_for(GEOMETRIES[1], linear=True)
    truth_in = {k: inputs[k].requires_grad_() for k in ("tokens", "weight", "bias")}
    truth = linear_masked_l1(**inputs | truth_in | {"target": inputs["target"].double()}, loss=loss, impl="reference")
    expected = [truth, *torch.autograd.grad(truth, list(truth_in.values()))]
    errors = {}
    for impl in ("reference", "torch"):
        args = {k: v.detach().float().requires_grad_() for k, v in truth_in.items()}
        with torch.autocast("cpu", torch.bfloat16):
            found = linear_masked_l1(**inputs | args, loss=loss, impl=impl)
        assert found.dtype == torch.float32
        grads = torch.autograd.grad(found, list(args.values()))
        assert all(g.dtype == torch.float32 for g in grads)
        errors[impl] = [relative_error(f, e) for f, e in zip([found, *grads], expected, strict=True)]
    assert all(o <= 2 * p + 1e-6 for o, p in zip(errors["torch"], errors["reference"], strict=True)), errors


def test_half_precision_gradients_do_not_underflow() -> None:
    """float16 with a loss scale of 65,536: the gradient without the scale, about 1e-8, is not representable."""
    inputs = inputs_for(((1, 3, 64, 64), (2, 2), (2, 2), 32), linear=True)
    inputs["mask"] = torch.ones_like(inputs["mask"])
    args = {k: inputs[k].half().requires_grad_() for k in ("tokens", "weight", "bias")}
    loss = linear_masked_l1(**inputs | args, impl="torch")
    grad, = torch.autograd.grad(loss * 65536, args["tokens"])
    wide = {k: v.detach().double().requires_grad_() for k, v in args.items()}
    truth = linear_masked_l1(**inputs | wide | {"target": inputs["target"].double()}, impl="reference")
    expected, = torch.autograd.grad(truth * 65536, wide["tokens"])
    assert relative_error(grad, expected) < 2e-3


def operands(inputs: dict[str, Any], linear: bool) -> tuple[Any, ...]:
    names = ("tokens", "weight", "bias") if linear else ("prediction",)
    head = [inputs[n].float().requires_grad_() for n in names]
    tail = (inputs["target"], inputs["mask"], None, None, inputs["stride"], "l1")
    return (*head, *tail, 0.0, 1e-5, torch.float32, True, "torch") if linear else (*head, *tail, "torch")


def test_opcheck() -> None:
    torch.library.opcheck(OP.forward.op, operands(inputs_for(GEOMETRIES[3], False), False))
    torch.library.opcheck(LINEAR_OP.forward.op, operands(inputs_for(GEOMETRIES[3], True), True))


def test_compiles_without_graph_break() -> None:
    inputs = inputs_for(GEOMETRIES[1], linear=True)
    inputs |= {k: inputs[k].float().requires_grad_() for k in ("tokens", "weight", "bias")}
    torch._dynamo.reset()
    compiled = torch.compile(linear_masked_l1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs), linear_masked_l1(**inputs))


def test_flops_of_head_and_gradients() -> None:
    inputs = inputs_for(GEOMETRIES[0], linear=True)
    args = {k: inputs[k].float().requires_grad_() for k in ("tokens", "weight", "bias")}
    with FlopCounterMode(display=False) as counter:
        linear_masked_l1(**inputs | args, impl="torch").backward()
    assert counter.get_total_flops() == 3 * 2 * 12 * 11 * 192
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        linear_masked_l1(**inputs | args, impl="torch")
    assert counter.get_total_flops() == 2 * 12 * 11 * 192


def test_closed_forms() -> None:
    forward, backward = traffic((2, 2, 2), 3, 32, 512, hit=0.5, itemsize=2, target_itemsize=4)
    assert forward == (4 * 3072 * 6 + 512, 8, 0) and backward == (4 * 3072 * 6 + 516, 8 * 3072 * 2, 0)
    forward, _ = linear_traffic((2, 2, 2, 3), 16, 32, 512, masked=0.5)
    assert forward[2] == 6 * 4 * 3072 * 16
    more, _ = linear_traffic((2, 2, 2, 3), 16, 32, 512, masked=0.5, target_itemsize=1, statistics=True)
    less, _ = linear_traffic((2, 2, 2, 3), 16, 32, 512, masked=0.5, target_itemsize=1)
    assert (more[0] - less[0], more[1] - less[1]) == (4 * (3072 + 8), 4 * 8)


@pytest.mark.parametrize("change, word", [
    ({"loss": "l3"}, "loss='l3'"), ({"stride": 4}, "stride 4"), ({"mask": torch.ones(2, 5, 3)}, "mask"),
    ({"target_eps": -1.0}, "target_eps"), ({"tokens": torch.zeros(2, 3, 3, 11), "target_eps": 1e-6}, "target_eps"),
    ({"count_eps": float("nan")}, "count_eps"),
    ({"target": torch.zeros(2, 3, 16, 24).byte()}, "mean and std"), ({"weight": torch.zeros(192, 9)}, "weight")])
def test_wrong_arguments_are_named(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        linear_masked_l1(**inputs_for(GEOMETRIES[0], linear=True) | change)
