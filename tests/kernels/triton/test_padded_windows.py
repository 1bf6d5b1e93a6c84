"""Padded maps on the kernels: attention by its definition is the truth, and no token reaches the opposite edge."""

from __future__ import annotations

import copy

import pytest
import torch

import fastmim_kernels as fk
from fastmim.interop import load_timm
from fastmim.models import create_encoder
from fastmim.objectives import create_objective
from tests.kernels.oracle import FLOOR, relative_error
from tests.kernels.test_accelerate import NAMES, create, images, results
from tests.kernels.test_nn import randomise
from tests.kernels.window_definition import as_defined, reach

# Odd edges; more than 64 tokens in a window, which another kernel takes, and a shift along one axis.
GEOMETRIES = {"7x5, windows of 4": ((7, 5), (4, 4)), "9x9, windows of 9x8": ((9, 9), (9, 8))}


@pytest.mark.parametrize("grid, window", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_those_of_the_definition(name: str, grid: tuple[int, int], window: tuple[int, int]
                                                           ) -> None:
    """Of an encoder with the weights of timm's model, and, of the smaller maps, of that on the kernels."""
    size = (4 * grid[0], 4 * grid[1])
    geometry = dict(img_size=size, window_size=window, embed_dim=16, depths=(2,), num_heads=(1,))
    model = create(name, **geometry, mlp_ratio=1.0, num_classes=0, global_pool="")
    truth, x = as_defined(model), images(*size, batch=1)
    plain, expected = results(truth, x), results(copy.deepcopy(truth).double(), x.double())
    encoder = dict(name=name.partition("_tiny")[0], mlp_ratio=1.0, **geometry)
    objective = create_objective("simmim", encoder=encoder, unit=4, impl="triton")
    load_timm(objective, model.state_dict())
    tried = [objective.encoder]
    if window == (4, 4):
        fk.accelerate(model, impl="triton", policy="default")
        tried.append(model)
    for ours in tried:
        for key, value in results(ours, x).items():
            if key not in expected:
                continue  # the mask token's, whose gradient is none
            error, limit = relative_error(value, expected[key]), 4 * relative_error(plain[key], expected[key]) + FLOOR
            assert error <= limit, f"{type(ours).__name__} {key}: error {error:.3g} > {limit:.3g}"


@pytest.mark.parametrize("policy", ["default", "parity"])
@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_token_reaches_its_windows_only(name: str, policy: str) -> None:
    """Tokens of the first and of the last row and column are changed one by one; timm's order lets them wrap."""
    size, chosen = (7, 5), [0, 2, 4, 15, 19, 30, 34]
    encoder = dict(name=name, img_size=size, patch_size=1, embed_dim=16, depths=(2,), num_heads=(1,), window_size=4)
    model = create_encoder(encoder | {"policy": policy, "mlp_ratio": 1.0}, impl="triton")
    randomise(model)
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    others = x + 3 * torch.eye(35)[chosen].view(-1, 1, *size)
    with torch.no_grad():
        change = (model(others) - model(x)).abs().amax(-1).flatten(1)
    near = reach(size, (4, 4), (2, 2)).T[chosen]
    assert change[near].min() > 1e-4
    far = change[~near].max()
    assert far < 1e-5 if policy == "default" else far > 1e-2
