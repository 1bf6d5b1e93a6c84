"""The proof's command: what is skipped, left, failed and kept, and what the report says of it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import harness
from benchmarks.proof import command, page, store
from benchmarks.proof.part import Part
from benchmarks.proof.process import Worker
from benchmarks.proof.registry import PARTS
from tests.benchmarks.fake_parts import part

BLOCKED = ("pydantic", "deepspeed", "nvidia.dali")
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == blocked or name.startswith(blocked + ".") for blocked in {blocked!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""


def prove(folder: Path, parts: list[Part], *options: str) -> int:
    return command.main(["--dry", "--out", str(folder), *options], parts)


def results(folder: Path, parts: list[Part]) -> dict[str, store.Result]:
    return store.read(folder, parts)


def alive(process: int) -> bool:
    state = Path(f"/proc/{process}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_finished_parts_are_skipped_and_those_beyond_the_budget_left(tmp_path: Path, capsys: pytest.CaptureFixture
                                                                     ) -> None:  # fmt: skip
    parts = [part("passes"), part("is_wrong", seconds=10_000)]
    assert prove(tmp_path, parts, "--budget", "100") == 0
    assert "left for the next run (the budget is spent): is_wrong" in capsys.readouterr().out
    kept = store.path_of(tmp_path, "passes").stat().st_mtime_ns
    assert [*results(tmp_path, parts)] == ["passes"]
    assert prove(tmp_path, parts) == 1
    said = capsys.readouterr().out
    assert "passes: finished before, skipped" in said and "FAILED: is_wrong" in said
    assert store.path_of(tmp_path, "passes").stat().st_mtime_ns == kept
    # A failed part is no finished one; the other is run again only where that is asked for.
    assert prove(tmp_path, parts, "--again", "--parts", "passes") == 0
    assert store.path_of(tmp_path, "passes").stat().st_mtime_ns > kept
    assert "== is_wrong" in (tmp_path / "proof.log").read_text()


def test_results_of_other_sources_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    parts = [part("passes")]
    assert prove(tmp_path, parts) == 0
    monkeypatch.setattr(store, "key", lambda machine, dry: "another")
    capsys.readouterr()
    assert prove(tmp_path, parts) == 0
    assert "skipped" not in capsys.readouterr().out


def test_key_sees_sources_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    (tmp_path / "kernels").mkdir()
    source = tmp_path / "kernels" / "op.py"
    source.write_text("one")
    first = store.key({"name": "H200"}, False)
    assert store.key({"name": "H200"}, False) == first
    assert len({first, store.key({"name": "H100"}, False), store.key({"name": "H200"}, True)}) == 3
    source.write_text("two")
    assert store.key({"name": "H200"}, False) != first


def test_a_part_that_fails_is_named_and_the_rest_go_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = [part(name) for name in ("raises", "dies", "looks_at_nothing", "is_wrong", "passes")]
    assert prove(tmp_path, parts) == 1
    found = results(tmp_path, parts)
    assert {name: result.passed for name, result in found.items()} == {
        "raises": False, "dies": False, "looks_at_nothing": False, "is_wrong": False, "passes": True}  # fmt: skip
    assert found["raises"].reason == "RuntimeError: an illegal memory access"
    assert [fact["name"] for fact in found["raises"].facts] == ["before it broke"]
    assert found["dies"].reason == "its process ended with exit status 3"
    assert found["looks_at_nothing"].reason == "nothing was looked at"
    assert found["is_wrong"].reason == "a large error: nan, expected <= 1e-06"
    assert "FAILED: raises,dies,looks_at_nothing,is_wrong" in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "log" / "raises.log").read_text()


def test_a_part_that_hangs_ends_with_the_budget_and_takes_its_processes_along(tmp_path: Path) -> None:
    parts = [part("hangs")]
    assert prove(tmp_path, parts, "--budget", "4") == 1
    assert results(tmp_path, parts)["hangs"].reason.startswith("took longer than the ")
    child = int(re.search(r"child (\d+)", (tmp_path / "log" / "hangs.log").read_text())[1])  # type: ignore[index]
    assert not alive(child)


def test_the_checkout_is_proved_and_not_what_is_installed(tmp_path: Path) -> None:
    """A fastmim that stands elsewhere on the path, and says so where it is imported."""
    mark, other = tmp_path / "imported", tmp_path / "elsewhere"
    (other / "fastmim").mkdir(parents=True)
    (other / "fastmim" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()")
    words = [sys.executable, str(harness.ROOT / "benchmarks" / "gpu_proof.py"), "--dry", "--out", str(tmp_path / "out"),
             "--parts", "no_sync"]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(other)}, cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not mark.exists()


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_a_part_does_not_outlive_the_command(signal_: signal.Signals, tmp_path: Path) -> None:
    """Else it and what it has started would keep the GPU busy beside the parts of the next run."""
    code = ("import sys; from pathlib import Path; from benchmarks.proof import command\n"
            "from tests.benchmarks.fake_parts import part\n"
            "if __name__ == '__main__': command.main(['--dry', '--out', sys.argv[1]], [part('hangs')])")
    script = tmp_path / "proof.py"
    script.write_text(code)
    path = os.pathsep.join(map(str, (harness.ROOT, harness.ROOT / "kernels")))
    running = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=os.environ | {"PYTHONPATH": path})
    log = tmp_path / "log" / "hangs.log"
    while running.poll() is None and not (log.exists() and log.read_text().endswith("\n")):
        time.sleep(0.1)
    child = int(log.read_text().split()[1])
    running.send_signal(signal_)
    assert running.wait() == -signal_
    for _ in range(600):
        if not alive(child):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child of the part is still there")


def test_who_ends_the_command_has_the_report_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, original = [part("passes"), part("is_wrong")], Worker.run

    def ended(self: Worker, one: Part, seconds: float | None) -> store.Result:
        if one.name == "is_wrong":
            raise KeyboardInterrupt
        return original(self, one, seconds)

    monkeypatch.setattr(Worker, "run", ended)
    with pytest.raises(KeyboardInterrupt):
        prove(tmp_path, parts)
    assert "an op" in (tmp_path / page.CSV).read_text() and "Title of passes" in (tmp_path / page.REPORT).read_text()


def test_a_clone_that_is_given_later_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By the part that measures it alone; without the option what was measured stands."""
    parts = [part("passes"), dataclasses.replace(part("passes"), name="rivals", reference=True)]
    assert prove(tmp_path, parts) == 0
    for options, runs in (((), 0), (("--reference", str(tmp_path)), 1), (("--reference", str(tmp_path)), 0), ((), 0)):
        capsys.readouterr()
        assert prove(tmp_path, parts, *options) == 0
        said = capsys.readouterr().out
        assert "== passes: finished before" in said and said.count("== rivals: Title") == runs


