"""A wrong argument of any public op is one sentence that names the op and the argument, never torch's own words."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import fastmim_kernels as fk
from fastmim_kernels.common import arguments


def some(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)))


def stage() -> tuple[Tensor, Tensor]:
    """(coords (9, 2), index (4, 4)) of windows of 2 × 2."""
    index = torch.arange(4)
    rows, columns = index // 2, index % 2
    return some(9, 2), (rows[:, None] - rows + 1) * 3 + columns[:, None] - columns + 1


COORDS, INDEX = stage()
PLAN, BLOCKS = fk.bias_plan([INDEX], [2], [3], [9])
IMAGES = {"target": some(2, 3, 8, 8).mul(255).to(torch.uint8), "stride": 4,
          "mask": torch.eye(2, dtype=torch.bool).repeat(2, 1, 1)}
MLP = {"x": some(5, 4), "weight1": some(8, 4), "bias1": some(8), "weight2": some(6, 8), "bias2": some(6),
       "low_weight1": some(8, 4), "low_weight2": some(6, 8), "recompute_fc1": False}  # fmt: skip
LINEAR = {"x": some(5, 4), "weight": some(6, 4), "bias": some(6), "low_weight": some(6, 4), "low_bias": some(6)}
TOKENS = {"tokens": some(2, 3, 4, 5), "mask": torch.zeros(2, 3, 4, dtype=torch.bool), "mask_token": some(5),
          "norm_weight": some(5), "norm_bias": some(5), "eps": 1e-5, "pos_embed": some(3, 4, 5),
          "out_dtype": torch.float32}  # fmt: skip
VISIBLE = (torch.tensor([[[-2, 0, 3, -1], [1, 2, 4, -1]], [[-2, 4, -1, -1], [0, 1, 2, 3]]]),
           torch.tensor([[[0, 2, 3, 1], [0, 1, 3, 2]], [[0, 3, 1, 2], [0, 1, 2, 3]]]))  # fmt: skip
LOGITS = {"student": some(3, 2, 5), "teacher": some(2, 2, 5), "centre": some(5), "student_temp": 0.1,
          "teacher_temp": 0.05, "pairs": "views", "weight": some(3, 2)}  # fmt: skip
RIGHT: dict[str, dict[str, Any]] = {
    "bias_plan": {"index": [INDEX], "blocks": [2], "heads": [3], "rows": [9], "coords": [COORDS], "hidden": 8},
    "cpb_bias": {"coords": COORDS, "index": INDEX, "weight1": some(2, 8, 2), "bias1": some(2, 8),
                 "weight2": some(2, 3, 8)},
    "distillation": LOGITS,
    "distillation_and_entropy": LOGITS,
    "gelu": {"x": some(5, 4), "bias": some(4)},
    "layer_norm": {"x": some(2, 5, 4), "weight": some(4), "bias": some(4), "eps": 1e-5, "out_dtype": torch.float32},
    "linear": LINEAR,
    "linear_and_input": LINEAR,
    "linear_masked_l1": {"tokens": some(2, 2, 2, 5), "weight": some(48, 5), "bias": some(48), **IMAGES, "loss": "l1",
                         "mean": some(3), "std": some(3), "target_eps": 1e-6, "count_eps": 1e-5},
    "local_norm_target": {"images": some(2, 3, 8, 8), "kernel_size": 3},
    "low_copies": {"tensors": [some(3, 4), some(5)], "dtype": torch.bfloat16},
    "mask_tokens": TOKENS,
    "mask_tokens_twice": TOKENS,
    "masked_l1": {"prediction": some(2, 2, 2, 48), **IMAGES, "loss": "l1", "mean": some(3), "std": some(3)},
    "mlp": MLP,
    "mlp_and_input": MLP,
    "patch_merge": {"x": some(2, 4, 6, 3), "weight": some(12), "bias": some(12), "eps": 1e-5,
                    "out_dtype": torch.float32},
    "position_bias": {"plan": PLAN, "blocks": BLOCKS, "params": [(some(9, 3),), (some(9, 3),)]},
    "residual_norm": {"residual": some(2, 4, 6, 5), "branch": some(2, 4, 6, 5), "weight": some(5), "bias": some(5),
                      "order": "pre", "eps": 1e-5, "drop_scale": some(2), "gamma": some(5), "branch_bias": some(5),
                      "stream_dtype": None, "out_dtype": torch.float32, "merge": False},
    "unshuffle": {"tokens": some(2, 3, 5), "places": torch.tensor([[0, -1, 1, -1], [-1, -1, 0, 1]]),
                  "mask_token": some(5), "pos_embed": some(5, 5), "out_dtype": torch.float32},
    "visible_attention": {"qkv": some(2, 5, 12), "bias": some(2, 4, 4), "slots": VISIBLE[0], "places": VISIBLE[1],
                          "num_heads": 2, "groups": torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]]), "padding": some(12),
                          "logit_scale": some(2)},
    "window_attention": {"qkv": some(2, 4, 6, 12), "bias": some(2, 4, 4), "num_heads": 2, "window_size": (2, 2),
                         "shift_size": (1, 0), "logit_scale": some(2)},
}  # fmt: skip
"""Arguments of every public op that belong together, all but ``impl``."""
NO_OPS = {"IMPLS", "Fusion", "accelerate", "check_impl", "fusion", "nn", "shape_may_follow"}
"""What the package offers besides: what is not a function of tensors, and what computes nothing."""

FREE = {
    ("gelu", "x", "rank + 1"), ("gelu", "x", "dim 0"), ("layer_norm", "x", "rank + 1"), ("layer_norm", "x", "rank - 1"),
    ("layer_norm", "x", "dim 0"), ("layer_norm", "x", "dim 1"), ("local_norm_target", "images", "dim 0"),
    ("local_norm_target", "images", "dim 1"), ("local_norm_target", "images", "dim 2"),
    ("local_norm_target", "images", "dim 3"), ("patch_merge", "x", "dim 0"), ("patch_merge", "x", "dim 1"),
    ("patch_merge", "x", "dim 2"), ("window_attention", "qkv", "dim 0"),
    *((op, "x", kind) for op in ("linear", "linear_and_input", "mlp", "mlp_and_input")
      for kind in ("rank + 1", "rank - 1", "dim 0")),
    *((op, name, kind) for op in RIGHT for name in ("mask_token", "pos_embed", "mean", "std", "logit_scale")
      for kind in ("rank + 1", "rank - 1")),
    *((op, name, f"dim {i}") for op, name in (("masked_l1", "prediction"), ("linear_masked_l1", "tokens"))
      for i in (1, 2)),
    *(("low_copies", "tensors", f"its first: {kind}") for kind in ("rank + 1", "rank - 1", "dim 0", "dim 1")),
    ("low_copies", "tensors", "its first: of one value alone"),
    ("low_copies", "tensors", "nothing"), ("gelu", "x", "rank - 1"), ("cpb_bias", "weight2", "dim 1"),
    ("cpb_bias", "coords", "dim 0"), ("unshuffle", "tokens", "dim 1"), ("linear_masked_l1", "target_eps", "0.0"),
    ("linear_masked_l1", "count_eps", "0.0"),
    ("visible_attention", "qkv", "dim 1"),
    *((op, name, kind) for op in ("distillation", "distillation_and_entropy")
      for name, kind in (("centre", "rank + 1"), ("teacher", "dim 0"))),
}  # fmt: skip
"""(op, argument, what is done to it) where the result is as right as before."""
FOREIGN = re.compile(r"\n|xpected|mat1|Triton|aten|dispatch|at::|c10|attribute|operand|scalar type|of tensor a")
"""Words of torch, of Triton and of Python."""


def wrong_tensors(right: Tensor, name: str, optional: bool) -> Iterator[tuple[str, Any]]:
    yield from (("a number", 3), ("a list", [1.0]), ("a tuple", (right,)), ("text", "x"), ("numpy", right.numpy()))
    yield from (("complex", right.to(torch.complex64)), ("on meta", right.to("meta")))
    yield from [] if optional else [("None", None)]
    if name not in ("mask", "index", "places", "slots", "groups"):
        yield from (("whole numbers", right.long()), ("bool", right.bool()))
    if name != "mask":
        yield from (("int8", right.to(torch.int8)), ("float8", right.float().to(torch.float8_e5m2)))
    else:
        yield from ((f"full of {v}", torch.full(right.shape, v)) for v in (7, -2, 0.5, float("nan")))
    if name in ("index", "places", "slots"):
        # One beyond either end, and far beyond.
        ends = {"index": (0, 8), "slots": (-2, 4), "places": (-1, 1) if right.ndim == 2 else (0, 3)}[name]
        for kind, value in (("low", ends[0] - 1), ("high", ends[1] + 1), ("very low", -100), ("very high", 2**40)):
            yield kind, right.masked_fill(right == right.max(), value)
    yield from (("rank + 1", right[None]), ("rank - 1", right[0]))
    if right.ndim > 1:
        yield "of one value alone", right.flatten()[0]
    for i in range(right.ndim):
        yield f"dim {i}", torch.cat([right, right.narrow(i, 0, 1)], i)


def wrong_values(op: str, name: str, right: Any) -> Iterator[tuple[str, Any]]:
    """(What is done, value) of everything that an argument must not be."""
    optional = "None" in inspect.signature(getattr(fk, op)).parameters[name].annotation
    if isinstance(right, Tensor):
        yield from wrong_tensors(right, name, optional)
    elif isinstance(right, list | tuple) and isinstance(right[0], Tensor):
        yield from (("a number", 3), ("a tensor", right[0]), ("text", "x"), ("nothing", []))
        yield from [] if optional else [("None", None)]
        for kind, value in wrong_tensors(right[0], name, False):
            yield f"its first: {kind}", [value, *right[1:]]
    elif name in ("window_size", "shift_size"):
        yield from ((repr(v), v) for v in (-1, 7, (1,), (2, 2, 2), (2, -1), (2.5, 1), "2", None, torch.ones(2), [None]))
    elif name.endswith("eps"):
        yield from ((repr(v), v) for v in (0.0, -1e-5, float("nan"), float("inf"), "1", None, [1e-5]))
        yield "beyond any float", 10**400
    elif name.endswith("temp"):
        yield from ((repr(v), v) for v in (0, -0.1, float("nan"), float("inf"), "x", 1j, None, [0.1], np.ones(2)))
        yield "beyond any float", 10**400
        own = torch.tensor(right)
        yield from (("two", own.repeat(2)), ("0.0", own * 0), ("below 0", -own), ("infinite", own / 0))
        yield from (("on meta", own.to("meta")), ("complex", own.to(torch.complex64)), ("bool", own.bool()))
        yield from (("whole numbers", own.long() + 1), ("float8", own.to(torch.float8_e5m2)))
    elif isinstance(right, bool):
        yield from ((repr(v), v) for v in (2, "yes", torch.ones(2)))
    elif isinstance(right, int):
        yield from ((repr(v), v) for v in (0, -1, 1.5, "2", None, [2], torch.ones(2), float(right), math.nan, math.inf))
    elif isinstance(right, torch.dtype) or name.endswith("dtype"):
        yield from ((repr(v), v) for v in (torch.int32, torch.bool, torch.complex64, "float32", 16, torch.ones(2)))
    elif isinstance(right, str):
        yield from ((repr(v), v) for v in ("other", 3, None, ["l1"], torch.ones(2), np.ones(2)))
    else:
        wrong = (3, None, "x", [], [1.5], [0], ["x"], torch.ones(2), (*right, right[0]))
        yield from ((repr(v), v) for v in wrong if v is not None or not optional)


CASES = [
    pytest.param(op, name, id=f"{op}-{name}")
    for op, arguments in RIGHT.items()
    for name in (*arguments, *(() if op == "bias_plan" else ("impl",)))
]


def said_of(op: str, **changed: Any) -> str:
    """What the op says to its right arguments with some of them changed."""
    with pytest.raises(ValueError) as raised:
        getattr(fk, op)(**RIGHT[op] | changed)
    return str(raised.value)


@pytest.mark.parametrize("op, name", CASES)
def test_a_wrong_argument_is_named_in_one_line(op: str, name: str) -> None:
    tried = 0
    for kind, value in wrong_values(op, name, RIGHT[op].get(name, "auto")):
        if (op, name, kind) in FREE:
            continue
        with torch.autocast("cpu", torch.bfloat16, enabled=tried % 2 == 1):  # whose casts must hide no dtype
            said = said_of(op, **{name: value})
        assert said.partition(":")[0] in (op, op.removesuffix("_and_input"), op.removesuffix("_twice")), (kind, said)
        assert re.search(rf"\b{name}\b", said.partition(":")[2]), (kind, said)
        assert " must " in said and not FOREIGN.search(said) and len(said) < 300, (kind, said)
        tried += 1
    assert tried


def test_these_are_all_ops() -> None:
    assert set(RIGHT) | NO_OPS == set(fk.__all__) and not set(RIGHT) & NO_OPS


@pytest.mark.parametrize("op", RIGHT)
def test_right_arguments_pay_for_no_explanation(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "_fault", lambda *args: pytest.fail("a right call was explained"))
    for impl in ({},) if op == "bias_plan" else ({"impl": "torch"}, {"impl": "reference"}):
        getattr(fk, op)(**RIGHT[op], **impl)


def test_fake_tensors_and_the_compiler_see_the_op_itself() -> None:
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in LINEAR.items()}
        assert fk.linear(**fake).shape == (5, 6)
        with pytest.raises(ValueError, match="linear: weight must be"):
            fk.linear(**fake | {"weight": fake["bias"]})
    compiled = torch.compile(fk.linear, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**LINEAR), fk.linear(**LINEAR))


def test_an_empty_batch_that_somebody_watches_is_named() -> None:
    """Others get an empty result; who looks at the op itself asks for what it computes of no rows."""
    weight1, weight2 = some(5, 4), some(3, 5)
    assert fk.mlp(some(0, 4), weight1, None, weight2, None).shape == (0, 3)
    with FlopCounterMode(display=False), pytest.raises(ValueError, match="mlp: x must be a tensor with values"):
        fk.mlp(some(0, 4), weight1, None, weight2, None)


def test_an_error_of_right_arguments_stays_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="gelu: torch.func's transforms cannot look into this op"):
        torch.func.vmap(fk.gelu)(some(2, 5, 4))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'bias'"):
        fk.window_attention(some(2, 4, 6, 12), num_heads=2, window_size=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("op, changed, words", [
    ("window_attention", {"bias": None}, "bias must be a tensor, got None"),
    ("window_attention", {"qkv": np.ones((2, 4, 6, 12))}, r"qkv must be a tensor, got a numpy.ndarray of shape \(2, 4"),
    ("window_attention", {"qkv": some(2, 4, 6, 12).to(torch.float8_e5m2)}, "qkv must be dense and of float16"),
    ("window_attention", {"impl": "cuda"}, "impl='cuda': must be one of auto, triton, torch, reference"),
    ("gelu", {"x": some(5, 4).to_sparse()}, "x must be dense"),
    ("linear", {"low_weight": some(6, 4).to("meta")}, "low_weight must be on a CPU or a GPU"),
    ("mask_tokens", {"norm_bias": None}, "norm_bias must be given with norm_weight, got None"),
    ("masked_l1", {"std": None}, "std must be 3 values: a uint8 target needs mean and std, got None"),
    ("residual_norm", {"branch": some(2, 4, 6, 5).double()}, "branch must be of float32 as residual, got .*float64"),
    ("residual_norm", {"order": "post"}, "gamma must be None with order='post'"),
    ("residual_norm", {"merge": True}, "merge must be False but with order='post'"),
    ("cpb_bias", {"index": INDEX + 1}, "index must hold rows of coords, 0 to 8, got 1 to 9"),
    ("bias_plan", {"index": [INDEX - 5], "coords": None}, "index must hold rows of the table, 0 to 8, got -5 to 3"),
    ("unshuffle", {"places": torch.full((2, 4), 2)}, "places must hold numbers of kept tokens or -1, -1 to 1, got 2 t"),
    ("visible_attention", {"padding": None}, "slots must hold tokens of qkv or -1, -1 to 4, got -2 to 4"),
    ("visible_attention", {"places": VISIBLE[1] + 1}, "places must hold positions in a window, 0 to 3, got 1 to 4"),
    ("masked_l1", {"mask": torch.full((2, 2, 2), 7)}, r"mask must hold 0 and 1 alone, got others in \(2, 2, 2\)"),
    ("local_norm_target", {"kernel_size": math.nan}, "kernel_size must be a whole number, got nan"),
    ("distillation", {"pairs": "rows"}, r"teacher must be \(3, 2, 5\) as student, a row for each of its rows"),
    ("distillation", {"student": some(1, 2, 5), "teacher": some(1, 2, 5)}, "pairs must be 'rows' where student and te"),
    ("distillation", {"student": some(3, 0, 5), "teacher": some(2, 0, 5)}, r"weight must be \(3, 0\) for student"),
    ("distillation", {"teacher_temp": torch.tensor(-0.5)}, "teacher_temp must be above 0, for example 0.1, got -0.5"),
    ("distillation_and_entropy", {"student_temp": 0}, "student_temp must be a number above 0, for example 0.1, got 0"),
    ("layer_norm", {"impl": np.ones(2)}, r"impl=a numpy.ndarray of shape \(2,\): must be one of auto"),
])  # fmt: skip
def test_what_is_said(op: str, changed: dict[str, Any], words: str) -> None:
    assert re.search(words, said_of(op, **changed))


@pytest.mark.parametrize("call, words", [
    (lambda: fk.fusion("nope", torch.device("cpu")), "fusion: impl='nope': must be one of auto, "),
    (lambda: fk.fusion("auto", "cpu"), "fusion: device must be a device, got 'cpu'"),
    (lambda: fk.shape_may_follow(3), "shape_may_follow: data must be a tensor, got 3"),
    (lambda: fk.accelerate(3), "accelerate: model must be a Module, got 3"),
    (lambda: fk.accelerate(torch.nn.Linear(2, 2), impl=3), "accelerate: impl=3: must be one of auto, "),
    (lambda: fk.accelerate(torch.nn.Linear(2, 2), policy="x"), "accelerate: policy='x': must be 'parity' or 'default'"),
    (lambda: fk.check_impl(np.ones((2, 2))), "^impl=a ndarray: must be one of auto, "),
])  # fmt: skip
def test_what_is_no_op_says_it_too(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("op", [op for op in RIGHT if op != "bias_plan"])
def test_triton_is_refused_in_the_name_of_the_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot run, and for float64; also where the op runs another's kernel."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    said = said_of(op, impl="triton")
    assert said.partition(":")[0] == op and " impl='triton': must be 'auto' where no Triton kernel can run: t" in said
    if op not in ("low_copies", "position_bias", "masked_l1"):  # of float32, or of tuples; and a target that is wider
        doubled = {name: value.double() for name, value in RIGHT[op].items()
                   if isinstance(value, Tensor) and value.is_floating_point()}  # fmt: skip
        said = said_of(op, **doubled, impl="triton")
        assert said.startswith(f"{op}: impl='triton': must be 'auto' or 'torch' for float64")


@pytest.mark.parametrize("op, changed", [
    ("bias_plan", {"blocks": [np.int64(2)], "heads": (np.uint8(3),), "rows": np.array([9]), "hidden": np.int32(8)}),
    ("linear_masked_l1", {"stride": np.int64(4)}), ("masked_l1", {"stride": np.int64(4)}),
    ("local_norm_target", {"kernel_size": np.int64(3)}), ("visible_attention", {"num_heads": np.int64(2)}),
    ("window_attention", {"num_heads": np.int64(2), "window_size": np.int64(2), "shift_size": np.int64(0)}),
    ("window_attention", {"window_size": (np.int64(2), 2), "shift_size": [np.int16(1), np.int16(0)]}),
])  # fmt: skip
def test_whole_numbers_of_numpy_are_taken(op: str, changed: dict[str, Any]) -> None:
    """By the direct way, and by torch's dispatcher, whose schemas know those of Python."""
    plain = {name: value.tolist() if isinstance(value, np.generic | np.ndarray) else value for name, value in
             changed.items()}  # fmt: skip
    wanted = getattr(fk, op)(**RIGHT[op] | plain)
    for impl in ({},) if op == "bias_plan" else ({"impl": "torch"}, {"impl": "reference"}):
        with contextlib.nullcontext() if op == "bias_plan" else FlopCounterMode(display=False):
            torch.testing.assert_close(getattr(fk, op)(**RIGHT[op] | changed, **impl), wanted)
        torch.testing.assert_close(getattr(fk, op)(**RIGHT[op] | changed, **impl), wanted)


