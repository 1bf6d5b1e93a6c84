"""Accelerated models on the kernels: what differs from the torch path is who adds the biases of the products."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch

import fastmim_kernels as fk
from tests.kernels.test_accelerate import NAMES, accelerated, check, create, images
from tests.kernels.test_nn import randomise


@pytest.mark.parametrize("name", NAMES)
def test_swin(name: str) -> None:
    """Two blocks, the second shifted, hand on the stream; then a merging of an odd map, and a block that pads it."""
    model = create(name, img_size=(20, 12), window_size=(3, 2), depths=(2, 1))
    check(accelerated(model, impl="triton"), model, images(20, 12, batch=2), factor=4.0)


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_depth_and_a_hooked_mlp(name: str) -> None:
    """A bias that nobody else would add again comes out of the product itself."""
    model = create(name, img_size=16, window_size=4, depths=(2, 1), drop_path_rate=0.5).train()
    ours = accelerated(model, impl="triton")
    for module in (model, ours):
        module.layers[0].blocks[0].mlp.fc1.register_forward_hook(lambda *_: None)
    outputs = []
    for module in (model, ours):
        torch.manual_seed(0)
        outputs.append(module(images(16, 16, batch=4)))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


def test_vit() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2, num_classes=3,
                              init_values=0.1).eval()
    randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, depth=1, num_heads=2,
                                 num_classes=3, init_values=0.1).eval()
        fk.accelerate(ours, impl="triton")
    ours.load_state_dict(model.state_dict())
    check(ours, model, images(32, 32), factor=4.0)
