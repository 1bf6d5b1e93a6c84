"""The parts of the proof see what they are for: a wrong loss, a changed bit, a host that waits, an invalid access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bench_kernels, kernel_works
from benchmarks.proof import compiled, graph, kernels, losses, model, ops, repeat, sanitizer, whole_step
from benchmarks.proof.part import Outcome, Setting
from fastmim.engine.graph import is_proven, record_proof
from fastmim.models import create_encoder
from fastmim.models.sizes import SIZES

DRY = Setting("cpu", True)




class Reads(nn.Module):
    """An objective that looks at its loss."""

    def __init__(self, objective: Any) -> None:
        super().__init__()
        self.objective = objective
        self.in_chans, self.img_size, self.encoder = objective.in_chans, objective.img_size, objective.encoder
        self.random_mask = objective.random_mask

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        out = self.objective(images, mask)
        return out if float(out["loss"].detach()) > 0 else {}


def test_kernels_that_do_not_compile_are_named_and_slow_ones_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the parts behind it launch is asked for, each op of which is traced; nothing is compiled here."""
    asked: list[str] = []

    def compile_ahead(launches: list[Any], progress: Any, timeout: float) -> list[str]:
        asked.extend(launch.op.partition("::")[2].removesuffix("_backward") for launch in launches)
        return ["mlp/fc1: not compiled after 1 s", "gelu/gelu_kernel: CompilationError: no"]

    monkeypatch.setattr(compiled, "compile_ahead", compile_ahead)
    monkeypatch.setattr(compiled.bench_kernels, "DTYPES", {"bf16": torch.bfloat16})
    monkeypatch.setattr(compiled.self_test, "request", lambda dtypes: None)
    monkeypatch.setattr(compiled, "shapes", lambda: [one for one in ops.shapes() if one[1] == "stage 0 of swin_base"])
    outcome = Outcome()
    compiled.compiled(Setting("cuda", False), outcome)
    assert {*kernel_works.WORKS} <= {*asked} and not outcome.left_out
    assert [fact.name for fact in outcome.facts if not fact.holds] == ["gelu/gelu_kernel"]


