"""Whether a Triton kernel is right on this GPU, asked once before ``impl="auto"`` first relies on it.

Forward and every gradient of the examples of :mod:`.examples` are compared with the float64 oracle. Answers are kept by
op, dtype and compute capability: a kernel that is wrong in float32 leaves that of bfloat16 in use. What is wrong, or
does not compile, is replaced by torch with one loud warning.

**Bounded**: the oracle runs on the GPU itself, one example after the other, and an example holds at most
:data:`MOST_VALUES` values (a test adds them up), of eight bytes in the oracle: below 2 GiB of memory with what it keeps
for backward, and the arithmetic of a few images.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..common.dispatch import forget_self_tests, no_triton
from ..distillation.op import distillation, distillation_and_entropy
from ..linear.op import linear, linear_and_input
from ..local_norm.op import local_norm_target
from ..low_copies.op import low_copies
from ..mask_tokens.op import mask_tokens, mask_tokens_twice
from ..masked_loss.linear_op import linear_masked_l1
from ..masked_loss.op import masked_l1
from ..mlp.gelu import gelu
from ..mlp.op import mlp, mlp_and_input
from ..patch_merge.op import patch_merge
from ..position_bias.op import BiasPlan, bias_plan, cpb_bias, position_bias
from ..residual_norm.op import layer_norm, residual_norm
from ..unshuffle.op import unshuffle
from ..visible_attention.op import visible_attention
from ..window_attention.op import window_attention
from .examples import SHIPPED, SMALL, Case, normal


def table_bias(table: Tensor, index: Tensor, *, impl: str = "auto") -> Tensor:
    """``position_bias`` of one block with a (T, heads) table: (heads, N, N)."""
    plan, blocks = bias_plan([index], [1], [table.shape[1]], [len(table)])
    return position_bias(BiasPlan(*(tensor.to(table.device) for tensor in plan)), blocks, [(table,)], impl=impl)[0]


OPS: dict[str, Callable[..., Any]] = {op.__name__: op for op in (
    cpb_bias, distillation, distillation_and_entropy, gelu, layer_norm, linear, linear_and_input, linear_masked_l1,
    local_norm_target, low_copies, mask_tokens, mask_tokens_twice, masked_l1, mlp, mlp_and_input, patch_merge,
    residual_norm, table_bias, unshuffle, visible_attention, window_attention)}

FACTOR, FLOOR = 4.0, 1e-6
"""Wider than the tests' rule on errors (2 x plain torch): what is looked for is a kernel that is wrong."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_VALUES = 24 << 20
"""Values that the tensors of an example have together, inputs and results."""
CASES: tuple[Case, ...] = SMALL + SHIPPED

_KERNEL_OF = {"cpb_bias": "position_bias", "table_bias": "position_bias", "layer_norm": "residual_norm",
              "linear_and_input": "linear", "mlp_and_input": "mlp", "mask_tokens_twice": "mask_tokens",
              "distillation_and_entropy": "distillation"}
"""Where the two names differ."""

_failures: dict[tuple[str, torch.dtype, tuple[int, int]], str] = {}
"""By op, dtype and compute capability: why the kernel failed, empty where it did not."""


class Result(NamedTuple):
    """What became of one example in one dtype; errors are relative and NaN when it raised."""

    op: str
    variant: str
    dtype: torch.dtype
    compared: str
    """The output or gradient that is nearest to its limit or furthest beyond it."""
    error: float
    limit: float
    raised: str = ""

    @property
    def failure(self) -> str:
        """What is wrong, in one line; empty if nothing is."""
        if self.error <= self.limit:
            return ""
        name = f"{self.op}{f' ({self.variant})' if self.variant else ''} in {_name(self.dtype)}"
        if self.raised:
            return f"{name}: {self.raised}"
        return (f"{name}: error {self.error:.2g} of {self.compared} against the float64 oracle, at most "
                f"{self.limit:.2g} is expected")


def run(dtypes: Iterable[torch.dtype] = DTYPES, device: torch.device | str = "cuda") -> list[Result]:
    """Test every op in ``dtypes`` on ``device`` up front, instead of each at its first use.

    To be called before a CUDA graph is captured, within which no test can run. Ops that compute in float32 whatever
    the model's dtype are tested in it. What was tested already is tested again; ``impl="auto"`` goes by what is found.

    Returns:
        One result for each example and dtype; those with a ``failure`` were also warned of.

    Raises:
        ValueError: Triton kernels cannot run on ``device``.
        RuntimeError: A CUDA graph is being captured.
    """
    device = torch.device(device)
    if reason := no_triton(device):
        raise ValueError(f"device={str(device)!r}: the self-test needs a device that runs Triton kernels; {reason}")
    found = [result for op, dtype in _wanted(dtypes) for result in _judge(op, dtype, device)]
    forget_self_tests()
    return found


def request(dtypes: Iterable[torch.dtype] = DTYPES) -> None:
    """Run the kernels of :func:`run` without a judgement: what :func:`.launches.launches_of` wants to see.

    Under a ``FakeTensorMode``, on the CPU.
    """
    for op, dtype in _wanted(dtypes):
        for case in cases_of(op, dtype):
            run_case(case, case.build(), dict.fromkeys(case.low, dtype), torch.device("cpu"), "triton")


def _wanted(dtypes: Iterable[torch.dtype]) -> list[tuple[str, torch.dtype]]:
    """Ops as they are defined, in ``dtypes``, or in the only one that they know."""
    ops, wanted = dict.fromkeys(kernel_of(case.op) for case in CASES), set(dtypes)
    return [(op, dtype) for op, dtype in itertools.product(ops, DTYPES) if (cases := cases_of(op, dtype))
            and (dtype in wanted or {case.only for case in cases} == {torch.float32})]


