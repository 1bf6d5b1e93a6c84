"""``fastmim doctor``: it says what will run, notices a wrong op, and its exit status can be relied on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmim_kernels as fk
from fastmim import cli, doctor
from fastmim_kernels.check import self_test

CPU = torch.device("cpu")
# bias_plan computes nothing; the kernels of position_bias are examined as cpb_bias.
NOT_OPS = {"IMPLS", "check_impl", "bias_plan", "position_bias"}
NOT_OPS |= {"Fusion", "fusion", "shape_may_follow", "nn", "accelerate"}


@pytest.fixture
def cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has no GPU, whatever it has, and the interpreter is off."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def case_of(op: str) -> doctor.Case:
    return next(case for case in doctor.SMALL if case.op == op)


def test_every_public_op_is_examined() -> None:
    assert {case.op for case in doctor.SMALL} == set(fk.__all__) - NOT_OPS


@pytest.mark.usefixtures("cpu_only")
def test_all_is_well_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """torch is what a CPU is expected to run: nothing fell back, status 0."""
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["device"] == "cpu"
    assert report["versions"]["torch"] == torch.__version__ and report["versions"]["apex"] is None
    assert len(report["ops"]) == len(doctor.SMALL)
    for op in report["ops"]:
        assert op["implementation"] == "torch" and not op["fell_back"] and not op["failure"], op
        assert 0 <= op["error"] <= op["limit"] < 0.2
        assert op["reason"], "it must say why"


@pytest.mark.usefixtures("cpu_only")
def test_text_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "python: 3." in out and "deepspeed: " in out and "cpu: " in out
    assert "window_attention (cosine)" in out and out.endswith("everything runs as asked\n")


def wrong_gradient(op: Any) -> Any:
    """The op, with 1 % too much gradient unless it is the oracle."""
    def run(x: Tensor, impl: str = "auto") -> Tensor:
        out = op(x, impl=impl)
        return out if impl == "reference" else out + 0.01 * (out - out.detach())
    return run


@pytest.mark.usefixtures("cpu_only")
def test_a_wrong_gradient_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SMALL", (case_of("patch_merge"),))
    monkeypatch.setitem(self_test.OPS, "patch_merge", wrong_gradient(fk.patch_merge))
    report, status = doctor.doctor()
    assert status == 1 and "in float32: error 0.01 of d x against" in report and "1 of 1 did not run as asked" in report


@pytest.mark.usefixtures("cpu_only")
def test_an_op_that_raises_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: Any) -> Tensor:
        raise RuntimeError("PTX was compiled\nwith something else")

    monkeypatch.setitem(self_test.OPS, "gelu", broken)
    report, status = doctor.doctor(as_json=True)
    failures = {op["op"]: op["failure"] for op in json.loads(report)["ops"] if op["failure"]}
    assert status == 1 and failures == {
        "gelu": "gelu (bias) in float32: RuntimeError: PTX was compiled with something else"}


@pytest.mark.usefixtures("cpu_only")
def test_not_a_number_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fk.local_norm_target
    monkeypatch.setattr(doctor, "SMALL", (case_of("local_norm_target"),))
    monkeypatch.setitem(self_test.OPS, "local_norm_target", lambda images, kernel_size, impl="auto":
                        original(images, kernel_size, impl=impl) * (1.0 if impl == "reference" else float("nan")))
    finding, = doctor.examine(CPU)
    assert finding.failure.startswith("local_norm_target in float32: error inf of output 0")


def test_torch_instead_of_triton_is_a_fall_back_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op without a Triton kernel has not fallen back; one whose kernel cannot run has."""
    found = [doctor.Finding("patch_merge", "", "torch", "triton is not installed (pip install triton)"),
             doctor.Finding("made_up", "", "torch", doctor._NO_KERNEL),
             doctor.Finding("gelu", "", "triton", "")]
    for finding in found:
        finding.error, finding.limit = 0.0, 1.0
    assert [f.fell_back for f in found] == [True, False, False]
    monkeypatch.setattr(doctor, "examine", lambda device: found)
    monkeypatch.setattr(doctor, "devices", lambda: [])
    for gpu, status in ((False, 0), (True, 1)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        report, got = doctor.doctor(as_json=True)
        assert got == status
        assert [op["fell_back"] for op in json.loads(report)["ops"]] == [gpu, False, False]


def test_a_kernel_that_failed_its_self_test_has_fallen_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_case", lambda *args: [])
    monkeypatch.setattr(doctor, "self_test_failure", lambda op, dtype, device: f"error 0.3 in {dtype}")
    finding = doctor.Finding("gelu", "bias", *doctor._choice(case_of("gelu"), CPU))
    assert finding.fell_back and finding.implementation == "torch"
    assert finding.reason == ("its Triton kernel failed the self-test: error 0.3 in torch.float32; "
                              "error 0.3 in torch.bfloat16")
    monkeypatch.setattr(doctor, "self_test_failure", lambda op, dtype, device: "wrong" * (dtype == torch.float32))
    finding = doctor.Finding("gelu", "bias", *doctor._choice(case_of("gelu"), CPU))
    assert finding.fell_back and finding.implementation == "triton" and finding.reason.endswith("wrong")


@pytest.mark.cuda
def test_every_kernel_on_this_gpu() -> None:
    report, status = doctor.doctor()
    assert status == 0, report
    for finding in doctor.examine(torch.device("cuda")):
        assert finding.forward_us and finding.gb_per_s