def test_torch_and_timm_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 to 1e-9; and a model that differs in one term of one weight does not."""
    monkeypatch.setattr(losses, "STEPS", 6)
    kwargs = model.encoder("swinv2_tiny", tiny=True)
    ours, timms = (losses.run(name, kwargs, "fp64", "cpu", 1) for name in ("torch", "timm"))
    assert losses.furthest(ours, timms) <= 1e-9 and len({*ours}) == 6
    build = model.timms

    def other(kwargs: dict[str, Any], device: str) -> nn.Module:
        net = build(kwargs, device)
        with torch.no_grad():
            net.encoder.layers[0].blocks[1].attn.logit_scale[0] += 1e-3
        return net

    monkeypatch.setattr(model, "timms", other)
    outcome = Outcome()
    losses._in_double("swinv2_tiny", kwargs, DRY, outcome, 1)
    assert outcome.failure().startswith("swinv2_tiny fp64: torch's losses from timm's")


def test_float32_is_judged_by_what_one_rounding_does(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"timm": [1.0, 1.0], "nudged": [1.0, 1.001], "torch": [1.0, 1.003]}
    monkeypatch.setattr(losses, "run", lambda name, *_, nudged=False: made["nudged" if nudged else name])
    outcome = Outcome()
    losses._rounded("a size", {}, "fp32", DRY, outcome, 1)
    assert not outcome.failure()
    made["torch"] = [1.0, 1.005]
    losses._rounded("a size", {}, "fp32", DRY, outcome, 1)
    assert outcome.failure()
    assert losses.furthest([1.0, float("nan")], [1.0, 1.0]) == float("inf")


def test_nudged_weights_are_one_rounding_away() -> None:
    net = nn.Linear(64, 64)
    before = net.weight.detach().clone()
    losses._nudge(net, torch.bfloat16)
    apart = (net.weight / before - 1).abs()
    assert apart.min() > 0 and apart.max() < 1.1 * 2**-8


def test_bits() -> None:
    nan, zero = torch.tensor(float("nan")), torch.zeros(2, 2)
    assert model.bits_apart([nan, zero], [nan.clone(), zero.clone()]) == 0
    assert model.bits_apart([zero], [-zero]) == 1
    assert model.bits_apart([zero], [zero.t() + torch.finfo(torch.float32).tiny]) == 1


def test_a_second_run_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    build, calls = model.ours, []

    def other(*args: Any) -> Any:
        objective = build(*args)
        calls.append(0)
        if len(calls) == 2:
            with torch.no_grad():
                objective.head.bias[0] += 1e-7
        return objective

    monkeypatch.setattr(model, "ours", other)
    monkeypatch.setattr(repeat, "SIZES", ("swin_base",))
    monkeypatch.setattr(repeat, "STEPS", 1)
    outcome = Outcome()
    repeat.determinism(DRY, outcome)
    assert [fact.holds for fact in outcome.facts] == [False, True]


def test_a_host_that_reads_a_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    build = model.built
    outcome = Outcome()
    monkeypatch.setattr(model, "built", lambda *args: Reads(build(*args)))
    repeat._dry_sync("swin_base", outcome)
    assert "DataDependentOutput" in outcome.failure()


def test_a_mask_whose_numbers_are_read_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    build, outcome = model.built, Outcome()

    def reading(*args: Any) -> Any:
        objective = build(*args)
        draw = objective.random_mask
        objective.random_mask = lambda ids, **key: draw(ids, **key) if ids.tolist() else None
        return objective

    monkeypatch.setattr(model, "built", reading)
    repeat._dry_sync("swin_base", outcome)
    assert "DataDependentOutput" in outcome.failure()


def test_an_op_that_raises_does_not_hide_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter([RuntimeError("does not\ncompile"), {"torch": (1e-7, 1e-6)}, {"torch": (2e-6, 1e-6)}])

    def errors(*_: Any) -> Any:
        found = next(made)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(bench_kernels, "errors", errors)
    outcome = Outcome()
    ops._against_float64("gelu", "a stage", kernel_works.stage(SIZES["swin_tiny"], 3), 1, "torch", DRY, outcome)
    assert [fact.holds for fact in outcome.facts] == [False, True, False]
    assert outcome.facts[0].value == "RuntimeError: does not compile"


@pytest.mark.parametrize("errors, status", [(0, 0), (2, 9)])
def test_what_the_sanitizer_says_counts(errors: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:  # fmt: skip
    tool = tmp_path / sanitizer.TOOL
    tool.write_text(f"#!/bin/sh\necho \"$@\"\necho '========= ERROR SUMMARY: {errors} errors'\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    outcome = Outcome()
    sanitizer.sanitizer(Setting("cuda", False), outcome)
    assert bool(outcome.failure()) == bool(errors) and not outcome.left_out
    assert outcome.facts[-1].value == str(errors)
    assert sanitizer.summary("it was killed") is None


def test_graph_compares_losses_weights_and_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = model.encoder("swin_base", tiny=True)
    parameters = len(list(model.ours(kwargs, "torch", "cpu").parameters()))
    found = graph.history("swin_base", DRY, False)
    assert len(found) == 2 * graph.WARM + graph.STEPS + parameters * (1 + 3)  # step and two moments
    assert len({loss.item() for loss in found[: 2 * graph.WARM + graph.STEPS]}) == 2 * graph.WARM + graph.STEPS


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A made-up GPU on which both encoders were proved before; the folder of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, answer in (("get_device_name", "a GPU"), ("current_device", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
    for kind in KINDS:
        record_proof(torch.device("cuda", 0), kind)
    return tmp_path


KINDS = ("SimMIM of SwinTransformerV2", "SimMIM of SwinTransformer")
ON_GPU = Setting("cuda", False)


def proven() -> list[bool]:
    return [is_proven(torch.device("cuda", 0), kind) for kind in KINDS]


def test_a_graph_that_fails_takes_its_earlier_proof_back(monkeypatch: pytest.MonkeyPatch, proofs: Path) -> None:
    """By another bit, or by what it raises before the other encoder is reached."""
    def run(size: str, setting: Setting, captured: bool) -> list[Tensor]:
        if size == "swin_base":
            raise RuntimeError("cannot be captured")
        return [torch.tensor(float(captured))]

    assert proven() == [True, True], "the kinds are those of the models"
    monkeypatch.setattr(graph, "trained", run)
    monkeypatch.setattr(graph, "history", lambda *_: [torch.zeros(1)])
    with pytest.raises(RuntimeError, match="captured"):
        graph.graph(ON_GPU, Outcome())
    assert proven() == [False, False]


def test_a_proof_that_cannot_be_noted_is_one_all_the_same(monkeypatch: pytest.MonkeyPatch, proofs: Path) -> None:
    for name in ("trained", "history"):
        monkeypatch.setattr(graph, name, lambda *_: [torch.zeros(1)])
    outcome = Outcome()
    graph.graph(ON_GPU, outcome)
    assert not outcome.failure() and not outcome.left_out and proven() == [True, True]

    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "/nowhere")

    monkeypatch.setattr(graph, "record_proof", read_only)
    outcome = Outcome()
    graph.graph(ON_GPU, outcome)
    assert not outcome.failure() and len(outcome.left_out) == 2 and "stays off" in outcome.left_out[0]
    assert proven() == [False, False]


def test_shares_of_measured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each direction: the shares are the closed forms themselves."""
    monkeypatch.setattr(bench_kernels, "times", lambda steps, *_: dict.fromkeys(steps, (1.0, 1.0, 1.0)))
    shape = kernel_works.stage(SIZES["swin_tiny"], 3)
    c, rows = shape["embed_dim"], 2 * shape["grid"] ** 2
    forward, backward = kernels.measured("mlp", shape, "torch", 2, torch.device("cpu"), 1e-3, 1e-3)
    assert float(forward["gflop_per_image"]) == pytest.approx(2 * 2 * rows * c * 4 * c / 2 / 1e9, rel=1e-3)
    assert float(forward["matmul_share"]) == pytest.approx(2 * 2 * rows * c * 4 * c / 1e12 / 1e-3, rel=1e-2)
    # Of each of the two products the gradients of both factors.
    assert float(backward["gflop_per_image"]) == pytest.approx(2 * float(forward["gflop_per_image"]), rel=1e-3)
    moved = kernel_works.WORKS["mlp"](shape, 2, 2)
    assert float(forward["roofline_share"]) == pytest.approx(moved.bytes_forward / 1e9 / 1e-3, abs=1e-3)


