"""Every target and head of SimMIM against a direct computation in float64, gradients included."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmim.models import create_encoder
from fastmim.objectives import create_objective, losses
from fastmim.objectives.targets import patch_statistics
from fastmim_kernels import reference

ENCODERS = {
    "swin": dict(name="swin", img_size=(32, 48), embed_dim=8, depths=(1, 1, 1), num_heads=(1, 2, 4), window_size=4),
    "vit": dict(name="vit", img_size=(48, 32), patch_size=16, embed_dim=16, depth=1, num_heads=2, abs_pos_embed=True),
}
TOKENS = dict(name="dvae", img_size=16, patch_size=4, in_chans=3, embed_dim=8, depth=1, codes=6, code_dim=4)
BATCH = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Clusters of colours of 1, 3 and 6 channels, and a tokenizer."""
    folder = tmp_path_factory.mktemp("targets")
    generator = np.random.default_rng(0)
    for chans in (1, 3, 6):
        save_file({"centres": generator.random((7, chans), dtype=np.float32)}, folder / f"{chans}.safetensors")
    torch.manual_seed(0)
    save_torch(create_encoder(TOKENS).state_dict(), folder / "tokens.safetensors", {"encoder": json.dumps(TOKENS)})
    return folder


def build(files, encoder="swin", chans=3, **own):
    if own.get("target") == "clusters":
        own["clusters"] = str(files / f"{chans}.safetensors")
    if own.get("target") == "tokens":
        own["tokenizer"] = str(files / "tokens.safetensors")
    torch.manual_seed(0)
    statistics = dict(mean=tuple(0.3 + 0.05 * c for c in range(chans)), std=(0.2,))
    return create_objective(
        "simmim", encoder=ENCODERS[encoder] | {"in_chans": chans}, **{"unit": 16} | statistics | own
    )