def test_a_failure_of_other_sources_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = [part("is_wrong", seconds=10_000)]
    store.write(tmp_path, store.Result("is_wrong", False, "an error", 1.0, key="of other sources"))
    assert prove(tmp_path, parts, "--budget", "100") == 0
    said = capsys.readouterr().out
    assert "left for the next run" in said and "FAILED" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no CUDA GPU here; use --dry"):
        command.main(["--out", str(tmp_path)], [part("passes")])
    assert results(tmp_path, [part("passes")]) == {}


@pytest.mark.parametrize("options, said", [
    (["--parts", "speed"], "speed: no such part; use some of passes"),
    (["--budget", "-3"], "'-3' is no whole number of at least 0"),
    (["--out", __file__], "is a file; give a folder"),
])  # fmt: skip
def test_options_that_cannot_work(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        prove(tmp_path, [part("passes")], *options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_a_result_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [part("passes")]
    before = store.Result("passes", True, "", 1.0)
    store.write(tmp_path, before)

    def killed(self: Path, target: Path) -> None:
        assert json.loads(self.read_text())["reason"] == "later", "the new file is whole before it takes the name"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            store.write(tmp_path, store.Result("passes", False, "later", 2.0))
    assert results(tmp_path, parts) == {"passes": before}
    store.path_of(tmp_path, "passes").write_text("{")
    assert results(tmp_path, parts) == {}


def test_report_and_csv(tmp_path: Path) -> None:
    parts = [part(name) for name in ("passes", "is_wrong", "hangs")]
    where = {"machine": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "commit": "abc1234", "date": "2026-01-02"}
    row = {"benchmark": "kernels", "case": "mlp forward", "provider": "triton", "seconds": "1.000e-03", **where}
    row.pop("triton")
    done = {
        "passes": store.Result("passes", True, "", 3.0, [], [row], ["<b>one</b> thing"], "now", where),
        "is_wrong": store.Result("is_wrong", False, "error 2 > 1", 1.0, [], [row], [], "old", where),
    }
    page.write(tmp_path, parts, done, "now")
    text = (tmp_path / page.REPORT).read_text()
    for one in parts:
        assert one.title in text
    assert "failed: error 2 &gt; 1 (of other sources, libraries or machine)" in text and "not run" in text
    assert "NVIDIA H200, torch 2.11.0, triton 3.6.0, commit abc1234, 2026-01-02" in text
    assert "&lt;b&gt;one" in text and "<b>" not in text
    with (tmp_path / page.CSV).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(found) for found in rows] == [harness.COLUMNS]
    assert rows[0]["case"] == "mlp forward" and rows[0]["machine"] == "NVIDIA H200" and rows[0]["commit"] == "abc1234"


@pytest.mark.parametrize("columns", [
    {"images_per_sec": "100"},
    {"roofline_share": "0.9", "matmul_share": "0.1"},
    {"ratio": "0.8"},
])  # fmt: skip
def test_rows_are_drawn(columns: dict[str, str], tmp_path: Path) -> None:
    row = {"benchmark": "kernels", "case": "mlp forward", "provider": "triton", "batch": 128, "baseline": "torch"}
    result = store.Result("passes", True, "", 3.0, [], [row | columns], [], "now", {})
    page.write(tmp_path, [part("passes")], {"passes": result}, "now")
    text = (tmp_path / page.REPORT).read_text()
    assert text.count("<figure>") == 1 and text.count('class="part') == len(columns)
    assert all(value in text for value in columns.values())


def test_parts_fit_into_the_budget_and_exist() -> None:
    assert sum(one.seconds for one in PARTS) <= command.BUDGET < 540
    assert all(callable(one.function()) for one in PARTS)


def blocked_environment(folder: Path) -> dict[str, str]:
    """No Python that is started with it finds the packages that the first GPU machine does not have."""
    (folder / "sitecustomize.py").write_text(BLOCKER.format(blocked=BLOCKED))
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return keep | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_dry_run_without_pydantic_deepspeed_and_dali(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = blocked_environment(tmp_path)
    for name in BLOCKED:
        command_line = [sys.executable, "-c", f"import {name}"]
        assert subprocess.run(command_line, env=environment, capture_output=True).returncode == 1
    command_line = [sys.executable, str(harness.ROOT / "benchmarks" / "gpu_proof.py"), "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command_line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = {name: vars(result) for name, result in results(tmp_path, list(PARTS)).items()}
    assert [*found] == [one.name for one in PARTS]
    for name, result in found.items():
        assert result["passed"] and result["left_out"], f"{name} was dry, and says of what"
        assert not result["rows"], f"{name}: a dry run measures nothing"
    exact = [fact for fact in found["losses"]["facts"] if "fp64" in fact["name"] and "from timm's" in fact["name"]]
    assert len(exact) == 2 and all(float(fact["value"]) <= 1e-9 for fact in exact)