@pytest.mark.parametrize("size", ["swinv2_base", "swin_base"])
def test_works_of_a_stage_have_the_shapes_of_the_encoder(size: str) -> None:
    kwargs = dict(SIZES[size], embed_dim=8, num_heads=(1, 2, 4, 8), depths=(1, 1, 1, 1))
    encoder = create_encoder(kwargs)
    for index, layer in enumerate(encoder.layers):
        arguments = kernel_works.WORKS["window_attention"](kernel_works.stage(kwargs, index), 2, 2).arguments
        attention = layer.blocks[0].attn
        edge = arguments["window_size"][0]
        assert arguments["qkv"].shape == (2, 48 >> index, 48 >> index, 3 * (8 << index))
        assert arguments["bias"].shape == (attention.num_heads, edge**2, edge**2)
        assert edge == min(kwargs["window_size"], 48 >> index)
        assert (arguments["shift_size"] != (0, 0)) == (edge < 48 >> index)


def test_a_step_with_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    makers = whole_step.providers

    def wrong(*args: Any) -> Any:
        made = makers(*args)
        build = made["fastmim"]

        def doubled() -> Any:
            step = build()
            forward = step.forward
            step.forward = lambda images, mask: 2 * forward(images, mask)
            return step

        return made | {"fastmim": doubled}

    timed: list[str] = []
    monkeypatch.setattr(whole_step, "providers", wrong)
    monkeypatch.setattr(whole_step.measure, "interleave", lambda calls, rounds: timed.extend(calls))
    outcome = Outcome()
    whole_step.swin_base(DRY, outcome)
    assert outcome.failure().startswith("swin_base: fastmim's loss") and timed == ["timm"]
