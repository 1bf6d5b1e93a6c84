"""The report and the README's table: drawn from CSV rows alone, and looked at in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks import bars, command, harness, readme_table, report, rows, run

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
    found = rows.latest(ROWS, "step")
    assert [(r["provider"], r["batch"], r["images_per_sec"]) for r in found] == [
        ("fastmim", "4", "10.0"), ("timm", "4", "5.0"), ("timm-compiled", "4", "8.0"), ("fastmim", "8", "12.0")
    ]  # fmt: skip


def test_faster_turns_the_ratio_and_its_spread_over() -> None:
    assert rows.faster(ROWS[2]) == pytest.approx((2.0, 1.6, 2.5))
    assert rows.faster(ROWS[0]) is None
    assert rows.faster(ROWS[2] | {"baseline": "timm"}) is None


def test_readme_table() -> None:
    text = readme_table.text(ROWS)
    assert "| model | precision | batch | fastmim, images/s | vs timm | vs timm compiled |" in text
    assert "| swin_base | fp32 | 4 | 10.0 [9.0, 11.0] | 2.00× [1.60, 2.50] | 1.25× [1.00, 1.56] |" in text
    assert "| swin_base | fp32 | 8 | 12.0 [" in text and "– | – |" in text
    assert "| swin_base | fp32 | 4 | 1.50 | 0.50 |" in text
    assert "A CPU, 2 threads" in text
    begin, end = "<!-- measured: begin (benchmarks/readme_table.py) -->", "<!-- measured: end -->"
    new = readme_table.between(f"before\n{begin}\nold\n{end}\nafter\n", "measured", text)
    assert new == f"before\n{begin}\n\n{text}\n\n{end}\nafter\n"
    with pytest.raises(ValueError, match="markers"):
        readme_table.between("nothing", "measured", text)


def test_roofs_of_the_readme() -> None:
    """A line for each model: its own figures, and timm's of the same model."""
    rows = [{"model": model, "side": side, "modelled_us_h100": f"{n}.1", "honest_us_h100": f"{n}.2",
             "h100_us_bound_by_bytes": f"{n}.3", "h100_us_bound_by_flops": f"{n}.4", "h100_us_bound_by_issue": f"{n}.5"}
            for n, (model, side) in enumerate((("a", "eager"), ("a", "ours"), ("b", "ours"), ("b", "eager")))]
    assert readme_table.roofs(rows)[2:] == ["| a | 1.1 | 1.2 | 1.3 | 1.4 | 1.5 | 0.2 |",
                                            "| b | 2.1 | 2.2 | 2.3 | 2.4 | 2.5 | 3.2 |"]


def test_readme_is_what_the_csv_gives() -> None:
    text = README.read_text(encoding="utf-8")
    assert readme_table.with_tables(text) == text, "run benchmarks/readme_table.py"


def test_committed_csv_has_the_schema() -> None:
    lines = readme_table.CSV.read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(harness.COLUMNS)
    for r in harness.read_rows(readme_table.CSV):
        assert r["machine"] and r["commit"] and r["torch"] and re.fullmatch(r"\d{4}-\d\d-\d\d", r["date"])


def test_page_is_self_contained() -> None:
    pytest.importorskip("matplotlib")
    page = report.page(ROWS)
    assert page.count("<figure") == page.count("<figcaption>") == 6 and page.count("<svg") == 1
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)", page) and "<img" not in page
    assert "2.00× [1.60, 2.50]" in page and "not measured" in page
    assert "swin&lt;" in report.page([step("fastmim", 1.0, 1.0, case="swin<")])
    # First the sentence, then its picture, then the contents.
    first = page.index("A training step of fastmim is 1.25 to 2.00 times as fast as others'")
    assert "timm 2.00, timm-compiled 1.25" in page and first < page.index("<figure") < page.index("<nav>")


def test_only_the_roofline_needs_matplotlib() -> None:
    code = ("import sys; sys.modules['matplotlib'] = None; from benchmarks import report, readme_table; "
            "from tests.benchmarks.test_report import ROWS; print(report.page(ROWS[:-1]).count('<figure'))")
    paths = f"{harness.ROOT}:{harness.ROOT / 'kernels'}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=harness.ROOT,
                          env={"PYTHONPATH": paths, "PATH": ""}, timeout=600)  # fmt: skip
    assert done.stdout.strip() == "5"


def widths(picture: str) -> list[float]:
    """Of the bars, in percent of the axis."""
    return [float(share) for share in re.findall(r'class="part[^"]*" style="left:0.00%;width:([\d.]+)%', picture)]


