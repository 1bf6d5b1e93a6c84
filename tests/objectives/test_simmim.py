"""The SimMIM objective: its loss against a pixel-space formula, its inputs, its traceability."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmim_kernels
from fastmim.objectives import create_objective

ENCODERS = {
    "swin": dict(name="swin", img_size=64, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4),
    "swinv2": dict(name="swinv2", img_size=(64, 96), embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4),
    "vit": dict(name="vit", img_size=64, embed_dim=24, depth=2, num_heads=3, shared_rel_pos_bias=True),
}


def build(family, **kwargs):
    torch.manual_seed(0)
    objective = create_objective("simmim", encoder=ENCODERS[family], **kwargs)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, objective.in_chans, *objective.img_size, generator=generator)
    return objective, images, objective.random_mask(torch.arange(3))


def pixel_mask(objective, mask):
    p = objective.patch_size
    return mask.repeat_interleave(p, 1).repeat_interleave(p, 2).unsqueeze(1).double()


@pytest.mark.parametrize("loss", ["l1", "l2", "smooth_l1"])
@pytest.mark.parametrize("family", ENCODERS)
def test_loss_is_the_papers_formula(family, loss):
    objective, images, mask = build(family, loss=loss)
    prediction = objective.reconstruct(images, mask).double()
    function = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[loss]
    m = pixel_mask(objective, mask)
    expected = (function(prediction, images.double(), reduction="none") * m).sum() / (m.sum() + 1e-5) / 3
    torch.testing.assert_close(objective(images, mask)["loss"].double(), expected, rtol=1e-6, atol=0)


def test_masks_of_any_count_and_dtype():
    """A caller's mask may hide a different number of patches in every image, or none."""
    objective, images, _ = build("swinv2")
    mask = torch.rand(3, *objective.encoder.grid) < torch.tensor([0.1, 0.5, 0.0])[:, None, None]
    m = pixel_mask(objective, mask)
    prediction = objective.reconstruct(images, mask).double()
    expected = ((prediction - images.double()).abs() * m).sum() / (m.sum() + 1e-5) / 3
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float32):
        torch.testing.assert_close(objective(images, mask.to(dtype))["loss"].double(), expected, rtol=1e-6, atol=0)
    assert objective(images, torch.zeros_like(mask))["loss"].item() == 0


def test_loss_on_all_pixels():
    objective, images, mask = build("swin", loss_on="all")
    expected = (objective.reconstruct(images, mask).double() - images.double()).abs().mean()
    torch.testing.assert_close(objective(images, mask)["loss"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(60, 44), (100, 60)])
def test_rectangles_that_only_the_patch_divides(size):
    encoder = dict(ENCODERS["swin"], img_size=size)
    objective = create_objective("simmim", encoder=encoder, unit=16)
    images, mask = torch.randn(2, 3, *size), objective.random_mask(torch.arange(2))
    prediction = objective.reconstruct(images, mask)
    assert prediction.shape == images.shape
    m = pixel_mask(objective, mask)
    expected = ((prediction.double() - images.double()).abs() * m).sum() / (m.sum() + 1e-5) / 3
    torch.testing.assert_close(objective(images, mask)["loss"].double(), expected, rtol=1e-6, atol=0)


def test_hidden_pixels_do_not_reach_the_prediction():
    objective, images, mask = build("swinv2")
    hidden = pixel_mask(objective, mask).bool().expand_as(images)
    poisoned = images.masked_fill(hidden, 1e4)
    assert torch.equal(objective.reconstruct(images, mask), objective.reconstruct(poisoned, mask))


def test_uint8_images_are_normalised_inside():
    objective, _, mask = build("swin", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    normalised = (images.float() / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[
        :, None, None
    ]
    torch.testing.assert_close(objective.normalise(images), normalised, rtol=0, atol=2e-6)
    torch.testing.assert_close(objective(images, mask)["loss"], objective(normalised, mask)["loss"])
    torch.testing.assert_close(objective.denormalise(normalised), images / 255, rtol=0, atol=1e-6)


def test_pixels_of_a_perfect_normalised_prediction_are_the_image():
    import fastmim_kernels as fk

    objective, images, mask = build("swinv2", norm_target=7)
    target = fk.local_norm_target(images, 7)
    objective.reconstruct = lambda *_: target
    torch.testing.assert_close(objective.reconstruct_pixels(images, mask), images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ENCODERS)
def test_runs_on_fake_tensors(family):
    with FakeTensorMode():
        objective, images, mask = build(family, norm_target=5)
        loss = objective(images, mask)["loss"]
        loss.backward()
        assert loss.shape == () and mask.dtype == torch.bool
    objective, images, mask = build(family)  # nothing fake was cached
    assert torch.isfinite(objective(images, mask)["loss"])


@pytest.mark.parametrize("family", ENCODERS)
def test_traces_as_one_graph(family):
    objective, images, mask = build(family, norm_target=5)
    check_compiled(objective, images, mask, "aot_eager")


@pytest.mark.parametrize("family", ENCODERS)
def test_vmap_works_on_the_oracle_and_is_refused_elsewhere(family):
    """Gradients sample by sample, as the reader of a paper on influence or privacy would take them."""
    objective, images, mask = build(family, impl="reference")
    params = dict(objective.named_parameters())

    def loss(params, image, mask, module=objective):
        return torch.func.functional_call(module, params, (image[None], mask[None]))["loss"]

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, images, mask)
    for i in range(len(images)):
        objective.zero_grad()
        objective(images[i : i + 1], mask[i : i + 1])["loss"].backward()
        for name, param in params.items():
            if param.grad is not None:
                torch.testing.assert_close(found[name][i], param.grad, rtol=1e-4, atol=1e-6, msg=name)
    other = build(family)[0]
    with pytest.raises(RuntimeError, match="torch.func's transforms cannot look into this op.*impl='reference'"):
        torch.func.vmap(lambda image: other.encoder(image[None]))(images)


def test_the_default_compiler_gives_the_same_loss_and_gradients():
    """One block a stage: what inductor generates around the ops, in a minimum of its time."""
    torch.manual_seed(0)
    encoder = ENCODERS["swinv2"] | dict(img_size=64, depths=(1, 1))
    objective = create_objective("simmim", encoder=encoder, norm_target=5)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    check_compiled(objective, images, objective.random_mask(torch.arange(2)), "inductor")


def check_compiled(objective, images, mask, backend):
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend=backend)
    loss = compiled(images, mask)["loss"]
    loss.backward()
    compiled_grads = [p.grad.clone() for p in objective.parameters()]
    objective.zero_grad()
    expected = objective(images, mask)["loss"]
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for ours, theirs in zip(compiled_grads, objective.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-6)


