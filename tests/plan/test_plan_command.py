"""``fastmim plan``: what it prints, as text, JSON and picture, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmim import cli
from fastmim.config import load_config
from fastmim.engine import progress
from fastmim.engine.build import build_objective
from fastmim.engine.cuda_autocast import cuda_autocast
from fastmim.models.swin import SwinBlock
from fastmim.plan import command
from fastmim.plan.hardware import GPUS
from fastmim.plan.report import cost, share
from fastmim.plan.trace import Footprint

RealTracer = command.Tracer
ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs/demo.yaml")
SMALL = ["model.depths=[1, 1]", "model.embed_dim=24", "train.global_batch_size=64", "data.path=null"]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces without processes of their own: those of a tiny model take less than starting one.

    And without the line about a trace that takes long: a busy machine would print it.
    """

    class Tracer:
        def __init__(self, cfg: object, told: object = None) -> None:
            self.cfg, self.found = cfg, {}

        def start(self, wanted: object) -> None: ...

        def footprint(self, policy: str, low: bool) -> Footprint:
            if (policy, low) not in self.found:
                self.found[policy, low] = command.trace_config(self.cfg, policy, low)
            return self.found[policy, low]

        def close(self) -> None: ...

    monkeypatch.setattr(command, "Tracer", Tracer)
    monkeypatch.setattr(command, "RECOMPUTE", ("none", "full"))
    monkeypatch.setattr(progress, "said_if_slow", lambda *text, **settings: nullcontext())


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["plan", DEMO, *SMALL, *argv])
    return status, *capsys.readouterr()


def test_text_says_what_fits_and_why(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    status, out, err = run(capsys, "--gpus", "2", "--gpu", "a100-40g", "--picture", str(picture))
    assert status == 0 and err == ""
    assert out.startswith("swinv2 on 2 x a100-40g, global batch 64")
    assert "modelled, not measured" in out
    assert "as configured: ZeRO stage 0, recompute none, micro-batch 16 x 2 x 2 GPUs: fits" in out
    assert "fits: weights" in out and "8% headroom" in out and "300 steps of 64" in out
    assert len([line for line in out.splitlines() if line[:1] in "0123" and ("none" in line or "full" in line)]) == 8
    assert Image.open(picture).width > 400


def test_a_short_run_of_a_small_model_is_more_than_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys)[1]
    assert " 0%\n" not in out and "MFU 0%" not in out and "0.00 GPU-days" not in out
    assert "MFU under 1%, under 0.1 GPU-minutes for 19,200 images (300 steps of 64)" in out
    assert re.search(r" <1%$", out, re.MULTILINE)
    assert "for 64 images (1 step of 64)" in run(capsys, "train.steps=1")[1]
    assert "(1 epoch of 1 image, --images)" in run(capsys, "train.steps=null", "train.epochs=1", "--images", "1")[1]


@pytest.mark.parametrize(
    "days, said",
    [
        (0.00001, "under 0.1 GPU-minutes"),
        (0.00006, "under 0.1 to 0.1 GPU-minutes"),
        (0.003, "4.3 to 7.2 GPU-minutes"),
        (0.0099, "14.3 to 23.8 GPU-minutes"),
        (0.01, "0.01 to 0.02 GPU-days"),
        (1200.0, "1,200.00 to 2,000.00 GPU-days"),
    ],
)
def test_what_a_run_takes_is_said_in_days_or_minutes(days: float, said: str) -> None:
    assert cost(days, days / 0.6) == said


def test_a_share_is_nought_only_where_there_is_none() -> None:
    assert [share(part) for part in (0, 0.0001, 0.0099, 0.01, 0.456)] == ["0%", "<1%", "<1%", "1%", "46%"]


