"""Every provider computes the same training step, and a clone is loaded without a trace."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import measure, providers, reference
from benchmarks.providers import Case

SWIN = (("img_size", 64), ("embed_dim", 8), ("depths", (2, 1, 1, 1)), ("num_heads", (1, 2, 4, 8)), ("window_size", 2))
VIT = (("img_size", 64), ("embed_dim", 32), ("depth", 2), ("num_heads", 2))
CASES = {"swin_base": SWIN, "swinv2_base+47": SWIN, "vit_base": VIT, "vit_base_plain": VIT}
THIRD_PARTY = [name for name in ("lightly", "mmpretrain") if importlib.util.find_spec(name)]
CLONES = os.environ.get("FASTMIM_REFERENCE")


def built(names: list[str], case: Case, source: torch.nn.Module) -> list[providers.Provider]:
    """Those of the providers that have such a model."""
    steps = []
    for name in names:
        with contextlib.suppress(providers.Unavailable):
            steps.append(providers.build(name, case, source, reference=CLONES))
    return steps


def gradient_norm(step: providers.Provider, images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of all parameters, in float64; the gradients are gone afterwards."""
    step.backward(step.forward(images, mask))
    grads = [p.grad.double().norm() for p in step.module.parameters() if p.grad is not None]
    step.module.zero_grad(set_to_none=True)
    return torch.stack(grads).norm()


@pytest.mark.parametrize("dtype", providers.DTYPES)
@pytest.mark.parametrize("name", list(CASES))
def test_providers_take_the_same_step(name: str, dtype: str) -> None:
    case = Case(name, dtype, 2, overrides=CASES[name])
    source = case.weights()
    images, mask = case.inputs(source)
    names = ["fastmim", "fastmim-reference", "fastmim-plain-adamw", "fastmim-recompute-fc1", "timm"]
    names += [*(reference.KINDS if CLONES else ()), *THIRD_PARTY]
    steps = built(names, case, source)
    assert len(steps) >= 5
    if dtype == "fp32":
        norms = [gradient_norm(step, images, mask) for step in steps]
        torch.testing.assert_close(norms, [norms[0]] * len(norms), rtol=1e-4, atol=0)
    losses = {step.name: measure.first_losses(step, images, mask) for step in steps}
    assert measure.refusals(losses, "timm", measure.TOLERANCE[dtype]) == {}
    if dtype == "fp32":  # a step without its update would be seen
        first, later = losses["timm"]
        assert measure.refusals({"timm": (first, later), "idle": (first, first)}, "timm", measure.TOLERANCE[dtype])


def test_what_cannot_be_built_says_why() -> None:
    case = Case("swin_base", overrides=SWIN)
    with pytest.raises(providers.Unavailable, match="--reference DIR"):
        providers.build("microsoft-swin", case, case.weights())
    with pytest.raises(ValueError, match="use one of fastmim, "):
        providers.check_name("tim")
    huge = Case("swinv2_huge", overrides=(*SWIN, ("depths", (1, 1, 6, 1))))
    with pytest.raises(providers.Unavailable, match="extra norms"):
        providers.build("timm", huge, huge.weights())


MODEL = """
import torch.nn as nn
from timm.models.layers import DropPath
from torch._six import inf

class Model(nn.Module):
    patch_size = 4
    def __init__(self, config):
        super().__init__()
        self.config = config
    def forward(self, x, mask):
        return x.mean() * mask.sum() / mask.numel()

def build_simmim(config):
    return Model(config)
"""
CONFIG = """
import yaml
from yacs.config import CfgNode as CN
_C = CN()
_C.DATA = CN()
_C.DATA.IMG_SIZE = 224
_C.MODEL = CN()
_C.MODEL.DROP_PATH_RATE = 0.1
_C.MODEL.SWIN = CN()
for key in ("EMBED_DIM", "DEPTHS", "NUM_HEADS", "WINDOW_SIZE"):
    _C.MODEL.SWIN[key] = None
_C.TRAIN = CN()
_C.TRAIN.BASE_LR = 1.0

def _update_config_from_file(config, path):
    config.merge_from_file(path)
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that looks like a clone and asks for modules that are gone."""
    root = tmp_path / "SomeName"
    (root / "models").mkdir(parents=True)
    (root / "configs" / "swin").mkdir(parents=True)
    (root / "main_simmim.py").touch()
    (root / "models" / "__init__.py").touch()
    (root / "models" / "simmim.py").write_text(MODEL, encoding="utf-8")
    (root / "config.py").write_text(CONFIG, encoding="utf-8")
    recipe = root / "configs" / "swin" / "simmim_pretrain__swin_base__800ep.yaml"
    recipe.write_text("TRAIN:\n  BASE_LR: 1e-4\n", encoding="utf-8")
    return root


def test_a_clone_is_found_by_itself_and_in_a_folder(clone: Path, tmp_path: Path) -> None:
    assert reference.find_clones(clone) == reference.find_clones(clone.parent) == {"microsoft-simmim": clone}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no clone of microsoft/SimMIM"):
        reference.find_clones(tmp_path / "empty")


def test_a_clone_is_read_without_a_trace(clone: Path) -> None:
    before, path, files = dict(sys.modules), list(sys.path), sorted(clone.rglob("*"))
    config = reference.case_config(clone, {"name": "swin", "img_size": 64, "embed_dim": 8, "depths": (1, 1)}, 0)
    model = reference.build_reference(clone, config)
    assert (config.TRAIN.BASE_LR, config.DATA.IMG_SIZE, config.MODEL.SWIN.DEPTHS) == (1e-4, 64, [1, 1])
    images, mask = torch.ones(1, 3, 8, 8), torch.tensor([[[True, False], [False, False]]])
    assert model(images, mask)["loss"] == 0.25 and model.patch_size == 4
    left = {name.split(".")[0] for name in sys.modules.keys() - before.keys()}
    assert left.isdisjoint({"models", "config", "yacs"}) and "torch._six" not in sys.modules.keys() - before.keys()
    assert all(sys.modules.get(name) is module for name, module in before.items())
    assert sys.path == path and sorted(clone.rglob("*")) == files


def test_a_setting_that_a_clone_lacks_is_an_error(clone: Path) -> None:
    encoder = {"name": "swin", "img_size": 64, "extra_norm_period": 6}
    with pytest.raises(ValueError, match="extra_norm_period=6"):
        reference.case_config(clone, encoder, 0)
    with pytest.raises(ValueError, match="norm_target=47"):
        reference.case_config(clone, {"name": "swin", "img_size": 64}, 47)