@pytest.mark.parametrize("op, name", [
    ("unshuffle", "places"), ("visible_attention", "slots"), ("visible_attention", "places"), ("cpb_bias", "index"),
    ("masked_l1", "mask"), ("mask_tokens", "mask"), ("linear_masked_l1", "mask"), ("distillation", "teacher_temp"),
])  # fmt: skip
def test_values_that_are_not_at_hand_are_not_looked_at(op: str, name: str) -> None:
    """Fake tensors have none; for those of a GPU the host would wait."""
    right = torch.as_tensor(RIGHT[op][name])
    given = RIGHT[op] | {name: torch.full_like(right, -7, dtype=torch.int64 if right.dtype == torch.bool else None)}
    with pytest.raises(ValueError, match=f"{op}: {name} must "):
        getattr(fk, op)(**given)
    with FakeTensorMode() as mode:
        getattr(fk, op)(**{key: mode.from_tensor(v) if isinstance(v, Tensor) else v for key, v in given.items()})


@pytest.mark.parametrize("norm_dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_mask_tokens_takes_parameters_of_other_dtypes(impl: str, norm_dtype: torch.dtype) -> None:
    """float64 tokens whose result is asked in float32, and a norm in another dtype than both."""
    tokens = TOKENS["tokens"].double().requires_grad_()
    norm = {name: TOKENS[name].to(norm_dtype).requires_grad_() for name in ("norm_weight", "norm_bias")}
    out = fk.mask_tokens(**TOKENS | norm | {"tokens": tokens}, impl=impl)
    out.sum().backward()
    wanted = torch.nn.functional.layer_norm(tokens, (5,), *(p.double() for p in norm.values())) + TOKENS["pos_embed"]
    torch.testing.assert_close(out, wanted.float(), rtol=1e-3, atol=1e-3)
    assert {p.grad.dtype for p in norm.values()} == {norm_dtype} and tokens.grad.dtype == torch.float64
