"""The report and the README's table: drawn from CSV rows alone, and looked at in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from benchmarks import command, harness, plots, readme_table, report, run  # noqa: E402

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
README = harness.ROOT / "README.md"


def row(benchmark: str, provider: str, **values: Any) -> dict[str, Any]:
    shared = {"case": "swin_base", "dtype": "fp32", "batch": "4", "img_size": "192", "ranks": "1", "device": "cpu",
              "machine": "A CPU", "threads": "2", "torch": "2", "timm": "1", "commit": "abc", "date": "2026-01-02",
              "load_average": "2.0", "baseline": "fastmim"}  # fmt: skip
    return dict.fromkeys(harness.COLUMNS, "") | shared | {"benchmark": benchmark, "provider": provider} | values


def step(provider: str, rate: float, ratio: float, **values: Any) -> dict[str, Any]:
    return row("step", provider, images_per_sec=f"{rate}", images_per_sec_p20=f"{rate * 0.9}",
               images_per_sec_p80=f"{rate * 1.1}", ratio=f"{ratio}", ratio_p20=f"{ratio * 0.8}",
               ratio_p80=f"{ratio * 1.25}", forward_s="0.1", backward_s="0.2", optimizer_s="0.1",
               **values)  # fmt: skip


ROWS = [
    step("fastmim", 10.0, 1.0),
    step("timm", 4.0, 0.4),
    step("timm", 5.0, 0.5),  # measured again: the later row counts
    step("timm-compiled", 8.0, 0.8),
    step("fastmim", 12.0, 1.0, batch="8"),
    row("memory", "fastmim", peak_memory_gib="1.5", start_memory_gib="0.5"),
    row("memory", "microsoft-swin", peak_memory_gib="3.0", start_memory_gib="0.5"),
    row("counts", "fastmim", launches="500", mb_per_image="500", gflop_per_image="70", modelled_us_per_image="200"),
]


def test_a_later_row_replaces_an_earlier_one() -> None:
    rows = plots.latest(ROWS, "step")
    assert [(r["provider"], r["batch"], r["images_per_sec"]) for r in rows] == [
        ("fastmim", "4", "10.0"), ("timm", "4", "5.0"), ("timm-compiled", "4", "8.0"), ("fastmim", "8", "12.0")
    ]  # fmt: skip


def test_faster_turns_the_ratio_and_its_spread_over() -> None:
    assert plots.faster(ROWS[2]) == pytest.approx((2.0, 1.6, 2.5))
    assert plots.faster(ROWS[0]) is None
    assert plots.faster(ROWS[2] | {"baseline": "timm"}) is None


def test_readme_table() -> None:
    text = readme_table.text(ROWS)
    assert "| model | precision | batch | fastmim, images/s | vs timm | vs timm compiled |" in text
    assert "| swin_base | fp32 | 4 | 10.0 [9.0, 11.0] | 2.00× [1.60, 2.50] | 1.25× [1.00, 1.56] |" in text
    assert "| swin_base | fp32 | 8 | 12.0 [" in text and "– | – |" in text
    assert "| swin_base | fp32 | 4 | 1.50 | 0.50 |" in text
    assert "A CPU, 2 threads" in text
    old = f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n"
    new = readme_table.with_table(old, ROWS)
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert readme_table.with_table(new, ROWS) == new
    with pytest.raises(ValueError, match="markers"):
        readme_table.with_table("nothing", ROWS)


def test_readme_is_what_the_csv_gives() -> None:
    rows = harness.read_rows(readme_table.CSV)
    text = README.read_text(encoding="utf-8")
    assert readme_table.with_table(text, rows) == text, "run benchmarks/readme_table.py"


def test_committed_csv_has_the_schema() -> None:
    lines = readme_table.CSV.read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(harness.COLUMNS)
    for r in harness.read_rows(readme_table.CSV):
        assert r["machine"] and r["commit"] and r["torch"] and re.fullmatch(r"\d{4}-\d\d-\d\d", r["date"])


def test_page_is_self_contained() -> None:
    page = report.page(ROWS)
    assert page.count("<img") == page.count('src="data:image/png;base64,') == 5
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "http" not in page
    assert "2.00× [1.60, 2.50]" in page and "not measured" in page
    assert "swin&lt;" in report.page([step("fastmim", 1.0, 1.0, case="swin<")])


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Opens a page in a headless browser."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine: the report was NOT opened in a browser (apt-get install chromium)")

    def run_browser(path: Path, *options: str) -> str:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--window-size=1250,2400", *options, path.as_uri()]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return run_browser


PROBE = """<script>addEventListener("load", () => {
  const shown = [...document.images].filter(i => i.complete && i.naturalWidth > 300 && i.offsetWidth > 300);
  document.body.dataset.shown = shown.length;
  document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
});</script>"""


def test_a_browser_shows_every_picture(tmp_path: Path, browse: Callable[..., str]) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.page(ROWS) + PROBE, encoding="utf-8")
    page = browse(path, "--dump-dom")
    assert 'data-shown="5"' in page and 'data-wide="false"' in page
    browse(path, f"--screenshot={tmp_path / 'page.png'}")
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(maxcolors=2**24)}
    assert picture.size == (1250, 2400)
    # The bars of ours and of timm are there, not only text on white.
    assert {(0x1B, 0x78, 0x37), (0x43, 0x93, 0xC3)} <= colours


def test_committed_report_opens(tmp_path: Path, browse: Callable[..., str]) -> None:
    committed = (harness.RESULTS / "report.html").read_text(encoding="utf-8")
    (tmp_path / "copy.html").write_text(committed + PROBE, encoding="utf-8")
    assert f'data-shown="{committed.count("<img")}"' in browse(tmp_path / "copy.html", "--dump-dom")


def test_entry(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.main(["--help"]) == 0 and run.main(["steps"]) == 2
    assert "{kernels,rivals,step,data," in capsys.readouterr().out
    called: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(run, "run", lambda name, argv: called.append((name, argv)) or int(name == "data"))
    assert run.main(["all", "--reference", "clones", "--quick"]) == 1
    names = [name for name, _ in called]
    assert names == list(run.MODULES)
    options = dict(called)
    scratch = command.SCRATCH / "measurements.csv"
    assert options["step"][-4:] == ["--reference", "clones", "--out", str(scratch)]
    assert options["report"] == ["--csv", str(scratch), "--out", str(scratch.with_name("report.html"))]
    called.clear()
    run.main(["all", "--quick", "--record"])
    assert all("--record" in own and "--out" not in own for _, own in called)
