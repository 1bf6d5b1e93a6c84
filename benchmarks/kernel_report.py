"""What the compiler makes of every Triton kernel, without a GPU.

Compiles every case of ``aot_cases()`` in ``fastmim_kernels`` ahead of time for the given architectures (those
among them on which the case is launched; what the JIT would share is compiled once); prints registers, spills,
shared memory, the share of global bytes in 128-bit accesses, the tensor-core instructions and what a warp issues
outside of loops and in each; writes them as JSON and CSV, and there, for models that ``op_count.py`` has counted, the
time of the kernel in a step: by bytes and FLOPs, by three roofs at public efficiency, and which of these binds. A
report of everything with ``--record`` also renews ``fastmim_kernels/check/issue_slots.json``, the instructions that
``op_count.py`` and ``fastmim plan`` count.

    python benchmarks/kernel_report.py [--arch 80 90 100] [--module NAME …] [--match REGEX] [--quick]
                                          [--jobs 2] [--known REPORT.json] [--out STEM]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Worker processes import this file too and need the same paths.
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from benchmarks import command  # noqa: E402

COLUMNS = (
    "module",
    "case",
    "arch",
    "num_warps",
    "registers",
    "spills",
    "local_bytes",
    "shared_bytes",
    "blocks_per_sm",
    "share_128",
    "wide_target",
    "hmma",
    "hgmma",
    "tcgen05",
    "atomics",
    "arrivals",
    "loads",
    "stores",
    "once",
    "loops",
    "kernel",
    "model",
    "pure_us",
    "honest_us",
    "efficiency",
    "binds",
)
ISSUE = ("once", "loops")
COUNTED = command.RESULTS / "op_count_roofs.csv"
"""Instructions outside of loops and in each, on the architecture of the issue roof."""
MEASURED = (
    *COLUMNS[COLUMNS.index("registers") : COLUMNS.index("wide_target")],
    *COLUMNS[COLUMNS.index("hmma") : COLUMNS.index("once")],
)

SPILLED = {100: 16}
"""Bytes of a thread in local memory that are no fault: of two values at 255 registers on sm_100, nowhere else."""


def faults(row: dict[str, Any]) -> list[str]:
    """What breaks a target of the project in one row of the report."""
    found = []
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    if row["local_bytes"] > SPILLED.get(row["arch"], 0):
        found.append(f"{row['spills']} spill instructions, {row['local_bytes']} B of local memory")
    if row["share_128"] < row["wide_target"]:
        found.append(f"128-bit share {row['share_128']:.3f} < {row['wide_target']:.2f}")
    if row["dot"] and not row["hmma"] + row["hgmma"] + row["tcgen05"]:
        found.append("no tensor-core instruction")
    if row["blocks_per_sm"] < (1 if row["persistent"] else 2):
        found.append(f"{row['blocks_per_sm']} blocks per SM")
    if row["atomics"]:
        found.append(f"{row['atomics']} atomics: not deterministic")
    return found


def measure(module: str, name: str, arch: int) -> dict[str, Any]:
    """What the compiler makes of one case; its error becomes the column ``error``."""
    from fastmim_kernels.check import aot

    case = next(c for c in aot.cases_of(module) if c.name == name)
    try:
        return aot.compile_case(case, arch)
    except Exception as error:  # the report shows every kernel, also when one does not compile
        return {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}


def report(
    archs: list[int],
    match: str | re.Pattern[str] = "",
    quick: bool = False,
    jobs: int = 1,
    modules: list[str] | None = None,
    known: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Rows of every selected case and architecture, in a fixed order; ``known`` measurements by key are taken."""
    from fastmim_kernels.check import aot

    broken: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for module in modules or aot.kernel_modules():
        try:
            cases = [case for case in aot.cases_of(module) if case.quick or not quick]
        except Exception as error:  # one broken module must not hide the others
            broken += [{"module": module, "case": "aot_cases()", "arch": arch, "error": repr(error)} for arch in archs]
            continue
        cases = [case for case in cases if re.search(match, f"{module}/{case.name}")]
        rows += [_head(module, case, arch) for case in cases for arch in archs if arch in case.archs]
    measured = dict(known or {})
    # One compilation for all cases of a key: the first of them stands for the rest.
    work = {row["key"]: (row["module"], row["case"], row["arch"]) for row in reversed(rows)}
    missing = {key: item for key, item in work.items() if key not in measured}
    print(f"{len(rows)} cases, {len(work)} distinct, {len(missing)} to compile", file=sys.stderr)
    measured |= zip(missing, _measure_all(list(missing.values()), jobs), strict=True)
    return broken + [row | measured[row["key"]] for row in rows]


