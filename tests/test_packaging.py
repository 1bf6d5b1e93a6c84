"""The package: what a wheel holds, what importing it costs, and what it works without."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fastmim

ROOT = Path(__file__).resolve().parents[1]
# Everything that is not torch, torchvision, timm, pydantic, safetensors or pulled in by them.
BLOCKED = ["rich", "matplotlib", "tensorboard", "triton", "deepspeed", "nvidia.dali", "pynvml"]
BLOCKED += ["wandb", "mlflow", "sqlalchemy", "alembic", "transformers"]
BLOCKED += ["onnx", "onnxruntime", "onnxscript"]
BLOCKED += ["imagecodecs", "skimage", "sklearn", "mlxtend", "scipy", "hypothesis", "pytest"]

# The blocked packages look as if they were not installed: also to a find_spec(), which torch uses to ask.
_BLOCKER = """
import sys
from importlib.machinery import PathFinder
class Without:
    finders = list(sys.meta_path)
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {blocked!r}):
            return None
        specs = (finder.find_spec(name, path, target) for finder in self.finders)
        return next((spec for spec in specs if spec is not None), None)
sys.meta_path[:] = [Without()]
"""


def python(code: str) -> str:
    """Output of `code` in a fresh interpreter that has the checkout and the kernels on its path."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light() -> None:
    """Checked by what is loaded, not by a clock."""
    code = (
        "import sys, fastmim; print([m for m in ('torch', 'pydantic', 'yaml', 'numpy') if m in sys.modules])"
    )
    assert python(code) == "[]\n"


def test_works_in_a_bare_environment() -> None:
    """Import, config, a forward and a backward, an export: with every optional package blocked."""
    code = _BLOCKER.format(blocked=BLOCKED) + (
        "import torch, fastmim, fastmim.interop\n"
        "fastmim.load_config(None, ['train.steps=2'])\n"
        "obj = fastmim.create_objective('simmim', norm_target=47, encoder=dict(name='swinv2', img_size=64,\n"
        "    patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4))\n"
        "mask = obj.random_mask(torch.arange(2))\n"
        "obj(torch.randn(2, 3, 64, 64), mask)['loss'].backward()\n"
        "print('fine')\n"
    )
    assert python(code) == "fine\n"


def test_training_imports_in_a_bare_environment() -> None:
    code = _BLOCKER.format(blocked=BLOCKED) + "import fastmim; print(fastmim.train.__name__)"
    assert python(code) == "train\n"


def test_public_names() -> None:
    assert {"train", "create_objective", "load_config"} <= set(dir(fastmim))
    for name in fastmim.__all__:
        assert getattr(fastmim, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastmim.nothing


def test_the_kernels_folder_shadows_nothing() -> None:
    """`kernels` must stay importable as whatever else is called that: here it is at most a namespace."""
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)"
    assert python(code) == "True\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that the checkout stays clean; no network."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools >= 77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("fastmim", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-q"]
    result = subprocess.run(
        [*command, "-w", str(out), str(source)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    info = f"fastmim-{fastmim.__version__}.dist-info"
    assert tops == {"fastmim", "fastmim_kernels", info}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastmim").rglob("*.py")}
    sources |= {p.relative_to(ROOT / "kernels").as_posix() for p in (ROOT / "kernels").rglob("*.py")}
    assert sources <= set(names)
    assert "fastmim/py.typed" in names and f"{info}/entry_points.txt" in names


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"fastmim-{fastmim.__version__}.dist-info"
    meta = email.message_from_string(archive.read(f"{info}/METADATA").decode())
    assert meta["Version"] == fastmim.__version__ and meta["License-Expression"] == "Apache-2.0"
    extras = {"triton", "zero", "dali", "plots", "loggers", "demo", "profile", "bench", "study", "onnx", "dev", "all"}
    extras |= {"bands"}
    assert set(meta.get_all("Provides-Extra")) == extras
    required = meta.get_all("Requires-Dist")
    # PyPI's apex is another project; a requirement on it would install that.
    assert not any(re.match(r"apex\b", line) for line in required)
    core = {re.split(r"[ <>=;\[]", line)[0] for line in required if "extra ==" not in line}
    assert core == {
        "torch",
        "torchvision",
        "timm",
        "pydantic",
        "safetensors",
        "pyyaml",
        "numpy",
        "pillow",
        "tifffile",
        "rich",
        "jinja2",
    }
    assert "fastmim = fastmim.cli:entry" in archive.read(f"{info}/entry_points.txt").decode()


def test_wheel_runs(wheel: Path, tmp_path: Path) -> None:
    """Unpacked and first on the path, away from the checkout."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import fastmim, fastmim_kernels; print(fastmim.__file__); print(fastmim_kernels.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600, cwd="/"
    )
    assert result.returncode == 0, result.stderr
    assert all(line.startswith(str(tmp_path)) for line in result.stdout.splitlines())


def test_the_source_distribution_is_the_checkout(tmp_path: Path) -> None:
    """Every tracked file, tests with all that they read included: half of a suite would fail or be skipped."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git checkout: there is no list of files to compare with")
    files = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    source = tmp_path / "source"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, timeout=600, check=True)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in files - packed if not name.startswith(".")} == set()


def test_constraints_pin_what_is_declared() -> None:
    """Every core and test dependency has one exact version in constraints.txt."""
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|plots|loggers|demo|dev) = \[(.*?)\]$", text, flags=re.S | re.M)
    declared = {
        re.split(r"[<>=\[]", name)[0].lower() for group in lists for name in re.findall(r'"([^"]+)"', group)
    }
    assert len(lists) == 5 and {"torch", "matplotlib", "pytest"} <= declared
    assert declared - {"fastmim"} <= {name.replace("_", "-") for name in pinned}