def failure(op: str, dtype: torch.dtype, device: torch.device) -> str:
    """Why ``op``'s Triton kernel must not be used for ``dtype`` on ``device``; empty where it passed, or needs no test.

    Tested once per process, dtype and compute capability, on real tensors also within a trace.

    Raises:
        RuntimeError: It was not tested before a CUDA graph is captured.
    """
    capability = _capability(device)
    if capability is None:
        return ""
    key = op, dtype, capability
    if key not in _failures:
        _judge(op, dtype, device)
    return _failures[key]


def kernel_of(op: str) -> str:
    """The op, as it is defined, whose kernels run for a public function."""
    return _KERNEL_OF.get(op, op)


def cases_of(op: str, dtype: torch.dtype) -> list[Case]:
    """The examples that run the kernels of ``op`` as a call in ``dtype`` does."""
    return [case for case in CASES if kernel_of(case.op) == op and case.only in (None, dtype)]


def _judge(op: str, dtype: torch.dtype, device: torch.device) -> list[Result]:
    """Test ``op`` in ``dtype``, keep the answer, and warn of a failure."""
    _refuse_capture(op, device)
    # Whoever asks first may be in inference mode, where no gradient could be compared.
    with (_disable_current_modes(), torch.inference_mode(False), torch.enable_grad(),
          torch.autocast(device.type, enabled=False)):
        found = [judge(case, device, dtype, "triton") for case in cases_of(op, dtype)]
    wrong = [result.failure for result in found if result.failure]
    capability = _capability(device) or (0, 0)
    _failures[op, dtype, capability] = wrong[0] if wrong else ""
    if wrong:
        more = f" ({len(wrong) - 1} further examples failed)" if len(wrong) > 1 else ""
        warnings.warn(f"fastmim: the Triton kernel of {op} failed its self-test in {_name(dtype)} on sm_{capability[0]}"
                      f"{capability[1]} and impl='auto' falls back to torch for that dtype: {wrong[0]}{more}",
                      RuntimeWarning, stacklevel=6)
    return found


def _refuse_capture(op: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"the self-test of {op} cannot run while a CUDA graph is captured; call "
                           "fastmim_kernels.check.self_test.run() before, or name impl='triton'")


def _capability(device: torch.device) -> tuple[int, int] | None:
    """Of a GPU that is there; a trace may name one on a machine that has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.cuda.is_available() else None


def judge(case: Case, device: torch.device, dtype: torch.dtype, impl: str) -> Result:
    """``case`` by ``impl`` against the float64 oracle; what it raises is part of the result."""
    try:
        return Result(case.op, case.variant, dtype, *errors(case, device, dtype, impl))
    except Exception as broken:  # a broken compiler or driver shows in many types
        nan = float("nan")
        return Result(case.op, case.variant, dtype, "", nan, nan,
                      f"{type(broken).__name__}: {' '.join(str(broken).split())[:300]}")


def errors(case: Case, device: torch.device, dtype: torch.dtype, impl: str) -> tuple[str, float, float]:
    """(name, error, limit) of the output or gradient that is nearest to its limit or furthest beyond it."""
    low = {name: dtype for name in case.low}
    rounded = inputs_of({k: v.to(dtype).float() if k in low else v for k, v in case.build().items()}, {}, device)
    double = {k: torch.float64 for k, v in rounded.items() if isinstance(v, Tensor) and v.is_floating_point()}
    truth = run_case(case, rounded, double, device, "reference")
    plain = [relative(p, t) for p, t in zip(run_case(case, rounded, low, device, "reference"), truth, strict=True)]
    ours = run_case(case, rounded, low, device, impl)
    outputs = [f"output {i}" for i in range(len(truth) - len(case.grads))]
    # What an op stores in its dtype and reads again, such as a norm's stream, is rounded; plain torch may keep it wide.
    rounding = torch.finfo(dtype).eps / 2
    found = [(name, relative(o, t), max(FACTOR * p + FLOOR, rounding))
             for name, o, p, t in zip(outputs + [f"d {n}" for n in case.grads], ours, plain, truth, strict=True)]
    return max(found, key=lambda each: each[1] / each[2])


def run_case(case: Case, arguments: dict[str, Any], dtypes: dict[str, torch.dtype], device: torch.device, impl: str
             ) -> list[Tensor]:
    """Outputs and gradients of a fixed cotangent."""
    inputs = inputs_of(arguments, dtypes, device)
    for name in case.grads:
        inputs[name] = inputs[name].detach().requires_grad_()
    outputs = listed(OPS[case.op](**inputs, impl=impl))
    if case.grads:
        used = outputs if case.used is None else [outputs[i] for i in case.used]
        cotangents = [normal(*o.shape).to(device, o.dtype) for o in used]
        outputs += torch.autograd.grad(used, [inputs[n] for n in case.grads], cotangents)
    return [o.detach() for o in outputs]


def inputs_of(arguments: dict[str, Any], dtypes: dict[str, torch.dtype], device: torch.device) -> dict[str, Any]:
    """``arguments`` on ``device``, those in ``dtypes`` cast."""
    moved = {name: _to(value, device) for name, value in arguments.items()}
    return moved | {name: moved[name].to(dtype) for name, dtype in dtypes.items()}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def listed(out: Any) -> list[Tensor]:
    """The results of an op."""
    return [out] if isinstance(out, Tensor) else list(out)


def relative(value: Tensor, truth: Tensor) -> float:
    """RMS of the error over that of ``truth`` (over 1 where that is zero); infinite where ``value`` is not a number."""
    error = (value.to(truth.device).double() - truth).square().mean().sqrt().item()
    scale = truth.square().mean().sqrt().item() or 1.0
    return error / scale if error == error else float("inf")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