def test_bars_start_at_zero_and_are_as_long_as_their_numbers() -> None:
    usual = rows.at_usual_size(rows.latest(ROWS, "step"))
    picture = bars.grouped(usual, "images_per_sec", "images/s")
    most = 10.0 * 1.1  # the end of the longest whisker
    assert widths(picture) == pytest.approx([100 * rate / most for rate in (10, 5, 8)], abs=0.01)
    assert picture.count('class="group"') == 1 and picture.count("hatched") == 1
    far = [row("kernels", "torch", case=str(r), ratio=str(r), baseline="reference") for r in (0.5, 2.0, 40.0)]
    cut = bars.speedups(far)
    assert widths(cut) == pytest.approx([12.5, 50.0, 100.0]) and cut.count(" cut") == 1 and "40.00×" in cut
    assert cut.count('class="line" style="left:25.00%"') == 3 and "ends in a point" in bars.speedups_show(far)
    assert bars.speedups(far[:2]).count(" cut") == 0 and not bars.speedups([])
    slower = bars.speedups(far[:1])  # the axis reaches the line
    assert widths(slower) == [50.0] and 'class="line" style="left:100.00%"' in slower


def test_parts_of_a_bar_add_up() -> None:
    picture = bars.phases(rows.latest(ROWS, "step")[:1])
    places = re.findall(r'class="part" style="left:([\d.]+)%;width:([\d.]+)%', picture)
    assert [tuple(map(float, p)) for p in places] == [(0, 25), (25, 50), (75, 25)] and "<em>0.4</em>" in picture


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Opens a page in a headless browser."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine: the report was NOT opened in a browser (apt-get install chromium)")

    def run_browser(path: Path, *options: str) -> str:
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                   "--disable-background-networking", "--disable-component-update", "--disable-sync",
                   f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1250,2400", *options,
                   path.as_uri()]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout

    return run_browser


PROBE = """<script>addEventListener("load", () => {
  const page = document.documentElement, parts = [...document.querySelectorAll(".part, svg")];
  const sizes = [...document.querySelectorAll("figure *")].filter(e => e.textContent.trim() && !e.closest("svg"))
    .map(e => parseFloat(getComputedStyle(e).fontSize));
  const svg = [...document.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height);
  parent.postMessage([page.scrollWidth <= innerWidth, parts.length, parts.filter(e => e.getBoundingClientRect().width
    > 0).length, Math.min(...sizes, ...svg), getComputedStyle(document.body).backgroundColor], "*");
});</script>"""
# A window of a browser is 500 px wide at least, a frame is as wide as one asks.
FRAME = """<body style="margin:0"><iframe src="page.html" width="WIDTH" height="2000" style="border:0"></iframe><script>
addEventListener("message", e => { document.body.dataset.found = e.data.join(";") });</script>"""


@pytest.mark.parametrize("scheme, paper", [(1, "rgb(255, 255, 255)"), (0, "rgb(22, 22, 22)")])
@pytest.mark.parametrize("width", [420, 1400])
def test_a_browser_shows_every_picture(scheme: int, paper: str, width: int, tmp_path: Path, browse: Callable[..., str]
                                       ) -> None:
    """The committed page at two widths, in light and in dark: nothing is wider than the page, no text is small."""
    page = (harness.RESULTS / "report.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page + PROBE, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    seen = browse(tmp_path / "frame.html", f"--blink-settings=preferredColorScheme={scheme}", "--dump-dom",
                  "--virtual-time-budget=10000")  # fmt: skip
    fits, parts, shown, smallest, background = re.search(r'data-found="([^"]*)"', seen)[1].split(";")
    assert fits == "true" and background == paper
    assert int(parts) == int(shown) == page.count('class="part') + page.count("<svg") > 100
    assert float(smallest) >= 12


def test_a_browser_draws_the_bars(tmp_path: Path, browse: Callable[..., str]) -> None:
    path = tmp_path / "report.html"
    path.write_text(report.page(ROWS[:-1]), encoding="utf-8")
    browse(path, f"--screenshot={tmp_path / 'page.png'}", "--blink-settings=preferredColorScheme=1")
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    colours = {colour for _, colour in picture.getcolors(maxcolors=2**24)}
    assert picture.size == (1250, 2400)
    # The bars of ours and of timm are there, not only text on white.
    assert {(0x1B, 0x78, 0x37), (0x43, 0x93, 0xC3)} <= colours


def test_committed_report_is_what_the_csv_gives() -> None:
    page = (harness.RESULTS / "report.html").read_text(encoding="utf-8")
    pytest.importorskip("matplotlib")
    drawn = report.page(harness.read_rows(readme_table.CSV))

    def but_for_the_roofline(text: str) -> str:  # whose ids and digits follow matplotlib's version
        return re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)

    assert but_for_the_roofline(page) == but_for_the_roofline(drawn), "run benchmarks/run.py report --record"


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