@pytest.mark.parametrize("columns", [200, 60])
def test_a_terminal_shows_the_same_words(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run(capsys)[1]
    for name, value in (("COLUMNS", str(columns)), ("LINES", "50"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = run(capsys)[1]
    if columns == 60:  # too narrow for the table
        assert shown == plain
        return
    assert "\x1b[" in shown  # the recommended row's colour
    text = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert re.sub("[─-]{3,}", "", text).split() == re.sub("-{3,}", "", plain).split()
    assert all(line.rstrip() in map(str.rstrip, text.splitlines()) for line in plain.splitlines()[-4:])


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--json", "--gpus", "4", "train.steps=null", "train.epochs=2", "--images", "1000")
    tree = json.loads(out)
    assert status == 0 and tree["gpus"] == 4 and tree["times"].startswith("modelled")
    assert len(tree["options"]) == 8 and tree["smallest_machine"] is None
    for entry in tree["options"]:
        memory = dict(entry["memory_bytes"])
        total = memory.pop("total") + memory.pop("host")
        assert total == pytest.approx(sum(memory.values()))
        assert entry["micro_batch_size"] * entry["grad_accum_steps"] * 4 == 64
    best = tree["recommended"]
    assert best["modelled_images_per_sec"] >= 0.95 * max(e["modelled_images_per_sec"] for e in tree["options"])
    assert best["zero_stage"] == 0
    # 15 whole steps of 64 images, two epochs
    assert tree["images"] == 2 * 15 * 64
    days = tree["images"] / best["modelled_images_per_sec"] * 4 / 86400
    assert best["modelled_gpu_days"] == pytest.approx(days)
    assert best["modelled_gpu_days_at_most"] == pytest.approx(days / 0.6)


def test_recomputing_keeps_less_and_computes_more() -> None:
    cfg = load_config(DEMO, SMALL)
    none, full = (command.trace_config(cfg, policy, False) for policy in ("none", "full"))
    assert full.kept(16) < 0.6 * none.kept(16)
    assert none.flops(16) < full.flops(16) < 1.34 * none.flops(16)


def test_offloaded_block_inputs_leave_the_gpu() -> None:
    deep = [*SMALL[1:], "model.depths=[3, 1]", "efficiency.recompute=full"]
    kept, moved = (
        command.trace_config(load_config(DEMO, [*deep, *more]), "full", False)
        for more in ([], ["efficiency.recompute_offload=true"])
    )
    objective = build_objective(load_config(DEMO, deep))
    sizes: list[int] = []

    def note(block: object, args: tuple[object, ...]) -> None:
        sizes.extend(arg.nbytes for arg in args if isinstance(arg, torch.Tensor))

    for block in (module for module in objective.modules() if isinstance(module, SwinBlock)):
        block.register_forward_pre_hook(note)
    images = torch.zeros(4, 3, *objective.img_size, dtype=torch.uint8)
    with torch.no_grad(), cuda_autocast():
        objective(images, objective.random_mask(torch.arange(4)))
    assert len(sizes) >= 2 * 4 and kept.host(4) == 0
    assert moved.host(4) == pytest.approx(sum(sizes), rel=0.02)
    # A block's two inputs, the stream and its norm, may share memory with each other or with what is kept anyway.
    assert 0.4 * sum(sizes) < kept.kept(4) - moved.kept(4) <= 1.02 * sum(sizes)
    assert moved.peak(4, accumulating=True).total < kept.peak(4, accumulating=True).total
    assert moved.flops(4) == kept.flops(4)


def test_offloading_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["efficiency.zero_stage=3", "efficiency.offload_param=nvme", "efficiency.nvme_path=/none"]
    status, out, _ = run(capsys, "--gpus", "2", *own, "efficiency.recompute=full", "efficiency.recompute_offload=true")
    assert status == 0 and "on nvme a GPU" in out and "of host RAM a GPU" in out
    assert "offload to nvme: neither the drive's speed" in out
    assert "efficiency.recompute_offload: under full and full/n the inputs of recomputed blocks are in host RAM" in out


def test_a_gpu_without_bf16_is_planned_in_fp32_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    status, auto, _ = run(capsys, "--json", "--gpu", "v100-32g")
    tree = json.loads(auto)
    assert status == 0 and tree["precision"] == "fp32" and tree["gpu"]["flops"] == 15.7e12
    assert len(tree["notes"]) == 1 and "v100-32g has no bfloat16" in tree["notes"][0]
    assert "efficiency.precision=fp16 with efficiency.zero_stage=1" in tree["notes"][0]
    asked = json.loads(run(capsys, "--json", "--gpu", "v100-32g", "efficiency.precision=fp32")[1])
    assert asked["notes"] == [] and asked["options"] == tree["options"]
    fast = ["efficiency.precision=fp16", "efficiency.zero_stage=1"]
    half = json.loads(run(capsys, "--json", "--gpu", "v100-32g", *fast)[1])
    assert half["gpu"]["flops"] == 125e12 and half["notes"] == []
    # Without loss scaling float16 underflows: no stage 0 among what is recommended.
    assert {option["zero_stage"] for option in half["options"]} == {1}


def test_the_configs_own_way(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["efficiency.zero_stage=2", "efficiency.offload_optimizer=cpu", "efficiency.recompute=full"]
    status, out, _ = run(capsys, "--json", "--gpus", "2", *own)
    entry = json.loads(out)["configured"]
    assert status == 0
    assert (entry["zero_stage"], entry["recompute"], entry["offload"]) == (2, "full", "optimizer")
    assert entry["memory_bytes"]["optimizer"] == 0 and entry["memory_bytes"]["host"] > 0


def test_does_not_fit_names_a_machine_that_does(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = "name=toy,memory=0.2,tflops=1,bandwidth=10,link=1"
    status, out, _ = run(capsys, "--gpu", tiny, "--json")
    tree = json.loads(out)
    assert status == 0 and tree["recommended"] is None and not tree["configured"]["fits"]
    assert tree["smallest_machine"]["fits"] and tree["smallest_machine"]["gpu"] in GPUS
    status, out, _ = run(capsys, "--gpu", tiny)
    assert "does not fit" in out and "smallest known machine for it: 1 x " in out


def test_more_gpus_than_micro_batches_in_the_global_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """16 images on each of 8 GPUs are more than 64: what would train is planned, and said."""
    status, out, err = run(capsys, "--gpus", "8")
    assert status == 0 and err == ""
    assert "train.micro_batch_size=16: no whole number of them on 8 GPUs makes the global batch of 64; planned" in out
    assert "as configured: ZeRO stage 0, recompute none, micro-batch 8 x 1 x 8 GPUs: fits" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--gpu", "h101"], "--gpu h101: unknown; the nearest is h100-80g"),
        (["--gpus", "0"], "--gpus 0: must be at least 1"),
        (["--gpus", "3"], "train.global_batch_size=64: not a multiple of 48"),
        (["--gpu", "v100-32g", "efficiency.precision=bf16"], "precision=bf16: v100-32g has no bfloat16; use fp32"),
        (["--images", "0"], "--images 0: must be at least 1"),
        (["--picture", "plan.docx"], "--picture plan.docx: no picture ends like this; use .png, .svg or .pdf"),
        (["--picture", "plan"], "--picture plan: no picture ends like this"),
        (["--picture", "nowhere/plan.png"], "--picture nowhere/plan.png: there is no folder nowhere; make it first"),
        (["optim.lr=-1"], "optim.lr=-1: must be >= 0"),
        (
            ["efficiency.zero_stage=2", "efficiency.offload_param=cpu"],
            "efficiency.offload_param=cpu: needs efficiency.zero_stage=3",
        ),
        (
            ["efficiency.zero_stage=2", "efficiency.offload_optimizer=nvme"],
            "efficiency.offload_optimizer=nvme: needs efficiency.zero_stage=3; or use cpu",
        ),
    ],
)
def test_user_errors_are_one_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("fastmim: error: ") and message in err


def test_traces_of_other_processes_are_the_same_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg, told = load_config(DEMO, SMALL), []
    with closing(RealTracer(cfg, lambda done, of: told.append((done, of)))) as tracer:
        tracer.start([("full", True)])
        found = tracer.footprint("full", True)
    here = command.trace_config(cfg, "full", True)
    assert (found.small, found.large) == (here.small, here.large) and told == [(1, 1)]
    # The next plan, of another schedule and folder, traces nothing; of another model, everything.
    again = load_config(DEMO, [*SMALL, "train.steps=7", "optim.lr=1e-3", "efficiency.zero_stage=1"])
    with closing(RealTracer(again)) as tracer:
        monkeypatch.setattr(tracer, "_pool", None)
        kept = tracer.footprint("full", True)
        assert (kept.small, kept.large) == (here.small, here.large)
        assert kept.bound(GPUS["h100-80g"], 7) == here.bound(GPUS["h100-80g"], 7)
        for file in (tmp_path / "fastmim/plan").iterdir():
            file.write_bytes(file.read_bytes()[:-9])
        monkeypatch.setattr(tracer, "_found", {})
        with pytest.raises(AttributeError, match="submit"):  # a file that is cut short is no trace
            tracer.footprint("full", True)
        monkeypatch.undo()
    other = load_config(DEMO, [*SMALL, "model.mlp_ratio=3"])
    assert command._name_of(other, "full", True) != command._name_of(cfg, "full", True)
    assert command._name_of(cfg, "full", False) != command._name_of(cfg, "full", True)


def test_a_file_that_the_objective_reads_is_part_of_a_traces_name(tmp_path: Path) -> None:
    clusters = tmp_path / "clusters.safetensors"
    cfg = load_config(DEMO, ["objective.target=clusters", f"objective.clusters={clusters}"])
    names = [command._name_of(cfg, "none", False)]
    for size in (4, 8):
        clusters.write_bytes(bytes(size))
        names += [command._name_of(cfg, "none", False)] * 2
    assert len(set(names)) == 3
    os.utime(clusters, ns=(0, 0))
    assert command._name_of(cfg, "none", False) not in names


def test_a_loss_that_depends_on_the_micro_batch_is_said() -> None:
    cfg = load_config(ROOT / "configs/moco/vit_small.yaml")
    (note,) = command._notes(cfg, GPUS["h100-80g"])
    assert note.startswith("objective.name=moco: its negatives and BatchNorm statistics are of the micro-batch")
    assert command._notes(load_config(DEMO), GPUS["h100-80g"]) == ()