def _head(module: str, case: Any, arch: int) -> dict[str, Any]:
    """What a row says of the case itself."""
    own = {name: getattr(case, name) for name in ("num_warps", "dot", "wide_target", "persistent")}
    return {"module": module, "case": case.name, "kernel": case.kernel.fn.__name__, "arch": arch, "key": case.key(arch),
            **own}  # fmt: skip


MODELS = {"swin_b": "swin_base", "swinv2_b": "swinv2_base", "swinv2_l": "swinv2_large", "swinv2_h": "swinv2_huge",
          "swinv2_g": "swinv2_giant"}  # fmt: skip
"""In the name of a case → whose steps ``op_count.py`` has counted."""


def roofs(row: dict[str, Any], counted: list[dict[str, str]]) -> dict[str, Any]:
    """What ``op_count.py`` models of the kernel of a row in all launches of a step, where a model is in its name.

    µs an image on an H100 by bytes and FLOPs at 100 % (``pure_us``) and at public efficiency with issue slots
    (``honest_us``), the first over the second, and the roof that binds the larger part.
    """
    from fastmim_kernels.check import issue_slots

    found = re.search(r"(?:^|[/_])(swinv2_[blhg]|swin_b)(?=[-_]|$)", row["case"])
    if found is None or row["arch"] != issue_slots.ARCH:
        return {}
    model, suffix = MODELS[found[1]], f"/triton.{row['kernel']}"
    own = [one for one in counted if one["model"] == model and one["op"].endswith(suffix)]
    if not own:
        return {}
    pure, honest = (sum(float(one[name]) for one in own) for name in ("pure_us", "honest_us"))
    largest = max(own, key=lambda one: float(one["honest_us"]))
    share = {"efficiency": f"{pure / honest:.2f}"} if honest else {}
    return {"model": model, "pure_us": f"{pure:.3f}", "honest_us": f"{honest:.3f}", "binds": largest["binds"], **share}


def read_known(path: Path) -> dict[str, dict[str, Any]]:
    """Measurements by key of an earlier report; of a case that did not compile there is none.

    Raises:
        ValueError: there is no such report; compiling everything instead would take the whole time.
    """
    from fastmim_kernels.check import issue_slots

    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, LookupError, TypeError):
        raise ValueError(f"--known {path}: no report of this command; give its .json, or leave it out") from None
    found = {}
    for row in rows:
        wanted = (*MEASURED, *(ISSUE if row["arch"] == issue_slots.ARCH else ()))
        if row.keys() >= set(wanted):
            found[row["key"]] = {k: row[k] for k in wanted}
    return found


def expression(text: str) -> re.Pattern[str]:
    """A regular expression.

    Raises:
        ArgumentTypeError: it is none.
    """
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def check_modules(modules: list[str] | None) -> None:
    """Raise ValueError for one that has no kernels."""
    from fastmim_kernels.check import aot

    known = aot.kernel_modules()
    if unknown := [name for name in modules or () if name not in known]:
        raise ValueError(f"--module {unknown[0]}: unknown; use of {', '.join(known)}")


def issue_table(rows: list[dict[str, Any]]) -> str:
    """The text of ``issue_slots.json``: instructions of the cases in bfloat16, or whatever their module says first."""
    from fastmim_kernels.check import aot, issue_slots

    own = {(module, case.name) for module in aot.kernel_modules() for case in aot.own_cases_of(module)}
    kept = [row for row in rows if row["arch"] == issue_slots.ARCH and (row["module"], row["case"]) in own]
    lines = [json.dumps({name: row[name] for name in ("module", "case", "key", "once", "loops")}) for row in kept]
    return f'{{"arch": {issue_slots.ARCH}, "rows": [\n' + ",\n".join(lines) + "\n]}\n"