def squares(x, edge):
    """(B, C, H, W) → (B, C, H/e, W/e, e·e)."""
    b, c, height, width = x.shape
    return x.view(b, c, height // edge, edge, width // edge, edge).transpose(3, 4).flatten(4)


def direct_prediction(objective, tokens):
    """(B, values, H/t, W/t), by the formula of each head."""
    head = objective.head
    if head.before is not None and not head.mixes:
        first = head.before[0]
        tokens = tokens @ first.weight.T + first.bias
        tokens = tokens * 0.5 * (1 + torch.erf(tokens / 2**0.5))
    elif head.mixes:
        tokens = head.before(tokens)  # tests/models/test_inverse_swin.py
    out = tokens @ head.weight.T + head.bias
    b, h, w, _ = out.shape
    s, t = head.stride, objective.target.stride
    out = out.view(b, h, w, -1, s, s).permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h * s, w * s)
    return out[:, :, : objective.img_size[0] // t, : objective.img_size[1] // t]


def direct_error(objective, own, images, raw, prediction):
    """(B, H/t, W/t): of each predicted pixel, from the (B, C, H, W) float64 images in [0, 1], `raw`."""
    t, name = objective.target.stride, own.get("target", "pixels")
    b, chans = raw.shape[:2]
    if name == "pixels":
        window = own.get("norm_target", 0)
        if own.get("norm_patch"):
            target = torch.empty_like(images)
            for sample in range(b):
                for y in range(0, images.shape[2], objective.stride):
                    for x in range(0, images.shape[3], objective.stride):
                        here = (sample, slice(None), slice(y, y + objective.stride), slice(x, x + objective.stride))
                        patch = images[here]
                        target[here] = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
        else:
            target = reference.local_norm_target(images, window) if window else images
        error = prediction - squares(target, t).mean(-1)
        beta = own.get("beta", 1.0)
        size = error.abs()
        of = dict(l1=size, l2=error**2, smooth_l1=torch.where(size < beta, error**2 / (2 * beta), size - beta / 2))
        return of[own.get("loss", "l1")].mean(1)
    mean = squares(raw, t).mean(-1)
    if name == "bins":
        bins = own.get("bins", 8)
        edges = np.arange(1, bins) * 256 / bins - 0.5  # the first level of bin k is the first from 256·k/bins on
        ids = torch.from_numpy(np.digitize((mean * 255).numpy(), edges))
        logits = prediction.view(b, chans, bins, *prediction.shape[2:])
        chosen = logits.gather(2, ids[:, :, None])[:, :, 0]
        return (logits.logsumexp(2) - chosen).mean(1)
    if name == "clusters":
        distance = (mean[:, None] - objective.target.centres[..., None, None]).square().sum(2)
        ids = distance.argmin(1)
    else:
        size = [4 * edge // t for edge in objective.img_size]
        small = F.interpolate(raw.float(), size, mode="bicubic", antialias=True).clamp(0, 1)
        ids = objective.target.tokenizer.model(small)
    return prediction.logsumexp(1) - prediction.gather(1, ids[:, None])[:, 0]


CASES = {
    "pixels": dict(),
    "l2": dict(loss="l2", loss_on="all", encoder="vit"),
    "smooth_l1": dict(loss="smooth_l1", beta=0.25, head="mlp"),
    "window, 1/2": dict(norm_target=7, target_stride=2),
    "patch": dict(norm_patch=True, head="mlp", chans=1),
    "one number a token": dict(target_stride=16, unit=8, chans=6),
    "one number a token, ViT": dict(target_stride=16, encoder="vit", unit=16),
    "coarser than units": dict(target_stride=8, unit=4),
    "8 bins": dict(target="bins", chans=1),
    "256 bins": dict(target="bins", bins=256, target_stride=4, loss_on="all", chans=2, head="mlp"),
    "bins beyond units": dict(target="bins", bins=5, target_stride=16, unit=4),
    "clusters": dict(target="clusters", encoder="vit"),
    "clusters of bands": dict(target="clusters", chans=6, target_stride=4),
    "clusters of greys": dict(target="clusters", chans=1, target_stride=2, loss_on="all"),
    "tokens": dict(target="tokens"),
    "tokens, finer": dict(target="tokens", target_stride=8, head="mlp"),
    "visible only": dict(target="bins", visible_only=True, decoder_dim=8, decoder_num_heads=2, head="mlp"),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_those_of_the_formula(name, files, monkeypatch):
    own = dict(CASES[name])
    if "bins" in name:  # in several steps, as large ones are
        monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1 << 12)
    objective = build(files, **own).double()
    raw = torch.rand(BATCH, objective.in_chans, *objective.img_size, dtype=torch.float64)
    images = (raw - objective.mean) / objective.std
    mask = objective.random_mask(torch.arange(BATCH))
    mask[0, 0, 0] ^= True  # a unit that is not whole
    if own.get("visible_only"):
        mask = objective.random_mask(torch.arange(BATCH))
    loss = objective(images, mask)["loss"]
    found = torch.autograd.grad(loss, list(objective.parameters()), allow_unused=True)

    prediction = direct_prediction(objective, objective._tokens(images, mask))
    error = direct_error(objective, own, images, raw, prediction)
    p, t = objective.patch_size, objective.target.stride
    hidden = torch.ones_like(mask) if own.get("loss_on") == "all" else mask
    pixels = hidden.repeat_interleave(p, 1).repeat_interleave(p, 2)[:, None].double()
    counts = squares(pixels, t).amax(-1)[:, 0]
    expected = (error * counts).sum() / (counts.sum() + 1e-5)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    truth = torch.autograd.grad(expected, list(objective.parameters()), allow_unused=True)
    for (parameter, _), ours, theirs in zip(objective.named_parameters(), found, truth, strict=True):
        assert (ours is None) == (theirs is None), parameter
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-11, msg=parameter)


def test_a_swin_head_sees_every_token_and_the_loss_hidden_ones(files):
    """The heavy head of the paper, on the encoder's window: every parameter learns, in bfloat16 too."""
    objective = build(files, "swin", head="swin_tiny", target="bins")
    images, mask = objective.example(BATCH)
    raw = images.double() / 255
    exact = objective(images, mask)["loss"]
    prediction = direct_prediction(objective, objective._tokens(objective.normalise(images), mask)).double()
    error = direct_error(objective, dict(target="bins"), None, raw, prediction)
    counts = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    expected = (error * counts).sum() / (counts.sum() + 1e-5)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(images, mask)["loss"]
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.head.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", ["8 bins", "clusters", "tokens", "one number a token", "patch"])
def test_runs_on_fake_tensors(name, files):
    with FakeTensorMode():
        objective = build(files, **CASES[name])
        images, mask = objective.example(BATCH)
        loss = objective(images, mask)["loss"]
        loss.backward()
        assert loss.shape == () and objective.reconstruct(images, mask).shape == images.shape


def test_compiles_as_one_graph(files, monkeypatch):
    """Some logits at a time, made again in the backward pass."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 1 << 12)
    objective = build(files, **CASES["8 bins"])
    images, mask = objective.example(BATCH)
    torch._dynamo.reset()
    loss = torch.compile(objective, fullgraph=True, backend="aot_eager")(images, mask)["loss"]
    loss.backward()
    found = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    expected = objective(images, mask)["loss"]
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(found, objective.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["patch", "window, 1/2", "8 bins", "256 bins", "clusters", "clusters of bands"])
def test_a_perfect_prediction_is_the_image(name, files):
    """As near as bins and clusters allow: 1/16 and their distance; the true classes are the likeliest."""
    objective = build(files, **CASES[name])
    target, t = objective.target, objective.target.stride
    images = objective.normalise(objective.example(BATCH)[0])
    if "clusters" in name or t > 1:  # of whole squares of one colour, of the centres
        small = torch.rand(BATCH, objective.in_chans, *(edge // t for edge in objective.img_size))
        if "clusters" in name:
            ids = torch.randint(0, 7, (BATCH, *small.shape[2:]))
            small = target.centres[ids].permute(0, 3, 1, 2)
        images = ((small - objective.mean) / objective.std).repeat_interleave(t, 2).repeat_interleave(t, 3)
    perfect = target.of(images)
    if CASES[name].get("target"):
        groups = target.classify(perfect.flatten(2)).unflatten(2, perfect.shape[2:])
        perfect = F.one_hot(groups, target.classes).permute(0, 1, 4, 2, 3).flatten(1, 2).float()
    perfect = F.interpolate(target.read(perfect), objective.img_size)
    distance = (objective.denormalise(target.undo(perfect, images)) - objective.denormalise(images)).abs().max()
    # A window's statistics are those of every pixel, its mean over a square is not: only the rest is exact.
    limits = {"8 bins": 1 / 16 + 1e-3, "256 bins": 1 / 510 + 1e-4, "window, 1/2": 1.0}
    assert distance <= limits.get(name, 1e-5)
    assert name != "window, 1/2" or distance < 0.9


@pytest.mark.parametrize("bins", [2, 3, 5, 8, 17, 256])
def test_every_level_falls_into_its_bin(bins, files):
    """Of the 256 levels of uint8 images, whatever rounding does to them on their way through mean and deviation."""
    objective = build(files, target="bins", bins=bins)
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).expand(1, 3, 1, 256)
    ids = objective.target.classify(objective.target.of(objective.normalise(images)).flatten(2))
    assert torch.equal(ids[0, 1], (2 * torch.arange(256) + 1) * bins // 512)


def test_a_picture_of_codes_shows_them_all(files):
    objective = build(files, target="tokens")
    images, mask = objective.example(BATCH)
    headings, columns = objective.picture(images, mask)
    assert headings == ("image", "masked", "its codes", "predicted")
    assert all(column.shape == (BATCH, 3, 32, 48) for column in columns)
    shown = ~mask.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand_as(columns[1])
    assert torch.equal(columns[1][shown], columns[0][shown]) and not torch.equal(columns[3], columns[2])
    assert objective.identity().keys() == {"objective.tokenizer"} and objective.frozen_tensors()


def test_statistics_of_patches_are_over_all_channels():
    images = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    mean, std = patch_statistics(images, 2)
    assert mean.shape == std.shape == (1, 1, 4, 6)
    patch = images[0, :, 2:4, 4:6]
    assert torch.allclose(mean[0, 0, 2:4, 4:6], patch.mean())
    assert torch.allclose(std[0, 0, 3, 5] ** 2, patch.var() + 1e-6)


@pytest.mark.parametrize(
    "own, message",
    [
        (dict(head="swin"), "head='swin': must be one of linear, mlp, swin_tiny, swin_base"),
        (dict(head="swin_tiny", target_stride=4), "head=swin_tiny: cuts each token .* use target_stride=2"),
        (dict(target="codes"), "target='codes': must be one of pixels, bins, clusters, tokens"),
        (dict(target_stride=5), r"target_stride=5: must divide .* use one of 1, 2, 4, 8, 16"),
        (dict(target="bins", bins=1), "bins=1: must lie in 2 … 256"),
        (dict(target="bins", loss="l2"), "loss=l2: target=bins has none; leave it out, or use target=pixels"),
        (dict(target="bins", norm_target=47), "norm_target=47: target=bins has none"),
        (dict(target="bins", norm_patch=True), "norm_patch=true: target=bins has none"),
        (dict(norm_target=7, norm_patch=True), "norm_patch=true: not with a window too, norm_target=7"),
        (dict(size=(40, 48), norm_patch=True), r"norm_patch=true: .* whole tokens of 16 .* model.img_size=\[32, 48\]"),
        (dict(bins=16), "bins=16: target=pixels has none; leave it out, or use target=bins"),
        (dict(beta=0.5), "beta=0.5: loss=l1 has none; use loss=smooth_l1"),
        (dict(loss="smooth_l1", beta=0.0), "beta=0.0: must be above 0"),
        (dict(target="clusters", clusters=None), "clusters=null: give a file that `fastmim data clusters"),
        (dict(target="clusters", clusters="/no/such"), "objective.clusters=/no/such: no such file; make one with"),
        (dict(target="tokens", tokenizer=None), "tokenizer=null: give the encoder.safetensors"),
    ],
)
def test_mistakes_are_one_line(own, message):
    encoder = ENCODERS["swin"] | ({"img_size": own["size"]} if "size" in own else {})
    with pytest.raises(ValueError, match=message) as error:
        create_objective("simmim", encoder=encoder, unit=16, **{k: v for k, v in own.items() if k != "size"})
    assert "\n" not in str(error.value)


def test_wrong_files_are_named(files, tmp_path):
    other = tmp_path / "other.safetensors"
    for centres, message in [
        (np.zeros((3,), np.float32), "must be two colours or more"),
        (np.full((3, 3), 2, np.float32), "must be two colours or more in \\[0, 1\\]"),
        (np.zeros((4, 2), np.float32), "colours of 2 channels, and model.in_chans=3"),
    ]:
        save_file({"centres": centres}, other)
        with pytest.raises(ValueError, match=f"objective.clusters={other}: .*{message}"):
            create_objective("simmim", encoder=ENCODERS["swin"], unit=16, target="clusters", clusters=str(other))
    other.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="no file of colour clusters"):
        create_objective("simmim", encoder=ENCODERS["swin"], unit=16, target="clusters", clusters=str(other))
