"""The structure of a checkout in numbers: circles of imports, arrows back up, lines, hops to a kernel.

    python tests/house.py [CHECKOUT]     # default: this one

Imports are read from the source, lazy and typing-only ones included; the hops are those of one training step.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
Graph = dict[str, set[str]]

# From the ground up; a room may import from those before it. Rooms of one floor know each other only where
# this names them.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "fastmim": (
        ("_version", "files", "wording", "threads"),
        ("errors",),
        ("models", "data"),
        ("objectives",),
        ("config", "evaluate", "interop", "doctor"),
        ("engine",),
        ("plan", "profiling", "report"),
        ("commands",),
        ("cli",),
        ("__main__",),
    ),
    "fastmim_kernels": (
        ("reference",),
        ("common",),
        ("distillation", "linear", "low_copies", "local_norm", "mask_tokens", "patch_merge",
         "position_bias", "unshuffle", "window_attention", "fusion"),
        ("mlp", "residual_norm", "masked_loss", "visible_attention"),
        ("branches",),
        ("nn", "check", "triton"),
    ),
}  # fmt: skip


def sources(root: Path) -> dict[str, Path]:
    """Every module of the two packages and of the benchmarks, by its name."""
    found: dict[str, Path] = {}
    for package, base in (("fastmim", root), ("fastmim_kernels", root / "kernels"), ("benchmarks", root)):
        for path in (base / package).rglob("*.py"):
            parts = list(path.relative_to(base).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def names_of(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """Absolute names of what an import statement may load."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parents = module.split(".")
        keep = len(parents) - node.level + (1 if is_package else 0)
        base = ".".join([*parents[:keep], *([node.module] if node.module else [])])
    # `from fastmim import objectives` imports a room through its parent.
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        for name in names_of(node, module, path.name == "__init__.py"):
            yield node.lineno, name  # type: ignore[attr-defined]


def modules(root: Path) -> Graph:
    """Module → modules of the checkout that it imports; a package counts where nothing in it is named."""
    found = sources(root)
    graph: Graph = {}
    for module, path in found.items():
        known = {name if name in found else f"benchmarks.{name}" for _, name in imports(module, path)} & set(found)
        # `from x import y` names x too, which is no arrow of its own where y is a module.
        passed = {name.rpartition(".")[0] for name in known}
        graph[module] = known - passed - {module}
    return graph


def rooms(graph: Graph, package: str) -> Graph:
    """The arrows between the rooms of a package, its top-level modules and folders."""
    found: Graph = {}
    for module, targets in graph.items():
        if (home := _room(module, package)) is not None:
            others = {_room(target, package) for target in targets} - {None, home}
            found.setdefault(home, set()).update(other for other in others if other is not None)
    return found


def _room(module: str, package: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == package and len(parts) > 1 else None


def circles(graph: Graph) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return sorted(found)


def climbs(arrows: Graph, floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """Arrows that do not point down, and rooms without a floor."""
    level = {room: floor for floor, rooms_of_floor in enumerate(floors) for room in rooms_of_floor}
    found = [f"{room} has no floor" for room in arrows if room not in level]
    for room, targets in arrows.items():
        up = (t for t in targets if level.get(t, -1) >= level.get(room, len(floors)))
        found += [f"{room} -> {target}" for target in up]
    return sorted(found)


def back_edges(arrows: Graph) -> int:
    """Arrows between rooms of one circle: as many would have to go, or fewer."""
    return sum(len(arrows[room] & set(group)) for group in circles(arrows) for room in group)


def lines(root: Path, pattern: str) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in root.glob(pattern))


def scaffolding(root: Path) -> dict[str, int]:
    """Lines in the kernels' files that only say how an op is registered, differentiated, faked and chosen."""
    marks = re.compile(
        r"custom_op|register_fake|register_autograd|register_flop_formula|autograd\.Function|define_op|shortcut"
        r"|and_input\(|once_differentiable|IMPLEMENTATIONS|_FLOAT64\b|if impl == .triton.:|import_triton"
    )
    files = list((root / "kernels").rglob("*.py"))
    hits = {path: len(marks.findall(path.read_text(encoding="utf-8"))) for path in files}
    return {"mentions": sum(hits.values()), "files": sum(1 for count in hits.values() if count)}


HOPS = '''
import sys
from pathlib import Path

found = []

def watch(frame, event, arg):
    code = frame.f_code
    is_kernel = code.co_name == "forward" and code.co_filename.replace("/", "_").endswith(KERNELS)
    if event == "call" and is_kernel and not found:
        while frame is not None:
            if "fastmim" in Path(frame.f_code.co_filename).parts or "fastmim_kernels" in frame.f_code.co_filename:
                found.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
            frame = frame.f_back

KERNELS = ("window_attention_torch.py", "window_attention_on_torch.py")
from fastmim.cli import entry
sys.argv = ["fastmim", "pretrain", *sys.argv[1:]]
sys.setprofile(watch)
try:
    entry()
except SystemExit:
    pass
sys.setprofile(None)
print("HOPS", " ".join(reversed(found)))
'''
TINY = {
    "model.name": "swinv2",
    "model.img_size": 32,
    "model.patch_size": 4,
    "model.embed_dim": 8,
    "model.depths": [1],
    "model.num_heads": [1],
    "model.window_size": 4,
    "objective.unit": 8,
    "data.loader": "synthetic",
    "data.num_workers": 0,
    "train.steps": 1,
    "train.micro_batch_size": 1,
    "output.pictures": 0,
    "output.loggers": "[]",
}


def hops(root: Path) -> list[str]:
    """Our functions on the stack, from that of the command ``pretrain`` to the first kernel on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "empty.yaml"
        config.write_text("", encoding="utf-8")
        command = [sys.executable, "-c", HOPS, str(config), *(f"{key}={value}" for key, value in TINY.items())]
        command.append(f"output.dir={folder}/run")
        environment = {"PYTHONPATH": f"{root}:{root / 'kernels'}", "PATH": "", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("HOPS")), None)
    if line is None:
        raise RuntimeError(done.stderr[-2000:])
    path = line.split()[1:]
    return path[path.index("cli.py:_pretrain") :]


def main(root: Path) -> None:
    graph = modules(root)
    for package in ("fastmim", "fastmim_kernels", "benchmarks"):
        own = {module: targets for module, targets in graph.items() if module.split(".")[0] == package}
        found = circles(own)
        print(f"{package}: {len(own)} modules, {sum(map(len, own.values()))} imports, {len(found)} circles of modules")
        for group in found:
            print(f"  circle: {', '.join(group)}")
        if package not in FLOORS:
            continue
        arrows = rooms(graph, package)
        count = sum(map(len, arrows.values()))
        print(f"  {len(arrows)} rooms, {count} arrows, {back_edges(arrows)} of them within circles of rooms")
        for line in climbs(arrows, FLOORS[package]):
            print(f"  not down: {line}")
    marks: Mapping[str, int] = scaffolding(root)
    print(f"kernels: {lines(root, 'kernels/**/*.py')} lines; scaffolding named {marks['mentions']} times in "
          f"{marks['files']} files")
    for folder in ("models", "objectives", "config", "engine", "plan", "profiling"):
        print(f"fastmim/{folder}: {lines(root, f'fastmim/{folder}/**/*.py')} lines")
    path = hops(root)
    print(f"{len(path) - 1} hops from `fastmim pretrain` to a kernel: {' '.join(path)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