def _measure_all(work: list[tuple[str, str, int]], jobs: int) -> list[dict[str, Any]]:
    if jobs == 1 or len(work) < 2:
        return [measure(*item) for item in work]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(measure, *zip(*work, strict=True)))


def show(rows: list[dict[str, Any]]) -> None:
    width = max((len(f"{r['module']}/{r['case']}") for r in rows), default=4)
    print(
        f"{'case':{width}}  sm  warps regs spill local  shared blocks 128-bit  hmma hgmma tc05  once "
        f"{'loops':20}  faults"
    )
    for r in rows:
        name = f"{r['module']}/{r['case']}"
        problems = "; ".join(faults(r)) or "-"
        if "error" in r:
            print(f"{name:{width}} {r['arch']:3}  {problems}")
            continue
        print(
            f"{name:{width}} {r['arch']:3} {r['num_warps']:6} {r['registers']:4} {r['spills']:5} "
            f"{r['local_bytes']:5} {r['shared_bytes']:7} {r['blocks_per_sm']:6} {r['share_128']:7.3f} "
            f"{r['hmma']:5} {r['hgmma']:5} {r['tcgen05']:4} "
            f"{r.get('once', ''):5} {_loops(r):20}  {problems}"
        )


def _loops(row: dict[str, Any]) -> str:
    """Instructions of each loop that stand in no inner one; a loop in another is in brackets."""
    return " ".join(f"[{own}]" if outer else str(own) for own, outer in row.get("loops", ()))


def write(rows: list[dict[str, Any]], stem: Path) -> None:
    import torch
    import triton

    head = {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n'
    command.write_whole(stem.with_suffix(".json"), text)
    columns, lines = [*head, *COLUMNS], []
    counted = list(command.read_csv(COUNTED))
    for row in rows:
        widths = {k: " ".join(f"{b}x{n}" for b, n in row.get(k, {}).items()) for k in ("loads", "stores")}
        widths["loops"] = _loops(row)
        full = head | row | roofs(row, counted) | widths | {"share_128": round(row.get("share_128", 0), 4)}
        lines.append({column: full.get(column, "") for column in columns})
    command.write_csv(stem.with_suffix(".csv"), columns, lines)


def main(argv: list[str] | None = None) -> int:
    parser = command.Parser("kernel_report.py", __doc__)
    parser.add_argument("--arch", type=command.positive, nargs="+", default=[80, 90, 100], help="architectures, sm_…")
    parser.add_argument("--module", nargs="+", help="kernel modules, such as mlp.on_triton (default: all)")
    parser.add_argument("--match", type=expression, default="", help="regular expression on module/case")
    parser.add_argument("--quick", action="store_true", help="only the subset that every test run compiles")
    parser.add_argument("--jobs", type=command.positive, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--known", type=Path, help="earlier report (.json): only what changed since is compiled")
    parser.add_results("kernel_report", "stem of the .json and .csv")
    args = parser.parse_args(argv)
    check_modules(args.module)
    known = read_known(args.known) if args.known else {}
    rows = report(args.arch, args.match, args.quick, args.jobs, args.module, known)
    if not rows:
        raise ValueError("no case is left by --module, --match, --quick and --arch; leave one of them out")
    show(rows)
    write(rows, args.out)
    if not (args.module or args.match.pattern or args.quick) and args.out == command.RESULTS / "kernel_report":
        from fastmim_kernels.check import issue_slots

        command.write_whole(issue_slots.TABLE, issue_table(rows))
    return 1 if any(faults(row) for row in rows) else 0


if os.environ.pop("TRITON_INTERPRET", "0") not in ("", "0"):
    print("TRITON_INTERPRET ignored: the kernels are compiled", file=sys.stderr)

if __name__ == "__main__":
    command.exit_with("kernel_report.py", main)
