"""Microsoft's own SimMIM models, loaders and optimisers from a local clone, which is read and never edited.

``--reference DIR`` names a clone of https://github.com/microsoft/SimMIM, of
https://github.com/microsoft/Swin-Transformer, of https://github.com/bytedance/ibot (``ibot_reference.py``) or of
https://github.com/facebookresearch/mae (``mae_reference.py``), or a folder that holds some of them. Their code asks for
modules that current libraries no longer have; these stand in only while the clone is imported, and the clone's
top-level names (``models``, ``data``, ``config``, …) leave ``sys.modules`` again, so that two clones do not meet.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import yaml
from torch import Tensor, nn

# Provider: (files that only this repository has, the model types of its build_simmim).
KINDS = {
    "microsoft-simmim": (("main_simmim.py", "models/simmim.py"), ("swin", "vit")),
    "microsoft-swin": (("main_simmim_pt.py", "models/simmim.py"), ("swin", "swinv2")),
    "bytedance-ibot": (("main_ibot.py", "models/head.py"), ()),
    "facebookresearch-mae": (("main_pretrain.py", "models_mae.py"), ()),
}
# Published pretraining configs, from which a run starts; the sizes of the case are put over them.
_CONFIGS = {"swin": "*pretrain__swin_base*800ep.yaml", "swinv2": "*pretrain__swinv2_base*800ep.yaml",
            "vit": "*pretrain__vit_base*800ep.yaml"}  # fmt: skip
_TOP_LEVEL = ("models", "data", "config", "optimizer", "lr_scheduler", "utils", "logger", "kernels", "loader",
              "main_ibot", "evaluation", "models_mae", "util")
_KEYS = {"embed_dim": "EMBED_DIM", "depths": "DEPTHS", "num_heads": "NUM_HEADS", "window_size": "WINDOW_SIZE",
         "patch_size": "PATCH_SIZE", "in_chans": "IN_CHANS", "depth": "DEPTH", "init_values": "INIT_VALUES",
         "mlp_ratio": "MLP_RATIO", "qkv_bias": "QKV_BIAS", "abs_pos_embed": "USE_APE", "rel_pos_bias": "USE_RPB",
         "shared_rel_pos_bias": "USE_SHARED_RPB"}  # fmt: skip
_ELSEWHERE = {"name", "img_size", "drop_path_rate"}


def find_clones(folder: str | Path) -> dict[str, Path]:
    """Provider → clone, of a clone or of a folder of clones.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder).resolve()
    places = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())] if folder.is_dir() else []
    found: dict[str, Path] = {}
    for name, (files, _) in KINDS.items():
        for place in places:
            if all((place / file).is_file() for file in files):
                found.setdefault(name, place)
    if not found:
        raise ValueError(
            f"--reference {folder}: no clone of microsoft/SimMIM (main_simmim.py), microsoft/Swin-Transformer "
            "(main_simmim_pt.py), bytedance/ibot (main_ibot.py) or facebookresearch/mae (models_mae.py) in it; clone "
            "one of them and give its folder"
        )
    return found


def load_modules(clone: Path, *names: str, more: Mapping[str, ModuleType] | None = None) -> list[ModuleType]:
    """Import modules of a clone by their own top-level names; ``more`` stand in for what they import."""
    import timm.data.transforms as transforms

    # Fine-tuning asks for a function that timm renamed, and sits in the same package as pretraining's loader.
    renamed = mock.patch.object(transforms, "_pil_interp", transforms.str_to_pil_interp, create=True)
    quiet = contextlib.redirect_stdout(io.StringIO())
    with _isolated(clone, more or {}), renamed, quiet, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [importlib.import_module(name) for name in names]


@contextlib.contextmanager
def _isolated(clone: Path, more: Mapping[str, ModuleType]) -> Iterator[None]:
    """The clone first on the path, its names free, the shims in place; everything as before afterwards."""
    path, modules, shims = list(sys.path), dict(sys.modules), {**_shims(), **more}
    bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # leave no files in the clone
    for name in _of_clones(sys.modules):
        del sys.modules[name]
    sys.path.insert(0, str(clone))
    sys.modules.update({k: v for k, v in shims.items() if k not in sys.modules})
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = bytecode
        for name in [*_of_clones(sys.modules), *shims]:
            sys.modules.pop(name, None)
            if name in modules:
                sys.modules[name] = modules[name]
        sys.modules.update({k: modules[k] for k in _of_clones(modules)})


