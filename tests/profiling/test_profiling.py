"""``fastmim profile`` on the CPU: real steps, their trace, summary and memory; NVML with a stand-in driver."""

from __future__ import annotations

import json
import mmap
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from fastmim import cli
from fastmim.profiling.nvml import Nvml
from fastmim.profiling.summary import op_name, summarise
from fastmim.profiling.timeline import Timeline

ROOT = Path(__file__).resolve().parents[2]
ARGV = ["profile", str(ROOT / "configs/demo.yaml"), "model.depths=[1, 1]", "model.embed_dim=24"]
ARGV += ["train.micro_batch_size=2", "train.grad_accum_steps=2"]


def test_profile_of_synthetic_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main([*ARGV, "data.path=null", "--steps", "2", "--out", str(tmp_path)])
    out, _ = capsys.readouterr()
    assert status == 0 and "synthetic images" in out and "images/s" in out and "GiB" in out
    assert "NVML: " in out
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any("window_attention" in str(event.get("name")) for event in trace["traceEvents"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["ops"]}
    # two steps of two micro-batches; two blocks of one MLP each
    for name in ("fastmim::mlp", "fastmim::mlp_backward", "fastmim::window_attention"):
        assert rows[name]["calls"] == 2 * 2 * 2, name
    assert rows["optimizer step"]["calls"] == 2
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert memory["peak_bytes"] == max(row["bytes"] for row in memory["samples"]) > 1e7
    assert [span["name"] for span in memory["phases"][:4]] == ["data", "forward", "backward", "update"]
    assert Image.open(tmp_path / "memory.png").width > 400


def test_profile_of_real_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (100, 100), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    images = [f"data.path={tmp_path / 'images'}", "data.num_workers=0"]
    assert cli.main([*ARGV, *images, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    assert f"images of {tmp_path / 'images'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["data.path=/nowhere"], "data.path=/nowhere"),
        (["data.path=null", "--out", "/dev/null/x"], "output.dir=/dev/null/x: cannot be created"),
    ],
)
def test_user_errors_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = [] if "--out" in argv else ["--out", str(tmp_path)]
    status = cli.main([*ARGV, *argv, *out])
    _, err = capsys.readouterr()
    assert status == 2 and message in err.splitlines()[-1] and "Traceback" not in err


def event(name: str, own: float, above: Any = None) -> Any:
    device = SimpleNamespace(name="CPU")
    return SimpleNamespace(name=name, cpu_parent=above, self_cpu_time_total=own, device_type=device)


def test_every_microsecond_belongs_to_one_row() -> None:
    """What an op of ours calls counts as its own; the engine's event around it does not."""
    forward = event("forward", 5)
    mlp = event("fastmim::mlp", 1, forward)
    inner = event("aten::mm", 20, mlp)
    engine = event("autograd::engine::evaluate_function: fastmim::mlpBackward", 2)
    backward = event("fastmim::mlpBackward", 3, engine)
    alone = event("aten::mm", 4)
    rows = {r.name: (r.microseconds, r.calls) for r in summarise([forward, mlp, inner, engine, backward, alone], False)}
    assert rows == {
        "fastmim::mlp": (21, 1), "(between ops)": (7, 2), "fastmim::mlp_backward": (3, 1), "aten::mm": (4, 1),
    }  # fmt: skip
    assert op_name("aten::mm") is None


def test_one_sentence_without_a_driver_or_without_pynvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    missing = Nvml(torch.device("cpu"))
    assert missing.reason.endswith("pip install -e \".[profile]\"") and missing.sample() == {}

    class NVMLError(Exception): ...

    def fails() -> None:
        raise NVMLError("NVML Shared Library Not Found")

    fake = ModuleType("pynvml")
    fake.NVMLError, fake.nvmlInit = NVMLError, fails  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    without = Nvml(torch.device("cpu"))
    assert "no NVIDIA driver answers here (NVML Shared Library Not Found)" in without.reason
    assert "\n" not in without.reason and without.sample() == {}


def test_what_a_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Milliwatts become watts; the GPU is found by its uuid, because CUDA_VISIBLE_DEVICES renumbers it."""
    asked = []
    fake = ModuleType("pynvml")
    fake.__dict__.update(
        NVMLError=Exception,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or "handle",
        nvmlDeviceGetPowerUsage=lambda handle: 321_000,
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=87),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=5 * 2**30),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc"))
    nvml = Nvml(torch.device("cuda", 0))
    assert nvml.sample() == {"power_w": 321, "utilization": 87, "device_bytes": 5 * 2**30}
    assert asked == ["GPU-abc"] and nvml.reason == ""


def test_the_timeline_sees_an_allocation() -> None:
    size = 2**27
    with Timeline(torch.device("cpu")) as timeline:
        with timeline.phase("before"):
            pass
        before = timeline.samples[-1]["bytes"]
        with timeline.phase("after"):
            # From the system itself: an allocator may have kept what earlier tests have freed.
            kept = mmap.mmap(-1, size)
            for page in range(0, size, mmap.PAGESIZE):
                kept[page] = 1
    assert timeline.peak - before > 0.9 * size
