"""The floors of the house: an import may only point down, and the config stops at the cli and train()."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import house
from tests.house import ROOT, imports, names_of

# What each room may import from this repository, besides itself and, for CONFIG_READERS, the config.
ALLOWED = {
    "fastmim": {"fastmim.engine", "fastmim.objectives"},
    "fastmim.cli": {"fastmim.commands", "fastmim.engine", "fastmim.errors", "fastmim.threads"},
    "fastmim.commands": {
        "fastmim.engine",
        "fastmim.data",
        "fastmim.doctor",
        "fastmim.evaluate",
        "fastmim.plan",
        "fastmim.profiling",
        "fastmim.report",
        "fastmim.files",
        "fastmim.wording",
        "fastmim.errors",
        "fastmim.threads",
    },
    "fastmim.__main__": {"fastmim.cli"},
    # The checks ask the encoders what they take, the mask how many units it hides, and the data how samples are read.
    "fastmim.config": {"fastmim.models", "fastmim.objectives", "fastmim.data", "fastmim.files", "fastmim.wording"},
    "fastmim.engine": {
        "fastmim.evaluate",
        "fastmim.interop",
        "fastmim.objectives",
        "fastmim.models",
        "fastmim.data",
        "fastmim.files",
        "fastmim.errors",
        "fastmim.wording",
        "fastmim_kernels",
    },
    "fastmim.doctor": {"fastmim_kernels"},
    "fastmim.plan": {
        "fastmim.engine",
        "fastmim.data",
        "fastmim.objectives",
        "fastmim.files",
        "fastmim.wording",
        "fastmim_kernels",
    },
    "fastmim.profiling": {"fastmim.engine", "fastmim.files", "fastmim.wording"},
    "fastmim.report": {"fastmim.engine", "fastmim.evaluate", "fastmim.data", "fastmim.files", "fastmim.wording"},
    "fastmim.evaluate": {
        "fastmim.objectives",
        "fastmim.models",
        "fastmim.data",
        "fastmim.files",
        "fastmim.wording",
        "fastmim_kernels",
    },
    "fastmim.interop": {"fastmim.objectives", "fastmim.models", "fastmim_kernels"},
    "fastmim.objectives": {"fastmim.models", "fastmim_kernels"},
    "fastmim.models": {"fastmim_kernels"},
    "fastmim.data": {"fastmim_kernels", "fastmim.files", "fastmim.wording"},
    "fastmim.files": set(),
    "fastmim.wording": set(),
    "fastmim.errors": {"fastmim.wording"},
    "fastmim.threads": set(),
    "fastmim_kernels": set(),
}
# train() and what it builds from; some commands build the same, and are beside the cli for length only.
CONFIG_READERS = {
    "fastmim",
    "fastmim.cli",
    "fastmim.commands.configs",
    "fastmim.commands.convert",
    "fastmim.commands.finetune",
    "fastmim.commands.images",
    "fastmim.commands.machine",
    "fastmim.commands.masks",
    "fastmim.commands.own",
    "fastmim.commands.probe",
    "fastmim.commands.statistics",
    "fastmim.engine.build",
    "fastmim.engine.train",
    "fastmim.plan.command",
    "fastmim.plan.own_command",
    "fastmim.plan.own_text",
    "fastmim.profiling.command",
}
NOBODY_IMPORTS = {"benchmarks", "tests", "configs"}
OPTIONAL = {
    "triton",
    "deepspeed",
    "nvidia",
    "pynvml",
    "matplotlib",
    "tensorboard",
    "wandb",
    "mlflow",
    "sqlalchemy",
    "alembic",
    "transformers",
    "skimage",
    "sklearn",
    "mlxtend",
    "rich",
    "onnx",
    "onnxruntime",
    "onnxscript",
}


def sources() -> dict[str, Path]:
    return {module: path for module, path in house.sources(ROOT).items() if module.split(".")[0] != "benchmarks"}


def room(name: str) -> str | None:
    """The room of a module of ours: ``fastmim.engine.train`` is in ``fastmim.engine``."""
    parts = name.split(".")
    if parts[0] == "fastmim_kernels":
        return parts[0]
    if parts[0] != "fastmim":
        return None
    candidate = ".".join(parts[:2])
    return candidate if candidate in ALLOWED else "fastmim"


def violations(module: str, path: Path) -> list[str]:
    home = room(module)
    assert home is not None
    found = []
    for line, name in imports(module, path):
        target = room(name)
        if name.split(".")[0] in NOBODY_IMPORTS:
            found.append(f"{path.name}:{line} imports {name}, which nobody may")
        elif target in (None, "fastmim", home):
            continue
        elif target == "fastmim.config":
            if module not in CONFIG_READERS:
                found.append(f"{path.name}:{line} {module} reads the config")
        elif target not in ALLOWED[home]:
            found.append(f"{path.name}:{line} {home} imports {name}: not on a lower floor")
    return found


@pytest.mark.parametrize("module, path", sorted(sources().items()))
def test_imports_point_down(module: str, path: Path) -> None:
    found = violations(module, path)
    assert not found, "\n".join(found)


def test_every_module_lives_in_a_known_room() -> None:
    """A new room needs a row in ALLOWED, or nothing here would look at it."""
    homeless = [m for m in sources() if room(m) == "fastmim" and m not in ("fastmim", "fastmim._version")]
    assert not homeless


def test_public_root_is_not_used_inside() -> None:
    """``import fastmim`` inside would go round the floors through the root's lazy names."""
    inside = {
        f"{module}:{line}"
        for module, path in sources().items()
        for line, name in imports(module, path)
        if name in {"fastmim.train", "fastmim.load_config", "fastmim.create_objective", "fastmim.Config"}
    }
    assert not inside


