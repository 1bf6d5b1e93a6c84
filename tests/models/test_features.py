"""Pooled features of the last blocks against timm's own modules with the same weights, and by hand."""

from __future__ import annotations

import pytest
import timm
import torch

from fastmim.models import create_encoder

SWIN = dict(img_size=64, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4)
VIT = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, key_bias=True, abs_pos_embed=True)


def perturbed(module):
    """Norms and biases too: where they are 1 and 0, a norm left out of or added to a mean could not be seen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in module.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=generator, dtype=param.dtype))
    return module.double().eval()


def outputs_of(blocks, run):
    """What each module gives, deepest last."""
    found = []
    hooks = [block.register_forward_hook(lambda module, inputs, out: found.append(out)) for block in blocks]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("normed", [True, False])
def test_a_vits_class_tokens_are_those_of_timm(normed):
    own = perturbed(create_encoder({"name": "vit", **VIT}, impl="torch"))
    names = {key: VIT[key] for key in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **names).double().eval()
    weights = {key: value for key, value in own.state_dict().items() if key != "mask_token"}
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs.forward_intermediates(
            images, indices=2, norm=normed, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
        )
    for found, (patches, prefix) in zip(own.features(images, last=2, normed=normed), wanted, strict=True):
        torch.testing.assert_close(found.cls, prefix[:, 0].float())
        torch.testing.assert_close(found.mean, patches.mean(1).float())


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_swins_means_are_those_of_timms_blocks(name):
    """Four blocks over two stages: own widths, the norm on the last stage alone, and V2's gathered map undone."""
    own = perturbed(create_encoder({"name": name, **SWIN}, impl="torch"))
    model = {"swin": "swin_tiny_patch4_window7_224", "swinv2": "swinv2_tiny_window8_256"}[name]
    theirs = timm.create_model(model, num_classes=0, **SWIN).double().eval()
    weights = {key: value for key, value in own.state_dict().items() if key != "mask_token"}
    theirs.load_state_dict(weights, strict=name == "swin")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    blocks = [block for layer in theirs.layers for block in layer.blocks]
    wanted = outputs_of(blocks, lambda: theirs.forward_features(images))
    with torch.no_grad():
        wanted = [theirs.norm(x) if x.shape[-1] == 32 else x for x in wanted]
    found = own.features(images, last=4)
    assert [one.cls.shape[-1] for one in found] == [16, 16, 32, 32]
    for one, tokens in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.mean, tokens.mean((1, 2)).float())
        assert one.cls is one.mean


def test_the_deepest_is_what_the_encoder_gives_and_nothing_is_left_behind():
    own = create_encoder({"name": "vit", **VIT}, impl="torch").eval()
    images = torch.randn(2, 3, 32, 32)
    cls, patches = own.forward_tokens(images)
    (found,) = own.features(images)
    torch.testing.assert_close(found.cls, cls)
    torch.testing.assert_close(found.mean, patches.mean((1, 2)))
    assert not found.cls.requires_grad and not any(block._forward_hooks for block in own.blocks)
    with pytest.raises(ValueError, match="last=4: this encoder has 3 blocks"):
        own.features(images, last=4)
