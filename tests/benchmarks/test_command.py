"""What all benchmarks' command lines share: defaults in the help, results outside the checkout, errors of one line."""

from __future__ import annotations

import errno
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_kernels, big_model, command, harness, kernel_works, readme_table, report
from benchmarks.proof import command as proof_command
from fastmim.models.sizes import SIZES

ROOT = Path(__file__).resolve().parents[2]


def test_results_are_committed_only_when_told() -> None:
    parser = command.Parser("run.py step", "")
    parser.add_results("measurements.csv")
    assert parser.parse_args([]).out == harness.ROOT / "runs" / "benchmarks" / "measurements.csv"
    assert parser.parse_args(["--record"]).out == harness.RESULTS / "measurements.csv"
    ignored = (harness.ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "/runs/" in ignored


def test_help_says_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "(default: runs/benchmarks/measurements.csv)" in text
    for option in ("--model SIZE", "--shape", "--ops", "--dtype", "--providers", "--batch", "--rounds", "--record"):
        own = text[text.index(f"{option} ", text.index("options:")) + 3 :].partition(" --")[0]
        assert "(default: " in own, own


@pytest.mark.parametrize("script", ["study", "sweep", "transfer"])
def test_what_is_not_there_cannot_be_shown(script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "x.csv"
    with pytest.raises(ValueError, match=f"--show: there is no {absent}; --show --record shows the committed one"):
        importlib.import_module(f"benchmarks.{script}").main(["--show", "--out", str(absent), "--runs", str(tmp_path)])
    assert not any(tmp_path.iterdir()) and capsys.readouterr().out == ""


def test_every_command_says_how_long_it_takes() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in (harness.ROOT / "benchmarks").rglob("*.py")}
    names = {name for source in sources.values() for name in re.findall(r'Parser\("([^"]+)"', source)}
    assert len(names) > 25 and names <= {*command.TAKES}
    assert [name for name, source in sources.items() if "= argparse.ArgumentParser(" in source] == []


@pytest.mark.parametrize("options, said", [
    (["--rounds", "0"], "no whole number of at least 1"),
    (["--model", "vit_bas"], "invalid choice"),
    (["--shape", "grid=8"], "channels is missing"),
    (["--shape", "grid=8,channels=30,heads=4,window=4"], "channels=30: 4 heads do not divide it"),
    (["--out", "/"], "/ is a folder"),
])  # fmt: skip
def test_a_wrong_option_is_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_kernels.parse(options)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error


def test_a_missing_clone_is_one_line() -> None:
    script = harness.ROOT / "benchmarks" / "bench_compare.py"
    words = [sys.executable, str(script), "--reference", "/nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no clone of microsoft/SimMIM" in done.stderr


@pytest.mark.parametrize("error, status, said", [
    (ValueError("a\nb"), 2, "x: a b"),
    (ModuleNotFoundError("No module named 'skimage'", name="skimage"), 2, "pip install scikit-image"),
    (RuntimeError("died"), 1, "x: died"),
    (OSError(28, "No space left on device"), 1, "x: [Errno 28] No space left on device"),
])  # fmt: skip
def test_errors_end_in_one_line(error: Exception, status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as stopped:
        command.exit_with("x", main)
    text = capsys.readouterr().err
    assert stopped.value.code == status and text.count("\n") == 1 and said in text


def test_a_file_on_a_full_disk_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measurements.csv"
    harness.append_rows(path, [{"case": "first"}])
    before, write = path.read_bytes(), Path.write_text

    def full(self: Path, text: str, **options: Any) -> int:
        write(self, text[: len(text) // 2], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RuntimeError, match="measurements.csv cannot be written: No space left.*as it was"):
        harness.append_rows(path, [{"case": "second"}])
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("script, words, status, said", [
    (report, ["--record", "--out", "x"], 2, "not allowed with argument"),
    (report, ["--csv", str(readme_table.CSV), "--out", "/dev/full"], 1, "/dev/full cannot be written: No space left"),
    (readme_table, ["--chek"], 2, "unrecognized arguments: --chek"),
    (proof_command, ["--budget", "soon"], 2, "'soon' is no whole number"),
    (big_model, ["--model", "swin_bas"], 2, "swin_bas"),
    (big_model, ["--precision", "fp8"], 2, "invalid choice: 'fp8'"),
])  # fmt: skip
def test_scripts_end_in_one_line(script: Any, words: list[str], status: int, said: str,
                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        command.exit_with("script.py", lambda: script.main(words))
    error = capsys.readouterr().err
    assert stopped.value.code == status and error.count("\n") == 1 and said in error


@pytest.mark.parametrize("words, said", [
    (["--known", "mistyped.json"], "--known mistyped.json: no report of this command"),
    (["--known", str(ROOT / "README.md")], "README.md: no report of this command"),
    (["--module", "mlp.on_trition"], "--module mlp.on_trition: unknown; use of "),
    (["--match", "("], "'(' is no regular expression: missing )"),
    (["--match", "no such case"], "no case is left by --module, --match"),
])  # fmt: skip
def test_the_kernel_report_compiles_nothing_for_a_wrong_request(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # which the import would take away for good
    script = importlib.import_module("benchmarks.kernel_report")
    monkeypatch.setattr(script, "_measure_all", lambda work, jobs: pytest.fail("compiles") if work else [])
    with pytest.raises(SystemExit) as stopped:
        command.exit_with("kernel_report.py", lambda: script.main([*words, "--out", str(tmp_path / "report")]))
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert not [*tmp_path.iterdir()]


def test_a_screen_on_a_full_disk_is_one_line() -> None:
    script = harness.ROOT / "benchmarks" / "readme_table.py"
    with open("/dev/full", "w") as screen:
        done = subprocess.run([sys.executable, str(script), "--check"], stdout=screen, stderr=subprocess.PIPE,
                              text=True, check=False)  # fmt: skip
    assert done.returncode == 1 and done.stderr == "readme_table.py: [Errno 28] No space left on device\n"


def test_shapes_of_a_vit_are_those_of_its_blocks() -> None:
    size = SIZES["vit_base"]
    assert kernel_works.WORKS["mlp"](size, 2, 2).arguments["x"].shape == (2 * 197, 768)
    assert kernel_works.WORKS["masked_l1"](size, 2, 2).arguments["prediction"].shape == (2, 14, 14, 768)
    found, reasons = kernel_works.ops_of(size, kernel_works.WORKS)
    assert "window_attention" not in found and len(found) + len(reasons) == len(kernel_works.WORKS)


def test_own_shapes(tmp_path: Path) -> None:
    own = kernel_works.own_shape("grid=16,channels=32,heads=2,window=4")
    assert kernel_works.WORKS["window_attention"](own, 2, 2).arguments["qkv"].shape == (2, 16, 16, 96)
    assert kernel_works.WORKS["masked_l1"](own, 2, 2).arguments["target"].shape == (2, 3, 64, 64)
