"""Discrete autoencoders: published sizes, and DALL·E's computation written out again from its weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmim.models import check_encoder, create_encoder

TINY = dict(img_size=16, codes=12, code_dim=6, embed_dim=8)
MILLIONS = {"dvae": 6.0, "dalle encoder": 53.8, "dalle decoder": 43.8}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_sizes(name, millions):
    family, _, part = name.partition(" ")
    with torch.device("meta"):
        model = create_encoder(dict(name=family))
    found = sum(p.numel() for p in (getattr(model, part) if part else model).parameters())
    assert found / 1e6 == pytest.approx(millions, abs=0.05)


def dalle_encoder(w, x):
    """The encoder as its paper's appendix has it, on a state dict; 2 blocks a group, gain 1/64."""

    def conv(x, name):
        weight = w[f"blocks.{name}.w"]
        return F.conv2d(x, weight, w[f"blocks.{name}.b"], padding=weight.shape[-1] // 2)

    x = conv(0.8 * x + 0.1, "input")
    for group in range(1, 5):
        for block in (1, 2):
            place = f"group_{group}.block_{block}"
            inner = x
            for i in range(1, 5):
                inner = conv(inner.relu(), f"{place}.res_path.conv_{i}")
            x = (conv(x, f"{place}.id_path") if f"blocks.{place}.id_path.w" in w else x) + inner / 64
        x = F.max_pool2d(x, 2) if group < 4 else x
    return conv(x.relu(), "output.conv")


def test_dalle_is_its_definition():
    torch.manual_seed(0)
    model = create_encoder(dict(name="dalle", **TINY)).double()
    images = torch.rand(2, 3, 16, 24, dtype=torch.float64)
    weights = {name.removeprefix("encoder."): p for name, p in model.named_parameters() if name.startswith("encoder.")}
    assert {w.shape[-1] for name, w in weights.items() if "group_1.block_1" in name and name.endswith(".w")} == {3, 1}
    torch.testing.assert_close(model.logits(images), dalle_encoder(weights, images))
    kernels = [
        model.get_parameter(f"decoder.blocks.group_1.block_1.res_path.conv_{i}.w").shape[-1] for i in range(1, 5)
    ]
    assert kernels == [1, 3, 3, 3]
    assert "encoder.blocks.group_1.block_1.id_path.w" not in dict(model.named_parameters())
    assert model.get_parameter("encoder.blocks.group_2.block_1.id_path.w").shape == (16, 8, 1, 1)


@pytest.mark.parametrize("name", ["dvae", "dalle"])
def test_codes_and_back(name):
    torch.manual_seed(0)
    model = create_encoder(dict(name=name, **TINY))
    images = torch.rand(2, 3, 16, 24)
    ids = model(images)
    assert ids.shape == (2, 2, 3) and ids.dtype == torch.int64
    torch.testing.assert_close(ids, model.logits(images).argmax(1))
    pixels = model.pixels(ids)
    assert pixels.shape == images.shape and pixels.min() >= 0 and pixels.max() <= 1
    # Shares that stand for one code give what that code gives.
    torch.testing.assert_close(model.decode(F.one_hot(ids, 12).permute(0, 3, 1, 2).float()).clamp(0, 1), pixels)


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (dict(name="dvae", patch_size=12, img_size=24), "patch_size=12: must be a power of two; use 8 or 16"),
        (dict(name="dalle", patch_size=16), "patch_size=16: must be 8"),
        (dict(name="dvae", img_size=20), "img_size=20: not divisible by patch_size 8; use 16 or 24"),
        (dict(name="dvae", codes=10**6), "codes=1000000: at most 65536"),
    ],
)
def test_sizes_that_cannot_be(encoder, message):
    with pytest.raises(ValueError, match=message):
        check_encoder(encoder)
