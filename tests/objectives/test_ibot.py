"""iBOT and DINO beside the published runs of ``tests/test_golden.py``: what no golden file shows."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

import fastmim_kernels as fk
from fastmim.engine.base import _pairs
from fastmim.engine.local import LocalEngine, clip_each_
from fastmim.interop import load_reference, load_weights
from fastmim.interop.self_distilled import save_self_distilled
from fastmim.objectives import create_objective
from fastmim.objectives.self_distillation import Centre

VIT = dict(name="vit", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2,
           key_bias=True, abs_pos_embed=True, init="timm")  # fmt: skip
SWIN = dict(name="swin", img_size=32, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
OWN = dict(shared_head=False, shared_head_teacher=False, patch_out_dim=10)
SMALL = dict(out_dim=24, hidden_dim=20, bottleneck_dim=6, local_crops=2, local_size=16)


def build(name="ibot", encoder=VIT, **own):
    torch.manual_seed(0)
    return create_objective(name, encoder=encoder, impl="torch", **(SMALL | own))


def crops(objective, batch=3):
    images, mask = objective.example(batch)
    return images, mask


@pytest.mark.parametrize("encoder", [VIT, SWIN], ids=["vit", "swin"])
def test_a_fixed_number_of_rows_gives_the_loss_of_the_hidden_ones_alone(encoder, monkeypatch):
    objective = build(encoder=encoder)
    images, mask = crops(objective, 4)
    assert 0 < mask.sum() < mask.numel() / 2
    found = []
    for follows in (True, False):
        monkeypatch.setattr(fk, "shape_may_follow", lambda *_, follows=follows: follows)
        objective.zero_grad()
        loss = objective(images, mask)["loss"]
        loss.backward()
        found.append([loss, *(p.grad for p in objective.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_more_hidden_rows_than_places_are_no_number(monkeypatch):
    """Where shapes are fixed, masks denser than the objective draws must not lose rows in silence."""
    objective = build(mask_ratios=((0.1, 0.3),))
    images, mask = crops(objective)
    monkeypatch.setattr(fk, "shape_may_follow", lambda *_: False)
    assert objective(images, mask)["loss"].isfinite()
    assert objective(images, torch.ones_like(mask))["loss"].isnan()


def peak_bytes(run):
    """The most that torch's CPU allocator had given out at once in ``run()``, which has run before."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    sizes = [event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("encoder", [VIT, SWIN], ids=["vit", "swin"])
def test_groups_of_local_crops_take_the_memory_of_the_global_ones_and_change_no_gradient(encoder):
    """With positions that are not resampled, which is done in float32. Ten crops of a quarter are more than the two."""
    size = dict(local_crops=10, local_size=32 if encoder is VIT else 16)
    gradients, peaks = {}, {}
    for chunks in (0, 2, 10):
        objective = build(encoder=encoder, crop_chunks=chunks, **size).double()
        images, mask = crops(objective, 4)
        images = [objective.normalise(view.flatten(0, 1)).unflatten(0, view.shape[:2]).double() for view in images]

        def step(objective=objective, images=images, mask=mask):
            objective.zero_grad()
            objective(images, mask)["loss"].backward()

        peaks[chunks] = peak_bytes(step)
        gradients[chunks] = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    for chunks in (2, 10):
        torch.testing.assert_close(gradients[chunks], gradients[0], rtol=1e-12, atol=1e-12)
    assert peaks[10] < 0.65 * peaks[0]


def test_the_centre_of_patches_is_the_mean_over_all_of_them():
    objective = build()
    images, mask = crops(objective)
    objective(images, mask)
    globals_ = torch.cat([objective.normalise(view.flatten(0, 1)) for view in images[:2]])
    with torch.no_grad():
        _, patches = objective.teacher.encoder.forward_tokens(globals_)
        head = objective.teacher.head
        (logits,) = head.last_layer(head.directions(patches.flatten(0, 2)))
    torch.testing.assert_close(objective.patch_centre.total / objective.patch_centre.count, logits.mean(0))


def directions(head, tokens):
    """The MLP of a head and the directions of what it gives, written out."""
    layers = [layer for layer in head.mlp if hasattr(layer, "weight")]
    for i, layer in enumerate(layers):
        tokens = tokens @ layer.weight.T + layer.bias
        tokens = torch.nn.functional.gelu(tokens) if i + 1 < len(layers) else tokens
    return tokens / tokens.norm(dim=-1, keepdim=True)


def products(layer, x):
    return x @ (layer.weight_v / layer.weight_v.norm(dim=1, keepdim=True) * layer.weight_g).T


