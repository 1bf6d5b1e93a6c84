"""MoCo v3's parts: BatchNorm of views, keys, momentum, groups, monitors, names; whole runs stand in tests/golden."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fastmim import create_objective
from fastmim.interop import load_reference, load_weights
from fastmim.interop.moco import official_name, own_name, save_moco
from fastmim.objectives.moco import spread
from fastmim.objectives.schedule import Schedule
from fastmim.objectives.view_norm import ViewNorm

ENCODER = dict(name="vit", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, key_bias=True,
               abs_pos_embed="sincos_moco", init="moco")  # fmt: skip
SIZES = dict(hidden_dim=24, out_dim=12, augment=False)


def new_objective(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = ENCODER | changes.pop("encoder", {})
    return create_objective("moco", encoder=encoder, **SIZES | changes)


def crops(batch=6, seed=1):
    return torch.randn(2, batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trained():
    """After an update, so that encoder, momentum encoder and statistics all differ from their beginning."""
    objective = new_objective().train()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.02)
    objective((crops(),), None)["loss"].backward()
    optimizer.step()
    with torch.no_grad():
        for teacher, student in objective.ema():
            for own, param in zip(teacher.parameters(), student.parameters(), strict=True):
                own.lerp_(param, 0.5)
    return objective


@pytest.mark.parametrize("affine", [True, False])
def test_views_are_normalised_one_after_the_other(affine):
    """torch's BatchNorm1d on each view in turn: results, gradients and statistics, of rows far from 0."""
    torch.manual_seed(0)
    own, theirs = ViewNorm(5, affine), nn.BatchNorm1d(5, affine=affine).double()
    for param in own.parameters():
        nn.init.uniform_(param, 0.5, 2.0)
    theirs.load_state_dict(own.state_dict())
    x = torch.randn(2, 7, 5) * torch.tensor([1.0, 3.0])[:, None, None] + 100
    x, exact = x.requires_grad_(), x.double().requires_grad_()
    weight = torch.randn(2, 7, 5)
    found, expected = own(x), torch.stack([theirs(one) for one in exact])
    close = dict(rtol=1e-4, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(found, expected, **close)
    gradients = [
        torch.autograd.grad((y * weight).sum(), [start, *module.parameters()])
        for y, start, module in ((found, x, own), (expected, exact, theirs))
    ]
    torch.testing.assert_close(*gradients, **close)
    torch.testing.assert_close(dict(own.named_buffers()), dict(theirs.named_buffers()), **close)
    by_running = torch.stack([theirs.eval()(one) for one in exact])
    torch.testing.assert_close(own.eval()(x), by_running, **close)


def test_one_image_has_no_statistics():
    with pytest.raises(ValueError, match="train.micro_batch_size=1: .* at least 2 images"):
        new_objective().train()((crops(1),), None)


def test_the_loss_is_the_papers():
    """ctr(q₁, k₂) + ctr(q₂, k₁), by the pseudocode of the paper's appendix on the modules called view by view."""
    objective, images = new_objective().train(), crops()
    out = objective((images,), None)
    again = new_objective().train()
    base, momentum = again.encoder, again.momentum_encoder
    queries = [again.predictor(again.head(base.forward_tokens(x)[0][None]))[0] for x in images]
    keys = [momentum.head(momentum.encoder.forward_tokens(x)[0][None])[0] for x in images]
    loss = 0
    for q, k in zip(queries, keys[::-1], strict=True):
        logits = F.normalize(q, dim=1) @ F.normalize(k, dim=1).T / 0.2
        loss = loss + 2 * 0.2 * F.cross_entropy(logits, torch.arange(len(q)))
    torch.testing.assert_close(out["loss"], loss, rtol=1e-5, atol=0)
    for one, other in zip(objective.buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_keys_and_what_is_frozen():
    objective = new_objective().train()
    objective((crops(),), None)["loss"].backward()
    without = {name for name, param in objective.named_parameters() if param.grad is None}
    frozen = {"encoder.pos_embed", "encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias"}
    average = {name for name, _ in objective.named_parameters() if name.startswith("momentum_encoder.")}
    assert without == frozen | average
    free = new_objective(freeze_patch_embed=False)
    assert free.encoder.patch_embed.proj.weight.requires_grad and not free.encoder.pos_embed.requires_grad


def test_every_trained_tensor_decays_in_parity():
    objective = new_objective()
    (group,) = objective.groups(0.1, "parity")
    assert group["weight_decay"] == 0.1
    assert group["param_names"] == [name for name, p in objective.named_parameters() if p.requires_grad]
    named = {g["name"]: g["param_names"] for g in objective.groups(0.1, "default")}
    assert "encoder.norm.weight" in named["no_decay"] and "head.1.weight" in named["no_decay"]


def test_the_momentum_of_a_step_is_set_by_the_one_before():
    objective, curve = new_objective(momentum=0.9), Schedule(name="cosine", base_lr=0.9, min_lr=1.0, total_steps=8)
    seen = []
    for step in range(8):
        objective.set_step(step, 8, 2)
        seen.append(objective.ema_momentum())
    assert seen == [curve(step) for step in range(1, 8)] + [1.0]


def test_accuracy_and_spread_tell_of_a_collapse():
    objective = new_objective().train()
    q = torch.randn(2, 6, 12)
    loss, accuracy = objective.contrast(q, q.flip(0))
    assert accuracy == 1.0 and loss < 1.3  # every query is its key
    _, accuracy = objective.contrast(q, q.flip(0).roll(1, 1))
    assert accuracy == 0.0
    out = objective((crops(1).expand(2, 6, 3, 32, 32),), None)
    assert out["feature_std"] < 1e-5
    assert spread(torch.randn(2, 500, 64)) == pytest.approx(1.0, abs=0.02)


def test_evaluation_is_of_one_rank_and_moves_nothing(trained, monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)  # a collective would fail
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.eval()
    try:
        assert torch.isfinite(trained(crops(1)[0], None)["loss"])
    finally:
        trained.train()
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: s["state_dict"]])
def test_a_checkpoint_in_official_names_goes_out_and_in(trained, wrap):
    official = save_moco(trained)
    names = set(official["state_dict"])
    assert {"module.base_encoder.head.7.running_var", "module.momentum_encoder.head.3.weight",
            "module.predictor.1.num_batches_tracked", "module.momentum_encoder.pos_embed",
            "module.base_encoder.blocks.1.attn.qkv.bias"} <= names  # fmt: skip
    assert all(official_name(own_name(name[7:])) == name[7:] for name in names)
    target = new_objective(seed=3)
    report = load_reference(target, wrap(official))
    assert set(report.names) == {name.removeprefix("module.") for name in names} and not report.initialised
    for name, value in target.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


