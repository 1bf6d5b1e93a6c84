"""fastmim: masked image modelling pretraining for Swin, SwinV2 and ViT encoders.

The public names are loaded on first use, so ``import fastmim`` costs a few milliseconds and imports neither
torch nor any optional dependency.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastmim._version import __version__

if TYPE_CHECKING:
    from fastmim.config import Config, load_config, save_config
    from fastmim.engine.train import TrainResult, train
    from fastmim.objectives import create_objective

__all__ = [
    "Config",
    "TrainResult",
    "__version__",
    "create_objective",
    "load_config",
    "save_config",
    "train",
]

_HOMES = {
    "Config": "fastmim.config",
    "load_config": "fastmim.config",
    "save_config": "fastmim.config",
    "TrainResult": "fastmim.engine.train",
    "train": "fastmim.engine.train",
    "create_objective": "fastmim.objectives",
}


def __getattr__(name: str) -> Any:
    """Import a public name at first use (PEP 562)."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'fastmim' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