@pytest.mark.parametrize("shared_teacher", [False, True])
def test_patches_with_prototypes_of_their_own(shared_teacher):
    """iBOT's loss, equations 1 and 2, in float64; the teacher's may be those of its class tokens."""
    own = dict(OWN, shared_head_teacher=True, patch_out_dim=0) if shared_teacher else OWN
    objective = build(norm_last_layer=False, local_crops=0, mask_ratios=((0.3, 0.5),), **own).double()
    with torch.no_grad():
        for parameter in objective.teacher.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    images, mask = torch.randn(2, 3, 3, 32, 32, dtype=torch.float64), objective.random_mask(torch.arange(3))
    found = objective((images,), mask)
    student, teacher = objective.head, objective.teacher.head
    patches = objective.encoder.forward_tokens(images.flatten(0, 1), mask.flatten(0, 1))[1].flatten(1, 2)
    truth = objective.teacher.encoder.forward_tokens(images.flatten(0, 1))[1].flatten(1, 2)
    layer = teacher.last_layer if shared_teacher else teacher.last_layer2
    given = products(layer, directions(teacher, truth))
    target = (given / objective.teacher_patch_temp.double()).softmax(-1)
    guess = (products(student.last_layer2, directions(student, patches)) / 0.1).log_softmax(-1)
    hidden = mask.flatten(0, 1).flatten(1).double()
    expected = (-(target * guess).sum(-1) * hidden).sum(1) / hidden.sum(1)
    torch.testing.assert_close(found["patch"].double(), expected.mean(), rtol=1e-6, atol=0)
    mean = objective.patch_centre.total / objective.patch_centre.count
    torch.testing.assert_close(mean.double(), given.flatten(0, 1).mean(0), rtol=1e-5, atol=1e-7)
    gradients = torch.autograd.grad(expected.mean(), student.parameters(), allow_unused=True)
    found["loss"].backward()
    names = [name for name, _ in student.named_parameters()]
    own_gradient = dict(zip(names, gradients, strict=True))
    assert own_gradient["last_layer.weight_v"] is None
    torch.testing.assert_close(student.last_layer2.weight_v.grad, own_gradient["last_layer2.weight_v"])


def test_a_shared_teacher_starts_from_the_prototypes_of_patches_and_follows_those_of_class_tokens():
    """A quirk of the published code: there both names of the shared layer are loaded, that of patches last."""
    objective = build(**dict(OWN, shared_head_teacher=True, patch_out_dim=0))
    own, student = objective.teacher.head.last_layer, objective.head
    assert torch.equal(own.weight_v, student.last_layer2.weight_v)
    assert not torch.equal(own.weight_v, student.last_layer.weight_v)
    followed = {id(teacher): theirs for teacher, theirs in _pairs(objective)}
    assert followed[id(own.weight_v)] is student.last_layer.weight_v


def test_micro_batches_and_the_whole_batch_move_a_centre_alike():
    logits, whole, parts = torch.randn(12, 5), Centre((1, 5), 0.9), Centre((1, 5), 0.9)
    whole.add(logits)
    for part in logits.split(3):
        parts.add(part)
    whole.move()
    parts.move()
    torch.testing.assert_close(parts.value, whole.value)
    torch.testing.assert_close(whole.value, 0.1 * logits.mean(0, keepdim=True))


def test_no_gradient_reaches_the_teacher_and_every_trained_parameter_has_one():
    objective = build(norm_last_layer=False)
    objective(*crops(objective))["loss"].backward()
    teacher = {name for name, param in objective.named_parameters() if name.startswith("teacher.")}
    assert teacher and all(dict(objective.named_parameters())[name].grad is None for name in teacher)
    missing = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_only_the_teacher_of_the_other_crop_is_asked():
    """With one global crop's teacher made constant, the same crop of the student has a loss that does not see it."""
    objective = build("dino", local_crops=0)
    student, teacher = torch.randn(2, 1, 24), torch.randn(2, 1, 24)
    loss, _ = objective.class_loss(student.flatten(0, 1), teacher.flatten(0, 1))
    target = torch.softmax((teacher - objective.centre.value) / objective.teacher_temp, -1)
    pairs = [-(target[1 - v] * torch.log_softmax(student[v] / 0.1, -1)).sum() for v in range(2)]
    torch.testing.assert_close(loss, (pairs[0] + pairs[1]) / 2)