def _of_clones(modules: dict[str, Any]) -> list[str]:
    return [name for name in modules if name.partition(".")[0] in _TOP_LEVEL]


def _shims() -> dict[str, ModuleType]:
    """Modules that the clones import and that their libraries have dropped, or that need not be installed."""
    import timm.layers

    registry = ModuleType("timm.models.registry")
    registry.register_model = lambda build: build  # type: ignore[attr-defined]
    six, yacs, yacs_config = ModuleType("torch._six"), ModuleType("yacs"), ModuleType("yacs.config")
    six.inf = float("inf")  # type: ignore[attr-defined]
    yacs_config.CfgNode = ConfigNode  # type: ignore[attr-defined]
    return {"timm.models.layers": timm.layers, "timm.models.registry": registry, "torch._six": six,
            "yacs": yacs, "yacs.config": yacs_config}  # fmt: skip


class ConfigNode(dict):
    """The few things that the clones' ``config.py`` does with a config tree."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def defrost(self) -> None:
        """Nothing here is ever frozen."""

    freeze = defrost

    def clone(self) -> ConfigNode:
        """A deep copy."""
        return ConfigNode({k: v.clone() if isinstance(v, ConfigNode) else v for k, v in self.items()})

    def merge_from_file(self, path: str) -> None:
        """Put a YAML file over the tree."""
        self.merge(yaml.safe_load(Path(path).read_text(encoding="utf-8")))

    def merge(self, values: dict[str, Any]) -> None:
        """Put a nested dict over the tree; a key that the tree lacks is an error."""
        for key, value in values.items():
            if key not in self:
                raise KeyError(key)
            if isinstance(value, dict):
                self[key].merge(value)
            else:
                self[key] = _number(value)


def _number(value: Any) -> Any:
    # YAML reads 1e-4 as text.
    if isinstance(value, str):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(value)
    return value


def case_config(clone: Path, encoder: dict[str, Any], norm_target: int) -> Any:
    """The clone's defaults, its published pretraining config of the encoder's family, and the case's numbers.

    Args:
        encoder: Keyword arguments of ``fastmim.models.create_encoder`` with the name of a family.

    Raises:
        ValueError: the clone has no way to say what the case asks for.
    """
    family = encoder["name"]
    module = load_modules(clone, "config")[0]
    config = module._C.clone()
    files = sorted(clone.glob(f"configs/**/{_CONFIGS[family]}"))
    if not files:
        raise ValueError(f"--reference {clone}: no configs/**/{_CONFIGS[family]}; is the clone complete?")
    with contextlib.redirect_stdout(io.StringIO()):
        module._update_config_from_file(config, str(files[0]))
    config.defrost()
    node = config.MODEL[family.upper()]
    for key, value in encoder.items():
        if key in _ELSEWHERE:
            continue
        if _KEYS.get(key) not in node and value:
            raise ValueError(f"encoder {key}={value!r}: {clone.name} has no such setting")
        node[_KEYS[key]] = list(value) if isinstance(value, tuple) else value
    config.DATA.IMG_SIZE = encoder["img_size"]
    config.MODEL.DROP_PATH_RATE = encoder.get("drop_path_rate", 0.0)
    if "SIMMIM" in config.MODEL:
        config.MODEL.SIMMIM.NORM_TARGET.ENABLE = bool(norm_target)
        config.MODEL.SIMMIM.NORM_TARGET.PATCH_SIZE = norm_target or 47
    elif norm_target:
        raise ValueError(f"norm_target={norm_target}: {clone.name} predicts raw pixels only")
    return config


class ReferenceSimMIM(nn.Module):
    """A clone's SimMIM under the call that this folder times."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.patch_size = model.patch_size

    def forward(self, images: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Loss of (B, C, H, W) float images under a (B, H/p, W/p) mask; the clone expects integers there."""
        return {"loss": self.model(images, mask.long())}


def build_reference(clone: Path, config: Any) -> ReferenceSimMIM:
    """The clone's SimMIM for a :func:`case_config`."""
    models = load_modules(clone, "models.simmim")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.meshgrid without indexing
        return ReferenceSimMIM(models.build_simmim(config))


def commit_of(clone: Path) -> str:
    """Short commit of a clone, or "unknown"."""
    head = clone / ".git" / "HEAD"
    with contextlib.suppress(OSError):
        text = head.read_text(encoding="utf-8").strip()
        if text.startswith("ref: "):
            text = (clone / ".git" / os.fspath(text[5:])).read_text(encoding="utf-8").strip()
        return text[:7]
    return "unknown"