def test_bf16_autocast_stays_near_fp32():
    objective, images, mask = build("swinv2", norm_target=7)
    expected = objective(images, mask)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(images, mask)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("family", ["swin", "swinv2"])  # ViT's attention is torch's own
def test_backward_inside_autocast_is_backward_outside(family):
    """Autocast must not reach into the ops' gradients, whose float32 products would lose half their digits."""
    gradients = []
    for inside in (False, True):
        objective, images, mask = build(family)
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(images, mask)["loss"]
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append({name: param.grad for name, param in objective.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.equal(gradients[1][name], expected), name


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(unit=6), "unit=6: not a multiple of patch_size 4; use 4 or 8"),
        (dict(loss="l3"), "loss='l3'"),
        (dict(loss_on="none"), "loss_on='none'"),
        (dict(norm_target=46), "norm_target=46"),
        (dict(mask_ratio=1.2), "mask_ratio=1.2"),
        (dict(mean=(0.5, 0.5)), "mean=.*one per channel"),
        (dict(impl="cuda"), "impl='cuda'"),
    ],
)
def test_errors_name_the_value(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build("swin", **kwargs)


def test_wrong_shapes_are_named():
    objective, images, mask = build("swin")
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 64, 64\), got \(3, 3, 64, 60\)"):
        objective(images[..., :60], mask)
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 16, 16\)"):
        objective(images, mask[:, :8])
    with pytest.raises(ValueError, match="did you mean 'simmim'"):
        create_objective("simim", encoder=ENCODERS["swin"])


SMALL = dict(img_size=64, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4)


def bf16_step(objective, images, mask):
    objective.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(images, mask)["loss"]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in objective.parameters() if p.grad is not None])


def small_objective(name, **encoder):
    torch.manual_seed(0)
    objective = create_objective("simmim", encoder=dict(SMALL, name=name, **encoder), unit=8)
    with torch.no_grad():
        for parameter in objective.parameters():  # SwinV2's block norms start at zero
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return objective, torch.randn(2, 3, 64, 64), objective.random_mask(torch.arange(2))


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_the_stream_s_dtype_changes_the_loss_by_its_rounding_only(name):
    """bfloat16 has 8 bits: a stream rounded at every block stays within 2^-8 of the float32 one, as bf16 itself."""
    found = {}
    for dtype in ("auto", "fp32"):
        objective, images, mask = small_objective(name, residual_dtype=dtype)
        found[dtype] = bf16_step(objective, images, mask)
    exact = objective(images, mask)["loss"].item()
    assert found["auto"][0] != found["fp32"][0]
    for loss, grad in found.values():
        assert loss == pytest.approx(exact, rel=2**-8)
        assert F.cosine_similarity(grad, found["fp32"][1], dim=0) > 0.999


def test_a_wrong_stream_dtype_is_named():
    with pytest.raises(ValueError, match="residual_dtype='bf16'"):
        small_objective("swin", residual_dtype="bf16")


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_weights_cast_ahead_give_the_same_step(name, monkeypatch):
    """What the Triton path does, on a CPU: one cast for all weights, and none in later micro-batches.

    Of parameters alone: its table keeps addresses for the steps to come, and a CUDA graph those of its capture.
    """
    objective, images, mask = small_objective(name)
    expected = bf16_step(objective, images, mask)
    calls, copies = [], fastmim_kernels.low_copies
    monkeypatch.setattr(fastmim_kernels, "low_copies", lambda *args, **kw: calls.append(args) or copies(*args, **kw))
    monkeypatch.setattr(fastmim_kernels, "fusion", lambda *args: fastmim_kernels.Fusion(casts_once=True))
    for step in range(2):
        for index in range(2):
            objective.set_micro_batch(index, 2)
            loss, grad = bf16_step(objective, images, mask)
            assert loss == expected[0] and torch.equal(grad, expected[1]), (step, index)
    assert len(calls) == 2
    own = {parameter.data_ptr() for parameter in objective.parameters()}
    assert all(tensor.data_ptr() in own for tensors, _ in calls for tensor in tensors)
    with torch.no_grad():
        objective.encoder.layers[0].blocks[0].attn.qkv.weight.zero_()
    objective.set_micro_batch(0, 2)
    assert bf16_step(objective, images, mask)[0] != expected[0]