@pytest.mark.parametrize(
    "home, forbidden",
    [
        ("fastmim_kernels", "fastmim"),
        ("fastmim.models", "fastmim.data"),
        ("fastmim.data", "fastmim.models"),
        ("fastmim.data", "fastmim.objectives"),
        ("fastmim.objectives", "fastmim.data"),
        ("fastmim.objectives", "fastmim.engine"),
        ("fastmim.engine", "fastmim.cli"),
        ("fastmim.engine", "fastmim.plan"),
    ],
)
def test_rooms_that_must_not_meet(home: str, forbidden: str) -> None:
    """The design's sentences, said once more without the table above."""
    found = [
        f"{module}:{line}"
        for module, path in sources().items()
        if module == home or module.startswith(f"{home}.")
        for line, name in imports(module, path)
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]
    assert not found


@pytest.mark.parametrize("module, path", sorted(sources().items()))
def test_optional_packages_are_imported_at_the_point_of_use(module: str, path: Path) -> None:
    """No optional import at module level: importing fastmim must work without them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name.split(".")[0] for node in top for name in names_of(node, module, False)}
    # A file that is itself the one home of a Triton kernel is imported lazily as a whole.
    optional = OPTIONAL - {"triton"} if module.startswith("fastmim_kernels.") else OPTIONAL
    assert not names & optional


@pytest.mark.parametrize("package", ["fastmim", "fastmim_kernels", "benchmarks"])
def test_no_circle_of_imports(package: str) -> None:
    """Of modules and of rooms; a lazy import closes a circle as well."""
    graph = {module: targets for module, targets in house.modules(ROOT).items() if module.split(".")[0] == package}
    assert house.circles(graph) == []
    assert house.circles(house.rooms(graph, package)) == []


@pytest.mark.parametrize("package", list(house.FLOORS))
def test_arrows_between_rooms_point_down(package: str) -> None:
    assert house.climbs(house.rooms(house.modules(ROOT), package), house.FLOORS[package]) == []


def test_no_file_of_a_room_imports_its_op() -> None:
    """An implementation knows nothing of how its op is declared; what both need stands in the room's layout."""
    graph = house.modules(ROOT)
    assert "fastmim_kernels.mlp.on_torch" in graph["fastmim_kernels.mlp.op"]
    inside = {(m, t) for m, targets in graph.items() for t in targets if t.rpartition(".")[0] == m.rpartition(".")[0]}
    assert not {(m, t) for m, t in inside if t.startswith("fastmim_kernels.") and t.endswith(".op")}


def test_a_circle_and_a_climb_are_seen() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert house.circles(graph) == [["a", "b", "c"]]
    assert house.back_edges(graph) == 3
    assert house.climbs({"a": {"b"}, "b": set(), "c": {"b"}}, (("a",), ("b", "c"))) == ["a -> b", "c -> b"]
    assert house.climbs({"new": set()}, (("a",),)) == ["new has no floor"]


def test_a_wrong_import_is_seen(tmp_path: Path) -> None:
    """The rules above catch what they are for."""
    path = tmp_path / "swin.py"
    path.write_text("from ..data import build_loader\nfrom fastmim import config\nimport tests.helpers\n")
    found = violations("fastmim.models.swin", path)
    assert len(found) == 4 and "fastmim.data" in found[0]  # the package and the name in it
    path.write_text("import torch\nfrom .layers import Mlp\nimport fastmim_kernels as fk\n")
    assert violations("fastmim.models.swin", path) == []


def test_kernels_is_a_source_root() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
