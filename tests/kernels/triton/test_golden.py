"""The first step of Microsoft's golden SimMIM runs with every op on its Triton kernel, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmim.interop import load_reference
from tests.golden_kinds.common import read, weights
from tests.golden_kinds.simmim import build_simmim
from tests.test_golden import CASES, check_first_gradients

# The others take minutes: windows of 3 are many programs. What Swin has of its own, the plain softmax, is covered by
# the tests of window_attention.
SMALL = ("simmim_vit_64_p16", "simmim_swinv2_96_w6_norm47")


@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in CASES if p.stem in SMALL])
def test_first_step_matches_microsofts(path: Path) -> None:
    meta, tensors = read(path)
    objective = build_simmim(meta, "triton")
    report = load_reference(objective, weights(tensors))
    shape = (meta["steps"], meta["batch"], 3, meta["img_size"], meta["img_size"])
    images = np.random.default_rng(meta["seed"]).standard_normal(shape)[0].astype(np.float32)
    loss = objective(torch.from_numpy(images), tensors["masks"][0])["loss"]
    loss.backward()
    assert abs(loss.item() - tensors["losses"][0].item()) <= 1e-4 * loss.item()
    check_first_gradients(objective, report.names, tensors)