@pytest.mark.parametrize("left_out", ["base_encoder.head.4.running_mean", "momentum_encoder.norm.weight"])
def test_a_missing_tensor_is_named(trained, left_out):
    official = save_moco(trained)["state_dict"]
    del official[f"module.{left_out}"]
    with pytest.raises(ValueError, match=f"1 missing .{own_name(left_out)}"):
        load_reference(new_objective(), official)


def test_an_encoder_starts_from_the_base_of_an_official_file(trained, tmp_path):
    """Ours and timm's: the encoder that the authors evaluate is the base encoder, not its average."""
    torch.save(save_moco(trained), tmp_path / "moco.pth.tar")
    target = new_objective(seed=3)
    load_weights(target, tmp_path / "moco.pth.tar")
    base, average = (dict(part.named_parameters()) for part in (target.encoder, target.momentum_encoder.encoder))
    for name, value in trained.encoder.named_parameters():
        assert torch.equal(base[name], value) and torch.equal(average[name], value), name
    model = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    model.load_state_dict(trained.encoder.state_dict())
    images = crops()[0]
    found = trained.encoder.forward_tokens(images)[0]
    torch.testing.assert_close(model.eval()(images), found, rtol=1e-4, atol=1e-5)


def test_a_whole_file_keeps_the_momentum_encoder_and_statistics(trained, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "whole.pth")
    target = new_objective(seed=3)
    load_weights(target, tmp_path / "whole.pth")
    for name, value in target.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(temperature=0.0), "temperature=0.0: must be > 0"),
        (dict(momentum=1.5), r"momentum=1.5: must lie in \[0, 1\]"),
        (dict(scale=(0.5, 0.2)), r"scale=\[0.5, 0.2\]: must satisfy"),
        (dict(predictor_layers=0), "predictor_layers=0: must be at least 1"),
        (dict(augment=True, encoder=dict(in_chans=4)), "augment=true: changes colours of 1 or 3 channels, not of 4"),
        (dict(encoder=dict(abs_pos_embed=False)), "abs_pos_embed=false: the ViT would not know where a patch is"),
    ],
)
def test_arguments_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        new_objective(**given)