def test_masks_are_of_a_sample_and_a_crop_and_start_in_their_epoch():
    objective = build(mask_start_epoch=1, mask_ratios=((0.3, 0.5),))
    ids = torch.arange(8)
    mask = objective.random_mask(ids, seed=1, epoch=1)
    assert mask.shape == (2, 8, 4, 4) and not objective.random_mask(ids, seed=1, epoch=0).any()
    assert torch.equal(objective.random_mask(ids.flip(0), seed=1, epoch=1), mask.flip(1))
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize(
    "encoder, own",
    [(VIT, {}), (SWIN, {}), (VIT, OWN), (VIT, dict(shared_head=False))],
    ids=["vit", "swin", "own heads", "the student's own head"],
)
def test_a_checkpoint_in_official_names_goes_out_and_in(encoder, own):
    objective, other = build(encoder=encoder, **own), build(encoder=encoder, **own)
    with torch.no_grad():
        for tensor in [*objective.parameters(), objective.centre.value, objective.patch_centre.value]:
            tensor.add_(torch.randn_like(tensor))
    saved = save_self_distilled(objective)
    assert {"module.backbone.masked_embed", "module.head.last_layer2.weight_v"} <= saved["student"].keys()
    assert "backbone.masked_embed" not in saved["teacher"]
    assert saved["student"]["module.backbone.masked_embed"].shape == (1, objective.encoder.embed_dim)
    load_reference(other, saved)
    for name, tensor in objective.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    shared, second = build(encoder=encoder), "module.head.last_layer2.weight_v"
    saved["student"][second] = torch.zeros_like(saved["student"][second])
    with pytest.raises(ValueError, match="a head of their own; build the objective with shared_head=false"):
        load_reference(shared, saved)
    if own == OWN:
        student = {name: saved["teacher"][name.removeprefix("module.").replace("last_layer2", "last_layer")]
                   for name in saved["student"] if "masked_embed" not in name}  # fmt: skip
        with pytest.raises(ValueError, match="build the objective with shared_head_teacher=false"):
            load_reference(shared, saved | {"student": student})


def test_a_teacher_starts_as_the_student_that_was_given_weights(tmp_path):
    objective, other = build(), build(encoder=VIT | dict(drop_path_rate=0.3))
    with torch.no_grad():
        for tensor in objective.encoder.parameters():
            tensor.add_(1)
    save_file(objective.encoder.state_dict(), tmp_path / "encoder.safetensors")
    load_weights(other, tmp_path / "encoder.safetensors")
    for name, tensor in other.teacher.encoder.named_parameters():
        assert torch.equal(tensor, objective.encoder.state_dict()[name]), name


def test_gradients_are_clipped_tensor_by_tensor():
    grads = [torch.full((4,), 3.0), torch.full((4,), 0.1)]
    clip_each_(grads, 1.0)
    torch.testing.assert_close(grads[0], torch.full((4,), 3 / 6))
    torch.testing.assert_close(grads[1], torch.full((4,), 0.1))


def test_frozen_prototypes_have_no_moments_and_do_not_decay():
    objective = build(**OWN)
    optimiser = torch.optim.AdamW(objective.groups(0.5, "parity"), lr=1e-2)
    weights = [layer.weight_v for layer in (objective.head.last_layer, objective.head.last_layer2)]
    engine, before = LocalEngine(objective, optimiser), copy.deepcopy(weights)
    for step in range(2):
        objective.set_step(step, 4, 1)
        engine.train_on(*crops(objective))
        for weight, old in zip(weights, before, strict=True):
            assert (weight in optimiser.state) == bool(step)
            assert torch.equal(weight, old) == (step == 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(local_size=20), "local_size=20: not divisible by patch_size 8; use 16 or 24"),
        (dict(out_dim=0), "out_dim=0: must be at least 1"),
        (dict(crop_chunks=3), "crop_chunks=3: more groups than local_crops=2"),
        (dict(teacher_temp=0.0), "teacher_temp=0.0: must be > 0"),
        (dict(momentum_teacher=1.5), r"momentum_teacher=1.5: must lie in \[0, 1\]"),
        (dict(local_scale=(0.5, 0.1)), r"local_scale=\[0.5, 0.1\]: must satisfy 0 < low <= high <= 1"),
        (dict(encoder=VIT | dict(shared_rel_pos_bias=True)), "use abs_pos_embed"),
        (dict(encoder=VIT | dict(abs_pos_embed=False)), "abs_pos_embed=false"),
        (dict(encoder=VIT | dict(in_chans=4)), "use false"),
        (dict(mask_ratios=((0.5, 0.2),)), r"mask_ratios"),
        (dict(shared_head_teacher=False), "shared_head_teacher=false: the student has nothing to follow"),
        (dict(patch_out_dim=10), "patch_out_dim=10: other than out_dim=24 needs shared_head=false"),
    ],
)
def test_arguments_that_cannot_be(given, message):
    with pytest.raises(ValueError, match=message):
        build(**given)
